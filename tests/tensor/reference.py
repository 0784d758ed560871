"""Slow, obvious references written from the formulas of the paper; the oracles of these tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tl_bilinear import BilinearTensor


def layer(t: BilinearTensor, x: Tensor) -> Tensor:
    """One input vector through the layer, neuron by neuron."""
    result = torch.zeros(t.d_out, dtype=x.dtype)
    if t.bias_out is not None:
        result = result + t.bias_out
    for h in range(t.d_hidden):
        gate = sum((t.left[h, i] * x[i] for i in range(t.d_in)), x.new_zeros(()))
        linear = sum((t.right[h, i] * x[i] for i in range(t.d_in)), x.new_zeros(()))
        gate = gate if t.bias_left is None else gate + t.bias_left[h]
        linear = linear if t.bias_right is None else linear + t.bias_right[h]
        result = result + t.out[:, h] * gate * linear
    return result


def dense(t: BilinearTensor) -> Tensor:
    """B[a,i,j] by its definition."""
    one_sided = torch.einsum("ah,hi,hj->aij", t.out, t.left, t.right)
    return (one_sided + one_sided.transpose(1, 2)) / 2


def random_tensor(
    d_in: int, d_hidden: int, d_out: int, biases: bool = False, seed: int = 0, dtype=torch.float64
) -> BilinearTensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    factors = [normal(d_hidden, d_in), normal(d_hidden, d_in), normal(d_out, d_hidden)]
    if biases:
        factors += [normal(d_hidden), normal(d_hidden), normal(d_out)]
    return BilinearTensor(*factors, input_space="inputs", output_space="outputs")


def tensors(biases: bool | None = None, min_size: int = 1) -> st.SearchStrategy[BilinearTensor]:
    """Layers of any proportions: h < d, h > d, non-square, size 1, with and without biases."""
    size = st.integers(min_size, 7)
    flag = st.booleans() if biases is None else st.just(biases)
    return st.builds(random_tensor, size, size, size, flag, st.integers(0, 2**16))
