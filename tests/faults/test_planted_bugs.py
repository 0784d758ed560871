"""Small bugs that a person could write, and that no test noticed once: each has the test that does.

The patterns behind them: every field of what a digest is made of is varied; fixtures have biases, a
normalising SAE, uneven batches and a first token that matters; controls are compared one by one; oracles
are loops that share no code with what they judge.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from tests.faults.building import LAYER, OUT, images, layer
from tests.features.building import D, model, sae
from tests.hooks.running import TOKENS, eigen, model64
from tests.recipes.stories import make_stories
from tl_bilinear import FeatureInteractions, cli
from tl_bilinear.features import evaluate_saes
from tl_bilinear.features.labels import name_features
from tl_bilinear.hooks import verify
from tl_bilinear.models.spaces import norm_weight
from tl_bilinear.paper import class_spectra, truncate
from tl_bilinear.paper.neurons import shared_neurons
from tl_bilinear.recipes.images import TrainingConfig, train_classifier
from tl_bilinear.recipes.images.runs import run_key
from tl_bilinear.recipes.images.training import _kept
from tl_bilinear.recipes.language import FinetuneConfig, LanguageConfig, SAETrainingConfig
from tl_bilinear.recipes.language import train_tokenizer as make
from tl_bilinear.recipes.language.run_folder import work_in
from tl_bilinear.recipes.language.tokenizer import tokenizer_digest
from tl_bilinear.tensor import BilinearTensor

IN = f"blocks.{LAYER}.hook_resid_mid"
TEXT = torch.randint(0, 23, (5, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def features():
    """An input dictionary before the norm, and one behind the layer that normalises what it reads."""
    out = sae(OUT, n=30, seed=1, normalize_activations="layer_norm", dtype="float64")
    return FeatureInteractions(model(), LAYER, sae(IN, dtype="float64"), out)


@pytest.fixture(scope="module")
def run(features):
    """Five sequences, two at a time: the last batch is smaller. Nothing is left out but one token."""
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[1, 3] = False
    return features.run(TEXT, mask=mask, batch_size=2, progress=False)


def counted(run):
    return [(i, j) for i in range(5) for j in range(7) if bool(run.mask[i, j])]


# ---------------------------------------------------------------------- features


def approximation(run, feature, k):
    """The k first terms of a pre-activation, token by token, times what layer norm makes of it."""
    known = run.features
    dense = known.layer_tensor.interaction(known.directions[feature]).dense()
    values, vectors = torch.linalg.eigh(dense)
    order = values.abs().argsort(descending=True)[:k]
    found = []
    for i, j in counted(run):
        out, x = run.output[i, j], run.x[i, j]
        centred = out - out.sum() / len(out)
        gain = 1 / (float(centred.square().sum() / (len(out) - 1)) ** 0.5 + 1e-5)
        found.append(gain * sum(float(values[n]) * float(vectors[:, n] @ x) ** 2 for n in order))
    return torch.tensor(found, dtype=torch.float64)


def test_approximations_have_the_gain_of_a_normalising_sae(run):
    p = run.preactivations([4])[run.mask][:, 0]
    near = approximation(run, 4, 3)
    expected = float(torch.corrcoef(torch.stack([p, near]))[0, 1])
    found = run.low_rank_correlation(3, [4], progress=False)
    assert found.tokens == len(counted(run)) == 34
    assert abs(float(found.everywhere[0, 2]) - expected) < 1e-4
    assert_close(run.scatter(4, 3, progress=False).approximation, near, rtol=1e-4, atol=1e-6)


def test_the_token_before_the_first_of_a_row_is_none():
    tokens = torch.tensor([[1, 2], [3, 2], [3, 2], [3, 5]])
    active = torch.zeros(4, 2, 1)
    active[1:, 0] = 1.0
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    every = torch.ones_like(tokens, dtype=torch.bool)
    (name,) = name_features(tokenizer, tokens, [active[:1], active[1:]], 9, every)
    assert "(" not in name.replace("(seen", "")
    active = torch.zeros(4, 2, 1)
    active[1:3, 1] = 1.0
    (name,) = name_features(tokenizer, tokens, [active], 9, every)
    assert name.startswith("(<3>) <2>")


@pytest.mark.parametrize("side", ["input", "output"])
def test_examples_and_labels_keep_to_the_tokens_that_count(features, run, side):
    for feature in range(8):
        strengths = run.activations([feature], side=side)[..., 0]
        place = int(strengths.argmax())
        if float(strengths.max()) <= 0:
            continue
        mask = torch.ones(5, 7, dtype=torch.bool)
        mask[place // 7, place % 7] = False
        other = features.run(TEXT, mask=mask, batch_size=2, progress=False)
        found = other.examples(feature, 5, side=side, progress=False)
        expected = {
            i: max((float(strengths[i, j]), -j) for j in range(7) if mask[i, j]) for i in range(5)
        }
        best = sorted((v, i) for i, (v, _) in expected.items() if v > 0)[::-1]
        assert found.sequences.tolist() == [i for _, i in best]
        assert found.positions.tolist() == [-expected[i][1] for _, i in best]
        assert_close(found.values, torch.tensor([v for v, _ in best], dtype=found.values.dtype))
        break
    else:
        raise AssertionError("no feature is active")


def test_pairs_are_checked_on_the_tokens_that_count_first_ones_among_them(features, run):
    z = run.activations(side="input")
    first = (z[0, 0] != 0).nonzero()[:, 0].tolist()[:2]
    expected = sum(bool((z[i, j, first] != 0).all()) for i, j in counted(run))
    assert run.verify_pairs(0, [tuple(first)], progress=False).tokens.tolist() == [expected]
    hidden = dataclasses.replace(run, mask=run.mask & (torch.arange(7) > 0))
    fewer = sum(bool((z[i, j, first] != 0).all()) for i, j in counted(run) if j)
    assert fewer < expected
    assert hidden.verify_pairs(0, [tuple(first)], progress=False).tokens.tolist() == [fewer]
    beginning = features.run(TEXT, progress=False)  # by default without first tokens
    assert beginning.verify_pairs(0, [tuple(first)], progress=False).tokens.tolist() == [
        sum(bool((z[i, j, first] != 0).all()) for i in range(5) for j in range(1, 7))
    ]


def test_saes_are_evaluated_without_first_and_excluded_tokens():
    built, one = model(), sae(OUT, dtype="float64")
    left_out = int(TEXT[2, 3])
    _, cache = built.run_with_cache(TEXT)
    error, square, active, kept = 0.0, [], 0, []
    for i, j in itertools.product(range(5), range(1, 7)):
        if int(TEXT[i, j]) == left_out:
            continue
        x = cache[OUT][i, j]
        z = one.encode(x[None])[0]
        error += float((x - one.decode(z[None])[0]).square().sum())
        active += int((z != 0).sum())
        kept.append(x)
    mean = sum(kept) / len(kept)
    square = sum(float((x - mean).square().sum()) for x in kept)
    found = evaluate_saes(built, {"a": one}, TEXT, exclude=[left_out], batch_size=2, progress=False)
    assert found.tokens == len(kept)
    assert float(found.l0[0]) == pytest.approx(active / len(kept))
    assert float(found.nmse[0]) == pytest.approx(error / square, rel=1e-5)


def _other(made):
    with torch.no_grad():
        made.W_dec[3] += 0.1
    return made


@pytest.mark.parametrize("changed", ["input dictionary", "output dictionary", "layer"])
def test_a_sweep_of_other_dictionaries_is_not_read(tmp_path, changed):
    def sweep(which):
        reads = sae(f"blocks.{LAYER}.mlp.hook_in")
        writes = sae(OUT, n=30, seed=1 + (which == "output dictionary"))
        if which == "input dictionary":
            reads = _other(reads)
        number = 0 if which == "layer" else LAYER
        if which == "layer":
            reads, writes = sae("blocks.0.mlp.hook_in"), sae("blocks.0.hook_mlp_out", n=30, seed=1)
        known = FeatureInteractions(model(), number, reads, writes)
        return known.sweep(k=2, checkpoint=tmp_path / "sweep", progress=False)

    sweep("nothing")
    with pytest.raises(ValueError, match=r"other|another|belongs|different"):
        sweep(changed)


def test_a_norm_after_the_mlp_stands_between_its_output_and_hook_mlp_out():
    built = model(use_normalization_before_and_after=True)
    at_mlp = f"blocks.{LAYER}.mlp.hook_out"
    with pytest.raises(ValueError, match=rf"sae_out is at '{OUT}'.*writes at {at_mlp}"):
        FeatureInteractions(built, LAYER, sae(f"blocks.{LAYER}.mlp.hook_in"), sae(OUT))
    known = FeatureInteractions(built, LAYER, sae(f"blocks.{LAYER}.mlp.hook_in"), sae(at_mlp))
    assert known.run(TEXT, progress=False).attribute(3, 2).error < 1e-6


def test_a_norms_weight_is_left_out_only_where_all_of_it_is_one():
    """One entry of 1 among others is a weight: what is read through the norm must have it."""
    built = model()
    some = torch.ones(3)
    some[1] = 2.0
    assert norm_weight(built.cfg, SimpleNamespace(w=torch.ones(3))) is None
    assert_close(norm_weight(built.cfg, SimpleNamespace(w=some)), some)


def test_the_random_reference_has_the_squared_norm_of_the_matrix(features):
    """A symmetric matrix of independent entries has its spectrum on a semicircle of this mean square."""
    for feature in range(3):
        found = features.statistics(feature, progress=False)
        dense = features.interaction(feature, basis="activations").dense()
        assert float(found.reference.square().sum()) == pytest.approx(
            float(dense.square().sum()), rel=0.15
        )
        draw = torch.randn(
            200, 200, generator=torch.Generator().manual_seed(feature), dtype=torch.float64
        )
        draw = draw + draw.T
        largest = float(torch.linalg.eigvalsh(draw).abs().max() / draw.norm()) * 200**0.5
        edge = float(found.reference.abs().max() / dense.norm()) * D**0.5
        assert edge == pytest.approx(largest, rel=0.2)


# ---------------------------------------------------------------------- hooks


def test_the_hardest_control_is_the_one_that_stands():
    built = model64()
    found = verify(built, TOKENS, eigen(built, k=2), controls=4, progress=False)
    for c in range(len(found.scale)):
        for r in range(found.scale.shape[1]):
            errors = []
            for q in range(4):
                gaps = (found.control_measured - found.control_predicted)[c, q, r].tolist()
                errors.append(max(abs(gap) for gap in gaps) / float(found.scale[c, r]))
            assert float(found.control_error[c, r]) == pytest.approx(min(errors))
            assert min(errors) < max(errors)
            # A control misses by far more than what is checked, by a stated margin.
            assert min(errors) > 1e6 * float(found.error[c, r])


# ---------------------------------------------------------------------- images


def test_dropout_keeps_the_mean():
    kept = _kept(torch.zeros(100_000), 0.3, torch.Generator().manual_seed(0))
    assert sorted(set(kept.tolist())) == pytest.approx([0.0, 1 / 0.7])
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.01)


def test_the_loss_is_the_mean_over_images_of_uneven_batches():
    """Without a learning rate the model stays: the loss of an epoch is its loss on all images."""
    config = TrainingConfig(
        size=4, bias=True, noise=0.0, weight_decay=0.0, learning_rate=0.0, batch=3, epochs=1
    )
    data = images()
    result = train_classifier(data, config, progress=False)
    expected = cross_entropy(result.model(data.train_images), data.train_labels)
    assert result.losses[0] == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.fixture(scope="module")
def decided():
    """A classifier whose constants alone make every image of one class, and images of that class."""
    data = images()
    config = TrainingConfig(size=8, bias=True, noise=0.0, epochs=2, batch=2)
    trained = train_classifier(data, config, progress=False).model
    with torch.no_grad():
        trained.layer.out.bias.zero_()
        rest = trained(data.test_images).argmax(-1)
        rare = int(rest.bincount(minlength=2).argmin())
        assert not bool((rest == rare).all())
        trained.layer.out.bias[rare] = 100.0
    return trained, images(test_labels=torch.full((4,), rare))


def test_truncated_models_keep_the_constants_of_their_biases(decided):
    trained, data = decided
    spectra = class_spectra(trained).pixel
    kept = [1, spectra.values.shape[-1]]
    found = truncate(trained, spectra, data.test_images, data.test_labels, kept)
    assert found.accuracy == (1.0, 1.0)
    fitted = shared_neurons(trained, data, ranks=(2,), kept=(1,), steps=3)
    assert fitted.accuracy == [1.0]


# ---------------------------------------------------------------------- digests


def _changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 + 0.125
    if isinstance(value, int):
        return value + 1
    return None


OTHERS = {
    "augment": None,
    "activation": "reglu",
    "attention": "product",
    "path": "beta",
    "schedule": "cosine",
    "points": ("mlp_in",),
    "layers": (0,),
    "steps": 7,
    "n_heads": 4,
    "d_model": 1024,
    "tokens": 10**7,
}
WITH = {"norm": {"attention": "product"}}  # only such a model may go without norms


def variations(config):
    """The config with each of its fields changed, by name."""
    for field in dataclasses.fields(config):
        value = OTHERS.get(field.name, _changed(getattr(config, field.name)))
        if value is not None:
            changed = {field.name: value} | WITH.get(field.name, {})
            yield field.name, dataclasses.replace(config, **changed)


def test_a_runs_key_notices_every_setting_and_every_part_of_the_data():
    data, config = images(), TrainingConfig()
    keys = {"": run_key(data, config)}
    keys |= {name: run_key(data, other) for name, other in variations(config)}
    for name in ("train_images", "test_images"):
        keys[name] = run_key(images(**{name: getattr(data, name) * 0.5}), config)
    for name in ("train_labels", "test_labels"):
        keys[name] = run_key(images(**{name: 1 - getattr(data, name)}), config)
    keys["size of images"] = run_key(images(size=(3, 2)), config)
    keys["classes"] = run_key(images(classes=("a", "c")), config)
    assert len(keys) >= len(dataclasses.fields(config)) + 6
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(
    "config",
    [LanguageConfig(), FinetuneConfig(), SAETrainingConfig()],
    ids=lambda config: type(config).__name__,
)
def test_a_runs_folder_notices_every_setting(config, tmp_path):
    made_from = {"fingerprint": "a", "n_ctx": 8}

    def enter(config, **changes):
        with work_in(tmp_path, "kind", dataclasses.asdict(config), {**made_from, **changes}, "it"):
            pass

    def plain(each):
        return SimpleNamespace(
            **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(each).items()}
        )

    start = plain(config)
    with work_in(tmp_path, "kind", vars(start), made_from, "it"):
        pass
    names = []
    for name, other in variations(config):
        with (
            pytest.raises(ValueError, match=rf"other settings: .*\b{name}="),
            work_in(tmp_path, "kind", vars(plain(other)), made_from, "it"),
        ):
            pass
        names.append(name)
    assert {field.name for field in dataclasses.fields(config)} - set(names) <= {"layers"}
    for name in made_from:
        with (
            pytest.raises(ValueError, match=f"other settings: {name}="),
            work_in(tmp_path, "kind", vars(start), {**made_from, name: 0}, "it"),
        ):
            pass


def test_a_tokenizers_digest_notices_words_splits_and_special_tokens():
    stories = make_stories(30)
    one = make(stories, 150)
    assert tokenizer_digest(one) == tokenizer_digest(make(stories, 150))
    others = {tokenizer_digest(one), tokenizer_digest(make(stories, 151))}
    for change in ("eos", "lower case", "words exchanged"):
        changed = make(stories, 150)
        if change == "eos":
            changed.eos_token = "[UNK]"
        elif change == "lower case":
            changed.backend_tokenizer.normalizer = None
        else:
            state = json.loads(changed.backend_tokenizer.to_str())
            words = state["model"]["vocab"]
            words["a"], words["b"] = words["b"], words["a"]
            swapped = json.dumps(state)
            changed = type(changed)(
                tokenizer_object=type(changed.backend_tokenizer).from_str(swapped),
                eos_token="[EOS]",
                bos_token="[BOS]",
            )
        others.add(tokenizer_digest(changed))
    assert len(others) == 5


# ---------------------------------------------------------------------- text and files


def test_stories_are_held_out_alike_in_every_process():
    program = (
        "from tl_bilinear.recipes.language.data import _part\n"
        "print([_part(f'story {n}', 0.3) for n in range(40)])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**env, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert 4 <= said.pop().count("validation") <= 20


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    layer().save(path)

    def half(tensors, place, metadata=None):
        Path(place).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        layer().save(path)
    assert_close(BilinearTensor.load(path).left, layer().left)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_errors_relative_to_what_was_measured(run):
    """An encoder column a million times too long hides a wrong total from `error`, not from this."""
    found = run.attribute(4, 2)
    assert found.measured_error == pytest.approx(
        abs(found.total - found.measured) / abs(found.measured)
    )
    wrong = dataclasses.replace(found, constants={"a": 1e9, "b": -1e9})
    wrong = dataclasses.replace(wrong, measured=2 * wrong.total)
    assert wrong.error < 1e-8
    assert wrong.measured_error == pytest.approx(0.5)
    assert dataclasses.replace(found, measured=0.0).measured_error == math.inf
    assert f"off by {found.measured_error:.1e}" in found.text()
