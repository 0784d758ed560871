"""Writers that are killed, processes that meet in one folder, a full disk, Ctrl-C at any moment."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import tqdm.auto
import tqdm.std

from tests.faults import files
from tests.faults.building import images, layer
from tests.faults.campaign import patience
from tests.models.building import bilinear_model
from tests.recipes.stories import make_stories
from tl_bilinear import cli, io
from tl_bilinear.circuits import FeatureGraph
from tl_bilinear.models import HookedBilinearTransformer
from tl_bilinear.recipes.images import Runs, TrainingConfig
from tl_bilinear.recipes.language import (
    LanguageConfig,
    LanguageData,
    TextConfig,
    TokenizerConfig,
    load_tokenizer,
    make_tokenizer,
    pack_stories,
    prepare_text,
    train_language_model,
    train_tokenizer,
)
from tl_bilinear.tensor import BilinearTensor


@contextlib.contextmanager
def forked(work):
    """A child process that does `work`, killed at the end of the block if it is still there."""
    child = os.fork()
    if child == 0:
        # tqdm's own lock is shared with the parent: killed while it holds it, a child would hang both.
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
            bar.set_lock(threading.RLock())
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---------------------------------------------------------------------- kills


def _forever(write):
    def work():
        while True:
            write()

    return work


def _stories(folder):
    path = folder.parent / "stories.txt"
    if not path.exists():
        path.write_text("\n<|endoftext|>\n".join(make_stories(80)))
    return path


def _model(folder):
    bilinear_model(n_layers=1).save_pretrained(folder / "model")


def _load_model(folder):
    assert HookedBilinearTransformer.from_pretrained(folder / "model").cfg.n_layers == 1


def _tokenizer(folder):
    make_tokenizer(
        _stories(folder), TokenizerConfig(size=150), out=folder / "tokenizer", progress=False
    )


def _data(folder):
    tokenizer = train_tokenizer(make_stories(20), 150)
    config = TextConfig(n_ctx=16, validation=0.2)
    prepare_text(_stories(folder), config, tokenizer=tokenizer, out=folder / "data", progress=False)


WRITERS = {
    "a result": (
        lambda p: layer().save(p / "x.safetensors"),
        lambda p: BilinearTensor.load(p / "x.safetensors"),
    ),
    "JSON": (
        lambda p: io.write_json(p / "x.json", {"a": [1] * 20_000}),
        lambda p: io.read_table(p / "x.json"),
    ),
    "a graph": (
        lambda p: _graph().to_graphml(p / "x.graphml"),
        lambda p: __import__("networkx").read_graphml(p / "x.graphml"),
    ),
    "a model": (_model, _load_model),
    "a tokenizer": (_tokenizer, lambda p: load_tokenizer(p / "tokenizer")),
    "text": (_data, lambda p: LanguageData.load(p / "data")),
}


def _graph():
    one = torch.tensor([[0, 0]])
    return FeatureGraph(["a"], one, ["x\x01y"], torch.tensor([[0, 0, 0]]), torch.ones(1))


def _killed(write, load, folder, kills, longest):
    draw = random.Random(0)
    write(folder)
    names = {path.name for path in folder.iterdir()}
    for _ in range(kills):
        with forked(_forever(lambda: write(folder))):
            time.sleep(draw.uniform(0, longest))
        # A folder that was being exchanged is under its old name; the next writer sees to it.
        if names <= {path.name for path in folder.iterdir()}:
            load(folder)
    write(folder)
    load(folder)
    left = {path.name for path in folder.iterdir()} - names
    assert all(name.endswith(io.LOCK) for name in left), left


@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_what_was_there_and_nothing_else(writer, tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    slow = writer in ("text", "a tokenizer", "a model")
    _killed(*WRITERS[writer], folder, 6 if slow else 20, 0.2 if slow else 0.02)


@pytest.mark.campaign
@pytest.mark.parametrize("writer", WRITERS)
def test_writers_killed_a_hundred_times(writer, tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    _killed(*WRITERS[writer], folder, 100, 0.3)


def test_image_runs_killed_and_started_again(tmp_path):
    configs = [TrainingConfig(size=4, epochs=3, seed=seed) for seed in range(4)]
    alone = Runs(progress=False).train(images(), configs)
    for pause in (0.0, 0.01, 0.03, 0.1):
        with forked(lambda: Runs(tmp_path / "runs", progress=False).train(images(), configs)):
            time.sleep(pause)
    again = Runs(tmp_path / "runs", progress=False).train(images(), configs)
    for one, other in zip(alone, again, strict=True):
        assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))
    assert len(list((tmp_path / "runs").iterdir())) == 4


# ---------------------------------------------------------------------- leftovers


def _dead():
    with forked(lambda: None) as child:
        pass
    return child


def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path):
    target, dead, here = tmp_path / "model", _dead(), io._HERE
    gone = [f".model.{here}-{dead}-0a1b2c3d.tmp", f".model.{here}-{os.getpid()}-0a1b2c3d.tmp"]
    kept = [
        f".model.{here}-{os.getppid()}-0a1b2c3d.tmp",  # of a process that lives
        f".model.00000000-{dead}-0a1b2c3d.tmp",  # of another machine
        f".other.{here}-{dead}-0a1b2c3d.tmp",  # of another target
        f".model.{here}-{dead}-0a1b2c3d.txt",
        f"model.{here}-{dead}-0a1b2c3d.tmp",
    ]
    old = f".model.{here}-{dead}-0a1b2c3d.old"
    for name in [*gone, *kept, old]:
        (tmp_path / name).mkdir()
    with pytest.raises(ZeroDivisionError), io.whole_directory(target, "model"):
        1 / 0  # noqa: B018
    # While there is no model, the one that was being replaced is all there is.
    assert {path.name for path in tmp_path.iterdir()} == {*kept, old}
    for _ in range(2):
        with io.whole_directory(target, "model"):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "model"}


def test_a_folder_claimed_by_a_killed_run_can_be_claimed(tmp_path):
    (tmp_path / f".{io.MARKER}.{io._HERE}-{_dead()}-0a1b2c3d.tmp").write_text("{")
    io.claim(tmp_path, "run")
    assert [path.name for path in tmp_path.iterdir()] == [io.MARKER]


# ---------------------------------------------------------------------- two in one folder


def _wait_for(path):
    with patience(10):
        while not path.exists():
            time.sleep(0.01)


def test_two_processes_in_one_folder(tmp_path):
    def hold():
        with io.alone_in(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    with forked(hold) as child:
        _wait_for(tmp_path / "held")
        with (
            pytest.raises(
                BlockingIOError, match=rf"another run is at work in .*\(process {child} on"
            ),
            io.alone_in(tmp_path),
        ):
            pass
    with io.alone_in(tmp_path):  # a lock dies with its process
        pass


def test_two_writers_of_one_folder(tmp_path):
    def hold():
        with io.whole_directory(tmp_path / "model", "model"):
            (tmp_path / "held").touch()
            time.sleep(60)

    with forked(hold):
        _wait_for(tmp_path / "held")
        with pytest.raises(BlockingIOError, match=r"another run is at work in .*model"):
            _model(tmp_path)
    _model(tmp_path)
    _load_model(tmp_path)


def test_a_place_that_cannot_be_written_is_not_called_busy(tmp_path, monkeypatch):
    """/proc takes no files, whoever asks: the lock cannot be made, and nobody holds it."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    with (
        pytest.raises(PermissionError, match=r"cannot write into /proc: .*choose another folder"),
        io.whole_directory("/proc/model", "model"),
    ):
        pass


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    for enter in (
        lambda place: io.claim(place, "run"),
        lambda place: io.whole_directory(place / "model", "model").__enter__(),
    ):
        with pytest.raises(
            NotADirectoryError, match=rf"cannot write into .*: {tmp_path}/file is a file"
        ):
            enter(tmp_path / "file" / "below")


def test_a_training_beside_another_one(tmp_path):
    text = LanguageData.load(files.copy(files.text, tmp_path) / "data")
    folder = tmp_path / "run"
    io.claim(folder, "run")
    with io.alone_in(folder), pytest.raises(BlockingIOError, match="another run is at work"):
        train_language_model(text, LanguageConfig(**files.TINY), folder=folder, progress=False)
    assert sorted(p.name for p in folder.iterdir()) == [io.MARKER]


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _big():
    return BilinearTensor(torch.ones(200, 200), torch.ones(200, 200), torch.ones(200, 200))


def _big_model(place):
    bilinear_model(d_mlp=2000).save_pretrained(place / "model")


@pytest.mark.parametrize(
    "write",
    [
        lambda p: _big().save(p / "x.safetensors"),
        lambda p: io.write_json(p / "x.json", ["x" * 100] * 5000),
        _big_model,
        lambda p: bilinear_llama().to_hf(p / "llama"),
    ],
    ids=["result", "JSON", "model", "Llama"],
)
def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk, write):
    _model(small_disk)
    with pytest.raises(OSError, match=r"No space left|cannot write"):
        write(small_disk)
    _load_model(small_disk)
    assert [path.name for path in small_disk.iterdir()] == ["model"]


def bilinear_llama():
    fields = {"positional_embedding_type": "rotary", "rotary_dim": 8, "final_rms": True}
    model = bilinear_model(d_mlp=2000, **fields)
    model.unembed.b_U.data.zero_()
    return model


def test_a_command_on_a_full_disk(small_disk, tmp_path, capfd):
    (small_disk / "filled").write_bytes(bytes(190_000))
    story = _stories(tmp_path / "x")
    given = ["tokenizer", story, "--size", 170, "--out", small_disk / "out", "--quiet"]
    assert cli.main([str(each) for each in given]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "No space left" in lines[0] or "cannot write" in lines[0]
    assert "bug" not in lines[0]
    assert [path.name for path in small_disk.iterdir()] == ["filled"]


# ---------------------------------------------------------------------- what ends


def test_one_very_long_word_ends():
    with patience(20):
        tokenizer = train_tokenizer(
            ["x" * 1_000_000, *make_stories(5), "y" * 101 + " a " + "z" * 100], 200
        )
        assert len(pack_stories(["x" * 1_000_000] * 2, tokenizer, 4)) == 1
    assert "y" * 101 not in tokenizer.get_vocab()


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_an_interrupt_at_any_moment_is_one_line(moment, tmp_path):
    """From the first line of the command on, through its imports and its work."""
    program = (
        "import tl_bilinear.__main__, sys\n"
        "print('go', flush=True)\n"
        "from tl_bilinear.__main__ import main\n"
        "sys.argv = ['tl-bilinear', 'images', '--out', 'out', '--quiet']\n"
        "sys.exit(main())\n"
    )
    root = str(Path(cli.__file__).parents[1])
    done = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.stdout.readline() == "go\n"
    time.sleep(moment)
    done.send_signal(signal.SIGINT)
    _, said = done.communicate(timeout=60)
    assert done.returncode == 130, said
    assert len(said.strip().splitlines()) == 1
    assert "interrupted" in said
