"""One pre-activation at one token as a sum over pairs of input features, exactly.

With the activation at the input dictionary's hook split into rows, ``r = sum_m r_m`` (each active
feature times its decoder row, b_dec, error, ...), and ``x = (r A) / s + b`` the layer's input,

    ``e . f(x) = sum_mn r_m^T Q r_n / s^2 + sum_m l . r_m / s + constant``,

Q and l the interaction and linear parts of ``e . layer`` after the norm (biases, where there are any,
enter l and the constant). The output dictionary adds its own constants: ``- e . b_dec`` and ``b_enc``.
Contributions sum to the model's own pre-activation, to rounding; nothing is left over or approximated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.features.labels import Named, kinds
from tl_bilinear.tensor import BilinearTensor

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Attribution(Named):
    """What made an output feature's pre-activation at one token.

    Attributes
    ----------
    feature: the output feature; position: the token's
    features: [m], the active input features; labels: their names
    activations: [m], in units of the decoder's rows
    rest_names: the r other parts of the activation ("b_dec", "error", ...)
    quadratic: [m + r, m + r], symmetric; the features' rows first. An entry off the diagonal is half of
        its pair's contribution
    linear: [m + r], contributions of the layer's bias terms with each row
    constants: name to value: "layer constant", "b_out", "- e . b_dec", "b_enc"
    measured: the pre-activation in the model's own run
    """

    _finite = ("activations", "quadratic", "linear")

    feature: int
    position: int
    features: Int[Tensor, " m"]
    activations: Float[Tensor, " m"]
    labels: list[str]
    rest_names: list[str]
    quadratic: Float[Tensor, "rows rows"]
    linear: Float[Tensor, " rows"]
    constants: dict[str, float]
    measured: float

    @property
    def total(self) -> float:
        """The sum of all contributions."""
        parts = self.quadratic.double().sum() + self.linear.double().sum()
        return float(parts) + sum(self.constants.values())

    @property
    def error(self) -> float:
        """``|total - measured|`` relative to the largest of the contributions and of the two.

        It is rounding where it is near the dtype's. Where contributions cancel, `measured_error` is
        larger: it says how far the sum itself can be trusted.
        """
        return relative_error(self.total, self.measured, self.quadratic, self.constants)

    @property
    def measured_error(self) -> float:
        """``|total - measured| / |measured|``; infinite where zero was measured and is not the sum."""
        return error_of(self.total, self.measured)

    @property
    def pairs(self) -> Float[Tensor, "m m"]:
        """[m, m], the part between features; off the diagonal half of a pair's contribution."""
        m = len(self.features)
        return self.quadratic[:m, :m]

    def terms(self) -> dict[str, float]:
        """Everything in a few named sums, which add up to `total`."""
        m, r = len(self.features), len(self.rest_names)
        names = ["features", *self.rest_names]
        bounds = [0, m, *range(m + 1, m + r + 1)]
        parts = [slice(bounds[i], bounds[i + 1]) for i in range(len(names))]
        found = {}
        for i, (one, rows) in enumerate(zip(names, parts, strict=True)):
            found[f"{one} x {one}"] = float(self.quadratic[rows, rows].sum())
            for other, columns in zip(names[i + 1 :], parts[i + 1 :], strict=True):
                found[f"{one} x {other}"] = 2 * float(self.quadratic[rows, columns].sum())
        if bool(self.linear.any()):
            for name, rows in zip(names, parts, strict=True):
                found[f"bias x {name}"] = float(self.linear[rows].sum())
        return found | self.constants

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """The k pairs (all) of largest contribution: first, second, kind, labels, value, share."""
        import pandas as pd

        m = len(self.features)
        rows, columns = torch.triu_indices(m, m, device=self.pairs.device)
        values = self.pairs[rows, columns] * torch.where(rows == columns, 1.0, 2.0)
        order = values.abs().argsort(descending=True, stable=True)[:k]
        rows, columns, values = rows[order], columns[order], values[order]
        return pd.DataFrame(
            {
                "first": self.features[rows].tolist(),
                "second": self.features[columns].tolist(),
                "kind": kinds(rows, columns),
                "label_first": [self.labels[i] for i in rows.tolist()],
                "label_second": [self.labels[i] for i in columns.tolist()],
                "contribution": values.tolist(),
                "share": (values / self.total).tolist() if self.total else [0.0] * len(values),
            }
        )

    def text(self, k: int = 10) -> str:
        """The k strongest pairs and the rest, line by line."""
        name = self.output_name(self.feature)
        lines = [
            f"feature {name} at position {self.position}: {self.measured:+.4f} "
            f"(contributions sum to {self.total:+.4f}, off by {self.measured_error:.1e} of that)"
        ]
        for row in self.to_pandas(k).to_dict("records"):
            names = " x ".join(
                [row["label_first"], row["label_second"]][: 1 if row["kind"] == "self" else 2]
            )
            lines.append(f"  {row['contribution']:+.4f}  {names}")
        lines += [f"  {value:+.4f}  {name}" for name, value in self.terms().items() if value]
        return "\n".join(lines)


def relative_error(
    total: float, measured: float, quadratic: Tensor, constants: dict[str, float]
) -> float:
    """``|total - measured|`` relative to the largest of the contributions and of the two."""
    largest = float(quadratic.abs().max()) if quadratic.numel() else 0.0
    size = max(abs(measured), abs(total), largest, *(abs(value) for value in constants.values()))
    return abs(total - measured) / size if size else 0.0


def error_of(total: float, measured: float) -> float:
    """``|total - measured| / |measured|``; infinite where only `measured` is zero."""
    if total == measured:
        return 0.0
    return abs(total - measured) / abs(measured) if measured else math.inf


def contributions(
    layer: BilinearTensor,
    rows: Float[Tensor, "rows d"],
    gain: float = 1.0,
    max_bytes: int = checks.MAX_DENSE_BYTES,
) -> tuple[Float[Tensor, "rows rows"], Float[Tensor, " rows"], dict[str, float]]:
    """(quadratic, linear, constants) of ``gain * layer(sum of rows)``, for a layer of one output."""
    parts = layer.parts()
    rows = rows.to(layer.left.dtype)
    b_out = 0.0 if layer.bias_out is None else gain * float(layer.bias_out[0])
    constants = {"layer constant": gain * float(parts.constant[0]) - b_out, "b_out": b_out}
    quadratic = gain * parts.interaction.interaction()[0].fold(rows).dense(max_bytes)
    return quadratic, gain * (rows @ parts.linear[0]), constants
