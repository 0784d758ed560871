"""Dictionaries against SAELens's own forward, for every architecture."""

import pytest
import torch
from sae_lens import SAE
from torch.testing import assert_close

from tests.features.building import ARCHITECTURES, TOKENS, TRANSCODERS, D, model, sae
from tl_bilinear import Dictionary, FeatureInteractions
from tl_bilinear.features import dictionary as registry
from tl_bilinear.features import register_dictionary

EXACT = {"rtol": 1e-10, "atol": 1e-10}
NORMALISATIONS = ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]


def activations(seed=0, n=50):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, D, generator=generator, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reads_as_saelens_does(architecture, normalisation, apply_b_dec):
    made = sae(
        "h", architecture, dtype="float64", normalize_activations=normalisation,
        apply_b_dec_to_input=apply_b_dec,
    )  # fmt: skip
    d = Dictionary.of(made)
    x = activations()
    reading = d.read(x)
    whole = reading.coefficients @ d.decoder + sum(reading.rest.values())
    assert_close(whole, x, **EXACT)
    assert_close(x - reading.rest["error"], made(x), **EXACT)
    assert ("mean" in reading.rest) == (normalisation == "layer_norm")

    before = []
    made.hook_sae_acts_pre.add_hook(lambda value, hook: before.append(value))
    acts = made.encode(x)
    made.reset_hooks()
    p = d.preactivation(x)
    assert_close(p, before[0], **EXACT)
    assert (acts != 0).any()
    assert_close(p[acts != 0], acts[acts != 0], **EXACT)
    assert_close(d.preactivation(x, torch.tensor([3, 1])), p[:, [3, 1]], **EXACT)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_decoder_norms_are_saelenss(architecture):
    made = sae("h", architecture, dtype="float64", rescale_acts_by_decoder_norm=True)
    d = Dictionary.of(made)
    x = activations()
    reading, acts = d.read(x), made.encode(x)
    assert_close(x - reading.rest["error"], made(x), **EXACT)
    assert_close(d.preactivation(x)[acts != 0], acts[acts != 0], **EXACT)
    assert_close(d.decoder.norm(dim=1), torch.ones(d.n, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_write_elsewhere(architecture):
    made = sae(
        "blocks.0.mlp.hook_in", architecture, dtype="float64", hook_out="blocks.0.hook_mlp_out"
    )
    d = Dictionary.of(made)
    assert (d.encoder_hook, d.hook) == ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
    source, x = activations(0), activations(1)
    reading = d.read(x, source)
    assert_close(x - reading.rest["error"], made(source), **EXACT)
    assert ("skip" in reading.rest) == ("skip" in architecture)
    if "skip" in architecture:
        assert_close(reading.rest["skip"], source @ made.W_skip.T, **EXACT)
    acts = made.encode(source)
    assert_close(d.preactivation(source)[acts != 0], acts[acts != 0], **EXACT)


def test_batchtopk_and_matryoshka_are_read_as_they_are_saved(tmp_path):
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    for cls, config, more in (
        (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
        (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"matryoshka_widths": [10, 40]},
        ),
    ):
        training = cls(config(d_in=D, d_sae=40, k=6, dtype="float64", **more))
        with torch.no_grad():
            for parameter in training.parameters():
                parameter.copy_(torch.randn_like(parameter))
            training.topk_threshold = torch.tensor(0.5, dtype=torch.float64)
        folder = tmp_path / cls.__name__
        training.save_inference_model(folder)
        made = SAE.load_from_disk(folder)
        x = activations()
        reading = Dictionary.of(made).read(x)
        assert_close(x - reading.rest["error"], made(x), **EXACT)


def test_features_that_are_not_read_along_a_direction_still_write_along_one():
    made = sae("h", "matching_pursuit", dtype="float64", residual_threshold=0.1, max_iterations=4)
    d = Dictionary.of(made)
    assert d.encoder is None
    x = activations()
    reading = d.read(x)
    assert_close(x - reading.rest["error"], made(x), **EXACT)
    with pytest.raises(ValueError, match="has no encoder"):
        d.preactivation(x)


def test_an_sae_that_reads_several_tokens_at_once_is_refused():
    made = sae("h", "temporal", n=512, tied_weights=False)
    with pytest.raises(TypeError, match="TemporalSAE could not encode activations of shape"):
        Dictionary.of(made)


def test_an_sae_whose_decode_is_not_its_decoder_is_refused():
    made = sae("h", dtype="float64")
    decode = made.decode
    made.decode = lambda z: decode(z).tanh()
    with pytest.raises(
        TypeError, match="its decode is not W_dec applied to the features plus b_dec"
    ):
        Dictionary.of(made)


@pytest.mark.usefixtures("unchecked")
def test_plain_matrices_and_what_is_neither():
    rows = torch.randn(5, D)
    d = Dictionary.of(rows, labels=list("abcde"))
    assert (d.n, d.d, d.label(2)) == (5, D, "2 c")
    assert Dictionary.of(d) is d
    with pytest.raises(ValueError, match="has directions but no activations"):
        d.read(torch.randn(3, D))
    with pytest.raises(TypeError, match="expected a SAELens SAE or transcoder"):
        Dictionary.of("an sae")
    with pytest.raises(ValueError, match="one feature a row"):
        Dictionary(torch.randn(5))
    with pytest.raises(ValueError, match="3 labels for 5 features"):
        Dictionary(rows, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"decoder_bias must have shape \[16\]"):
        Dictionary(rows, decoder_bias=torch.zeros(3))


def test_a_matrix_with_an_encoder_of_ones_own():
    rows = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    d = Dictionary(rows, encoder=rows, encode=lambda x: x @ rows.T)
    x = activations()
    reading = d.read(x)
    assert_close(reading.rest["error"], torch.zeros_like(x), **EXACT)
    assert_close(d.preactivation(x), reading.coefficients, **EXACT)


class Overcomplete:
    """An SAE of a class that nobody knows, with names of its own."""

    def __init__(self, where, n=20, spoiled=0.0):
        generator = torch.Generator().manual_seed(n)
        self.directions = torch.randn(n, D, generator=generator, dtype=torch.float64)
        self.centre = torch.randn(D, generator=generator, dtype=torch.float64)
        self.where, self.spoiled = where, spoiled

    def encode(self, x):
        return ((x - self.centre) @ self.directions.T - 1).relu()

    def decode(self, z):
        return z @ self.directions + self.centre + self.spoiled * z.square().sum(-1, keepdim=True)


def read_overcomplete(mine):
    return Dictionary(
        mine.directions,
        hook=mine.where,
        encoder=mine.directions,
        encoder_hook=mine.where,
        decoder_bias=mine.centre,
        encoder_bias=-torch.ones(len(mine.directions), dtype=torch.float64),
        encoder_offset=-mine.directions @ mine.centre,
        encode=mine.encode,
        special_tokens=[1],
        sae=mine,
    )


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_readers", dict(registry._readers))
    register_dictionary(
        "overcomplete", lambda source: isinstance(source, Overcomplete), read_overcomplete
    )


def test_a_class_of_ones_own_is_read(registered):
    into = Overcomplete("blocks.1.hook_resid_mid")
    out = Overcomplete("blocks.1.hook_mlp_out", n=12)
    f = FeatureInteractions(model(), 1, into, out)
    assert repr(f.inputs) == f"Dictionary(Overcomplete, n=20, d={D}, hook=blocks.1.hook_resid_mid)"
    assert f.output == "encoder"
    run = f.run(TOKENS, progress=False)
    assert run.mask.tolist() == [[False, False, True, False, True, True], [False] + 5 * [True]]
    assert_close(run.activations(side="input"), into.encode(run.hook_activations), **EXACT)
    assert_close(run.activations(), run.preactivations().relu(), **EXACT)
    for feature in range(3):
        found = run.attribute(feature, 4)
        expected = (run.output[0, 4] - out.centre) @ out.directions[feature] - 1
        assert found.total == pytest.approx(float(expected), abs=1e-10)


def test_a_class_of_ones_own_is_checked(registered):
    with pytest.raises(TypeError, match="Overcomplete: its decode is not W_dec applied to"):
        Dictionary.of(Overcomplete("h", spoiled=0.3))


@pytest.mark.usefixtures("registered")
def test_the_registry():
    with pytest.raises(ValueError, match="'overcomplete' is registered already; names taken"):
        register_dictionary("overcomplete", callable, read_overcomplete)
    # The last comes first: a reader of one's own for a kind that ships.
    register_dictionary(
        "mine",
        lambda source: hasattr(source, "W_dec"),
        lambda source: Dictionary(source.W_dec.detach(), hook="mine"),
    )
    assert Dictionary.of(sae("h")).hook == "mine"


def test_what_no_reader_knows():
    with pytest.raises(
        TypeError, match=r"got object; register_dictionary.* \(there are gated sae, sae\)"
    ):
        Dictionary.of(object())


def test_float32():
    made = sae("h", "jumprelu")
    d = Dictionary.of(made)
    x = activations().float()
    assert_close(x - d.read(x).rest["error"], made(x), rtol=1e-5, atol=1e-5)
