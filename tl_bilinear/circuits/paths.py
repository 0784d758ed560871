"""Pairs of upstream components that make a bilinear layer's output at one token, exactly.

The layer reads ``x = (r A) / s + b`` (`features.passage`), ``r = sum_m r_m`` over upstream components
(`circuits.upstream`). With the attention patterns as they are and the norm's scale s frozen at its
value, the output along a direction u is a sum over pairs,

    ``u . f(x) = sum_mn r_m^T Q r_n / s^2 + sum_m l . r_m / s + constant``,

Q and l the interaction and linear parts of the layer along u after the norm's weight. Nothing is
approximated: `Paths.error` is rounding, and taking a component out of the model along its direct path
changes the output by what `Paths.effect` says (`check_paths`).

>>> found = paths(model, tokens, 2, readout)       # u: [d_model], say a row of `unembedding(model)`
>>> print(found.text(5))
>>> found.to_pandas(10)                            # the strongest pairs
>>> check_paths(model, tokens, found).to_pandas()  # predicted, and measured by path patching
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.circuits.residual import require_plain_stream
from tl_bilinear.circuits.upstream import By, Upstream, as_tokens
from tl_bilinear.features.attribution import contributions, error_of, relative_error
from tl_bilinear.features.labels import kinds
from tl_bilinear.hooks.points import LayerTensor, require_layer_tensor
from tl_bilinear.results import Result
from tl_bilinear.tensor import BilinearTensor, TopInteractions, approximation_note

if TYPE_CHECKING:
    import pandas

_RUNS_PER_BATCH = 256


@dataclass(frozen=True, eq=False)
class Paths(Result):
    """What pairs of upstream components contribute to ``u . f(x)`` at one token.

    Attributes
    ----------
    tokens: [pos], the text
    layer, position: where; by: how attention is split ("sources", "heads" or "layers")
    direction: [d_model], u
    labels: the n components' names
    kinds: "embed", "position", "head", "attention bias", "mlp" or "mlp bias"
    where: [n, 3], a component's layer, head and source position, -1 where there is none
    vectors: [n, d_model], what each wrote into the residual stream
    quadratic: [n, n], symmetric, float64. An entry off the diagonal is half of its pair's contribution
    linear: [n], contributions of the layer's and the norm's biases with each component
    constants: name to value: "layer constant", "b_out"
    scale: the norm's scale s (1 without a norm), the number that is frozen
    measured: ``u . f(x)`` in the model's own run
    approximation: what the layer stands for and how well, where it is an approximation
    """

    _finite = ("direction", "vectors", "quadratic", "linear")

    tokens: Int[Tensor, " pos"]
    layer: int
    position: int
    by: str
    direction: Float[Tensor, " d"]
    labels: list[str]
    kinds: list[str]
    where: Int[Tensor, "n 3"]
    vectors: Float[Tensor, "n d"]
    quadratic: Float[Tensor, "n n"]
    linear: Float[Tensor, " n"]
    constants: dict[str, float]
    scale: float
    measured: float
    approximation: str | None = None

    @property
    def total(self) -> float:
        """The sum of all contributions."""
        return float(self.quadratic.sum() + self.linear.sum()) + sum(self.constants.values())

    @property
    def error(self) -> float:
        """``|total - measured|`` relative to the largest of the contributions and of the two."""
        return relative_error(self.total, self.measured, self.quadratic, self.constants)

    @property
    def measured_error(self) -> float:
        """``|total - measured| / |measured|``: larger than `error` where contributions cancel."""
        return error_of(self.total, self.measured)

    @property
    def shares(self) -> Float[Tensor, " n"]:
        """[n], each component's part, pairs halved between their two: sums to total less constants."""
        return self.quadratic.sum(1) + self.linear

    @property
    def effects(self) -> Float[Tensor, " n"]:
        """[n], `effect` of each component by itself."""
        return self.quadratic.diagonal() - 2 * self.quadratic.sum(1) - self.linear

    def effect(self, components: Sequence[int]) -> float:
        """How ``u . f(x)`` changes when these are taken out together, everything else held.

        Raises IndexError for a component that there is not.
        """
        _require_components(components, len(self.labels))
        chosen = sorted(set(components))
        rows = self.quadratic[chosen]
        return float(rows[:, chosen].sum() - 2 * rows.sum() - self.linear[chosen].sum())

    def without(self, components: Sequence[int]) -> float:
        """What ``u . f(x)`` would be without these components: ``total + effect(components)``."""
        return self.total + self.effect(components)

    def strongest(self, k: int) -> TopInteractions:
        """The k pairs of largest contribution; numbers index `labels`."""
        n = len(self.labels)
        checks.require_count("k", k, n * (n + 1) // 2, f"the pairs of {n} components")
        doubled = (2 * self.quadratic).triu_(1) + self.quadratic.diagonal().diag()
        chosen = doubled.abs().flatten().topk(k).indices
        rows, columns = chosen // n, chosen % n
        return TopInteractions(rows, columns, self.quadratic[rows, columns], "components")

    def terms(self) -> dict[str, float]:
        """Sums over kinds of components, which add up to `total`."""
        kinds = list(dict.fromkeys(self.kinds))
        member = self.quadratic.new_zeros(len(kinds), len(self.kinds))
        member[[kinds.index(kind) for kind in self.kinds], range(len(self.kinds))] = 1
        between = (member @ self.quadratic @ member.T).tolist()
        found = {}
        for i, one in enumerate(kinds):
            found[f"{one} x {one}"] = between[i][i]
            found |= {f"{one} x {kinds[j]}": 2 * between[i][j] for j in range(i + 1, len(kinds))}
        if bool(self.linear.any()):
            linear = (member @ self.linear).tolist()
            found |= {f"bias x {kind}": value for kind, value in zip(kinds, linear, strict=True)}
        return found | self.constants

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """The k pairs (all) of largest contribution: numbers, kind, labels, contribution, share."""
        import pandas as pd

        n = len(self.labels)
        pairs = self.strongest(n * (n + 1) // 2 if k is None else k)
        first, second = pairs.first.tolist(), pairs.second.tolist()
        return pd.DataFrame(
            {
                "first": first,
                "second": second,
                "kind": kinds(pairs.first, pairs.second),
                "label_first": [self.labels[i] for i in first],
                "label_second": [self.labels[i] for i in second],
                "contribution": pairs.coefficients.tolist(),
                "share": (pairs.coefficients / (self.total or float("nan"))).tolist(),
            }
        )

    def text(self, k: int = 10) -> str:
        """The k strongest pairs and the sums over kinds, line by line."""
        lines = [
            f"layer {self.layer} at position {self.position}: {self.measured:+.4f} "
            f"(contributions sum to {self.total:+.4f}, off by {self.measured_error:.1e} of that)"
        ]
        lines += [self.approximation] if self.approximation else []
        n = len(self.labels)
        pairs = self.strongest(min(k, n * (n + 1) // 2))
        for i, j, value in zip(
            pairs.first.tolist(), pairs.second.tolist(), pairs.coefficients.tolist(), strict=True
        ):
            names = self.labels[i] if i == j else f"{self.labels[i]} x {self.labels[j]}"
            lines.append(f"  {value:+.4f}  {names}")
        lines.append("by kind:")
        lines += [f"  {value:+.4f}  {name}" for name, value in self.terms().items()]
        return "\n".join(lines)


@torch.no_grad()
def paths(
    model: Any,
    tokens: Tensor | str,
    layer: int,
    direction: Float[Tensor, " d_model"],
    position: int = -1,
    *,
    by: By = "sources",
    words: Sequence[str] | None = None,
    layer_tensor: LayerTensor | None = None,
    max_bytes: int = checks.MAX_DENSE_BYTES,
) -> Paths:
    """Split a layer's output along a direction over pairs of upstream components.

    Parameters
    ----------
    model: a bilinear HookedTransformer or TransformerBridge, folded or not; with `layer_tensor` a gated
        one
    tokens: [pos] or [1, pos], or text
    layer: int
        From 0; negative from the end.
    direction: [d_model], u, read from the layer's output (``mlp.hook_out``)
    position: int
        Negative from the end.
    by: "sources", "heads" or "layers"
        A component for each head and source token, for each head, or for each layer's attention.
    words: [pos], optional
        The tokens' names for labels; by default the tokenizer's, or their numbers.
    layer_tensor: BilinearTensor or Approximation, optional
        The layer as a function of ``mlp.hook_in``, instead of reading it from the model: an
        approximation of a gated one, ``approximate_llama(model, tokens)[layer]``. `Paths.error` is
        then what it leaves out.
    max_bytes: int
        The pairs are an n x n matrix: for long prompts and deep models sum over sources.

    Accumulated in float64 whatever the model's dtype. Raises IndexError for a layer or position that
    does not exist; ValueError for several sequences, a direction of another width, a layer that is not
    bilinear, and a model whose residual stream is not a plain sum; MemoryError above `max_bytes`.
    """
    require_plain_stream(model)
    tokens = as_tokens(model, tokens)  # refuses a batch before any work
    if layer_tensor is None:
        tensor = BilinearTensor.from_model(model, layer)
    else:
        tensor = require_layer_tensor(model, layer, layer_tensor, "layer_tensor")
    note = approximation_note(tensor)
    tensor = tensor.to(checks.gram_dtype(tensor.left))
    direction = checks.require_vector("direction", direction, tensor.d_out, "d_model", tensor.out)
    run = Upstream(model, tokens, layer, position)
    if words is not None and len(words) != run.tokens.shape[1]:
        raise ValueError(f"{len(words)} words for {run.tokens.shape[1]} tokens")
    found = run.components().group(by)
    n = len(found.kinds)
    checks.require_affordable(
        f"the pairs of {n} components",
        n * n,
        run.dtype,
        max_bytes,
        "sum over sources with by='heads', or over heads with by='layers'",
    )
    whole = run.passage.fold(tensor.project(direction[None]))
    quadratic, linear, constants = contributions(
        whole, found.vectors / run.scale, max_bytes=max_bytes
    )
    return Paths(
        tokens=run.tokens[0],
        layer=run.layer,
        position=run.position,
        by=by,
        direction=direction,
        labels=found.labels(run.words if words is None else list(words)),
        kinds=found.kinds,
        where=found.where,
        vectors=found.vectors,
        quadratic=quadratic,
        linear=linear,
        constants={name: value for name, value in constants.items() if value},
        scale=run.scale,
        measured=float(run.at(run.output_hook) @ direction),
        approximation=note,
    )


def _require_components(chosen: Sequence[int], n: int) -> None:
    if outside := [i for i in chosen if not 0 <= i < n]:
        raise IndexError(f"component {outside[0]} does not exist: there are {n}, from 0")


# ---------------------------------------------------------------------- by intervention


@dataclass(frozen=True, eq=False)
class PathCheck(Result):
    """Effects of taking components out, predicted from `Paths` and measured by path patching.

    Attributes
    ----------
    removed: the components of each intervention; labels: their names
    predicted, measured: [m], changes of ``u . f(x)``
    """

    removed: list[list[int]]
    labels: list[str]
    predicted: Float[Tensor, " m"]
    measured: Float[Tensor, " m"]

    @property
    def difference(self) -> float:
        """The largest ``|predicted - measured|`` relative to the largest effect."""
        size = max(float(self.predicted.abs().max()), float(self.measured.abs().max()))
        return float((self.predicted - self.measured).abs().max()) / size if size else 0.0

    def to_pandas(self) -> pandas.DataFrame:
        """One row an intervention: removed, predicted, measured."""
        import pandas as pd

        return pd.DataFrame(
            {
                "removed": self.labels,
                "predicted": self.predicted.tolist(),
                "measured": self.measured.tolist(),
            }
        )


def check_paths(
    model: Any,
    tokens: Tensor | str,
    found: Paths,
    removed: Sequence[Sequence[int]] | int = 10,
    *,
    progress: bool = True,
) -> PathCheck:
    """Take components out of the model along their direct path, and compare with `Paths.effect`.

    Parameters
    ----------
    removed: sets of components, each set taken out together; or a number k: the k single components of
        largest effect. The interaction of a pair is the second difference:
        ``effect([i, j]) - effect([i]) - effect([j]) = 2 quadratic[i, j]``.

    A component is removed where it is written (``hook_embed``, ``attn.hook_z``, ``hook_mlp_out``, ...),
    with attention patterns, values, the other MLPs' outputs and the norm's scale held at the clean run.
    All interventions are one batch, and each costs one token, however long the prompt is.

    Raises ValueError for other tokens than those of `found`, IndexError for a component that there is
    not.
    """
    run = Upstream(model, tokens, found.layer, found.position)
    given, known = run.tokens[0].cpu(), found.tokens.cpu()
    if given.shape != known.shape or bool((given != known).any()):
        raise ValueError(
            f"these paths are of the tokens {known.tolist()[:8]}... ({len(known)} of them), and those "
            f"given are {given.tolist()[:8]}... ({len(given)}): give the same"
        )
    if isinstance(removed, int):
        checks.require_count("removed", removed, 2**31, "components to remove, one at a time")
        count = min(removed, len(found.labels))
        removed = [[i] for i in found.effects.abs().topk(count).indices.tolist()]
    for chosen in removed:
        _require_components(chosen, len(found.labels))
    clean = run.outputs_without([[]])[0]
    components = list(zip(found.kinds, found.where.tolist(), strict=True))
    direction = found.direction.to(clean)
    measured: list[float] = []
    with tqdm(total=len(removed), unit="run", disable=not progress) as bar:
        for start in range(0, len(removed), _RUNS_PER_BATCH):
            batch = removed[start : start + _RUNS_PER_BATCH]
            outputs = run.outputs_without([[components[i] for i in chosen] for chosen in batch])
            measured += ((outputs - clean) @ direction).tolist()
            bar.update(len(batch))
    return PathCheck(
        removed=[list(chosen) for chosen in removed],
        labels=[" and ".join(found.labels[i] for i in chosen) for chosen in removed],
        predicted=torch.tensor([found.effect(chosen) for chosen in removed], dtype=clean.dtype),
        measured=torch.tensor(measured, dtype=clean.dtype),
    )
