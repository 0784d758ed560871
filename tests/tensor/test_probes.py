"""The bound on one end of a spectrum: it holds as often as it says, and shifts do not matter to it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tl_bilinear.tensor import basis, probes
from tl_bilinear.tensor.basis import Basis, Ritz
from tl_bilinear.tensor.factors import Factors

SPECTRA = {
    "power law": np.arange(1, 61) ** -1.0 * np.resize([1, -1], 60),
    "other end larger": np.concatenate([-5 * np.ones(20), np.linspace(0, 1, 40)]),
    "copies": np.concatenate([np.ones(30), np.zeros(30)]),
    "one far out": np.concatenate([[3.0], np.linspace(-1, 1, 59)]),
    "definite": -1 - np.arange(60) / 10,
}


def chain_of(values, rows, steps, seed=0, n=1):
    """A chain on diag(values), for n draws of the vectors, by dense algebra and Gram-Schmidt."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.diag(torch.as_tensor(values, dtype=torch.float64))
    omega = torch.randn(n, rows, len(values), generator=generator, dtype=torch.float64)
    chain = probes.Chain(rows)
    block, link = _lower(omega)
    chain.begin(link)
    held = block
    for _ in range(steps):
        image = block @ matrix
        own = image @ block.mT
        rest = image
        for _ in range(2):
            rest = rest - (rest @ held.mT) @ held
        if float(rest.abs().amax()) < 1e-10:  # nothing is left of the space
            chain.add(own, torch.zeros_like(own), torch.full((n,), 1e-13))
            break
        block, link = _lower(rest)
        chain.add(own, link, torch.full((n,), 1e-13))
        held = torch.cat([held, block], 1)
    return chain


def _lower(rows):
    q, r = torch.linalg.qr(rows.mT)
    return q.mT, r.mT


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("failure", [1e-8, 1e-3, 0.3])
def test_shortest_is_the_quantile_of_a_chi_distribution(rows, failure):
    assert math.isclose(stats.chi(rows).cdf(probes.shortest(rows, failure)), failure, rel_tol=1e-9)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_reach_lies_above_that_end_and_not_far_above(name, rows, sign):
    values = SPECTRA[name]
    top = (sign * values).max()
    spread = values.max() - values.min()
    chain = chain_of(values, rows, 16 // rows + 4, n=50)
    reach = chain.reach(sign)
    assert (reach >= top * (1 - 1e-9)).all()
    # At the rate of Chebyshev polynomials for that length: not a bound on the norm, but on this end.
    assert (reach <= max(top, 0) + spread * (0.7 if rows == 1 else 1.3)).all()
    assert (chain.margin(sign, reach) > 0).all()
    assert (chain.margin(sign, torch.full((50,), top * (1 - 1e-6 * np.sign(top)))) <= 0).all()


def test_a_shift_changes_nothing():
    values = SPECTRA["power law"]
    plain, moved = chain_of(values, 2, 6), chain_of(values - 7.0, 2, 6)
    levels = torch.tensor([1.2, 1.5, 3.0], dtype=torch.float64)
    for level in levels:
        torch.testing.assert_close(plain.margin(1, level[None]), moved.margin(1, level[None] - 7))
    # So an end that is negative is bounded by a negative number.
    definite = chain_of(SPECTRA["definite"], 1, 40)
    assert definite.margin(1, torch.tensor([-0.5], dtype=torch.float64)) > 0


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6))
def test_the_margin_grows_with_the_level(seed, rows, steps):
    rng = np.random.default_rng(seed)
    chain = chain_of(rng.standard_normal(40) ** 3, rows, steps, seed)
    margins = torch.cat([chain.margin(1, torch.tensor([x])) for x in np.linspace(-5, 60, 200)])
    finite = margins[torch.isfinite(margins)]
    assert (finite.diff() >= -1e-9).all()
    first = int(torch.isfinite(margins).nonzero()[0])
    assert torch.isfinite(margins[first:]).all()  # once above the Ritz values, always


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_it_fails_as_often_as_it_says(rows, monkeypatch):
    """With one chance in ten allowed, and no safety for rounding, the bound fails about so often."""
    monkeypatch.setattr(
        probes, "FAILURE_PROBABILITY", 0.4
    )  # a quarter of it for one end in one round
    monkeypatch.setattr(probes, "_SAFETY", 1.0)
    # One eigenvalue of two: the bound on it is attained where the polynomial vanishes on the other.
    values = np.concatenate([[1.0], np.zeros(39)])
    chain = chain_of(values, rows, 1, seed=3, n=4000)
    failed = (chain.margin(1, torch.full((4000,), 1.0 - 1e-9)) > 0).double().mean()
    assert failed < 0.1 + 4 * math.sqrt(0.1 * 0.9 / 4000)
    chance = 0.02 if rows == 1 else 1e-3
    assert failed > chance  # the allowance is not a formality


def test_rounds_and_ends_share_the_probability():
    lengths = [probes.Chain(1, round).length * probes._SAFETY for round in range(4)]
    spent = [2 * float(stats.chi(1).cdf(t)) for t in lengths]
    assert sum(spent) <= probes.FAILURE_PROBABILITY
    assert math.isclose(spent[0], probes.FAILURE_PROBABILITY / 2, rel_tol=1e-6)
    assert probes.Chain(1, 1).most >= probes.Chain(1, 0).most


def test_what_rounding_leaves_counts_as_the_noise_it_may_be():
    chain = probes.Chain(1)
    chain.begin(torch.full((1, 1, 1), 6.0, dtype=torch.float64))
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    chain.add(zero, zero, torch.tensor([1e-9], dtype=torch.float64))
    level = float(chain.reach(1))
    assert 1e-9 < level < 1e-1  # C = 0 up to the noise, and no more can be said
    assert chain.margin(1, torch.tensor([1.0])) > 0


# ---------------------------------------------------------------------------- bases


def factors(d, n, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Factors(normal(2 * d, d), normal(2 * d, d), normal(n, 2 * d)), normal


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_rows_are_parted_into_what_is_held_and_what_is_outside(seed, rows, held, dependent):
    _, normal = factors(3, 1, seed)
    inside = torch.linalg.qr(normal(2, 12, max(1, held))).Q.mT[:, :held]
    given_rows = normal(2, rows, 12)
    if dependent and rows > 1:
        given_rows[:, -1] = 2 * given_rows[:, 0] + (normal(2, 1, held) @ inside)[:, 0]
        given_rows[:, -1] += 1e-7 * normal(2, 12)
    noise = torch.full((2,), 1e-5, dtype=torch.float64)
    overlaps, ahead, coupling, lost = basis._outside(
        given_rows, inside, noise, torch.Generator().manual_seed(seed)
    )
    gap = torch.linalg.matrix_norm(overlaps @ inside + coupling @ ahead - given_rows)
    assert (gap <= lost.sqrt() * (1 + 1e-6) + 1e-12).all()
    assert bool((lost > 0).any()) == (dependent and rows > 1)
    whole = torch.cat([inside, ahead], 1)
    identity = torch.eye(held + rows, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(whole @ whole.mT, identity)
    assert torch.equal(coupling, coupling.tril())
    assert ((coupling.diagonal(dim1=1, dim2=2) == 0).any()) == (dependent and rows > 1)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 5), st.integers(1, 3))
def test_a_basis_knows_what_its_images_have_outside(seed, block, steps, k):
    d, n = 24, 2
    matrix, normal = factors(d, n, seed)
    Q = matrix.dense()
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(normal(n, d, block)).Q.mT
    grown = Basis(start.contiguous(), 2)
    for _ in range(steps):
        grown.advance(matrix, generator)
    chain = grown.begin_probing(2, 0, generator)
    before = grown.size
    for _ in range(2):
        grown.advance(matrix, generator)
    probing = grown.of(torch.tensor([1]))
    grown.end_probing(generator)
    V = grown.vectors[:, : grown.size]
    torch.testing.assert_close(grown.images[:, : grown.size], V @ Q)
    torch.testing.assert_close(grown.reduced[:, : grown.size, : grown.size], V @ Q @ V.mT)
    outside = V @ Q - (V @ Q @ V.mT) @ V
    mine = torch.zeros_like(outside)
    mine[:, grown.open] = grown.coupling @ grown.ahead
    torch.testing.assert_close(mine, outside, rtol=0, atol=1e-9)
    assert probing.size == grown.size
    assert before == steps * block
    # The chain is that of C, the matrix between rows outside the basis as it was.
    held = V[:, :before]
    P = torch.eye(d, dtype=torch.float64) - held.mT @ held
    C = P @ Q @ P
    fresh = V[:, before : before + 4]
    tridiagonal = fresh @ C @ fresh.mT
    torch.testing.assert_close(chain._matrix[:, :4, :4], tridiagonal, rtol=0, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(3, 20), st.integers(1, 3), st.sampled_from([1, -1]))
def test_the_end_of_the_others_holds_for_every_basis(seed, size, k, sign):
    """Against the dense spectrum: whatever V is, given the true end of what is outside it."""
    d = 22
    matrix, normal = factors(d, 1, seed)
    Q = matrix.dense()[0]
    V = torch.linalg.qr(normal(d, size)).Q.mT
    if seed % 2:  # a basis that knows the leading eigenvectors well
        good = torch.linalg.eigh(sign * Q).eigenvectors.mT.flip(0)[: size // 2 + 1]
        V = torch.linalg.qr(torch.cat([good + 1e-3 * normal(*good.shape), V])[:size].mT).Q.mT
    which = "positive" if sign == 1 else "negative"
    reduced = V @ Q @ V.mT
    values, columns = torch.linalg.eigh(reduced)
    k = min(k, size)
    order = basis.select(values[None], k, which)
    outside = columns.mT @ (V @ Q - reduced @ V)
    ritz = Ritz(values[None], columns.mT[order[0]][None], outside[None], order)
    P = torch.eye(d, dtype=torch.float64) - V.mT @ V
    spaces = torch.linalg.qr(P, mode="complete").Q  # C between rows outside V only
    rest = torch.linalg.svd(P).U[:, : d - size]
    beta = torch.linalg.eigvalsh(sign * rest.mT @ Q @ rest)[-1]
    del spaces
    # Q between rows orthogonal to the wanted Ritz vectors:
    wanted = columns.mT[order[0]] @ V
    others = torch.linalg.svd(wanted, full_matrices=True).Vh[k:]
    true_end = torch.linalg.eigvalsh(sign * others @ Q @ others.mT)[-1]
    end = ritz.end(sign, beta[None])[0]
    assert end >= true_end - 1e-9
    level = true_end + 0.3 * Q.norm()
    limit = ritz.limit(sign, level[None])[0]
    assert ritz.end(sign, limit[None])[0] <= level + 1e-5 * Q.norm()
