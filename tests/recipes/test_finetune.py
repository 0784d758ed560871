"""Making a gated Llama bilinear: the way there, what comes out, and what an interruption changes."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.activations import ACT2FN

from tests.recipes.stories import prepare_stories
from tl_bilinear import BilinearTensor, cli
from tl_bilinear.models.approximation import approximate_llama, to_bilinear_llama
from tl_bilinear.plots import finetune_figure
from tl_bilinear.recipes.language import (
    FinetuneConfig,
    FinetuneRun,
    LanguageConfig,
    compare_finetuning,
    finetune,
    language_loss,
    train_language_model,
)
from tl_bilinear.recipes.language import train as training
from tl_bilinear.recipes.language.annealing import (
    AnnealedGate,
    even_progress,
    install_gates,
    shares,
)
from tl_bilinear.recipes.language.distillation import Distillation
from tl_bilinear.recipes.language.trainer import validation_rows

OPTIONS = {"device": "cpu", "progress": False, "precision": "fp32"}
TINY = FinetuneConfig(steps=30, batch=8, learning_rate=3e-3, fit_rows=48, weight_decay=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_stories(tmp_path_factory.mktemp("text"), 400, 150)


@pytest.fixture(scope="module")
def swiglu(data, tmp_path_factory):
    """A trained SwiGLU Llama, as a folder."""
    config = LanguageConfig(
        n_layers=2,
        d_model=16,
        d_mlp=24,
        n_heads=2,
        activation="swiglu",
        batch=16,
        steps=120,
        learning_rate=2e-2,
    )
    folder = tmp_path_factory.mktemp("swiglu") / "run"
    return train_language_model(data, config, folder=folder, **OPTIONS).model_folder


@pytest.fixture(scope="module")
def compared(swiglu, data, tmp_path_factory):
    configs = {
        "affine": TINY,
        "beta": dataclasses.replace(TINY, path="beta", schedule="even"),
        "closed": dataclasses.replace(TINY, path="closed"),
    }
    folder = tmp_path_factory.mktemp("runs") / "compared"
    return compare_finetuning(swiglu, data, configs, folder=folder, **OPTIONS)


# ---------------------------------------------------------------------- the gate


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_the_affine_path_is_a_straight_line(name):
    g, bias, slope = torch.randn(9, 5), torch.randn(5), torch.randn(5)
    gate = AnnealedGate(ACT2FN[name], "affine", bias, slope)
    for share in (0.0, 0.3, 1.0):
        gate.share = share
        assert_close(gate(g), (1 - share) * ACT2FN[name](g) + share * (bias + slope * g))
    gate.share = 0.0
    gate(g).sum().backward()
    assert gate.bias.grad is not None  # several processes wait for every gradient


def test_the_path_of_beta_is_the_papers():
    g = 3 * torch.randn(200)
    gate = AnnealedGate(ACT2FN["silu"], "beta", torch.zeros(1), torch.tensor([0.5]))
    for share in (0.0, 0.4, 0.9, 0.998, 1.0):
        gate.share = share
        assert_close(gate(g), g * torch.sigmoid((1 - share) * g), rtol=1e-4, atol=1e-4)
    assert not list(gate.parameters())


# ---------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("schedule", ["linear", "cosine", "even", "layers"])
def test_schedules_go_from_nothing_to_all(schedule):
    even = even_progress(ACT2FN["silu"], torch.randn(500))
    path = [shares(schedule, p / 50, 3, even) for p in range(-5, 60)]
    assert path[0] == path[5] == [0.0] * 3
    assert path[-1] == path[55] == [1.0] * 3
    for before, after in itertools.pairwise(path):
        assert all(0 <= b <= a <= 1 for b, a in zip(before, after, strict=True))


def test_layers_go_one_after_the_other():
    assert shares("layers", 0.5, 4) == [1.0, 1.0, 0.0, 0.0]
    assert shares("layers", 0.625, 4) == [1.0, 1.0, 0.5, 0.0]
    assert shares("cosine", 0.25, 1) == pytest.approx([0.14645], abs=1e-4)


def test_the_even_schedule_changes_the_gate_equally_at_each_step():
    g, silu = 2 * torch.randn(4000), ACT2FN["silu"]
    even = even_progress(silu, g)
    gate = AnnealedGate(silu, "beta", torch.zeros(1), torch.tensor([0.5]))

    def distances(schedule):
        values = []
        for step in range(21):
            gate.share = shares(schedule, step / 20, 1, even)[0]
            values.append(gate(g))
        moves = torch.stack(values).diff(dim=0).square().mean(1).sqrt()
        return (moves.max() / moves.min()).item()

    assert distances("even") < 1.05
    assert distances("linear") > 2


# ---------------------------------------------------------------------- what comes out


def test_gaps_are_small_and_to_the_same_tokens(compared):
    assert compared.baseline.loss < compared.start_loss
    assert set(compared.gaps) == {"affine", "beta", "closed"}
    for name, gap in compared.gaps.items():
        assert gap == compared.runs[name].loss - compared.baseline.loss
        assert -0.05 < gap < 0.3
        assert compared.runs[name].tokens == compared.baseline.tokens == 30 * 8 * 32
    table = compared.to_pandas()
    assert list(table.index) == ["baseline", "affine", "beta", "closed"]
    assert list(table["path"]) == ["none", "affine", "beta", "closed"]
    assert "loss before finetuning" in str(compared)
    stored = json.loads((compared.baseline.folder.parent / "comparison.json").read_text())
    assert stored["runs"]["affine"]["loss"] == compared.runs["affine"].loss


def test_the_start_is_the_model_itself(compared, swiglu, data):
    want = language_loss(LlamaForCausalLM.from_pretrained(swiglu), data.validation, bos=1)
    assert compared.start_loss == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("name", "biased"), [("affine", True), ("beta", False), ("closed", True)])
def test_each_ends_in_a_plain_bilinear_llama(compared, data, name, biased):
    run = compared.runs[name]
    llama = run.llama()
    assert (llama.config.hidden_act, llama.config.mlp_bias) == ("linear", biased)
    # What was folded is what was trained: Trainer's own loss of the last step, a mean over batches.
    assert run.loss == pytest.approx(run.history[-1]["eval_loss"], abs=0.02)
    assert language_loss(llama, data.validation, bos=1) == pytest.approx(run.loss, abs=1e-5)
    hooked = run.hooked()
    ids = torch.tensor(data.validation[:4]["input_ids"])
    assert_close(hooked(ids), llama(ids).logits, rtol=0, atol=1e-4)
    assert BilinearTensor.from_model(hooked, 1).has_biases == biased


def test_neurons_added_at_the_start(swiglu, data, tmp_path):
    start = dataclasses.replace(TINY, path="closed", steps=1, learning_rate=0.0)
    config = dataclasses.replace(start, extra=8)
    configs = {"wide": config, "closed": start}
    result = compare_finetuning(swiglu, data, configs, folder=tmp_path / "x", **OPTIONS)
    run = result.runs["wide"]
    assert run.llama().config.intermediate_size == 24 + 8 + 16
    assert result.baseline.config.extra == 0
    assert result.gaps["wide"] < 0.8 * result.gaps["closed"]  # it starts nearer
    assert "8 neurons more" in str(run)
    affine = dataclasses.replace(config, path="affine")
    with pytest.raises(ValueError, match=r"extra=8 neurons are added on path='closed' alone"):
        finetune(swiglu, data, affine, folder=tmp_path / "y", **OPTIONS)


def test_the_baseline_keeps_its_gate(compared):
    assert compared.baseline.llama().config.hidden_act == "silu"


@pytest.mark.parametrize("path", ["affine", "beta"])
def test_folding_keeps_the_function(compared, swiglu, data, path):
    """The last checkpoint, with its gates at the end of their way, is the folded model."""
    from safetensors.torch import load_file

    run = compared.runs[path]
    checkpoint = load_file(run.folder / "checkpoint-30" / "model.safetensors")
    annealed = LlamaForCausalLM.from_pretrained(swiglu)
    none = (torch.zeros(24), torch.zeros(24))
    for gate in install_gates(annealed, path, {0: none, 1: none}):
        gate.share = 1.0
    annealed.load_state_dict(checkpoint, strict=False)
    ids = torch.tensor(data.validation[:4]["input_ids"])
    with torch.no_grad():
        assert_close(run.llama()(ids).logits, annealed(ids).logits, rtol=1e-5, atol=1e-5)


def test_grouped_queries_ties_and_another_activation(data, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        hidden_act="gelu",
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    small = dataclasses.replace(TINY, steps=4, schedule="layers", anneal=0.5)
    for path in ("affine", "beta"):
        run = finetune(
            tmp_path / "model",
            data,
            dataclasses.replace(small, path=path),
            folder=tmp_path / path,
            **OPTIONS,
        )
        llama = run.llama()
        assert llama.config.num_key_value_heads == 2
        assert llama.lm_head.weight is llama.model.embed_tokens.weight
        assert run.loss == pytest.approx(run.history[-1]["eval_loss"], abs=0.02)


def test_the_figure(compared):
    figure = finetune_figure(compared)
    assert len(figure.data) == 7  # four losses, three gaps
    gap = next(t for t in figure.data if t.name.startswith("closed") and not t.showlegend)
    ends = [run.history[-1]["eval_loss"] for run in (compared.runs["closed"], compared.baseline)]
    assert gap.y[-1] == pytest.approx(ends[0] - ends[1])
    vertical = [s for s in figure.layout.shapes if s.x0 == s.x1]
    assert {s.x0 for s in vertical} == {9.0}  # 30 % of 30 steps


# ---------------------------------------------------------------------- distillation


ONE_STEP = dataclasses.replace(TINY, path="closed", distill=0.3, batch=24, steps=1, warmup=0.0)


@pytest.fixture(scope="module")
def one_batch(data):
    """Rows that make one step, with more [BOS], and so fewer labels, in the first of them."""
    rows = sorted(range(len(data.train)), key=lambda n: -data.train[n]["input_ids"].count(1))
    return dataclasses.replace(data, train=data.train.select(rows[:12] + rows[-12:]))


def losses_by_hand(teacher, student, rows):
    """KL(teacher || student) and cross-entropy, means over the tokens, one after the other."""
    divergences, entropies = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (teacher, student))
        for here, label in enumerate(row["input_ids"][1:]):
            if label != 1:
                divergences.append((p[here].exp() * (p[here] - q[here])).sum())
                entropies.append(-q[here, label])
    return torch.stack(divergences).mean().item(), torch.stack(entropies).mean().item()


def test_the_loss_is_divergence_and_cross_entropy(swiglu, data, one_batch, tmp_path):
    """That of the first step, before it: of the closed form, or of a gate that has not moved yet."""
    teacher = LlamaForCausalLM.from_pretrained(swiglu)
    rows = torch.tensor(one_batch.train[: TINY.fit_rows]["input_ids"])
    fitted = approximate_llama(teacher, rows, warn_below=-1)
    student = to_bilinear_llama(teacher, {n: one.tensor for n, one in fitted.items()})
    divergence, entropy = losses_by_hand(teacher, student, one_batch.train)
    assert divergence > 0.002
    assert abs(entropy - divergence) > 0.1
    for share in (0.3, 1.0):
        config = dataclasses.replace(ONE_STEP, distill=share)
        run = finetune(swiglu, one_batch, config, folder=tmp_path / str(share), **OPTIONS)
        expected = share * divergence + (1 - share) * entropy
        assert run.history[0]["loss"] == pytest.approx(expected, abs=2e-6)
        # What is evaluated is the plain loss.
        assert run.history[1]["eval_loss"] == pytest.approx(run.loss, abs=0.02)
    itself = dataclasses.replace(ONE_STEP, path="affine", distill=1.0)
    run = finetune(swiglu, one_batch, itself, folder=tmp_path / "itself", **OPTIONS)
    assert abs(run.history[0]["loss"]) < 1e-6


@pytest.mark.parametrize("distill", [0.3, 1.0])
def test_micro_batches_change_no_gradient(swiglu, one_batch, tmp_path, distill):
    """Though they hold different numbers of tokens."""
    config = dataclasses.replace(ONE_STEP, distill=distill)
    norms = []
    for micro in (24, 6, 1):
        run = finetune(
            swiglu, one_batch, config, folder=tmp_path / str(micro), micro_batch=micro, **OPTIONS
        )
        norms.append((run.history[0]["grad_norm"], run.history[0]["loss"]))
    assert_close(torch.tensor(norms), torch.tensor(norms[:1]).expand(3, 2), rtol=1e-5, atol=0)


def test_without_distillation_there_is_no_teacher(compared, swiglu, data, tmp_path, monkeypatch):
    """And the result is, to the bit, that of Trainer's own loss."""
    monkeypatch.setattr(Distillation, "__post_init__", None)
    config = dataclasses.replace(compared.runs["closed"].config, distill=0.0)
    plain = finetune(swiglu, data, config, folder=tmp_path / "plain", **OPTIONS)
    make = training.make_trainer

    def stock(*arguments):
        made = make(*arguments)
        made.compute_loss = MethodType(Trainer.compute_loss, made)
        return made

    monkeypatch.setattr(training, "make_trainer", stock)
    again = finetune(swiglu, data, config, folder=tmp_path / "stock", **OPTIONS)
    for run in (plain, again):
        assert run.history == compared.runs["closed"].history
        for name, weight in run.llama().state_dict().items():
            assert torch.equal(weight, compared.runs["closed"].llama().state_dict()[name])


@pytest.mark.parametrize("path", ["affine", "beta", "closed"])
def test_the_teacher_is_come_closer_to(compared, swiglu, data, tmp_path, path):
    teacher = LlamaForCausalLM.from_pretrained(swiglu)
    config = dataclasses.replace(compared.runs[path].config, distill=1.0)
    taught = finetune(swiglu, data, config, folder=tmp_path / path, **OPTIONS)
    rows = data.validation.select(range(8))
    closer, _ = losses_by_hand(teacher, taught.llama(), rows)
    without, _ = losses_by_hand(teacher, compared.runs[path].llama(), rows)
    assert closer < 0.8 * without
    assert taught.llama().config.hidden_act == "linear"
    assert taught.parameters == compared.runs[path].parameters  # no teacher in it
    assert "distilled 100%" in str(taught)


def made_from(run):
    return json.loads((run.folder / "run.json").read_text())["data"]


def test_the_baseline_learns_from_the_text_and_teaches(compared, swiglu, data, tmp_path):
    taught = dataclasses.replace(TINY, path="closed", distill=1.0)
    result = compare_finetuning(swiglu, data, {"taught": taught}, folder=tmp_path / "x", **OPTIONS)
    assert result.baseline.loss == compared.baseline.loss
    assert list(result.to_pandas()["distill"]) == [0.0, 1.0]
    alone = finetune(
        swiglu,
        data,
        taught,
        folder=tmp_path / "alone",
        teacher=compared.baseline.model_folder,
        **OPTIONS,
    )
    assert alone.loss == result.runs["taught"].loss
    assert made_from(alone)["teacher"] == made_from(result.runs["taught"])["teacher"] != ""
    rows = data.validation.select(range(8))
    for teacher, nearer, further in (
        (compared.baseline.llama(), "taught", "itself"),
        (LlamaForCausalLM.from_pretrained(swiglu), "itself", "taught"),
    ):
        folders = {"taught": alone.folder, "itself": tmp_path / "itself"}
        finetune(swiglu, data, taught, folder=folders["itself"], **OPTIONS)
        distance = {
            name: losses_by_hand(teacher, FinetuneRun.load(folder).llama(), rows)[0]
            for name, folder in folders.items()
        }
        assert distance[nearer] < distance[further]


def test_a_teacher_belongs_to_its_run(compared, swiglu, data, tmp_path):
    taught = dataclasses.replace(ONE_STEP, batch=8)
    finetune(swiglu, data, taught, folder=tmp_path / "run", **OPTIONS)
    another = compared.runs["beta"].model_folder  # a bilinear one, which no path leads from
    with pytest.raises(
        ValueError, match=r"holds a run with other settings: teacher='\w+' \(there: '"
    ):
        finetune(swiglu, data, taught, folder=tmp_path / "run", teacher=another, **OPTIONS)
    finetune(swiglu, data, taught, folder=tmp_path / "another", teacher=another, **OPTIONS)
    wide = LlamaForCausalLM.from_pretrained(swiglu)
    wide.resize_token_embeddings(160)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(
        ValueError, match=r"wide has a vocabulary of 160 and reads 32 .* of 150, and"
    ):
        finetune(swiglu, data, taught, folder=tmp_path / "x", teacher=tmp_path / "wide", **OPTIONS)
    assert not (tmp_path / "x").exists()


def test_distillation_in_mixed_precision(swiglu, data, tmp_path):
    config = dataclasses.replace(TINY, distill=0.5)
    losses = [
        finetune(
            swiglu, data, config, folder=tmp_path / kind, **{**OPTIONS, "precision": kind}
        ).loss
        for kind in ("fp32", "bf16")
    ]
    assert 0 < abs(losses[0] - losses[1]) < 0.05


# ---------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_an_interrupted_run_ends_where_the_whole_one_does(
    swiglu, data, tmp_path, monkeypatch, distill
):
    """Inside the annealing: the gates go on from where they were."""
    config = dataclasses.replace(TINY, anneal=0.8, distill=distill)
    whole = finetune(swiglu, data, config, folder=tmp_path / "whole", **OPTIONS)
    step, calls = Trainer.training_step, []

    def interrupted(trainer, *args, **kwargs):
        calls.append(None)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="goes on from step 12 of 30"):
        finetune(swiglu, data, config, folder=tmp_path / "cut", **OPTIONS)
    resumed = finetune(swiglu, data, config, folder=tmp_path / "cut", **OPTIONS)
    assert len(calls) == 14 + 30 - 12
    assert resumed.loss == pytest.approx(whole.loss, abs=1e-6)
    again = finetune(swiglu, data, config, folder=tmp_path / "cut", **OPTIONS)
    assert len(calls) == 14 + 30 - 12  # finished: only read
    assert again.loss == resumed.loss


@pytest.mark.slow
def test_killed_and_started_again(swiglu, data, tmp_path):
    """While the gates change and the baseline teaches."""
    config = dataclasses.replace(TINY, steps=160, anneal=0.8, distill=0.5)
    arguments = [
        "finetune",
        str(swiglu),
        "--data",
        str(data.folder),
        "--out",
        str(tmp_path / "out"),
    ]
    arguments += ["--path", "affine", "--anneal", "0.8", "--distill", "0.5", "--steps", "160"]
    arguments += ["--batch", "8", "--learning-rate", "3e-3", "--weight-decay", "0"]
    arguments += ["--fit-rows", "48", "--device", "cpu", "--precision", "fp32", "--quiet"]
    program = f"from tl_bilinear.cli import main; main({arguments!r})"
    with subprocess.Popen([sys.executable, "-c", program], env=dict(os.environ)) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "affine" / "checkpoint-32").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out" / "affine" / "result.json").exists()
    options = {**OPTIONS, "teacher": tmp_path / "out" / "baseline" / "model"}
    whole = finetune(swiglu, data, config, folder=tmp_path / "whole", **options)
    resumed = finetune(swiglu, data, config, folder=tmp_path / "out" / "affine", **options)
    assert resumed.loss == pytest.approx(whole.loss, abs=1e-3)


@pytest.mark.slow
def test_two_processes_are_taught_as_one(swiglu, data, tmp_path):
    """The loss of the first step, which Adam would forgive a factor, and that at the end."""
    config = dataclasses.replace(TINY, path="closed", distill=1.0, steps=6)
    alone = compare_finetuning(swiglu, data, {"closed": config}, folder=tmp_path / "1", **OPTIONS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    arguments = ["--path", "closed", "--distill", "1", "--steps", "6", "--batch", "8"]
    arguments += ["--learning-rate", "3e-3", "--weight-decay", "0", "--fit-rows", "48"]
    arguments += ["--device", "cpu", "--precision", "fp32", "--quiet"]
    command = [sys.executable, *launcher, "-m", "tl_bilinear", "finetune", str(swiglu)]
    done = subprocess.run(
        [*command, "--data", str(data.folder), "--out", str(tmp_path / "2"), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    both, one = FinetuneRun.load(tmp_path / "2" / "closed"), alone.runs["closed"]
    assert both.history[0]["loss"] == pytest.approx(one.history[0]["loss"], rel=1e-3)
    assert both.loss == pytest.approx(one.loss, abs=1e-3)


# ---------------------------------------------------------------------- the command


def test_the_command(compared, swiglu, data, capsys):
    out = compared.baseline.folder.parent  # its baseline and its closed form are read, not trained
    arguments = ["--data", data.folder, "--out", out, "--path", "closed,affine", "--steps", 30]
    arguments += ["--batch", 8, "--learning-rate", 3e-3, "--fit-rows", 48, "--weight-decay", 0]
    arguments += ["--device", "cpu", "--precision", "fp32", "--quiet"]
    status = cli.main(["finetune", str(swiglu), *map(str, arguments)])
    output = capsys.readouterr()
    assert status == 0, output.err
    printed = output.out
    assert "loss before finetuning" in printed
    assert f"{compared.runs['affine'].loss:.4f}" in printed
    assert "plotly" in (out / "curves.html").read_text()
    assert FinetuneRun.load(out / "affine").config.path == "affine"


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "swish"}, "unknown path 'swish'; there are affine, beta, closed, none"),
        ({"schedule": "late"}, "unknown schedule 'late'; there are linear, cosine, even, layers"),
        ({"anneal": 1.0}, r"anneal must lie in \[0, 1\), got 1.0"),
        ({"distill": 1.5}, r"distill must lie in \[0, 1\], got 1.5"),
        ({"distill": -0.1}, r"distill must lie in \[0, 1\], got -0.1"),
        ({"distill": math.nan}, r"distill must lie in \[0, 1\], got nan"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative, got -1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**settings)


def test_runs_that_do_not_compare(swiglu, data, tmp_path):
    longer = dataclasses.replace(TINY, steps=40)
    with pytest.raises(ValueError, match=r"do not see the same text: .* 'b': \(320, 0\)"):
        compare_finetuning(swiglu, data, {"a": TINY, "b": longer}, folder=tmp_path / "x")
    with pytest.raises(ValueError, match="none of them named 'baseline'"):
        compare_finetuning(swiglu, data, {"baseline": TINY}, folder=tmp_path / "x")
    with pytest.raises(ValueError, match=r"is also its folder's, so '\.\./out' cannot be one"):
        compare_finetuning(swiglu, data, {"../out": TINY}, folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_models_that_it_refuses(compared, swiglu, data, tmp_path):
    place = tmp_path / "run"
    with pytest.raises(ValueError, match=r"is bilinear already .hidden_act='linear'."):
        finetune(compared.runs["beta"].model_folder, data, TINY, folder=place, **OPTIONS)
    llama = LlamaForCausalLM.from_pretrained(swiglu)
    llama.config.max_position_embeddings = 16
    llama.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"rows of 32 tokens, .*short takes 150 and 16: prepare"):
        finetune(tmp_path / "short", data, TINY, folder=place, **OPTIONS)
    config = json.loads((swiglu / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a 'gpt2' model; only a Llama can be stored"):
        finetune(tmp_path / "other", data, TINY, folder=place, **OPTIONS)
    assert not place.exists()
    llama.config.max_position_embeddings, llama.config.hidden_act = 32, "relu"
    llama.save_pretrained(tmp_path / "reglu")
    kinked = dataclasses.replace(TINY, path="beta")
    with pytest.raises(ValueError, match=r"has a kink at 0.*use path='affine'"):
        finetune(tmp_path / "reglu", data, kinked, folder=place, **OPTIONS)


def test_a_folder_of_another_model_is_refused(compared, swiglu, data, tmp_path):
    llama = LlamaForCausalLM.from_pretrained(swiglu)
    with torch.no_grad():
        llama.model.norm.weight.mul_(2)
    llama.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds a run with other settings: model='\w+' \(there:"):
        finetune(tmp_path / "other", data, TINY, folder=compared.runs["affine"].folder, **OPTIONS)


def test_validation_does_not_take_most_of_a_short_run():
    assert list(validation_rows(20, 10_000, 10)) == list(range(20))  # few beside the text: all
    some = validation_rows(5_000, 400, 10)
    assert 8 <= len(some) <= 0.25 * 400 / 10
    assert some[-1] >= 4_500  # spread over all stories
    assert len(validation_rows(5_000, 16, 2)) == 8
    assert len(validation_rows(3, 16, 2)) == 3


def test_a_run_says_how_long_it_will_take(swiglu, data, tmp_path, capsys):
    config = FinetuneConfig(path="closed", steps=6, batch=8, learning_rate=1e-3)
    finetune(swiglu, data, config, folder=tmp_path / "run", device="cpu", precision="fp32")
    said = capsys.readouterr()
    assert re.search(
        r"about \d+ s left: 2 steps of .* s, and 2 validations of \d+ rows", said.out + said.err
    )


@pytest.mark.parametrize(
    ("path", "schedule"), [("closed", "linear"), ("affine", "linear"), ("beta", "even")]
)
def test_without_progress_there_is_no_bar(swiglu, data, tmp_path, capsys, path, schedule):
    config = dataclasses.replace(TINY, path=path, schedule=schedule, steps=1)
    finetune(swiglu, data, config, folder=tmp_path / "run", **OPTIONS)
    assert "%|" not in capsys.readouterr().err
