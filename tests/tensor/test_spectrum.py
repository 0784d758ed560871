"""The sweep over a dictionary: against one dense matrix at a time, interrupted, and in two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tensor.reference import random_tensor
from tl_bilinear import BilinearTensor, Spectrum
from tl_bilinear.tensor import spectrum

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
    tensor = random_tensor(d_in, 6, d_out, seed=seed)
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


def test_another_sweeps_folder_is_refused(tmp_path):
    tensor = random_tensor(5, 3, 4)
    spectrum(tensor, k=2, checkpoint=tmp_path, progress=False)
    spectrum(tensor, k=2, checkpoint=tmp_path, progress=False)  # the same again is welcome
    for other in (lambda: spectrum(tensor, k=1, checkpoint=tmp_path, progress=False),
                  lambda: spectrum(2 * tensor, k=2, checkpoint=tmp_path, progress=False)):  # fmt: skip
        with pytest.raises(ValueError, match="holds the batches of another sweep"):
            other()


def test_stored_batches_are_read_not_done_again(tmp_path):
    tensor = random_tensor(5, 3, 4)
    first = spectrum(tensor, k=2, checkpoint=tmp_path, progress=False)
    path = next(tmp_path.glob("batch-*.safetensors"))
    before = path.stat().st_mtime_ns
    again = spectrum(tensor, k=2, checkpoint=tmp_path, progress=False)
    assert path.stat().st_mtime_ns == before
    assert torch.equal(first.values, again.values)


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
directions = torch.randn(80, 10, generator=generator)
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
    assert 2 <= len(done) < 10
    assert not (tmp_path / "killed").exists()
    finish(launch(tmp_path, folder, "resumed"))
    whole, resumed = (Spectrum.load(tmp_path / name) for name in ("whole", "resumed"))
    for name in ("index", "values", "residuals", "bound", "norms"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name))


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
    assert len(list(folder.glob("batch-*.safetensors"))) == 10
