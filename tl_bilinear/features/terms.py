"""A few terms ``value (vector . x)^2`` for each of many output features, chosen one of several ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.fitted import RIDGE, fitted_terms
from tl_bilinear.features.labels import Named
from tl_bilinear.tensor import InteractionMatrix, Metric

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.features.run import FeatureRun

MetricName = Literal["euclidean", "all", "active"]
By = Literal["magnitude", "contribution", "variance", "covariance", "fit"]
_FEATURES_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class FeatureTerms(Named):
    """k terms of each of m output features: ``f(x) = sum_i values_i (vectors_i . x)^2 + rest``.

    The rest is exactly the form ``Q - sum_i values_i vectors_i vectors_i^T`` (and the layer's biases).

    Attributes
    ----------
    features: [m], output features
    values: [m, k]; vectors: [m, k, d], in coordinates of the layer's input. NaN for a feature that is
        active on too few tokens to have a population
    counts: [m], on how many tokens the feature was active in the run that the terms were made from
    metric, by: how they were chosen, in words
    """

    features: Int[Tensor, " m"]
    values: Float[Tensor, "m k"]
    vectors: Float[Tensor, "m k d"]
    counts: Int[Tensor, " m"]
    metric: str
    by: str

    def activations(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t m k"]:
        """``values (vectors . x)^2``"""
        products = x @ self.vectors.flatten(0, 1).T
        return products.square().unflatten(-1, self.values.shape) * self.values

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature: feature, active_tokens, value_1 to value_k."""
        columns = {"feature": self.features, "active_tokens": self.counts}
        columns |= {f"value_{i + 1}": self.values[:, i] for i in range(self.values.shape[1])}
        return self.table(columns, inputs=(), outputs=("feature",))


@torch.no_grad()
def feature_terms(
    run: FeatureRun,
    index: Int[Tensor, " m"],
    k: int,
    metric: MetricName | Metric = "euclidean",
    by: By = "magnitude",
    *,
    ridge: float = RIDGE,
    progress: bool = True,
) -> FeatureTerms:
    """See `FeatureRun.terms`."""
    if by not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {by!r}")
    if not isinstance(metric, Metric) and metric not in get_args(MetricName):
        raise ValueError(
            f"metric must be one of {', '.join(get_args(MetricName))}, or a Metric, got {metric!r}"
        )
    if by == "fit" and metric != "active":
        raise ValueError('by="fit" fits terms where a feature is active: give metric="active"')
    checks.require_number("ridge", ridge, "is a share of the covariance")
    known = run.features
    layer = known.layer_tensor
    checks.require_count("k", k, layer.d_in, "the width of what the layer reads")
    needs_inputs = metric == "active" or by != "magnitude"
    overall = None
    if metric == "all":
        metric = run.moments(progress=False).metric(ridge)
    if by == "fit":
        overall = run.moments(progress=False).covariance
    values, vectors, counts = [], [], []
    with tqdm(total=len(index), unit="feature", disable=not progress) as bar:
        for some in index.split(_FEATURES_AT_ONCE):
            forms = layer.interaction(known.directions[some])
            inputs = run.inputs_of(some) if needs_inputs else [None] * len(some)
            for form, feature, x in zip(forms, some.tolist(), inputs, strict=True):
                found = _of_one(form, feature, x, k, metric, by, ridge, overall)
                values.append(found[0].to(layer.left))
                vectors.append(found[1].to(layer.left))
                counts.append(-1 if x is None else len(x))
                bar.update()
    return FeatureTerms(
        index,
        torch.stack(values) if values else layer.left.new_empty(0, k),
        torch.stack(vectors) if vectors else layer.left.new_empty(0, k, layer.d_in),
        torch.tensor(counts, dtype=torch.long),
        f"{metric}" if isinstance(metric, Metric) else _words(metric, ridge, by),
        by,
        output_labels=known.outputs.labels_of(index),
    )


def _words(metric: str, ridge: float, by: str) -> str:
    if metric == "euclidean":
        return "Euclidean"
    what = "fitted to" if by == "fit" else "the second moment of"
    return f"{what} the tokens where the feature is active (ridge {ridge:g})"


def _of_one(
    form: InteractionMatrix,
    feature: int,
    x: Tensor | None,
    k: int,
    metric: MetricName | Metric,
    by: By,
    ridge: float,
    overall: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The values [k] and vectors [k, d] of one output feature; x are the inputs where it is active."""
    if x is not None and len(x) < 2:
        return torch.full((k,), torch.nan), torch.full((k, form.d), torch.nan)
    if by == "fit":
        assert x is not None
        return fitted_terms(form.dense(), x, k, overall=overall, ridge=ridge)
    chosen: Metric | None = None
    if isinstance(metric, Metric):
        chosen = metric
    elif metric == "active":
        assert x is not None
        name = f"tokens where output feature {feature} is active"
        chosen = Metric.of_samples(x, ridge, population=name)
    if by == "magnitude":
        eigen = form.eigh(k, metric=chosen)
    else:
        # Any of them may lead in another order.
        eigen = form.eigh(form.d, metric=chosen).ordered(by, x).top(k)
    return eigen.values, eigen.vectors
