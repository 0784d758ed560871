"""BilinearMLP against the formula."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformer_lens import HookedTransformerConfig

from tests.models.building import config, randomise, reference_mlp
from tl_bilinear import BilinearMLP

HOOKS = ("hook_in", "hook_pre", "hook_pre_linear", "hook_post", "hook_out")


def component(seed=0, **fields):
    mlp = BilinearMLP(config(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("W_gate", "W_in", "W_out"):
            weight = getattr(mlp, name)
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return randomise(mlp)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d_mlp", [24, 16, 5])
def test_forward_is_the_formula(bias, d_mlp):
    mlp = component(bilinear_bias=bias, d_mlp=d_mlp)
    x = torch.randn(2, 3, 16)
    assert mlp.b_gate.any() == bias
    assert_close(mlp(x).double(), reference_mlp(mlp, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (0, 3), (2, 3, 4)])
def test_any_leading_dimensions(leading):
    mlp = component(bilinear_bias=True)
    x = torch.randn(*leading, 16)
    assert mlp(x).shape == x.shape


def test_gradients_are_those_of_the_formula():
    mlp = component(bilinear_bias=True).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64)
    (mlp(x) @ weight).sum().backward()
    gate, linear = x @ mlp.W_gate + mlp.b_gate, x @ mlp.W_in + mlp.b_in
    p = mlp.W_out @ weight
    assert_close(x.grad, (p * linear) @ mlp.W_gate.T + (p * gate) @ mlp.W_in.T)
    assert_close(mlp.b_gate.grad, (p * linear).sum((0, 1)))
    assert_close(mlp.W_gate.grad, torch.einsum("bpd,bph->dh", x, p * linear))


def test_hooks_fire_once_in_order_with_their_values():
    mlp = component(bilinear_bias=True)
    fired = []
    for name in HOOKS:
        getattr(mlp, name).add_hook(lambda value, hook, name=name: fired.append((name, value)))
    x = torch.randn(2, 3, 16)
    output = mlp(x)
    assert [name for name, _ in fired] == list(HOOKS)
    values = dict(fired)
    assert_close(values["hook_in"], x)
    assert_close(values["hook_pre"], x @ mlp.W_gate + mlp.b_gate)
    assert_close(values["hook_pre_linear"], x @ mlp.W_in + mlp.b_in)
    assert_close(values["hook_post"], values["hook_pre"] * values["hook_pre_linear"])
    assert_close(values["hook_out"], output)


@pytest.mark.parametrize("edited", HOOKS)
def test_an_edit_through_a_hook_changes_what_follows_it(edited):
    mlp = component(bilinear_bias=True)
    x = torch.randn(2, 3, 16)
    getattr(mlp, edited).add_hook(lambda value, hook: 2 * value)
    factor = {name: 2 if name == edited else 1 for name in HOOKS}
    y = factor["hook_in"] * x
    gate = factor["hook_pre"] * (y @ mlp.W_gate + mlp.b_gate)
    linear = factor["hook_pre_linear"] * (y @ mlp.W_in + mlp.b_in)
    post = factor["hook_post"] * gate * linear
    assert_close(mlp(x), factor["hook_out"] * (post @ mlp.W_out + mlp.b_out))


def test_without_biases_they_are_zero_buffers_in_the_state_dict():
    mlp = component()
    assert {name for name, _ in mlp.named_parameters()} == {"W_gate", "W_in", "W_out"}
    assert {name for name, _ in mlp.named_buffers()} == {"b_gate", "b_in", "b_out"}
    with_bias = component(bilinear_bias=True)
    assert with_bias.state_dict().keys() == mlp.state_dict().keys()
    mlp.load_state_dict(with_bias.state_dict())
    x = torch.randn(2, 16)
    assert torch.equal(mlp(x), with_bias(x))


def test_accepts_a_plain_config_and_shares_it():
    cfg = HookedTransformerConfig(**config())
    mlp = BilinearMLP(cfg)
    assert mlp.cfg is cfg
    assert {name for name, _ in mlp.named_buffers()} == {"b_gate", "b_in", "b_out"}


def test_deepcopy_is_independent():
    mlp = component()
    twin = copy.deepcopy(mlp)
    x = torch.randn(2, 16)
    before = mlp(x)
    with torch.no_grad():
        twin.W_out.zero_()
    assert torch.equal(mlp(x), before)
    assert not twin(x).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    mlp = component(bilinear_bias=True)
    x = torch.randn(2, 3, 16)
    expected = reference_mlp(mlp, x)
    mlp.to(dtype)
    output = mlp(x.to(dtype))
    assert output.dtype == dtype
    tolerance = {torch.float64: 1e-6}.get(dtype, 0.05) * expected.abs().max().item()
    assert_close(output.double(), expected, rtol=0, atol=tolerance)
