"""Names of a term ``value (w . x)^2``: what it reads along, and what inputs that excite it look like.

In inputs that vary together these are two questions (Haufe et al. 2014). The *filter* w is what x is
multiplied by: it is named by the input features whose directions d have the largest ``cos(w, d)``.
What has a large ``w . x`` may look different: the *pattern* is named by those whose activation rises and
falls with ``w . x`` from token to token (Pearson correlation over the tokens that count). The first is
what an intervention moves, the second what one sees in text.

A term does not change with the sign of w. It is named with the sign that makes ``w . x`` positive on
average where the output feature is active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.geometry import unit
from tl_bilinear.features.labels import Named
from tl_bilinear.features.nearest import CorrelationSums

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.run import FeatureRun
    from tl_bilinear.features.terms import FeatureTerms

FEW = "active on too few tokens"


@dataclass(frozen=True, eq=False)
class TermNames(Named):
    """Input features that name the k terms of m output features, n each, largest absolute value first.

    Attributes
    ----------
    features: [m], output features
    values: [m, k], of the terms
    filters: [m, k, n], input features that a term reads along; cosines: [m, k, n], with the filter
    patterns: [m, k, n], input features that vary with what it reads
    correlations: [m, k, n], of their activation (over the token's norm scale) with ``w . x``
    tokens: over how many tokens
    """

    features: Int[Tensor, " m"]
    values: Float[Tensor, "m k"]
    filters: Int[Tensor, "m k n"]
    cosines: Float[Tensor, "m k n"]
    patterns: Int[Tensor, "m k n"]
    correlations: Float[Tensor, "m k n"]
    tokens: int

    def words(self, row: int, term: int) -> tuple[str, str]:
        """What a term reads along, and what excites it looks like: ``“her” +0.39, “tim” -0.42``."""
        if not bool(self.values[row, term].isfinite()):
            return FEW, FEW
        read, alike = (
            ", ".join(
                f"“{(self.input_labels or {}).get(b, b)}” {value:+.2f}"
                for b, value in zip(index.tolist(), values.tolist(), strict=True)
            )
            for index, values in (
                (self.filters[row, term], self.cosines[row, term]),
                (self.patterns[row, term], self.correlations[row, term]),
            )
        )
        return read, alike

    def to_pandas(self) -> pandas.DataFrame:
        """One row a term: feature, term, value, reads_along (cosines), looks_like (correlations)."""
        m, k = self.values.shape
        words = [self.words(row, term) for row in range(m) for term in range(k)]
        columns = {
            "feature": self.features.repeat_interleave(k),
            "term": list(range(k)) * m,
            "value": self.values.flatten(),
            "reads_along": [read for read, _ in words],
            "looks_like": [alike for _, alike in words],
        }
        return self.table(columns, inputs=(), outputs=("feature",))


@torch.no_grad()
def term_names(run: FeatureRun, terms: FeatureTerms, n: int, *, progress: bool) -> TermNames:
    """See `FeatureRun.term_names`."""
    known = run.features
    checks.require_count("n", n, known.inputs.n, "the input features")
    index = known.numbers(terms.features).reshape(-1)
    w = terms.vectors.double()  # [m, k, d]
    m, k, d = w.shape
    if d != known.layer_tensor.d_in:
        raise ValueError(
            f"the terms read {d} coordinates, what the layer reads has {known.layer_tensor.d_in}: give "
            f"terms of the same layer"
        )
    flat = w.flatten(0, 1)
    sums = CorrelationSums(m * k, known.inputs.n, run.x.device)
    active = torch.zeros(m, k, dtype=torch.double, device=run.x.device)
    with tqdm(total=len(run), unit="sequence", disable=not progress) as bar:
        for part in run.read():
            some = part.run
            products = some.x[some.mask].double() @ flat.T
            sums.add(products, part.coefficients.double())
            on = (some.activations(index)[some.mask] != 0).double()
            active += torch.einsum("tm,tmk->mk", on, products.unflatten(1, (m, k)))
            bar.update(len(some))
    sign = torch.where(active < 0, -1.0, 1.0)[..., None]
    rows = unit(known.passage.map(known.input_directions.double()))
    cosines = sign * torch.einsum("mkd,bd->mkb", unit(w), rows)
    correlations = sign * sums.correlations().unflatten(0, (m, k))
    filters, patterns = (
        values.nan_to_num().abs().topk(n).indices for values in (cosines, correlations)
    )
    named = torch.cat([filters.flatten(), patterns.flatten()]).unique()
    return TermNames(
        index,
        terms.values,
        filters,
        cosines.gather(-1, filters).to(terms.values),
        patterns,
        correlations.gather(-1, patterns).to(terms.values),
        sums.count,
        input_labels=known.inputs.labels_of(named),
        output_labels=known.outputs.labels_of(index),
    )
