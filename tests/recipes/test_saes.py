"""Training SAEs around a model's layers, and measuring what they cost it."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer

import tl_bilinear  # noqa: F401  gives HookedTransformer.from_config its option
from tl_bilinear import FeatureInteractions, cli
from tl_bilinear.features import SAEEvaluation, evaluate_saes
from tl_bilinear.io import claim
from tl_bilinear.recipes.language import SAERun, SAETrainingConfig, train_saes
from tl_bilinear.recipes.language.saes import announcement
from tl_bilinear.tensor import estimates

TINY = SAETrainingConfig(
    layers=(1,),
    k=4,
    tokens=20_000,
    batch=200,
    learning_rate=5e-3,
    final_learning_rate=1e-4,
    buffer=4,
)
NAMES = ["1-mlp_in", "1-resid_mid", "1-mlp_out"]


@pytest.fixture(scope="module")
def model(story_data):
    return HookedTransformer.from_config(
        bilinear=True,
        n_layers=2,
        d_model=16,
        d_head=8,
        d_mlp=24,
        n_ctx=32,
        d_vocab=len(story_data.tokenizer),
        normalization_type="RMSPre",
        positional_embedding_type="rotary",
        init_weights=True,
        seed=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(model, story_data, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    folder = tmp_path_factory.mktemp("saes") / "whole"
    return train_saes(model, story_data, TINY, folder=folder, progress=False)


def stop_at(monkeypatch, call, error):
    """Every SAE takes a step in turn; at one of the calls, something happens."""
    left, original = [call], SAETrainer.step

    def step(trainer, batch):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return original(trainer, batch)

    monkeypatch.setattr(SAETrainer, "step", step)


def test_what_a_run_leaves(run, model):
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "evaluation.safetensors",
        "result.json",
        "run.json",
        "saes",
        "tl_bilinear.json",
    ]
    assert run.evaluation.names == NAMES
    assert run.layers == (1,)
    hooks = ["blocks.1.mlp.hook_in", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
    assert run.evaluation.hooks == hooks
    for point, hook in zip(TINY.points, hooks, strict=True):
        sae = SAE.load_from_disk(run.folder / "saes" / f"1-{point}")
        assert sae.cfg.metadata.hook_name == hook
        assert sae.cfg.d_sae == 64
        assert not sae.b_enc.any()
        assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(64), atol=1e-5)
    assert "loss_recovered" in str(run)


def test_it_learns(run):
    table = run.evaluation.to_pandas()
    assert (table["l0"] == 4).all()
    assert (table["nmse"] < 0.5).all()
    assert (table["loss_recovered"] > 0).all()


def test_the_saes_fit_the_rest_of_the_package(run, model, story_data):
    features = FeatureInteractions(model, 1, run.sae(1, "resid_mid"), run.sae(1, "mlp_out"))
    rows = story_data.validation.with_format("torch")[:4]["input_ids"].long()
    read = features.run(rows)
    feature = int(read.preactivations().flatten(0, 1).mean(0).argmax())
    assert read.attribute(feature).error < 1e-5
    with pytest.raises(KeyError, match=r"no SAE 0-mlp_in in .*there are 1-mlp_in, 1-resid_mid"):
        run.sae(0, "mlp_in")


def test_all_points_come_from_one_forward_pass(run, model, story_data, tmp_path, monkeypatch):
    calls = []
    original = type(model).run_with_cache

    def counted(self, *args, **kwargs):
        calls.append(len(kwargs["names_filter"]) if "stop_at_layer" in kwargs else 0)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "run_with_cache", counted)
    config = dataclasses.replace(TINY, layers=(0, 1), tokens=2000)
    train_saes(model, story_data, config, folder=tmp_path / "six", progress=False)
    training = [number for number in calls if number]
    # 2,000 tokens and the buffer's rest fit into a few passes of 32 rows; six SAEs share each.
    assert set(training) == {6}
    assert len(training) <= 4


def test_nothing_is_trained_again(run, model, story_data, monkeypatch):
    stop_at(monkeypatch, 1, AssertionError("trained"))
    again = train_saes(model, story_data, TINY, folder=run.folder, progress=False)
    assert torch.equal(again.evaluation.nmse, run.evaluation.nmse)
    assert SAERun.load(run.folder).config == TINY


def test_interrupted_and_started_again(run, model, story_data, tmp_path, monkeypatch):
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, 3 * 60, KeyboardInterrupt())
        with pytest.raises(
            KeyboardInterrupt, match=r"the same command goes on from token 1[12],.* of 20,000"
        ):
            train_saes(model, story_data, TINY, folder=folder, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(FileNotFoundError, match="is not finished: `tl-bilinear train saes` makes"):
        SAERun.load(folder)
    # What a killed run left half written, later than all others.
    half = folder / "checkpoints" / "run" / "19000"
    half.mkdir()
    (half / "runner_cfg.json").write_text('{"saes": ')
    with monkeypatch.context() as patch:
        stop_at(patch, 3 * 60, AssertionError("started from the beginning"))
        again = train_saes(model, story_data, TINY, folder=folder, progress=False)
    assert not (folder / "checkpoints").exists()
    difference = (again.evaluation.nmse - run.evaluation.nmse).abs()
    assert float(difference.max()) < 0.05


def test_a_kill_between_two_saved_saes_loses_nothing(run, model, story_data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "result.json").unlink()  # killed before the evaluation was written
    again = train_saes(model, story_data, TINY, folder=folder, progress=False)
    assert torch.equal(again.evaluation.patched, run.evaluation.patched)


def test_other_settings_data_and_folders_are_refused(run, model, story_data, tmp_path):
    other = dataclasses.replace(TINY, k=5)
    with pytest.raises(ValueError, match=r"holds a run with other settings: k=5 \(there: 4\)"):
        train_saes(model, story_data, other, folder=run.folder, progress=False)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        train_saes(model, story_data, TINY, folder=tmp_path, progress=False)
    settings = json.loads((run.folder / "run.json").read_text())
    folder = tmp_path / "lm"
    claim(folder, "run")
    (folder / "run.json").write_text(json.dumps(settings | {"format": "other"}))
    with pytest.raises(ValueError, match="does not describe a run of `tl-bilinear train saes`"):
        train_saes(model, story_data, TINY, folder=folder, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": ("mlp_mid",)}, "unknown points mlp_mid; there are mlp_in, resid_mid, mlp_out"),
        ({"points": ()}, "points must name at least one, each once"),
        ({"layers": (1, 1)}, "layers must name at least one, each once"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"expansion": 0.0}, r"expansion must be positive, got 0\.0"),
        ({"aux_loss": -1.0}, "aux_loss must not be negative"),
        ({"tokens": 10}, "10 tokens do not make one batch of 200"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 2)}, r"no layers \[2\]: the model's are 0 to 1"),
        ({"k": 65}, "k=65 features cannot be active of 64"),
    ],
)
def test_settings_that_do_not_fit_the_model(model, story_data, tmp_path, change, message):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match=message):
        train_saes(model, story_data, config, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def small_model(**changes):
    fields = {
        "n_layers": 2, "d_model": 16, "d_head": 8, "d_mlp": 24, "n_ctx": 32, "d_vocab": 180,
        "normalization_type": "RMSPre", "device": "cpu",
    }  # fmt: skip
    return HookedTransformer.from_config(bilinear=True, **(fields | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ctx": 16}, "rows of 32 tokens are longer than the model's context of 16"),
        ({"d_vocab": 20}, "tokenized with .* entries, the model has 20"),
        ({"n_layers": 1}, r"no layers \[1\]: the model's are 0 to 0"),
    ],
)
def test_models_that_do_not_fit_the_text(story_data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train_saes(small_model(**change), story_data, TINY, folder=tmp_path / "r", progress=False)


def test_it_says_first_how_much_it_will_do(model, monkeypatch):
    monkeypatch.setattr(estimates, "flops_per_second", lambda *given: 1e9)
    config = SAETrainingConfig(tokens=2_000_000, expansion=2, layers=(1,), points=("mlp_in",))
    said = announcement(model, config, 1)
    weights = sum(weight.numel() for weight in model.parameters())
    width = 2 * model.cfg.d_model
    seconds = 2e6 * (2 * weights + 12 * model.cfg.d_model * width) / 1e9
    assert f"1 SAE of {width:,} features, 2,000,000 tokens" in said
    assert f"at least {estimates.human_seconds(seconds)} here" in said


def test_a_small_model_gets_few_tokens():
    config = SAETrainingConfig()
    assert config.for_weights(2_700_000).tokens == 5_400_000
    assert config.for_weights(10**9).tokens == 150_000_000  # the paper's
    assert config.for_weights(10).tokens == config.batch
    assert SAETrainingConfig(tokens=8000).for_weights(10**9).tokens == 8000


def test_the_command(model, story_data, tmp_path, capsys):
    """From a Hugging Face folder, with the table of Fig. 21."""
    model.to_hf(tmp_path / "model")
    arguments = ["train", "saes", tmp_path / "model", "--data", story_data.folder, "--out"]
    arguments += [tmp_path / "run", "--points", "mlp_out", "--layers", "0", "--k", 4, "--quiet"]
    arguments += ["--tokens", 2000, "--batch", 200, "--expansion", 2, "--learning-rate", 1e-3]
    status, output = cli.main([str(each) for each in arguments]), capsys.readouterr()
    assert status == 0, output.err
    assert "clean loss" in output.out
    assert "0-mlp_out" in output.out
    assert SAE.load_from_disk(tmp_path / "run" / "saes" / "0-mlp_out").cfg.d_sae == 32
    assert cli.main(["train", "saes", "/no/such/model", "--layers", "0,one"]) == 2
    assert 'Invalid value for --layers: unable to convert "one" into int' in capsys.readouterr().err


# ---------------------------------------------------------------------- the evaluation


def slow_loss(model, tokens, skipped, hook=None, edit=None):
    """Cross-entropy of every token in a plain loop; [BOS] neither edited nor counted as a target."""
    losses = []
    for row in tokens:

        def change(x, hook, row=row):
            x = x.clone()
            for position in range(1, len(row)):
                if int(row[position]) not in skipped:
                    x[0, position] = edit(x[0, position])
            return x

        hooks = [] if hook is None else [(hook, change)]
        logits = model.run_with_hooks(row[None], fwd_hooks=hooks)[0].double()
        counted = [
            -logits[p].log_softmax(-1)[row[p + 1]]
            for p in range(len(row) - 1)
            if int(row[p + 1]) not in skipped
        ]
        losses.append(torch.stack(counted).mean())
    return torch.stack(losses)


@torch.no_grad()
def test_the_numbers_are_those_of_a_slow_loop(run, model, story_data):
    tokens = story_data.validation.with_format("torch")[:5]["input_ids"].long()
    bos = story_data.tokenizer.bos_token_id
    assert (tokens[:, 1:] == bos).any()  # inside of rows, too
    saes = {point: run.sae(1, point) for point in TINY.points}
    found = evaluate_saes(model, saes, tokens, batch_size=2, progress=False)
    assert torch.allclose(found.clean.double(), slow_loss(model, tokens, {bos}), atol=1e-5)
    kept = tokens != bos
    kept[:, 0] = False
    assert found.tokens == int(kept.sum())
    _, cache = model.run_with_cache(tokens)
    for number, (point, sae) in enumerate(saes.items()):
        hook = sae.cfg.metadata.hook_name
        x = cache[hook][kept].double()
        sae = sae.double()
        z = sae.encode(x)
        nmse = ((x - sae.decode(z)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert float(found.nmse[number]) == pytest.approx(float(nmse), rel=1e-4), point
        assert float(found.l0[number]) == pytest.approx(float((z != 0).sum() / len(z)))
        assert int(found.dead[number]) == int((z == 0).all(0).sum())
        sae = sae.float()
        for losses, edit in ((found.patched, sae), (found.ablated, torch.zeros_like)):
            expected = slow_loss(model, tokens, {bos}, hook, edit)
            assert torch.allclose(losses[number].double(), expected, atol=1e-4), point
    added = found.patched.mean(-1) - found.clean.mean()
    table = found.to_pandas()
    assert table["loss_added"].tolist() == pytest.approx(added.tolist(), abs=1e-5)
    recovered = 1 - added / (found.ablated.mean(-1) - found.clean.mean())
    assert table["loss_recovered"].tolist() == pytest.approx(recovered.tolist(), abs=1e-5)


def test_a_perfect_sae_costs_nothing(run, model, story_data):
    class Perfect:
        cfg = run.sae(1, "mlp_out").cfg
        encode = staticmethod(lambda x: x)
        decode = staticmethod(lambda z: z)

    tokens = story_data.validation.with_format("torch")[:3]["input_ids"].long()
    found = evaluate_saes(model, {"perfect": Perfect}, tokens, progress=False)
    assert float(found.nmse) == 0
    assert torch.allclose(found.patched, found.clean[None])
    assert float(found.recovered) == pytest.approx(1)


def test_an_evaluation_is_stored(run, tmp_path):
    run.evaluation.save(tmp_path / "e.safetensors")
    again = SAEEvaluation.load(tmp_path / "e.safetensors")
    assert again.names == run.evaluation.names
    assert torch.equal(again.ablated, run.evaluation.ablated)


def test_what_cannot_be_evaluated(run, model, story_data):
    tokens = torch.ones(2, 5, dtype=torch.long)
    sae = run.sae(1, "mlp_out")
    with pytest.raises(ValueError, match="no SAE to evaluate"):
        evaluate_saes(model, {}, tokens)
    with pytest.raises(ValueError, match="every token is excluded"):
        evaluate_saes(model, {"one": sae}, tokens, exclude=[1], progress=False)
    with pytest.raises(ValueError, match="takes activations of width 16, the model's are 32 wide"):
        evaluate_saes(small_model(d_model=32), {"one": sae}, tokens)
    sae.cfg.metadata.hook_name = "blocks.7.hook_mlp_out"
    with pytest.raises(ValueError, match=r"the SAE 'one' belongs to 'blocks\.7\.hook_mlp_out'"):
        evaluate_saes(model, {"one": sae}, tokens)
