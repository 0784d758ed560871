"""How interventions fit into a model: order, SAEs, gradients, threads, exceptions, errors."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAEMetadata
from torch.testing import assert_close
from transformer_lens import HookedTransformer

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
from tests.models.building import config, randomise
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import (
    Chain,
    EigenComponents,
    HOSVDComponents,
    Intervention,
    OutputEdit,
    ProjectInput,
    ReplaceLayer,
)
from tl_bilinear.hooks.points import LayerPoints, require_layer_tensor
from tl_bilinear.tensor import cp, hosvd, tucker


@pytest.fixture(scope="module")
def model():
    return model64(bilinear_bias=True)


# ---------------------------------------------------------------------- order


class Add(OutputEdit):
    def edit(self, x, out):
        return out + 1


def test_they_compose_in_the_order_given(model):
    _, out, _ = through(model)
    tensor = BilinearTensor.from_model(model, LAYER)
    parts = HOSVDComponents(hosvd(tensor, 2), layer=LAYER)
    add, ablate = Add(layer=LAYER), parts.ablate()
    u = parts.reads

    def projected(y):
        return y - (y @ u.T) @ u

    assert_close(through(model, add, ablate)[1], projected(out + 1), **EXACT)
    assert_close(through(model, ablate, add)[1], projected(out) + 1, **EXACT)
    assert_close(through(model, Chain(add, Chain(ablate, add)))[1], projected(out + 1) + 1, **EXACT)
    replace = ReplaceLayer(tensor * 3.0, layer=LAYER)
    assert_close(through(model, add, replace)[1], 3 * out, **EXACT)
    assert repr(Chain(add)).startswith("Chain(Add(")
    assert torch.equal(through(model, Chain())[2], through(model)[2])


def test_edits_of_the_input_come_first_in_a_chain(model):
    x, _, _ = through(model)
    tensor = BilinearTensor.from_model(model, LAYER)
    parts = eigen(model, None, write="minimal")
    project = ProjectInput(directions=directions(2, 9), layer=LAYER)
    read, out, _ = through(model, project)
    basis = torch.linalg.qr(directions(2, 9).T).Q
    assert_close(read, x - x @ basis @ basis.T, **EXACT)
    assert_close(out, tensor(read), **EXACT)
    expected = out - parts.activations(read)[..., 0, None] * parts.writes[0]
    assert_close(through(model, Chain(parts.ablate(0), project))[1], expected, **EXACT)


def test_dependent_and_zero_directions_of_the_input(model):
    x, _, _ = through(model)
    v = torch.eye(16, dtype=torch.float64)[3]
    dependent = torch.stack([v, 2 * v, 0 * v])
    expected = x.clone()
    expected[..., 3] = 0
    project = ProjectInput(directions=dependent, layer=LAYER)
    assert_close(through(model, project)[0], expected, **EXACT)
    at_one = ProjectInput(directions=v, layer=LAYER, positions=1)
    expected = x.clone()
    expected[:, 1, 3] = 0
    assert_close(through(model, at_one)[0], expected, **EXACT)


def test_layers_of_their_own_and_from_the_end(model):
    u = directions(1)[0]
    first = EigenComponents(
        BilinearTensor.from_model(model, 0).interaction(u).eigh(), layer=0
    ).ablate()
    last = dataclasses.replace(eigen(model, None), layer=-1).ablate()
    chain = Chain(first, last).fwd_hooks(model)
    assert [str(name) for name, _ in chain] == [
        "blocks.0.mlp.hook_in",
        "blocks.0.mlp.hook_out",
        READ,
        f"blocks.{LAYER}.mlp.hook_out",
    ]
    expected = through(model, first, eigen(model, None).ablate())[2]
    assert torch.equal(through(model, Chain(first, last))[2], expected)


# ---------------------------------------------------------------------- the model stays as it was


def test_nothing_stays_behind_not_even_after_an_exception(model):
    logits, before = model(TOKENS), hooks_of(model)
    edit = eigen(model, 2).ablate()
    assert not torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=edit.fwd_hooks(model)), logits)
    assert torch.equal(model(TOKENS), logits)

    def fails(value, hook):
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        model.run_with_hooks(TOKENS, fwd_hooks=[*edit.fwd_hooks(model), (WRITTEN, fails)])
    with pytest.raises(IndexError, match="position 6 does not exist: this forward has 6 positions"):
        through(model, eigen(model, 2).ablate(positions=6))
    assert hooks_of(model) == before
    assert torch.equal(model(TOKENS), logits)


def test_a_forward_that_failed_leaves_nothing_for_the_next(model):
    edit = eigen(model, 2).ablate((0, 0))
    hooks = edit.fwd_hooks(model)

    def fails(value, hook):
        raise RuntimeError

    between = [hooks[0], (f"blocks.{LAYER}.mlp.hook_post", fails), hooks[1]]
    with pytest.raises(RuntimeError):
        model.run_with_hooks(TOKENS, fwd_hooks=between)
    other = TOKENS.flip(0)[:, 1:]
    expected = through(model, edit, tokens=other)[2]
    assert torch.equal(model.run_with_hooks(other, fwd_hooks=hooks), expected)


def test_two_models_and_two_threads_share_one_object(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.W_E.mul_(2)
    edit = eigen(model, 2).ablate((0, 0))
    hooks = edit.fwd_hooks(model)  # these very functions, in both
    many = torch.randint(0, 23, (64, 12))
    expected = [through(each, edit, tokens=many)[2] for each in (model, twin)]
    assert not torch.allclose(*expected)
    wrong = []

    def work(which):
        for _ in range(10):
            with torch.no_grad():
                logits = (model, twin)[which].run_with_hooks(many, fwd_hooks=hooks)
            wrong.append(not torch.equal(logits, expected[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 20
    assert not any(wrong)


def test_they_are_immutable_values(model):
    edit = eigen(model, 2).ablate(0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.positions = 3
    loaded = pickle.loads(pickle.dumps(edit))
    assert torch.equal(through(model, loaded)[2], through(model, edit)[2])


def test_generating_with_a_cache_edits_each_new_token():
    model = model64(positional_embedding_type="rotary")
    edit = eigen(model, 2).scale(40.0)
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with model.hooks(fwd_hooks=edit.fwd_hooks(model)):
        cached = model.generate(TOKENS, **options)
    whole = TOKENS
    for _ in range(4):
        whole = torch.cat([whole, through(model, edit, tokens=whole)[2][:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.generate(TOKENS, **options))


# ---------------------------------------------------------------------- gradients


def test_gradients_flow_through(model):
    parts = eigen(model, 2, k=4)
    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    embedding = model.embed.W_E

    def loss(factor):
        edit = Chain(parts.scale(factor, (0, 0)), eigen(model, 1, seed=3).low_rank(5))
        hooks = edit.fwd_hooks(model)
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks, return_type="loss")

    by_factor, by_embedding = torch.autograd.grad(loss(factor), [factor, embedding])
    step = 1e-5
    with torch.no_grad():
        numeric = (loss(factor + step) - loss(factor - step)) / (2 * step)
        assert_close(by_factor, numeric, rtol=1e-6, atol=1e-9)
        along = torch.randn_like(embedding)
        original = embedding.clone()
        values = []
        for sign in (1, -1):
            embedding.copy_(original + sign * step * along)
            values.append(loss(factor))
        embedding.copy_(original)
    numeric = (values[0] - values[1]) / (2 * step)
    assert_close((by_embedding * along).sum(), numeric, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------- SAEs


@pytest.mark.parametrize("error_term", [False, True])
def test_behind_an_sae_they_read_what_the_layer_reads(sae_model, error_term):
    one = sae(READ)
    one.use_error_term = error_term
    edit = eigen(sae_model, 2).ablate((0, 0))
    hooks = edit.fwd_hooks(sae_model)  # made before the SAE is attached
    seen = {}

    def keep(value, hook):
        seen[hook.name] = value

    watch = [(f"{READ}.hook_sae_output", keep), (WRITTEN, keep)]
    sae_model.run_with_hooks_with_saes(TOKENS, saes=[one], fwd_hooks=[*hooks, *watch])
    read, written = seen.values()
    tensor = BilinearTensor.from_model(sae_model, LAYER)
    expected = (
        tensor(read)
        - edit.components.activations(read)[..., 0, 0, None] * (edit.components.writes[0])
    )
    assert_close(written, expected, **EXACT)
    clean = sae_model.run_with_cache(TOKENS)[1][READ]
    assert torch.allclose(read, clean) == error_term
    # And made while it is attached.
    with sae_model.saes([one]):
        inside = sae_model.run_with_hooks(TOKENS, fwd_hooks=edit.fwd_hooks(sae_model))
    outside = sae_model.run_with_hooks_with_saes(TOKENS, saes=[one], fwd_hooks=hooks)
    assert torch.equal(inside, outside)


def test_an_sae_on_the_output_sees_the_edit(sae_model):
    one = sae(WRITTEN)
    edit = eigen(sae_model, 2).ablate((0, 0))
    with sae_model.saes([one]), sae_model.hooks(fwd_hooks=edit.fwd_hooks(sae_model)):
        _, cache = sae_model.run_with_cache(TOKENS)
    edited = through(sae_model, edit)[1]
    assert_close(cache[f"{WRITTEN}.hook_sae_acts_post"], one.encode(edited), **EXACT)


def test_an_sae_on_the_mlps_own_hook_out_comes_first(sae_model):
    hook = f"blocks.{LAYER}.mlp.hook_out"
    one = sae(hook)
    parts = eigen(sae_model, 2)
    with sae_model.saes([one]):
        x, written, _ = through(sae_model)
        edited = through(sae_model, parts.ablate((0, 0)))[1]
    change = -parts.activations(x)[..., 0, 0, None] * parts.writes[0]
    assert_close(edited, written + change, **EXACT)


def test_transcoders(sae_model):
    """One between the layer's hooks takes the layer's place; its error term lets the edit through."""
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name=READ, hook_name_out=WRITTEN)
    one = Transcoder(
        TranscoderConfig(
            d_in=16,
            d_sae=32,
            d_out=16,
            dtype="float64",
            apply_b_dec_to_input=False,
            metadata=metadata,
        )
    )
    edit = eigen(sae_model, 2).ablate((0, 0))
    with sae_model.saes([one], use_error_term=True):
        with_error = sae_model.run_with_hooks(TOKENS, fwd_hooks=edit.fwd_hooks(sae_model))
    assert_close(with_error, through(sae_model, edit)[2], **EXACT)
    with sae_model.saes([one]):
        plain = sae_model(TOKENS)
        without = sae_model.run_with_hooks(TOKENS, fwd_hooks=edit.fwd_hooks(sae_model))
    assert torch.equal(without, plain)


def test_a_gated_mlp_with_identity_writes_at_hook_mlp_out():
    ordinary = HookedSAETransformer.from_config(
        config(act_fn="identity", gated_mlp=True, dtype=torch.float64)
    )
    randomise(ordinary)
    parts = eigen(ordinary, 2, write="dual")
    edit = parts.ablate((1, 0))
    assert [str(name) for name, _ in edit.fwd_hooks(ordinary)] == [READ, WRITTEN]
    x, out, _ = through(ordinary)
    assert_close(
        (through(ordinary, edit)[1] - out) @ parts.reads[1],
        -parts.activations(x)[..., 1, 0],
        **EXACT,
    )
    bare = HookedTransformer.from_config(config(act_fn="identity", gated_mlp=True))
    with pytest.raises(ValueError, match=rf"blocks.1 has no hook point {READ}"):
        edit.fwd_hooks(bare)


# ---------------------------------------------------------------------- what does not fit


def test_processed_models_have_spectra_of_their_own(model):
    processed = copy.deepcopy(model)
    processed.process_weights_()
    parts = eigen(processed, None)
    assert (through(processed, parts.ablate())[1] @ parts.eigen.directions).std() > 0  # the biases
    bare = BilinearTensor.from_model(processed, LAYER).parts()
    x, out, _ = through(processed, parts.ablate())
    assert_close(
        out @ parts.eigen.directions,
        (x @ bare.linear.T + bare.constant) @ parts.eigen.directions,
        **EXACT,
    )
    before = eigen(model, None).ablate()
    with pytest.raises(ValueError, match="the eigendecomposition does not fit") as error:
        before.fwd_hooks(processed)
    assert (
        "the eigendecomposition does not fit blocks.1.mlp: it has width 16 in 'blocks.1.mlp.hook_in"
        in str(error.value)
    )
    assert "after RMSNorm and its weight)', the layer reads width 16 in" in str(error.value)
    assert "after RMSNorm without a weight)'" in str(error.value)
    # Whoever knows better says so.
    spectrum = dataclasses.replace(before.components.eigen, space=None)
    parts = dataclasses.replace(before.components, eigen=spectrum)
    assert parts.ablate().fwd_hooks(processed)


def test_another_layer_width_or_basis_is_refused(model):
    tensor = BilinearTensor.from_model(model, LAYER)
    u = directions(2)
    here = eigen(model, 2)
    with pytest.raises(
        ValueError, match=r"width 16 in 'blocks.1.mlp.hook_in .*the layer reads width"
    ):
        dataclasses.replace(here, layer=0).ablate().fwd_hooks(model)
    folded = tensor.fold(directions(9, 1))
    parts = EigenComponents(folded.interaction(u).eigh(), layer=LAYER)
    with pytest.raises(ValueError, match=r"width 9 in 'directions in blocks.1.mlp.hook_in"):
        parts.keep(0).fwd_hooks(model)
    augmented = EigenComponents(
        tensor.augmented().interaction(u).eigh(), layer=LAYER, augmented=False
    )
    with pytest.raises(
        ValueError, match=r"width 17 in '\[blocks.1.mlp.hook_in .*, 1\]', the layer"
    ):
        augmented.ablate().fwd_hooks(model)
    narrow = dataclasses.replace(
        here, eigen=dataclasses.replace(here.eigen, directions=directions(2, d=5))
    )
    with pytest.raises(
        ValueError, match=r"the output direction does not fit.*width 5.*writes width 16"
    ):
        narrow.ablate().fwd_hooks(model)
    projected = ReplaceLayer(tensor.project(directions(16)), layer=LAYER)
    with pytest.raises(
        ValueError, match=r"the tensor does not fit.*'directions in blocks.1.hook_mlp_o"
    ):
        projected.fwd_hooks(model)
    components = HOSVDComponents(hosvd(BilinearTensor.from_model(model, 0), 2), layer=LAYER)
    with pytest.raises(ValueError, match=r"the HOSVD does not fit.*'blocks.0.hook_mlp_out'"):
        components.ablate().fwd_hooks(model)
    with pytest.raises(ValueError, match=r"the direction does not fit.*width 3"):
        ProjectInput(directions=torch.ones(3), layer=LAYER).fwd_hooks(model)


def test_approximations_of_a_layer_take_its_place(model):
    tensor = BilinearTensor.from_model(model, LAYER)
    x, _, logits = through(model)
    whole = ReplaceLayer(tensor, layer=LAYER)
    assert_close(through(model, whole)[2], logits, **EXACT)
    for layer in (tucker(tensor, 6, 8).tensor, cp(tensor, 4, restarts=1, steps=3).tensor):
        replaced = through(model, ReplaceLayer(layer, layer=LAYER))
        assert_close(replaced[1], layer(x), **EXACT)
        assert not torch.allclose(replaced[2], logits)


def test_models_and_layers_that_are_not_there(model):
    edit = eigen(model, 2)
    with pytest.raises(TypeError, match=r"a model with TransformerLens hooks .* got Linear"):
        edit.ablate().fwd_hooks(torch.nn.Linear(2, 2))
    with pytest.raises(IndexError, match="layer 2 does not exist: the model's layers are 0 to 1"):
        dataclasses.replace(edit, layer=2).ablate().fwd_hooks(model)
    with pytest.raises(IndexError, match="position -7 does not exist"):
        through(model, edit.ablate(positions=-7))
    with pytest.raises(ValueError, match=r"mask of positions must have shape \[6\] or \[3, 6\]"):
        through(model, edit.ablate(positions=torch.ones(5, dtype=torch.bool)))
    assert torch.equal(through(model, edit.ablate(positions=[]))[2], through(model)[2])
    with pytest.raises(TypeError, match="positions are None for all"):
        through(model, edit.ablate(positions=torch.ones(5)))


def test_a_model_of_another_kind_needs_hook_names_only():
    """No reader gives its spaces, so the layer number must agree."""
    tensor = BilinearTensor.from_model(model64(), LAYER)

    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_dict = {
                f"blocks.{i}.mlp.hook_{end}": None for i in (0, 1) for end in ("in", "out")
            }

    u = directions(1)[0]
    parts = EigenComponents(tensor.interaction(u).eigh(), layer=LAYER)
    assert len(parts.ablate().fwd_hooks(Foreign())) == 2
    with pytest.raises(
        ValueError, match=r"the eigendecomposition does not fit blocks.0.mlp.*'blocks.0.mlp.hook_"
    ):
        dataclasses.replace(parts, layer=0).ablate().fwd_hooks(Foreign())


def test_an_intervention_of_ones_own(model):
    class Both(Intervention):
        def fwd_hooks(self, model):
            return [(WRITTEN, lambda value, hook: 0 * value)]

    assert not through(model, Chain(Both()))[1].any()


@pytest.mark.usefixtures("unchecked")
def test_a_chain_is_of_interventions():
    with pytest.raises(TypeError, match=r"Chain\(first, second\), got list"):
        Chain([Add(layer=0)])


def test_a_replacement_shows_its_tensor_or_what_it_approximates(model):
    tensor = BilinearTensor.from_model(model, LAYER)
    assert repr(tensor) in repr(ReplaceLayer(tensor, layer=LAYER))
    note = "here (approximation of a SwiGLU layer, linear, R^2 0.9)"
    near = ReplaceLayer(dataclasses.replace(tensor, output_space=note), layer=LAYER)
    assert repr(near) == (
        f"ReplaceLayer(layer {LAYER}: approximation of a SwiGLU layer, linear, R^2 0.9)"
    )


def test_a_layer_without_hook_points_still_has_a_width_and_a_space():
    bare = HookedTransformer.from_config(config(act_fn="identity", gated_mlp=True))
    with pytest.raises(ValueError, match="has no hook point"):
        LayerPoints.of(bare, 0)
    tensor = BilinearTensor.from_model(bare, 0)
    require_layer_tensor(bare, 0, tensor)
    with pytest.raises(ValueError, match="the tensor does not fit"):
        require_layer_tensor(bare, 0, tensor.project(torch.eye(16)[:3]))
