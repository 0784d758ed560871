"""Component activations as hook points: caches, names, gradients, edits, and nothing left behind."""

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.running import (
    EXACT,
    LAYER,
    READ,
    TOKENS,
    WRITTEN,
    directions,
    eigen,
    hooks_of,
    model64,
    sae,
    through,
)
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import EigenComponents, HOSVDComponents, ProjectInput, recording
from tl_bilinear.tensor import hosvd

EIGEN, HOSVD = f"blocks.{LAYER}.mlp.hook_eigen", f"blocks.{LAYER}.mlp.hook_hosvd"


@pytest.fixture(scope="module")
def model():
    return model64()


@pytest.fixture(scope="module")
def parts(model):
    return eigen(model, 2, k=3, write="dual")


def test_caches_hold_the_activations(model, parts):
    x, out, logits = through(model)
    components = HOSVDComponents(hosvd(BilinearTensor.from_model(model, LAYER), 4), layer=LAYER)
    with recording(model, parts, components) as names:
        assert names == [EIGEN, HOSVD]
        again, cache = model.run_with_cache(TOKENS)
        assert torch.equal(again, logits)
        assert cache[EIGEN].shape == (3, 6, 6)
        assert_close(cache[EIGEN].reshape(3, 6, 2, 3), parts.activations(x), **EXACT)
        assert_close(cache[HOSVD], out @ components.reads.T, **EXACT)
        _, only = model.run_with_cache(TOKENS, names_filter=names, pos_slice=-1)
        assert set(only) == {EIGEN, HOSVD}
        assert_close(only[EIGEN], cache[EIGEN][:, -1:])
        seen = []
        model.run_with_hooks(
            TOKENS, fwd_hooks=[(EIGEN, lambda a, hook: seen.append((hook.name, a)))]
        )
        assert seen[0][0] == EIGEN
        assert torch.equal(seen[0][1], cache[EIGEN])


def test_two_of_a_layer_under_names_of_their_own(model, parts):
    single = EigenComponents(parts.eigen[0], layer=LAYER)
    with recording(model, parts), recording(model, single, name="hook_one") as (name,):
        _, cache = model.run_with_cache(TOKENS)
        assert name == f"blocks.{LAYER}.mlp.hook_one"
        assert_close(cache[name], cache[EIGEN][..., :3], **EXACT)
        with pytest.raises(ValueError, match=f"{EIGEN} exists already; record under another name"):
            recording(model, single).__enter__()
    with pytest.raises(ValueError, match=r"blocks.1.mlp.hook_in exists already"):
        recording(model, single, name="hook_in").__enter__()
    with pytest.raises(ValueError, match=r"that of an attribute .* got 'my spectrum'"):
        recording(model, single, name="my spectrum").__enter__()
    assert "hook_eigen" not in dict(model.blocks[LAYER].mlp.named_modules())


def test_the_model_is_as_before_also_after_an_exception(model, parts):
    logits, before, state = model(TOKENS), hooks_of(model), list(model.state_dict())
    modules, registered = [name for name, _ in model.named_modules()], set(model.mod_dict)

    def fails(value, hook):
        raise RuntimeError("on the way")

    def as_before():
        assert torch.equal(model(TOKENS), logits)
        assert hooks_of(model) == before
        assert list(model.state_dict()) == state
        assert [name for name, _ in model.named_modules()] == modules
        assert set(model.mod_dict) == registered
        mlp = model.blocks[LAYER].mlp
        for module in (mlp, mlp.hook_in, mlp.hook_out, model.blocks[LAYER]):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    with pytest.raises(RuntimeError, match="on the way"), recording(model, parts):
        model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{LAYER}.mlp.hook_post", fails)])
    as_before()
    with recording(model, parts):
        with pytest.raises(RuntimeError, match="on the way"):
            model.run_with_hooks(TOKENS, fwd_hooks=[(EIGEN, fails)])
        assert not model.blocks[LAYER].mlp.hook_in._forward_hooks
        assert torch.equal(model(TOKENS), logits)
    as_before()
    wrong = eigen(model64(n_layers=3), 1)
    object.__setattr__(wrong, "layer", 0)
    with pytest.raises(ValueError, match="does not fit"), recording(model, parts, wrong):
        pass
    as_before()


def test_an_interrupted_forward_leaves_nothing_for_the_next(model, parts):
    """Ctrl-C in a notebook cell, the context still open."""

    def interrupted(value, hook):
        raise KeyboardInterrupt

    fired = []
    with recording(model, parts):
        with pytest.raises(KeyboardInterrupt):
            model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{LAYER}.mlp.hook_post", interrupted)])
        model.run_with_hooks(TOKENS, fwd_hooks=[(EIGEN, lambda a, hook: fired.append(hook.name))])
    assert fired == [EIGEN]
    assert not model.blocks[LAYER].mlp.hook_in._forward_hooks


def test_an_edited_activation_is_written(model, parts):
    def scaled(value, hook):
        value = value.clone()
        value[..., 4] *= -2  # pair 1 of direction 1
        return value

    with recording(model, parts), model.hooks(fwd_hooks=[(EIGEN, scaled)]):
        logits, cache = model.run_with_cache(TOKENS)
    _, out, expected = through(model, parts.scale(-2, (1, 1)))
    assert_close(cache[WRITTEN], out, **EXACT)
    assert_close(cache[f"blocks.{LAYER}.mlp.hook_out"], out, **EXACT)
    assert_close(logits, expected, **EXACT)


def test_it_reads_what_the_layer_reads_after_every_edit(model, parts):
    project = ProjectInput(directions=directions(2, 9), layer=LAYER)
    with recording(model, parts) as names:
        with model.hooks(fwd_hooks=project.fwd_hooks(model)):
            _, cache = model.run_with_cache(TOKENS)
        assert_close(
            cache[names[0]].reshape(3, 6, 2, 3), parts.activations(through(model, project)[0])
        )
        # Interventions edit the output: the activations, functions of the input, stay.
        with model.hooks(fwd_hooks=parts.ablate().fwd_hooks(model)):
            _, cache = model.run_with_cache(TOKENS)
    assert_close(cache[EIGEN].reshape(3, 6, 2, 3), parts.activations(through(model)[0]))


def test_gradients_attribute_the_loss_to_components(model, parts):
    """The gradient of an activation is the loss's derivative by what the component writes."""
    model.zero_grad()
    loss = model(TOKENS, return_type="loss")
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with recording(model, parts):
        _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    assert cache[f"{WRITTEN}_grad"].any()
    expected = (cache[f"{WRITTEN}_grad"] @ parts.writes.T).repeat_interleave(3, -1)
    assert_close(cache[f"{EIGEN}_grad"], expected, **EXACT)
    for name, p in model.named_parameters():
        if name in plain:
            assert_close(p.grad, plain[name], rtol=1e-12, atol=1e-15)
    model.zero_grad()
    seen = []
    with recording(model, parts):  # the same without a backward hook
        loss = model.run_with_hooks(
            TOKENS, return_type="loss", fwd_hooks=[(EIGEN, lambda a, hook: seen.append(a))]
        )
        (gradient,) = torch.autograd.grad(loss, seen)
    assert_close(gradient, expected, **EXACT)
    # To first order, it is what a small scaling of the component does to the loss.
    step = 1e-6
    with torch.no_grad():
        losses = [
            model.run_with_hooks(
                TOKENS,
                fwd_hooks=parts.scale(1 + sign * step, (0, 0)).fwd_hooks(model),
                return_type="loss",
            )
            for sign in (1, -1)
        ]
    slope = (losses[0] - losses[1]) / (2 * step)
    assert_close((cache[EIGEN] * cache[f"{EIGEN}_grad"])[..., 0].sum(), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("hook", [READ, WRITTEN, f"blocks.{LAYER}.mlp.hook_out"])
def test_saes_come_and_go_while_it_is_open(sae_model, hook):
    parts = eigen(sae_model, 2, k=3)
    with recording(sae_model, parts):
        plain = sae_model.run_with_cache(TOKENS)[1]
        with_sae, cache = sae_model.run_with_cache_with_saes(TOKENS, saes=[sae(hook)])
        behind = {READ: f"{READ}.hook_sae_output"}.get(hook, READ)
        assert_close(cache[EIGEN].reshape(3, 6, 2, 3), parts.activations(cache[behind]), **EXACT)
        assert torch.allclose(cache[EIGEN], plain[EIGEN]) == (hook != READ)
        after = sae_model.run_with_cache(TOKENS)[1]
        assert torch.equal(after[EIGEN], plain[EIGEN])
    assert EIGEN not in sae_model.hook_dict
    assert torch.equal(with_sae, sae_model.run_with_saes(TOKENS, saes=[sae(hook)]))


def test_a_gated_mlp_with_identity():
    from sae_lens import HookedSAETransformer

    from tests.models.building import config, randomise

    ordinary = randomise(
        HookedSAETransformer.from_config(
            config(act_fn="identity", gated_mlp=True, dtype=torch.float64)
        )
    )
    parts = eigen(ordinary, 2, k=3)
    with recording(ordinary, parts):
        _, cache = ordinary.run_with_cache(TOKENS)
        assert_close(cache[EIGEN].reshape(3, 6, 2, 3), parts.activations(cache[READ]), **EXACT)
        with ordinary.hooks(fwd_hooks=[(EIGEN, lambda value, hook: 0 * value)]):
            written = ordinary.run_with_cache(TOKENS)[1][WRITTEN]
    assert_close(written, through(ordinary, parts.ablate())[1], **EXACT)
