"""What each input contributes beside a baseline: exact Shapley values of a quadratic function.

For ``f(x) = x^T Q x + l . x + c`` and a baseline b the Shapley values of the inputs are the integrated
gradients along the straight line from b to x, and both are

    ``phi = (x - b) * grad f((x + b) / 2)``,   ``sum phi = f(x) - f(b)``.

Their second order (integrated Hessians; Shapley interactions) is ``2 Q[i,j] (x - b)_i (x - b)_j`` for a
pair. Against a background population nothing is sampled: only its mean m and second moment M enter,

    ``E_b phi_i = x_i (Q (x + m))_i - m_i (Q x)_i - (Q M)_ii + (x - m)_i l_i``.

>>> found = shapley(tensor, x, moments)             # or a point b [d_in], or None for zero
>>> found.values                                    # [..., d_out, d_in], sum: f(x) - E f(b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.moments import InputMoments

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class ShapleyValues(Result):
    """Contributions of every input to every output, beside a baseline.

    Attributes
    ----------
    values: [..., d_out, d_in], ``phi``
    output: [..., d_out], the layer's output on x
    baseline_output: [d_out], on the baseline (its mean, over a population)
    baseline: in words
    input_space, output_space: what the coordinates are
    """

    values: Float[Tensor, "*batch d_out d_in"]
    output: Float[Tensor, "*batch d_out"]
    baseline_output: Float[Tensor, " d_out"]
    baseline: str
    input_space: str | None = None
    output_space: str | None = None

    @property
    def error(self) -> Float[Tensor, "*batch d_out"]:
        """``|sum phi - (f(x) - f(b))|``: rounding."""
        return (self.values.sum(-1) - (self.output - self.baseline_output)).abs()

    def to_pandas(self) -> pandas.DataFrame:
        """One row an output and input, largest contribution first: [batch,] output, input, value."""
        import pandas as pd

        *batch, outputs, inputs = self.values.shape
        count = torch.Size(batch).numel()
        table = pd.DataFrame(
            {
                "x": torch.arange(count).repeat_interleave(outputs * inputs).tolist(),
                "output": torch.arange(outputs).repeat_interleave(inputs).repeat(count).tolist(),
                "input": torch.arange(inputs).repeat(count * outputs).tolist(),
                "value": self.values.flatten().tolist(),
            }
        )
        order = table["value"].abs().sort_values(ascending=False, kind="stable").index
        table = table.loc[order].reset_index(drop=True)
        return table if batch else table.drop(columns="x")


def shapley(
    tensor: BilinearTensor,
    x: Float[Tensor, "... d_in"],
    baseline: InputMoments | Float[Tensor, " d_in"] | None = None,
) -> ShapleyValues:
    """Exact Shapley values, equal to integrated gradients, of a layer's outputs on x.

    Parameters
    ----------
    tensor: BilinearTensor; project it first for a few output directions
    x: [..., d_in]
    baseline: InputMoments of a background population, a point [d_in], or None for zero

    Cost ``4 d_hidden d_out d_in`` flops for each x; memory d_out d_in numbers for each, and as many of
    d_hidden.

    Raises ValueError for inputs or a baseline of another width.
    """
    meaning = checks.meaning("d_in", tensor.input_space)
    x = checks.require_rows("x", x, tensor.d_in, meaning, tensor.left)
    if isinstance(baseline, InputMoments):
        mean, second = baseline.mean.to(x), baseline.second.to(x)
        described = f"{baseline.population} ({baseline.count:,} inputs)"
    else:
        point = x.new_zeros(tensor.d_in) if baseline is None else baseline
        mean = checks.require_rows("baseline", point, tensor.d_in, meaning, tensor.left)
        second, described = None, "zero" if baseline is None else "a point"
    if mean.shape != (tensor.d_in,):
        raise ValueError(
            f"the baseline must have shape [{tensor.d_in}] ({meaning}), got {checks.shape(mean)}"
        )
    around = tensor.around(mean)
    z = x - mean
    linear = around.parts().linear
    values = z[..., None, :] * (linear + _products(around, z))
    constant = around.parts().constant
    if second is not None:
        # A background that varies: the mean of its own quadratic parts, (Q C)_ii, is taken off.
        covariance = second - torch.outer(mean, mean)
        own = _diagonal_of_products(around, covariance)
        values = values - own
        constant = constant + own.sum(-1)
    return ShapleyValues(
        values, tensor(x), constant, described, tensor.input_space, tensor.output_space
    )


def _products(tensor: BilinearTensor, z: Tensor) -> Tensor:
    """``(Q_a z)_i``: [..., d_out, d_in]."""
    through_left = (z @ tensor.left.T)[..., None, :] * tensor.out
    through_right = (z @ tensor.right.T)[..., None, :] * tensor.out
    return (through_left @ tensor.right + through_right @ tensor.left) / 2


def _diagonal_of_products(tensor: BilinearTensor, matrix: Tensor) -> Tensor:
    """``(Q_a matrix)_ii``: [d_out, d_in]."""
    left, right = tensor.left @ matrix, tensor.right @ matrix
    return tensor.out @ (left * tensor.right + right * tensor.left) / 2
