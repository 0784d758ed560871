"""Predicted changes against measured ones, exact where the theory is, and wrong where it must be."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.running import EXACT, LAYER, TOKENS, directions, eigen, model64, through
from tests.models.building import bilinear_model
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import (
    Chain,
    EigenComponents,
    HOSVDComponents,
    Intervention,
    ReplaceLayer,
    Trial,
    Verification,
    effects,
    logit_difference,
    loss_added,
    next_token_loss,
    verify,
    verify_trials,
)
from tl_bilinear.tensor import hosvd

FEW = (slice(None), slice(2))


@pytest.fixture(scope="module")
def model():
    return model64()


def check(model, parts, which=FEW, **options):
    return verify(model, TOKENS, parts, which, progress=False, **options)


@pytest.mark.parametrize("at", ["output", "input"])
def test_predicted_is_measured(model, at):
    found = check(model, eigen(model, 2, write="dual"), at=at, controls=3)
    assert found.predicted.shape == found.measured.shape == (4, 2 if at == "output" else 1, 18)
    assert found.control_measured.shape[:2] == (4, 3)
    assert_close(found.predicted, found.measured, **EXACT)
    assert found.error.max() < 1e-10
    assert found.predicted.abs().max() > 0.1
    assert found.labels == {"direction": [0, 0, 1, 1], "component": [0, 1, 0, 1]}


@pytest.mark.parametrize("at", ["output", "input"])
def test_in_float32_to_1e_5(at):
    single = bilinear_model()
    found = check(single, eigen(single, 2, write="dual"), at=at)
    assert found.predicted.dtype == torch.float32
    assert found.error.max() < 1e-5


def test_the_measured_numbers_are_those_of_the_runs(model):
    parts = eigen(model, 2)
    read = directions(3, seed=8)
    found = check(model, parts, at="output", read=read, positions=slice(1, 4))
    x, out, _ = through(model)
    run = through(model, parts.ablate((1, 0), positions=slice(1, 4)))[1]
    expected = ((run - out)[:, 1:4] @ read.T).flatten(0, 1).T
    assert_close(found.measured[2], expected, **EXACT)
    assert_close(found.scale[2], (out[:, 1:4] @ read.T).flatten(0, 1).abs().amax(0), **EXACT)
    assert_close(
        found.predicted[2],
        -(parts.activations(x)[:, 1:4, 1, 0].flatten() * (read @ parts.writes[1])[:, None]),
        **EXACT,
    )


def test_the_effect_is_the_loss_added(model):
    parts = eigen(model, 2)
    found = check(model, parts, (0, [1, 2]), at="output")
    added = loss_added(
        model, TOKENS, {"1": parts.ablate((0, 1)), "2": parts.ablate((0, 2))}, progress=False
    )
    assert_close(found.effect, added.patched - added.clean, **EXACT)
    assert_close(found.interval, added.interval, **EXACT)
    assert_close(found.clean_effect, added.clean, **EXACT)
    found = check(model, parts, (0, 1), at="output", effect=logit_difference(3, 4))
    logits, edited = through(model)[2], through(model, parts.ablate((0, 1)))[2]
    change = (edited - logits)[:, -1]
    assert_close(found.effect[0], change[:, 3] - change[:, 4], **EXACT)


def test_a_spectrum_of_another_layer_fails_at_the_input_only(model):
    """At the output any component is subtracted as predicted; the weights tell the difference."""
    u = directions(2)
    other = BilinearTensor.from_model(model, 0).interaction(u).eigh()
    parts = EigenComponents(dataclasses.replace(other, space=None, output_space=None), layer=LAYER)
    assert check(model, parts, at="output").error.max() < 1e-10
    assert check(model, parts, at="input").error.min() > 0.01
    assert check(model, parts).error.min() > 0.01


def test_the_default_is_the_check_that_can_fail(model):
    parts, tensor = eigen(model, 2), BilinearTensor.from_model(model, LAYER)
    augmented = EigenComponents(tensor.augmented().interaction(directions(2)).eigh(), layer=LAYER)
    assert check(model, parts).at == "input"
    assert check(model, parts, read=directions(1)).at == "output"
    assert check(model, augmented).at == "output"
    assert check(model, HOSVDComponents(hosvd(tensor, 2), layer=LAYER), None).at == "output"


def test_controls_at_the_input_fail_and_are_seeded(model):
    parts = eigen(model, 2)
    found = check(model, parts, at="input", controls=4)
    assert found.control_error.min() > 1e-3
    again = check(model, parts, at="input", controls=4)
    assert torch.equal(found.control_measured, again.control_measured)
    other = check(model, parts, at="input", controls=4, seed=1)
    assert not torch.allclose(found.control_measured, other.control_measured)
    none = check(model, parts, controls=0)
    assert none.control_error.isnan().all()
    assert none.to_pandas()["control_effect"].isna().all()


def test_controls_at_the_output_write_as_much_elsewhere(model):
    parts = eigen(model, 1)
    read = torch.eye(16, dtype=torch.float64)  # the whole change
    found = check(model, parts, (0, 0), controls=5, read=read)
    own = found.measured[0].norm(dim=0)
    for control in found.control_measured[0]:
        assert_close(control.norm(dim=0), own, **EXACT)
        assert not torch.allclose(control, found.measured[0])
    assert_close(found.control_predicted, found.control_measured, **EXACT)


def test_input_biases(model):
    biased = model64(bilinear_bias=True)
    tensor = BilinearTensor.from_model(biased, LAYER)
    u = directions(2)
    parts = EigenComponents(tensor.interaction(u).eigh(), layer=LAYER)
    assert check(biased, parts, at="output").error.max() < 1e-10
    linear = tensor.project(u).parts().linear
    assert check(biased, parts, at="input", linear=0 * linear).error.min() > 1e-3
    assert check(biased, parts, at="input").error.max() < 1e-10  # read from the model
    assert check(biased, parts, at="input", linear=linear).error.max() < 1e-10
    augmented = EigenComponents(tensor.augmented().interaction(u).eigh(), layer=LAYER)
    assert check(biased, augmented).error.max() < 1e-10


@pytest.mark.parametrize("bias", [False, True])
def test_hosvd_components(bias):
    model = model64(bilinear_bias=bias)
    tensor = BilinearTensor.from_model(model, LAYER)
    components = hosvd(tensor.augmented() if bias else tensor, 4)
    found = check(model, HOSVDComponents(components, layer=LAYER), None)
    assert found.error.max() < 1e-10
    assert found.labels == {"direction": [0, 1, 2, 3], "component": [0, 0, 0, 0]}
    if bias:  # without the biases in its form, the form does not predict the model's output
        bare = HOSVDComponents(hosvd(tensor, 4), layer=LAYER)
        assert check(model, bare, None).error.max() > 1e-3


def test_a_mask_of_tokens_and_small_batches(model):
    mask = TOKENS == 5
    parts = eigen(model, 2)
    masked = check(model, parts, positions=mask, batch_size=1)
    assert masked.measured.shape[-1] == int(mask.sum())
    whole = check(model, parts, batch_size=2)
    assert_close(masked.predicted, whole.predicted[..., mask.flatten()], **EXACT)
    assert_close(whole.measured, check(model, parts).measured, **EXACT)


def test_table_top_and_storage(model, tmp_path):
    found = check(model, eigen(model, 2), at="output", controls=2)
    table = found.to_pandas()
    assert list(table.columns) == [
        *("direction", "component", "read", "predicted", "measured", "error", "control_error"),
        *("effect", "low", "high", "control_effect"),
    ]
    assert len(table) == 8
    row = table[(table.direction == 1) & (table.component == 0) & (table["read"] == 1)].iloc[0]
    assert_close(row.predicted, float(found.predicted[2, 1].mean()))
    assert_close(row.effect, float(found.effect[2].mean()))
    assert_close(row.control_effect, float(found.control_effect[2].mean()))
    most = found.top(2)
    order = found.effect.mean(-1).abs().argsort(descending=True)[:2].tolist()
    assert most.labels["component"] == [found.labels["component"][i] for i in order]
    assert torch.equal(most.measured, found.measured[order])
    found.save(tmp_path / "v.safetensors")
    loaded = Verification.load(tmp_path / "v.safetensors")
    assert loaded.to_pandas().equals(table)
    assert loaded.at == "output"


def test_trials_of_ones_own(model):
    """Halving a component, say."""
    parts = eigen(model, 1)
    zero = torch.zeros(1, dtype=torch.long)
    trial = Trial(parts.scale(0.5, (0, 0)), lambda x: -0.5 * parts.at(x, zero), parts.reads)
    options = {"labels": {"what": ["half"]}, "at": "output", "progress": False}
    found = verify_trials(model, TOKENS, LAYER, [[trial, trial]], **options)
    assert found.error.max() < 1e-10
    assert found.to_pandas()["what"].tolist() == ["half"]
    with pytest.raises(ValueError, match=r"got 2 groups, labels of length \[1\]"):
        verify_trials(model, TOKENS, LAYER, [[trial], [trial]], **options)
    with pytest.raises(ValueError, match="equally many trials"):
        verify_trials(model, TOKENS, LAYER, [], **(options | {"labels": {}}))


def test_directions_that_are_parameters(model):
    """As ``model.W_U[:, token]`` is: results are plain numbers all the same."""
    tensor, u = BilinearTensor.from_model(model, LAYER), model.W_U[:, 4]
    assert u.requires_grad
    parts = EigenComponents(tensor.interaction(u).eigh(), layer=LAYER)
    for at in ("output", "input"):
        found = check(model, parts, [0, 1], at=at)
        assert found.error.max() < 1e-10
        assert len(found.to_pandas()) == 2
    assert len(loss_added(model, TOKENS, parts.ablate(), progress=False).to_pandas()) == 1


def test_the_model_is_as_before(model):
    logits = model(TOKENS)
    check(model, eigen(model, 1), at="input")
    assert torch.equal(model(TOKENS), logits)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    with pytest.raises(ValueError, match=r"positions=slice\(9, None, None\) chooses no token"):
        check(model, eigen(model, 1), positions=slice(9, None))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused(model):
    parts = eigen(model, 2)
    components = HOSVDComponents(hosvd(BilinearTensor.from_model(model, LAYER), 2), layer=LAYER)
    with pytest.raises(ValueError, match="at must be 'output' or 'input', got 'both'"):
        check(model, parts, at="both")
    with pytest.raises(ValueError, match="are not directions of it: use at='output'"):
        check(model, components, None, at="input")
    with pytest.raises(ValueError, match="leave read out"):
        check(model, parts, at="input", read=directions(1))
    with pytest.raises(ValueError, match="linear belongs to at='input'"):
        check(model, parts, at="output", linear=directions(2))
    with pytest.raises(ValueError, match="controls must be a number of random controls"):
        check(model, parts, controls=-1)
    with pytest.raises(ValueError, match=r"read must have shape \[\.\.\., 16\]"):
        check(model, parts, read=directions(1, d=5))
    with pytest.raises(IndexError, match="chooses nothing"):
        check(model, parts, 7)
    with pytest.raises(ValueError, match="the eigendecomposition does not fit"):
        check(model, dataclasses.replace(parts, layer=0))


@pytest.mark.parametrize("at", ["input", "output"])
def test_runs_that_start_at_the_block_are_the_whole_ones(model, at, monkeypatch):
    parts = eigen(model, 2)
    started = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda *a, **g: (started.append(g.get("start_at_layer")), forward(*a, **g))[1],
    )
    kind, attended = type(model.blocks[LAYER].attn), []
    attend = kind.forward
    with monkeypatch.context() as counting:
        counting.setattr(
            kind, "forward", lambda *a, **g: (attended.append(a[0]), attend(*a, **g))[1]
        )
        found = check(model, parts, at=at, controls=2)
    assert started[0] is None
    assert set(started[1:]) == {LAYER}
    assert len(attended) == len(model.blocks)  # of the clean run; edited ones know what it gave
    monkeypatch.setattr(effects, "starts_at_blocks", lambda model: False)
    started.clear()
    whole = check(model, parts, at=at, controls=2)
    assert set(started) == {None}
    for name in ("measured", "predicted", "effect", "control_effect", "clean_effect"):
        assert_close(getattr(found, name), getattr(whole, name), **EXACT)


@dataclasses.dataclass(frozen=True, eq=False)
class Rolled(Intervention):
    """Each coordinate at the next one's place."""

    at: str

    def fwd_hooks(self, model):
        return [(self.at, lambda value, hook: value.roll(1, -1))]


AFTER = ["hook_resid_mid", "ln2.hook_normalized", "mlp.hook_pre", "hook_mlp_out", "hook_resid_post"]
BEFORE = ["hook_resid_pre", "ln1.hook_normalized", "attn.hook_z", "hook_attn_out"]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("point", [*BEFORE, *AFTER])
def test_an_edit_at_any_hook_is_that_of_a_whole_run(model, layer, point):
    edit = Rolled(f"blocks.{layer}.{point}")
    found = loss_added(model, TOKENS, edit, progress=False)
    with edit.applied(model):
        loss = next_token_loss(model(TOKENS), TOKENS)
    assert_close(found.patched[0], loss, **EXACT)
    assert (found.patched[0] - found.clean).abs().max() > 1e-4
    assert "forward" not in vars(model.blocks[layer].attn)


def test_an_edit_of_two_layers_starts_at_the_first(model):
    late = eigen(model, 2).ablate((0, 0))
    tensor = BilinearTensor.from_model(model, 0)
    early = ReplaceLayer(tensor * 0.5, layer=0)
    edits = {"both": Chain(late, early), "late": late}
    found = loss_added(model, TOKENS, edits, progress=False)
    for name, edit in edits.items():
        with edit.applied(model):
            loss = next_token_loss(model(TOKENS), TOKENS)
        assert_close(found.patched[found.names.index(name)], loss, **EXACT)


def test_a_table_has_the_means_over_tokens_of_each_component_and_read_direction(model):
    found = check(model, eigen(model, 2), at="output", read=directions(3, seed=8))
    table = found.to_pandas()
    rows = [(c, r) for c in range(len(found.scale)) for r in range(3)]
    assert len(table) == len(rows) == 12
    for name in ("predicted", "measured"):
        values = getattr(found, name)
        means = [sum(values[c, r].tolist()) / values.shape[-1] for c, r in rows]
        assert table[name].tolist() == pytest.approx(means)


def test_sequences_go_through_the_model_as_many_at_a_time_as_asked(model):
    sizes = []
    watch = ("hook_embed", lambda value, hook: sizes.append(len(value)))
    with model.hooks(fwd_hooks=[watch]):
        one = check(model, eigen(model, 2), at="output", batch_size=1)
        assert set(sizes) == {1}
        assert_close(one.measured, check(model, eigen(model, 2), at="output").measured, **EXACT)
    assert set(sizes) == {1, len(TOKENS)}


def test_a_loss_needs_a_second_token(model):
    with pytest.raises(ValueError, match="pos at least 2"):
        verify(model, TOKENS[:, :1], eigen(model, 2), FEW, progress=False)
