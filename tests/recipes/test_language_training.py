"""Training language models: what comes out, and what a kill, a full disk or a second process change."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer

from tests.recipes.stories import make_stories
from tl_bilinear import BilinearTensor
from tl_bilinear.io import MARKER
from tl_bilinear.recipes.language import (
    ACTIVATIONS,
    CONFIGS,
    ActivationComparison,
    LanguageConfig,
    LanguageData,
    LanguageRun,
    RunOptions,
    TextConfig,
    choose_config,
    compare_activations,
    language_loss,
    prepare_text,
    train_language_model,
    train_tokenizer,
)
from tl_bilinear.recipes.language import train as training
from tl_bilinear.recipes.language.llama import Collate, build_llama

TINY = LanguageConfig(
    n_layers=2, d_model=16, d_mlp=24, n_heads=2, batch=16, steps=20, learning_rate=2e-2
)
OPTIONS = {"device": "cpu", "progress": False, "precision": "fp32"}


@pytest.fixture(scope="module")
def data(story_data):
    return story_data


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    return train_language_model(
        data, TINY, folder=tmp_path_factory.mktemp("runs") / "whole", **OPTIONS
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


class StopAt:
    """Trainer.training_step, raising at one call; once."""

    def __init__(self, call, error):
        self.left, self.error, self.original = call, error, Trainer.training_step

    def install(self, monkeypatch):
        stop = self

        def step(trainer, *args, **kwargs):
            stop.left -= 1
            if stop.left == 0:
                raise stop.error
            return stop.original(trainer, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", step)


# ---------------------------------------------------------------------- what comes out


def test_it_learns_and_says_how_well(run, data):
    untrained = build_llama(TINY, data.tokenizer, data.n_ctx)
    before = language_loss(untrained, data.validation, bos=1)
    assert abs(before - torch.tensor(180.0).log()) < 0.1
    assert run.loss < 0.75 * before
    assert (
        run.loss == language_loss(run.llama(), data.validation, bos=1, batch_size=7)
        or abs(run.loss - language_loss(run.llama(), data.validation, bos=1, batch_size=7)) < 1e-5
    )
    curve = run.to_pandas()
    assert list(curve["step"]) == list(range(1, 21))
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0]
    assert curve["eval_loss"].notna().sum() == 10
    assert abs(curve["eval_loss"].iloc[-1] - run.loss) < 1e-2  # Trainer's is a mean over batches
    assert curve["learning_rate"].iloc[0] > curve["learning_rate"].iloc[-1]
    assert run.steps == 20
    assert run.tokens == 20 * 16 * 32
    assert 0 < run.seconds < 60
    assert run.sample.startswith("once upon a time")
    assert "validation loss" in str(run)


def test_the_folder_holds_a_llama_and_a_bilinear_hooked_transformer(run, data):
    assert names(run.folder) == [
        "checkpoint-18",
        "checkpoint-20",
        "model",
        "result.json",
        "run.json",
    ]
    llama = AutoModelForCausalLM.from_pretrained(run.model_folder)
    assert type(llama) is LlamaForCausalLM
    assert (llama.config.hidden_act, llama.config.pad_token_id) == ("linear", None)
    assert llama.config.use_cache
    assert not llama.config.tie_word_embeddings
    assert all((p == 1).all() for name, p in llama.named_parameters() if "norm" in name)
    ids = torch.tensor(data.validation[:4]["input_ids"])
    model = run.hooked()
    assert_close(model(ids), llama(ids).logits, rtol=0, atol=1e-4)
    text = "once upon a time, lily saw a cat."
    assert model.to_tokens(text).tolist() == [
        AutoTokenizer.from_pretrained(run.model_folder)(text).input_ids
    ]
    tensor = BilinearTensor.from_model(model, 1)
    assert tensor.input_space == BilinearTensor.from_model(llama, 1).input_space
    assert run.parameters == sum(p.numel() for n, p in llama.named_parameters() if "norm" not in n)


def test_biases_train_and_come_along(data, tmp_path):
    config = dataclasses.replace(TINY, bias=True, steps=5)
    biased = train_language_model(data, config, folder=tmp_path / "biased", **OPTIONS)
    ids = torch.tensor(data.validation[:4]["input_ids"])
    model = biased.hooked()
    assert model.b_gate.abs().min() > 0
    assert_close(model(ids), biased.llama()(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "bilinear"])
def test_other_activations(data, tmp_path, activation):
    config = dataclasses.replace(TINY, activation=activation, steps=2)
    other = train_language_model(data, config, folder=tmp_path / "run", **OPTIONS)
    gate = other.llama().model.layers[0].mlp.act_fn
    x = torch.linspace(-3, 3, 13)
    formula = {"reglu": x.relu(), "swiglu": x * x.sigmoid(), "geglu": torch.nn.functional.gelu(x)}
    assert_close(gate(x), formula[activation])
    with pytest.raises(ValueError, match="`tl-bilinear finetune`"):
        other.hooked()


def test_initial_weights_are_gpt2s(data):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    config = dataclasses.replace(TINY, d_model=128, d_mlp=256, n_layers=8)
    llama = build_llama(config, data.tokenizer, 32)
    assert torch.equal(torch.rand(3), expected)
    for name, weight in llama.named_parameters():
        if "norm" in name:
            assert not weight.requires_grad
            continue
        assert weight.requires_grad
        std = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert abs(float(weight.detach().std()) / std - 1) < 0.05, name
    again = build_llama(config, data.tokenizer, 32)
    assert torch.equal(again.lm_head.weight, llama.lm_head.weight)
    other = build_llama(dataclasses.replace(config, seed=1), data.tokenizer, 32)
    assert not torch.equal(other.lm_head.weight, llama.lm_head.weight)


def test_bos_is_given_and_never_predicted(run, data):
    """The loss, one token at a time."""
    rows = data.validation.select(range(3))
    llama = run.llama()
    losses = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        log_probabilities = llama(ids[None]).logits[0].log_softmax(-1)
        losses += [-log_probabilities[i, t] for i, t in enumerate(ids[1:]) if t != 1]
    assert len(losses) < 3 * 31  # some row has a [BOS] inside
    expected = torch.stack(losses).mean().item()
    assert abs(language_loss(llama, rows, bos=1, batch_size=2) - expected) < 1e-5
    batch = Collate(1)([{"input_ids": [1, 5, 2, 1, 6]}])
    assert batch["labels"].tolist() == [[-100, 5, 2, -100, 6]]


def test_paper_settings():
    """Table 2 and PAPER_FACTS."""
    paper = dataclasses.asdict(CONFIGS["paper"])
    assert paper == {
        "n_layers": 6,
        "d_model": 512,
        "d_mlp": 2048,
        "n_heads": 8,
        "activation": "bilinear",
        "bias": False,
        "attention": "softmax",
        "norm": True,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "warmup": 0.0,
        "batch": 512,
        "epochs": 5.0,
        "steps": None,
        "seed": 0,
    }
    assert CONFIGS["paper"].total_steps(1_000_000) == 5 * 1953


def test_the_callers_random_numbers_stay(unchecked, data, tmp_path):  # the checks draw numbers
    import random

    import numpy

    def draw():
        return torch.rand(2).tolist(), random.random(), numpy.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(4)
        random.seed(4)
        numpy.random.seed(4)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    train_language_model(data, dataclasses.replace(TINY, steps=1), folder=tmp_path / "r", **OPTIONS)
    assert draw() == expected


def test_the_figure_shows_both_losses_of_each_run(run):
    from tl_bilinear.plots import loss_figure

    curve = run.to_pandas()
    other = SimpleNamespace(to_pandas=lambda: curve.assign(loss=curve["loss"] + 1))
    figure = loss_figure({"a": run, "b": other})
    assert [trace.name for trace in figure.data] == [
        *("a, training", "a, validation", "b, training", "b, validation"),
    ]
    training, validation = figure.data[:2]
    assert list(training.y) == list(curve["loss"])
    assert list(validation.x) == list(range(2, 21, 2))
    assert figure.data[0].line.color != figure.data[2].line.color


# ---------------------------------------------------------------------- the same result


def test_the_micro_batch_changes_nothing(run, data, tmp_path):
    for micro in (2, 8):
        small = train_language_model(
            data, TINY, folder=tmp_path / str(micro), micro_batch=micro, **OPTIONS
        )
        assert abs(small.loss - run.loss) < 1e-4


def test_mixed_precision_is_close(run, data, tmp_path):
    options = {**OPTIONS, "precision": "bf16"}
    mixed = train_language_model(data, TINY, folder=tmp_path / "bf16", **options)
    assert 0 < abs(mixed.loss - run.loss) < 0.05  # it was in use, and it did no harm
    assert mixed.llama().dtype == torch.float32


@pytest.mark.parametrize("feature", [None, "avx512_bf16", "amx_bf16"])
def test_bf16_is_chosen_where_the_processor_has_it(data, tmp_path, monkeypatch, feature):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    arguments = training._arguments(tmp_path, TINY, RunOptions(device="cpu"), 20, False)
    assert (arguments.bf16, arguments.fp16) == (feature is not None, False)


def test_a_processor_may_compute_in_bf16_without_being_asked_for(data, tmp_path, monkeypatch):
    """transformers refuses bf16 without an accelerator unless it is told to use the processor."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = training._arguments(tmp_path, TINY, RunOptions(precision="bf16"), 20, False)
    assert arguments.bf16
    assert arguments.use_cpu


def test_interrupted_and_started_again(run, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        StopAt(14, KeyboardInterrupt()).install(patch)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from step 12 of 20"):
            train_language_model(data, TINY, folder=folder, **OPTIONS)
    assert names(folder) == ["checkpoint-10", "checkpoint-12", "run.json"]
    with pytest.raises(FileNotFoundError, match="is not finished"):
        LanguageRun.load(folder)
    # What a killed run leaves in the place for half-written things is not looked at.
    (folder / ".writing" / "checkpoint-14").mkdir(parents=True)
    (folder / "checkpoint-of-mine").mkdir()
    (folder / ".writing" / "checkpoint-14" / "model.safetensors").write_bytes(b"half")
    steps = []
    original = Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda *a, **k: steps.append(1) or original(*a, **k)
    )
    resumed = train_language_model(data, TINY, folder=folder, **OPTIONS)
    assert len(steps) == 8
    assert abs(resumed.loss - run.loss) < 1e-5
    assert list(resumed.to_pandas()["step"]) == list(range(1, 21))
    assert resumed.seconds > 0
    assert names(folder) == sorted([*names(run.folder), "checkpoint-of-mine"])


def test_a_run_that_is_damaged_or_of_another_version(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    result = tmp_path / "run" / "result.json"
    stored = json.loads(result.read_text())
    for content, message in (
        ("{", "is not JSON, or not all of it"),
        ("[]", "is not a table of values"),
        (json.dumps({**stored, "colour": "blue"}), "was not written by this version .*colour"),
        (json.dumps({"loss": 1.0}), "was not written by this version .*history"),
    ):
        result.write_text(content)
        with pytest.raises(ValueError, match=message):
            LanguageRun.load(tmp_path / "run")


def test_a_finished_run_is_only_read(run, data, monkeypatch):
    StopAt(1, AssertionError("trained again")).install(monkeypatch)
    again = train_language_model(data, TINY, folder=run.folder, **OPTIONS)
    assert (again.loss, again.sample) == (run.loss, run.sample)


def command(data, out, launcher=()):
    settings = {**dataclasses.asdict(TINY), "steps": 300}
    arguments = []
    for name in ("n_layers", "d_model", "d_mlp", "n_heads", "batch", "steps", "learning_rate"):
        arguments += [f"--{name.replace('_', '-')}", str(settings[name])]
    module = ["-m", "tl_bilinear", "train", "lm", str(data.folder), "--out", str(out)]
    arguments += ["--device", "cpu", "--precision", "fp32", "--quiet"]
    return [sys.executable, *launcher, *module, *arguments]


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def long_run(data, tmp_path_factory):
    """In this process and alone, what the next two tests do with a kill and with two processes."""
    config = dataclasses.replace(TINY, steps=300, epochs=CONFIGS["paper"].epochs)
    return train_language_model(
        data, config, folder=tmp_path_factory.mktemp("long") / "run", **OPTIONS
    )


@pytest.mark.slow
def test_killed_and_started_again(long_run, data, tmp_path):
    process = subprocess.Popen(
        command(data, tmp_path / "run"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        while not (tmp_path / "run" / "checkpoint-90").is_dir():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "run" / "result.json").exists()
    last = max(int(n.partition("-")[2]) for n in names(tmp_path / "run") if n.startswith("check"))
    assert 90 <= last < 300
    config = LanguageConfig(**json.loads((tmp_path / "run" / "run.json").read_text())["config"])
    assert config == long_run.config
    resumed = train_language_model(data, config, folder=tmp_path / "run", **OPTIONS)
    assert abs(resumed.loss - long_run.loss) < 1e-3


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one(long_run, data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    done = subprocess.run(
        command(data, tmp_path / "run", launcher=launcher),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1  # one of them speaks
    result = LanguageRun.load(tmp_path / "run")
    assert names(tmp_path / "run" / "checkpoint-300").count("rng_state_1.pth") == 1
    assert abs(result.loss - long_run.loss) < 1e-3
    assert result.tokens == long_run.tokens


# ---------------------------------------------------------------------- what goes wrong


@pytest.fixture
def full_disk():
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_checkpoints(run, data, tmp_path, full_disk, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        StopAt(6, KeyboardInterrupt()).install(patch)
        with pytest.raises(KeyboardInterrupt):
            train_language_model(data, TINY, folder=folder, **OPTIONS)
    full_disk(20_000)
    with pytest.raises(
        OSError, match=r"the checkpoint of step 6 cannot be written to .*run: .*Make room"
    ):
        train_language_model(data, TINY, folder=folder, **OPTIONS)
    full_disk(resource.RLIM_INFINITY)
    assert names(folder) == ["checkpoint-2", "checkpoint-4", "run.json"]
    resumed = train_language_model(data, TINY, folder=folder, **OPTIONS)
    assert abs(resumed.loss - run.loss) < 1e-5


def test_a_disk_that_is_full_at_the_very_end(run, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = dataclasses.replace(TINY, steps=2)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_llama", full)
        with pytest.raises(OSError, match="No space left"):
            train_language_model(data, config, folder=folder, **OPTIONS)
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "run.json"]
    assert train_language_model(data, config, folder=folder, **OPTIONS).steps == 2


def test_other_settings_need_another_folder(run, data, tmp_path):
    for change, message in (
        ({"learning_rate": 0.5}, r"learning_rate=0\.5 .there: 0\.02."),
        ({"activation": "swiglu"}, r"activation='swiglu' .there: 'bilinear'."),
    ):
        with pytest.raises(ValueError, match=f"holds a run with other settings: {message}"):
            train_language_model(
                data, dataclasses.replace(TINY, **change), folder=run.folder, **OPTIONS
            )
    other = dataclasses.replace(data, fingerprint="0-0")
    with pytest.raises(ValueError, match="fingerprint='0-0'"):
        train_language_model(other, TINY, folder=run.folder, **OPTIONS)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        train_language_model(data, TINY, folder=tmp_path, **OPTIONS)


def test_a_vocabulary_that_is_not_that_of_the_tokens(data, tmp_path):
    shutil.copytree(data.folder, tmp_path / "data")
    train_tokenizer(make_stories(50), 150).save_pretrained(tmp_path / "data" / "tokenizer")
    with pytest.raises(
        ValueError, match="a vocabulary of 180, the tokenizer there has 150 entries"
    ):
        train_language_model(tmp_path / "data", TINY, folder=tmp_path / "run", **OPTIONS)
    assert names(tmp_path) == ["data"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"learning_rate": float("nan")}, "learning_rate must not be negative, got nan"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\)"),
        ({"steps": 0}, "steps must be at least 1"),
        (
            {"d_model": 18, "n_heads": 2},
            "d_model=18 does not divide into n_heads=2 heads of an even",
        ),
        ({"activation": "relu"}, "unknown activation 'relu'; there are bilinear, reglu"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)


def test_options_that_do_not_fit(data, tmp_path, monkeypatch):
    def start(config=TINY, **options):
        train_language_model(data, config, folder=tmp_path / "run", **{**OPTIONS, **options})

    with pytest.raises(ValueError, match="unknown config 'huge'; there are paper, small, nano"):
        choose_config("huge")
    with pytest.raises(ValueError, match="micro_batch=5 does not divide the 16 rows"):
        start(micro_batch=5)
    with pytest.raises(ValueError, match="device is 'cpu' or left out, got 'cuda:1'"):
        start(device="cuda:1")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        start(precision="int4")
    with pytest.raises(
        ValueError, match=r"a batch of 99999 rows is more than the \d+ rows of text"
    ):
        start(dataclasses.replace(TINY, batch=99999))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs tensorboard: pip install tensorboard"):
        start(report_to=("tensorboard",))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="a batch of 16 rows does not divide among 3 processes"):
        start()
    assert names(tmp_path) == []


# ---------------------------------------------------------------------- the comparison


def test_activations_compared(data, tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, steps=6)
    options = {"folder": tmp_path / "c", "activations": ("bilinear", "swiglu"), **OPTIONS}
    with monkeypatch.context() as patch:  # a machine on which swiglu takes exactly twice as long
        original = training.write_json

        def write(path, content):
            if path.name == "result.json":
                content = {**content, "seconds": 2.0 if path.parent.name == "swiglu" else 1.0}
            original(path, content)

        patch.setattr(training, "write_json", write)
        compared = compare_activations(data, config, **options)
    table = compared.to_pandas()
    assert list(table.index) == ["bilinear", "swiglu"]
    assert compared.steps == (6, 6)
    assert compared.steps_in_equal_time == (6, 3)
    assert compared.constant_time[0] == compared.constant_epochs[0]
    assert (
        compared.constant_time[1] == LanguageRun.load(tmp_path / "c" / "swiglu-in-equal-time").loss
    )
    assert (
        compared.constant_time[1] > compared.constant_epochs[1]
    )  # three steps learn less than six
    assert ActivationComparison.load(tmp_path / "c") == compared
    with pytest.raises(FileNotFoundError, match="holds no comparison"):
        ActivationComparison.load(tmp_path)
    assert "constant_epochs" in str(compared)
    StopAt(1, AssertionError("trained again")).install(monkeypatch)
    assert compare_activations(data, config, **options) == compared
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        compare_activations(data, config, **{**options, "activations": ("bilinear", "tanh")})


# ---------------------------------------------------------------------- the commands


def test_from_text_to_a_model_by_commands(tmp_path, monkeypatch, capsys):
    from tl_bilinear import cli

    monkeypatch.chdir(tmp_path)
    Path("stories.txt").write_text("\n<|endoftext|>\n".join(make_stories(120)))

    def call(*arguments):
        return cli.main(arguments), capsys.readouterr()

    status, output = call("data", "stories.txt", "--quiet")
    assert status == 2
    assert "tokenizer holds no tokenizer: make one with `tl-bilinear tokenizer" in output.err
    status, output = call("tokenizer", "stories.txt", "--size", "170", "--quiet")
    assert status == 0, output.err
    assert "120 of 120 stories kept" in output.out
    assert "170 entries in tokenizer" in output.out
    status, output = call("data", "stories.txt", "--n-ctx", "16", "--validation", "0.2", "--quiet")
    assert status == 0, output.err
    assert "validation: " in output.out
    options = ["--d-model", "16", "--d-mlp", "16", "--device", "cpu", "--quiet"]
    status, output = call("train", "lm", "--config", "nano", "--steps", "2", *options)
    assert status == 0, output.err
    assert "validation loss" in output.out
    config = LanguageRun.load("runs/lm").config
    assert config == choose_config("nano", steps=2, d_model=16, d_mlp=16)
    status, output = call("train", "lm", "--config", "nano", "--steps", "3", *options)
    assert status == 2
    assert "runs/lm holds a run with other settings: steps=3 (there: 2)" in output.err
    StopAt(1, KeyboardInterrupt()).install(monkeypatch)
    status, output = call(
        *("train", "compare", "--config", "nano", "--steps", "2", "--device", "cpu", "--quiet")
    )
    assert status == 130
    assert output.err.strip().endswith("the same command goes on from step 0 of 2")


def test_real_text(shared_data, tmp_path):
    tokenizer = train_tokenizer(make_stories(10), 400)
    made = prepare_text(
        shared_data / "tinystories_valid.txt",
        TextConfig(n_ctx=64, validation=0.05, limit=200),
        tokenizer=tokenizer,
        out=tmp_path / "data",
        progress=False,
    )
    config = choose_config("nano", steps=10, d_model=32)
    run = train_language_model(
        LanguageData.load(made.folder), config, folder=tmp_path / "r", **OPTIONS
    )
    assert run.loss < run.to_pandas()["loss"].iloc[0] - 0.5
