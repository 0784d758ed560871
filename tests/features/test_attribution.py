"""Exact attribution on a prompt: contributions sum to what the model computes."""

import pytest
import torch
from torch.testing import assert_close

from tests.features.building import ARCHITECTURES, N_OUT, TOKENS, D, model, sae
from tl_bilinear import BilinearTensor, FeatureInteractions
from tl_bilinear.features import Attribution

LAYER = "blocks.1"
INPUTS = [f"{LAYER}.mlp.hook_in", f"{LAYER}.ln2.hook_normalized", f"{LAYER}.hook_resid_mid"]
OUTPUT = f"{LAYER}.hook_mlp_out"


def check(f, tolerance, position=4, feature=3):
    found = f.run(TOKENS[1]).attribute(feature, position)
    _, cache = f.model.run_with_cache(TOKENS[1:])
    output = cache[OUTPUT][0, position]
    before = []
    made = f.outputs.sae
    if f.output == "encoder":  # SAELens's own pre-activation, of the model's own activation
        made.hook_sae_acts_pre.add_hook(lambda value, hook: before.append(value.detach()))
        made.encode(output[None])
        made.reset_hooks()
        measured = float(before[0][0, feature])
    else:
        measured = float(output @ f.outputs.decoder[feature].to(output))
    scale = max(1.0, float(found.quadratic.abs().max()))
    assert abs(found.measured - measured) <= tolerance * scale
    assert abs(found.total - measured) <= tolerance * scale
    assert abs(sum(found.terms().values()) - measured) <= tolerance * scale
    assert found.error <= tolerance
    return found


@pytest.mark.parametrize("hook", INPUTS)
@pytest.mark.parametrize("norm", ["RMS", "RMSPre", "LN", "LNPre"])
def test_exact_at_every_hook_and_norm(hook, norm):
    f = FeatureInteractions(
        model(normalization_type=norm), 1, sae(hook, dtype="float64"),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64"),
    )  # fmt: skip
    found = check(f, 1e-12)
    assert found.rest_names == ["b_dec", "error"]
    assert {"b_out", "b_enc", "- e . b_dec"} <= set(found.constants)


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_for_every_architecture(architecture, normalisation):
    made = [
        sae(
            hook, architecture, n=n, seed=seed, dtype="float64", normalize_activations=normalisation
        )
        for hook, n, seed in ((INPUTS[2], 40, 0), (OUTPUT, N_OUT, 1))
    ]
    found = check(FeatureInteractions(model(), 1, *made), 1e-12)
    assert ("mean" in found.rest_names) == (normalisation == "layer_norm")


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
def test_exact_through_transcoders(architecture):
    """One that writes the layer's input, and one that writes its output."""
    into = sae("blocks.0.hook_resid_pre", architecture, hook_out=INPUTS[2], dtype="float64")
    out = sae(INPUTS[0], architecture, n=N_OUT, seed=1, hook_out=OUTPUT, dtype="float64")
    f = FeatureInteractions(model(), 1, into, out)
    assert f.output == "decoder"
    found = check(f, 1e-12)
    assert ("skip" in found.rest_names) == ("skip" in architecture)


def test_exact_on_a_processed_model_and_without_biases():
    built = model(bilinear_bias=False, normalization_type="LN")
    import copy

    folded = copy.deepcopy(built)
    folded.process_weights_()
    f = FeatureInteractions(
        folded.to(torch.float64), 1, sae(INPUTS[2], dtype="float64"),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64"),
    )  # fmt: skip
    found = check(f, 1e-7)
    bare = FeatureInteractions(
        model(bilinear_bias=False), 1, sae(INPUTS[2], dtype="float64"),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64"),
    )  # fmt: skip
    found = check(bare, 1e-12)
    assert not found.linear.any()
    assert "b_out" not in found.constants


def test_float32():
    f = FeatureInteractions(model(torch.float32), 1, sae(INPUTS[2]), sae(OUTPUT, n=N_OUT, seed=1))
    for position in range(6):
        check(f, 1e-5, position)


def test_pairs_are_what_the_weights_say():
    f = FeatureInteractions(
        model(), 1, sae(INPUTS[0], dtype="float64"), sae(OUTPUT, n=N_OUT, seed=1, dtype="float64")
    )
    run = f.run(TOKENS[:1])
    found = run.attribute(7, 2)
    layer = BilinearTensor.from_model(f.model, 1).dense()
    Q = torch.einsum("i,ijk->jk", f.outputs.encoder[7], layer)
    z = f.inputs.sae.encode(run.x[0, 2])
    assert found.features.tolist() == z.nonzero()[:, 0].tolist()
    d = z[found.features, None] * f.inputs.decoder[found.features]
    assert_close(found.pairs, d @ Q @ d.T, rtol=1e-10, atol=1e-10)
    table = found.to_pandas()
    assert len(table) == len(found.features) * (len(found.features) + 1) // 2
    assert table["contribution"].sum() == pytest.approx(found.terms()["features x features"])
    assert table["contribution"].abs().is_monotonic_decreasing


def test_text_and_storage(tmp_path):
    labels = [f"feature-{i}" for i in range(40)]
    from tl_bilinear import Dictionary

    f = FeatureInteractions(
        model(), 1, Dictionary.of(sae(INPUTS[0], dtype="float64"), labels=labels),
        sae(OUTPUT, n=N_OUT, seed=1, dtype="float64"),
    )  # fmt: skip
    found = f.run(TOKENS[0]).attribute(7, -1)
    assert found.position == 5
    text = found.text(3)
    assert text.startswith("feature 7 at position 5: ")
    assert "feature-" in text.splitlines()[1]
    assert text.count("\n") == 3 + len([v for v in found.terms().values() if v])
    found.save(tmp_path / "x")
    loaded = Attribution.load(tmp_path / "x")
    assert loaded.terms() == found.terms()
    assert loaded.labels == found.labels


def test_bad_requests():
    f = FeatureInteractions(model(), 1, sae(INPUTS[0]), sae(OUTPUT, n=N_OUT))
    run = f.run(TOKENS)
    with pytest.raises(IndexError, match="sequence 2 of a run of 2"):
        run.attribute(3, sequence=2)
    with pytest.raises(IndexError, match="position 9 does not exist: the prompt has 6 tokens"):
        run.attribute(3, 9)
    with pytest.raises(ValueError, match="tokens must be ids"):
        f.run(torch.randn(3, D))
    plain = FeatureInteractions(model(), 1, torch.randn(7, D), torch.randn(3, D))
    with pytest.raises(ValueError, match="has directions but no activations"):
        plain.run(TOKENS[0]).attribute(1)


def test_attached_saes_are_refused():
    import copy

    built = copy.deepcopy(model(torch.float32))
    made = sae(INPUTS[0])
    f = FeatureInteractions(built, 1, made, sae(OUTPUT, n=N_OUT))
    built.add_sae(made)
    with pytest.raises(
        ValueError, match=r"SAEs are attached to the model at blocks\.1\.mlp\.hook_in"
    ):
        f.run(TOKENS)
