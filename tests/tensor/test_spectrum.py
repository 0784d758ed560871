"""The sweep over a dictionary: against one dense matrix at a time, interrupted, and in two processes."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tensor.reference import random_tensor
from tl_bilinear import BilinearTensor, Spectrum
from tl_bilinear.io import alone_in, load_tensors, save_tensors
from tl_bilinear.tensor import batching, spectrum

module = importlib.import_module("tl_bilinear.tensor.spectrum")  # the package names the function

ROOT = Path(__file__).parents[2]


def reference(tensor, directions, k):
    """One direction at a time through the dense matrix: (norm, trace, values, effective rank)."""
    rows = []
    for u in directions:
        values = torch.linalg.eigvalsh(torch.einsum("a,aij->ij", u, tensor.dense()))
        rank = values.abs().sum() ** 2 / values.square().sum()
        largest = values[values.abs().argsort(descending=True)][:k]
        rows.append((values.square().sum().sqrt(), values.sum(), largest, rank))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 9), st.integers(1, 12))
def test_agrees_with_dense_matrices(seed, d_out, d_in, n):
    tensor = random_tensor(d_in, 6, d_out, biases=seed % 2 == 1, seed=seed)
    directions = torch.randn(n, d_out, dtype=torch.float64)
    k = min(3, d_in)
    norms, traces, values, ranks = reference(tensor, directions, k)
    sweep = spectrum(tensor, directions, k, effective_rank=True, progress=False)
    torch.testing.assert_close(sweep.norms, norms, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sweep.traces, traces, rtol=1e-10, atol=1e-10)
    assert sorted(sweep.index.tolist()) == list(range(n))
    torch.testing.assert_close(sweep.values.abs(), values[sweep.index].abs(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sweep.effective_rank, ranks[sweep.index], rtol=1e-6, atol=1e-6)
    assert (sweep.values[:, 0].abs().diff() <= 1e-12).all()
    assert sweep.converged.all()


def test_every_output_where_no_directions_are_given():
    tensor = random_tensor(4, 3, 5)
    sweep = spectrum(tensor, k=2, progress=False)
    same = spectrum(tensor, torch.eye(5, dtype=torch.float64), k=2, progress=False)
    torch.testing.assert_close(sweep.values, same.values)
    torch.testing.assert_close(sweep.norms, same.norms)


def test_screening_takes_the_largest_norms_and_keeps_all_of_them():
    tensor = random_tensor(8, 10, 6)
    directions = torch.randn(40, 6, dtype=torch.float64)
    whole = spectrum(tensor, directions, 2, progress=False)
    sweep = spectrum(tensor, directions, 2, screen=7, progress=False)
    assert set(sweep.index.tolist()) == set(whole.norms.topk(7).indices.tolist())
    torch.testing.assert_close(sweep.norms, whole.norms)
    place = {int(i): row for row, i in enumerate(whole.index)}
    for row, direction in enumerate(sweep.index.tolist()):
        torch.testing.assert_close(sweep.values[row], whole.values[place[direction]])


def test_one_end_of_the_spectrum():
    tensor = random_tensor(8, 12, 3)
    sweep = spectrum(tensor, k=2, which="negative", progress=False)
    for row, direction in enumerate(sweep.index.tolist()):
        every = torch.linalg.eigvalsh(tensor.dense()[direction])
        torch.testing.assert_close(sweep.values[row], every[:2])


def test_share_is_one_where_the_rank_is_k():
    left = torch.randn(2, 30)
    tensor = BilinearTensor(left, left, torch.randn(4, 2))
    sweep = spectrum(tensor, k=2, progress=False)
    torch.testing.assert_close(sweep.share, torch.ones(4))


def test_empty_directions():
    sweep = spectrum(
        random_tensor(5, 3, 4), torch.zeros(0, 4, dtype=torch.float64), 2, progress=False
    )
    assert len(sweep) == 0
    assert sweep.values.shape == (0, 2)
    assert sweep.to_pandas().empty


def test_table_and_storage(tmp_path):
    tensor = random_tensor(8, 10, 6)
    sweep = spectrum(tensor, k=2, effective_rank=True, progress=False)
    table = sweep.to_pandas()
    assert list(table.columns[:5]) == ["direction", "norm", "trace", "value_1", "value_2"]
    assert table["value_1"].abs().is_monotonic_decreasing
    torch.testing.assert_close(torch.tensor(table["norm"].values), sweep.norms[sweep.index])
    sweep.save(tmp_path / "sweep.safetensors")
    loaded = Spectrum.load(tmp_path / "sweep.safetensors")
    for name in ("index", "values", "bound", "converged", "effective_rank", "traces"):
        torch.testing.assert_close(getattr(loaded, name), getattr(sweep, name))
    assert len(loaded.top(3)) == 3


def test_bad_requests(unchecked, tmp_path):
    tensor = random_tensor(5, 3, 4)
    with pytest.raises(ValueError, match=r"directions must have shape \[\.\.\., 4\]"):
        spectrum(tensor, torch.randn(3, 5), 2)
    with pytest.raises(ValueError, match="screen must lie between 1 and 4"):
        spectrum(tensor, k=2, screen=5)
    with pytest.raises(ValueError, match="k must lie between 1 and 5"):
        spectrum(tensor, k=6)


# ---------------------------------------------------------------------------- checkpoints


def swept(folder, tensor=None, directions=None, k=2, **options):
    tensor = random_tensor(5, 3, 4, biases=True) if tensor is None else tensor
    return spectrum(tensor, directions, k, checkpoint=folder, progress=False, **options)


@pytest.fixture
def in_eights(monkeypatch):
    """Twenty-one directions in batches of 8, 8 and 5."""
    monkeypatch.setattr(module, "_MOST_PER_BATCH", 8)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(21, 4, generator=generator, dtype=torch.float64)


def replaced(name):
    return lambda t: replace(t, **{name: getattr(t, name) * (1 + 1e-12)})


CHANGES = {
    "left": {"tensor": replaced("left")},
    "right": {"tensor": replaced("right")},
    "out": {"tensor": replaced("out")},
    "dtype": {"tensor": lambda t: t.to(torch.float32)},
    "directions": {"directions": lambda d: torch.cat([d[:-1], 2 * d[-1:]])},
    "order of directions": {"directions": lambda d: d.flip(0)},
    "fewer directions": {"directions": lambda d: d[:-1]},
    "no directions": {"directions": lambda d: None},
    "k": {"k": lambda k: 1},
    "which": {"which": lambda _: "negative"},
    "screen": {"screen": lambda _: 20},
    "effective_rank": {"effective_rank": lambda _: True},
    "method": {"method": lambda _: "lowrank"},
    "tol": {"tol": lambda _: 1e-3},
    "seed": {"seed": lambda _: 1},
    "max_bytes": {"max_bytes": lambda _: 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_is_of_one_sweep_in_every_detail(change, tmp_path, in_eights):
    given = {"tensor": random_tensor(5, 3, 4, biases=True), "directions": in_eights, "k": 2}
    first = swept(tmp_path, **given)
    again = swept(tmp_path, **given)  # the same again is welcome
    assert torch.equal(first.values, again.values)
    other = {name: make(given.get(name)) for name, make in CHANGES[change].items()}
    with pytest.raises(
        ValueError, match=r"holds the batches of another sweep: batch-00000\d.*is not of"
    ):
        swept(tmp_path, **{**given, **other})


def test_the_work_of_another_kind_is_refused(tmp_path):
    options = {"checkpoint": tmp_path, "progress": False, "unit": "row"}
    batching.sweep(
        lambda r: {"x": torch.ones(r.stop - r.start)}, 9, 4, identity=lambda: "a", **options
    )
    for identity, count, batch in (("b", 9, 4), ("a", 10, 4), ("a", 9, 3)):
        with pytest.raises(ValueError, match="holds the batches of another sweep"):
            batching.sweep(
                lambda r: {"x": torch.ones(1)},
                count,
                batch,
                identity=lambda i=identity: i,
                **options,
            )


@pytest.mark.parametrize("index", [0, 1, 2, 7])
def test_any_foreign_batch_is_refused_by_name(index, tmp_path, in_eights):
    ours, other = tmp_path / "ours", tmp_path / "other"
    swept(ours, directions=in_eights)
    swept(other, 2 * random_tensor(5, 3, 4), in_eights)
    path = ours / f"batch-{index:06d}.safetensors"
    shutil.copy(other / "batch-000001.safetensors", path)
    with pytest.raises(
        ValueError, match=rf"{path.name} is not of this one \(other weights, directions"
    ):
        swept(ours, directions=in_eights)
    path.unlink()
    assert len(swept(ours, directions=in_eights)) == 21


def test_a_batch_in_the_place_of_another_is_refused(tmp_path, in_eights):
    swept(tmp_path, directions=in_eights)
    shutil.copy(tmp_path / "batch-000000.safetensors", tmp_path / "batch-000001.safetensors")
    with pytest.raises(
        ValueError, match=r"batch-000001\S* is not of this one \(it says rows \[0, 8\] of 21"
    ):
        swept(tmp_path, directions=in_eights)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit of a number":
        content[-3] ^= 1
        path.write_bytes(content)
    elif how == "a bit of the header":
        content[12] ^= 255
        path.write_bytes(content)
    elif how == "another shape":
        tensors, metadata = load_tensors(path)
        save_tensors(path, {n: t[:3] for n, t in tensors.items()}, metadata)
    elif how == "a tensor less":
        tensors, metadata = load_tensors(path)
        tensors.pop("bound")
        save_tensors(path, tensors, metadata)
    elif how == "not a number":
        tensors, metadata = load_tensors(path)
        tensors["values"][0, 0] = torch.nan
        save_tensors(path, tensors, metadata)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "a bit of a number",
        "a bit of the header",
        "another shape",
        "a tensor less",
        "not a number",
    ],
)
@pytest.mark.parametrize("index", [0, 2])
def test_a_damaged_batch_is_done_again(how, index, tmp_path, in_eights):
    whole = swept(None, directions=in_eights)
    swept(tmp_path, directions=in_eights)
    path = tmp_path / f"batch-{index:06d}.safetensors"
    damage(path, how)
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged and done again"):
        found = swept(tmp_path, directions=in_eights)
    for name in ("index", "values", "residuals", "bound", "converged"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert torch.equal(
        swept(tmp_path, directions=in_eights).values, whole.values
    )  # and is whole now


def test_stored_batches_are_read_not_done_again(tmp_path, in_eights, monkeypatch):
    first = swept(tmp_path, directions=in_eights)
    paths = sorted(tmp_path.glob("batch-*.safetensors"))
    assert len(paths) == 3
    before = [path.stat().st_mtime_ns for path in paths]
    leftover = tmp_path / ".batch-000001.safetensors.0123.tmp"
    leftover.write_bytes(b"half")
    monkeypatch.setattr(module, "participation", None)
    again = swept(tmp_path, directions=in_eights)
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert torch.equal(first.values, again.values)
    assert not leftover.exists()  # of a writer that was killed


def test_an_interrupted_write_leaves_no_batch(tmp_path, in_eights, monkeypatch):
    def interrupted(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, directions=in_eights)
    assert not list(tmp_path.glob("*.safetensors"))
    monkeypatch.undo()
    assert len(swept(tmp_path, directions=in_eights)) == 21


def test_one_run_at_a_time(tmp_path, in_eights):
    with (
        alone_in(tmp_path),
        pytest.raises(
            BlockingIOError, match=f"another run is at work in {tmp_path}.*: wait for it"
        ),
    ):
        swept(tmp_path, directions=in_eights)
    assert len(swept(tmp_path, directions=in_eights)) == 21
    with alone_in(tmp_path):  # and it has let go
        pass


@pytest.mark.parametrize(("world", "count"), [(2, 21), (3, 21), (4, 9), (5, 3)])
def test_processes_share_uneven_batches(world, count, monkeypatch):
    """What each process does, one after the other, and what they tell each other, without a launch."""
    told = []
    rows = torch.arange(float(count))

    def one(rank):
        @contextmanager
        def processes():
            yield rank, world, "group"

        def everyone(mine, group, size):
            assert (group, size) == ("group", world)
            told[rank : rank + 1] = [mine]
            return {index: part for each in told for index, part in each.items()}

        monkeypatch.setattr(batching, "_processes", processes)
        monkeypatch.setattr(batching, "_gather", everyone)
        return batching.sweep(
            lambda r: {"x": rows[r], "y": 2 * rows[r]},
            count,
            4,
            checkpoint=None,
            identity=str,
            progress=False,
            unit="row",
        )

    told.extend({} for _ in range(world))
    for rank in range(world):
        try:
            found = one(rank)
        except KeyError:  # the others have not said theirs yet
            assert rank < world - 1
    assert torch.equal(found["x"], rows)
    assert torch.equal(found["y"], 2 * rows)
    assert sorted(i for each in told for i in each) == list(range(-(-count // 4)))


PROGRAM = """
import importlib, sys, time, torch
from tl_bilinear import BilinearTensor
from tl_bilinear.tensor import spectrum

torch.set_num_threads(1)
importlib.import_module("tl_bilinear.tensor.spectrum")._MOST_PER_BATCH = 8
folder, out, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
work = BilinearTensor.interaction

def slow(self, *args):
    time.sleep(pause)
    return work(self, *args)

BilinearTensor.interaction = slow
generator = torch.Generator().manual_seed(0)
tensor = BilinearTensor(*(torch.randn(*s, generator=generator) for s in ((30, 20), (30, 20), (10, 30))))
directions = torch.randn(85, 10, generator=generator)  # eleven batches, the last one smaller
sweep = spectrum(tensor, directions, 3, checkpoint=folder or None, progress=False)
import os
sweep.save(out + os.environ.get("RANK", ""))
"""


def launch(tmp_path, folder, name, pause=0.0, prefix=()):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, *prefix, str(program), str(folder), str(tmp_path / name), str(pause)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_killed_and_started_again_gives_the_same_bits(tmp_path):
    finish(launch(tmp_path, "", "whole"))
    folder = tmp_path / "batches"
    process = launch(tmp_path, folder, "killed", pause=0.5)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("batch-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = list(folder.glob("batch-*.safetensors"))
    assert 2 <= len(done) < 11
    assert not (tmp_path / "killed").exists()
    finish(launch(tmp_path, folder, "resumed"))
    whole, resumed = (Spectrum.load(tmp_path / name) for name in ("whole", "resumed"))
    for name in ("index", "values", "residuals", "bound", "norms"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name))


def test_two_runs_in_one_folder(tmp_path):
    """Not launched together: the second says so and ends, the first is not disturbed."""
    folder = tmp_path / "batches"
    first = launch(tmp_path, folder, "first", pause=0.3)
    deadline = time.monotonic() + 60
    while not list(folder.glob("batch-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # or it would be done first where importing takes long
    try:
        second = launch(tmp_path, folder, "second")
        _, errors = second.communicate(timeout=60)
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"BlockingIOError: another run is at work in {folder}" in errors.splitlines()[-1]
    finish(first)
    assert Spectrum.load(tmp_path / "first").values.shape == (85, 3)
    finish(launch(tmp_path, folder, "third"))


@pytest.mark.slow
def test_two_processes_share_the_work_and_both_have_the_result(tmp_path):
    finish(launch(tmp_path, "", "whole"))
    folder = tmp_path / "batches"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finish(launch(tmp_path, folder, "shared", prefix=torchrun))
    whole = Spectrum.load(tmp_path / "whole")
    for rank in "01":
        shared = Spectrum.load(tmp_path / f"shared{rank}")
        assert torch.equal(shared.index, whole.index)
        assert torch.equal(shared.values, whole.values)
    assert len(list(folder.glob("batch-*.safetensors"))) == 11
