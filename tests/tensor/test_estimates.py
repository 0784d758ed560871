"""What is said of the time that work takes: the flops counted, over a measured speed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.layers import directions, layer_like_trained
from tl_bilinear import BilinearTensor
from tl_bilinear.features.feature_sweep import feature_sweep
from tl_bilinear.tensor import eigensolvers, estimates, spectrum, top


@pytest.mark.parametrize(("k", "n"), [(3, 64), (10, 64), (10, 24)])
def test_the_flops_of_a_solver_are_foreseen_within_a_factor_of_two(k, n):
    tensor = layer_like_trained(512, 1024, 512)
    Q = tensor.interaction(directions(n, 512))
    with FlopCounterMode(display=False) as counted:
        found = Q.eigh(k, method="krylov")
    assert found.converged.all()
    # The time of the small steps that are no products is in the estimate, hence not in the middle.
    ratio = n * eigensolvers.flops("krylov", 512, 1024, k, n) / counted.get_total_flops()
    assert 0.5 < ratio < 2


def test_a_dense_solver_counts_as_much_as_its_parts():
    forming, decomposing = 2 * 64 * 32**2, 13 * 32**3
    assert eigensolvers.flops("dense", 32, 64, 5, 1) == forming + decomposing
    assert eigensolvers.flops("auto", 32, 64, 5, 1) == forming + decomposing
    # 2 h = 16 factor rows: the same two steps inside their span, and the way into it.
    assert eigensolvers.flops("lowrank", 200, 8, 5, 1) < eigensolvers.flops("dense", 200, 8, 5, 1)


@pytest.mark.parametrize(("speed", "said"), [(1e15, False), (1e4, True)])
def test_a_sweep_says_first_how_long_it_will_take(speed, said, monkeypatch, capfd):
    monkeypatch.setattr(estimates, "flops_per_second", lambda *given: speed)
    tensor, rows = layer_like_trained(16, 32, 16), directions(40, 16)
    spectrum(tensor, rows, 2)
    text = capfd.readouterr().err
    seconds = 40 * eigensolvers.flops("auto", 16, 32, 2, 40) / speed
    assert "spectra, about" in text
    assert (f", {estimates.human_seconds(seconds)}" in text) is said
    assert said is (seconds > estimates.WORTH_SAYING)


@pytest.mark.parametrize("flat", [True, False])
def test_the_flops_of_a_search_for_pairs_are_foreseen(flat):
    top._faster_dtype(torch.device("cpu"))  # measured once in a process
    tensor = layer_like_trained(128, 256, 128)
    if flat:
        left, right = (
            torch.randn(256, 128, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
        )
        tensor = BilinearTensor(left, right, tensor.out)
    matrix, rows = tensor.interaction(directions(1, 128))[0], directions(5000, 128, seed=2)
    with FlopCounterMode(display=False) as counted:
        matrix.top(1, kind="cross", directions=rows)
    ratio = top.flops(128, 256, 5000) / counted.get_total_flops()
    # All of them where nothing can be left out (the blocks overlap the diagonal); at most, elsewhere.
    assert 0.75 < ratio < 1.1 if flat else 1 < ratio < 3


@pytest.mark.parametrize(("speed", "said"), [(1e15, False), (1e4, True)])
def test_a_feature_sweep_says_how_long_its_pairs_will_take(speed, said, monkeypatch, capfd):
    monkeypatch.setattr(estimates, "flops_per_second", lambda *given: speed)
    tensor, rows = layer_like_trained(16, 32, 16), directions(40, 16)
    settings = {"screen": None, "checkpoint": None, "max_bytes": 2**30, "progress": True}
    feature_sweep(tensor, rows, rows, rows, torch.arange(30), 2, **settings)
    text = capfd.readouterr().err
    seconds = 30 * top.flops(16, 32, 40) / speed
    assert "strongest pairs" in text
    assert (f"at most about {estimates.human_seconds(seconds)}" in text) is said


def test_speed_is_measured_once():
    estimates.flops_per_second.cache_clear()
    first = estimates.flops_per_second(torch.device("cpu"))
    assert first > 1e6
    assert estimates.flops_per_second(torch.device("cpu")) == first


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "3 s"), (75, "1 min 15 s"), (1500, "25 min"), (3600 * 7.5, "7 h 30 min")],
)
def test_durations_in_words(seconds, text):
    assert estimates.human_seconds(seconds) == text
