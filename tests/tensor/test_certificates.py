"""Certificates: an independent checker accepts what was proved, and nothing that was changed."""

import ast
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tensor.reference import random_tensor
from tl_bilinear.io import load_tensors, save_tensors
from tl_bilinear.tensor import certificate_checker as checker
from tl_bilinear.tensor.bilinear import BilinearTensor
from tl_bilinear.tensor.boundary import boundary_distance
from tl_bilinear.tensor.certificates import folded, verify_certificate, write_certificate
from tl_bilinear.tensor.margins import margin_spectrum, moment_metric
from tl_bilinear.tensor.moments import InputMoments
from tl_bilinear.tensor.quadratic import QuadraticForm
from tl_bilinear.tensor.robustness import adversarial_distances

f64 = torch.float64


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def build(path, dtype=torch.float32, biases=True, embedded=False, n=24, k=3):
    t = random_tensor(6, 8, 3, biases, 0, dtype)
    x = normal(1, n, 9 if embedded else 6).to(dtype)
    embedding = (normal(2, 9, 6).to(dtype), normal(3, 6).to(dtype)) if embedded else None
    whole = folded(t, embedding)
    found = adversarial_distances(whole, x)
    labels = found.predicted.clone()
    labels[:4] = (labels[:4] + 1) % 3
    metric = moment_metric(whole, InputMoments.of(x.double()), ridge=0.1, centred=False)
    known = margin_spectrum(whole, k, metric)
    # Radii between distances, so that a count is not a matter of rounding.
    radii = [0.0, *(found.radius.sort().values[[5, 15]] * 1.0001).tolist()]
    write_certificate(path, t, x, labels, found, known, radii=radii, embedding=embedding)
    return t, x, labels, found, known, embedding


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_what_was_proved_is_accepted(tmp_path, dtype, biases, embedded):
    t, x, labels, found, known, embedding = build(tmp_path / "c", dtype, biases, embedded)
    claims = verify_certificate(tmp_path / "c", t, x, labels, embedding=embedding)
    right = found.predicted == labels
    expected = [int((right & (found.radius > r)).sum()) for r, _ in claims["certified"]]
    assert [count for _, count in claims["certified"]] == expected
    assert expected[0] == 20
    assert 0 < expected[2] < expected[1] < 20
    assert claims["proved"] == int((known.answers(x.double()) == labels).sum())
    assert claims["proved"] > 0


@pytest.mark.parametrize("embedded", [False, True])
def test_inputs_that_all_but_lie_on_a_boundary_do_not_spoil_a_certificate(tmp_path, embedded):
    """Rounding hides more of their distance than a relative slack allows."""
    t = random_tensor(40, 30, 3, True, 0, f64)
    embedding = (normal(2, 50, 40), normal(3, 40)) if embedded else None
    whole = folded(t, embedding)
    x = 3 * normal(1, 30, whole.d_in)
    first = adversarial_distances(whole, x)
    shares = 1 - torch.logspace(-1, -13, 30, dtype=f64)[:, None]
    x = x + shares * (first.nearest - x)
    found = adversarial_distances(whole, x)
    write_certificate(
        tmp_path / "c", t, x, found.predicted, found, embedding=embedding, radii=[0.0]
    )
    claims = verify_certificate(tmp_path / "c", t, x, found.predicted, embedding=embedding)
    stored, _ = load_tensors(tmp_path / "c")
    assert bool((stored["lower"] <= found.radius).all())
    assert int(stored["upper"].isfinite().sum()) >= 4
    assert claims["certified"] == [[0.0, int((stored["lower"] > 0).sum())]]
    assert claims["certified"][0][1] >= 15


def test_the_checker_is_one_file_that_needs_numpy_only(tmp_path):
    source = Path(checker.__file__).read_text()
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) < 200
    imported = {
        name.name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported == {"hashlib", "json", "struct", "sys", "numpy"}
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    build(tmp_path / "c")
    run = [sys.executable, checker.__file__, str(tmp_path / "c")]
    good = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env={})
    assert good.returncode == 0
    assert good.stdout.startswith('proved: {"gap"')
    bad = subprocess.run([*run, "0" * 64], capture_output=True, text=True, cwd=tmp_path, env={})
    assert bad.returncode == 1
    assert "another model" in bad.stderr


def test_its_bounds_hold_where_the_truth_is_known():
    """Lower bounds lie below exact distances of a known form, and within 1e-8 of them."""
    for seed in range(20):
        values = normal(seed, 5).numpy()
        vectors = np.linalg.qr(normal(seed + 1, 5, 5).numpy())[0]
        A = (vectors * values) @ vectors.T
        x = normal(seed + 2, 30, 5)
        t = BilinearTensor(
            torch.from_numpy(vectors.T.copy()), torch.from_numpy(vectors.T.copy()),
            torch.stack([torch.from_numpy(values), 0 * torch.from_numpy(values)]),
        )  # fmt: skip
        found = adversarial_distances(t, x)
        rows = found.predicted == 0
        rows &= found.distance[:, 1].isfinite() & (found.distance[:, 1] > 1e-3)
        form = checker.Forms(
            {"left": t.left.numpy(), "right": t.right.numpy(), "out": t.out.numpy()}
        )
        pair = form.pair(0, 1)
        assert np.abs(pair[0] - A).max() < 1e-12
        w, V = np.linalg.eigh(pair[0])
        exact = found.distance[rows, 1].numpy()
        nu = found.multiplier[rows, 1].numpy()
        bound = checker.lower_bounds(pair, w, V, x[rows].numpy(), nu)
        assert (bound <= exact * (1 + 1e-12)).all()
        assert (bound >= exact * (1 - 1e-6)).all()
        # A multiplier that is not the right one proves less, never more.
        for factor in (0.5, 0.9, 1.1, 3.0):
            other = checker.lower_bounds(pair, w, V, x[rows].numpy(), factor * nu)
            assert (other <= exact * (1 + 1e-12)).all()


def test_its_error_bounds_cover_rounding():
    """Against rational arithmetic: forms and values from float32 weights with an embedding."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    w = {
        "left": rng.normal(size=(4, 3)), "right": rng.normal(size=(4, 3)),
        "out": 1e3 * rng.normal(size=(2, 4)), "bias_left": rng.normal(size=4),
        "bias_right": rng.normal(size=4), "bias_out": rng.normal(size=2),
        "directions": rng.normal(size=(5, 3)), "offset": rng.normal(size=3),
    }  # fmt: skip
    w = {name: array.astype(np.float32) for name, array in w.items()}
    exact = {name: np.vectorize(Fraction)(array.astype(float)) for name, array in w.items()}
    form = checker.Forms(w).pair(0, 1)
    for _ in range(20):
        z = rng.normal(size=5) * 10.0 ** rng.integers(-3, 4)
        inside = np.vectorize(Fraction)(z) @ exact["directions"] + exact["offset"]
        left = exact["left"] @ inside + exact["bias_left"]
        right = exact["right"] @ inside + exact["bias_right"]
        logits = exact["out"] @ (left * right) + exact["bias_out"]
        value, _, error, _ = checker.at(form, z[None])
        assert abs(Fraction(float(value[0])) - (logits[0] - logits[1])) <= Fraction(float(error[0]))


def test_its_error_bounds_cover_an_embedding_that_cancels():
    """The product of layer and embedding is a trillionth of its terms."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    worst = 0
    for _ in range(20):
        big = 1e6 * rng.normal(size=(4, 6))
        directions = np.concatenate([big, -big * (1 + 1e-12 * rng.normal(size=(4, 6)))], 1)
        one = rng.normal(size=(3, 6))
        w = {
            "left": np.concatenate([one, one], 1), "right": rng.normal(size=(3, 12)),
            "out": np.array([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]]), "directions": directions,
        }  # fmt: skip
        form = checker.Forms(w).pair(0, 1)
        exact = {name: np.vectorize(Fraction)(array) for name, array in w.items()}
        left, right = (exact[side] @ exact["directions"].T for side in ("left", "right"))
        half = (left.T * exact["out"][0]) @ right
        error = (half + half.T) / 2 - np.vectorize(Fraction)(form[0])
        size = float((error**2).sum()) ** 0.5
        assert size <= form[3][0]
        # Rounding of the product alone would not cover it: the embedding's is what counts.
        worst = max(worst, size / (1e-15 * np.linalg.norm(form[0])))
    assert worst > 10


def test_no_multiplier_and_no_eigenvectors_prove_too_much():
    """Whatever is proposed, the bound stays below the distance; the hard case with nu too large, too."""
    rng = np.random.default_rng(0)
    reached = 0
    for seed in range(60):
        lam = np.array([-2.0, -0.5, 0.3, 1.0, 2.0])
        vectors = np.linalg.qr(rng.normal(size=(5, 5)))[0]
        x = rng.normal(size=(20, 5))
        if seed % 2:
            x[:, :2] = 0  # no part where the form falls
        x = x @ vectors.T
        matrix = (vectors * lam) @ vectors.T
        q = QuadraticForm.from_matrix(torch.from_numpy(matrix))
        exact = boundary_distance(q, torch.from_numpy(x))
        held = (exact.distance > 1e-3).numpy()
        x, distance = x[held], exact.distance.numpy()[held]
        form = (matrix, np.zeros(5), 0.0, [1e-14, 0.0, 0.0])
        w, V = np.linalg.eigh(matrix)
        turned = np.linalg.qr(V + rng.normal(size=(5, 5)) * 10.0 ** rng.uniform(-6, 0))[0]
        for basis, values in ((V, w), (turned, w), (V, w + 0.1 * rng.normal(size=5))):
            values = np.concatenate([w[:1], values[1:]])  # too high a least one is refused at once
            for factor in (0.5, 0.99, 1.0, 1.01, 2.0, 10.0, 1e6):
                nu = factor * exact.multiplier.numpy()[held]
                bound = checker.lower_bounds(form, values, basis, x, nu)
                assert (bound <= distance * (1 + 1e-9)).all()
                reached += int((bound > 0.9 * distance).sum())
    assert reached > 1000


# ------------------------------------------------------------------ tampering


def rewrite(path, change, rng, sign=True):
    """Change a stored certificate, and its digests with it: what is false must fail for its content."""
    arrays, header = load_tensors(path)
    claims = header["claims"]
    change(arrays, claims, rng)
    if sign:
        numbers = {name: array.numpy() for name, array in arrays.items()}
        claims["model"] = checker.digest(numbers, checker.WEIGHTS)
        claims["data"] = checker.digest(numbers, checker.DATA)
        claims["content"] = checker.digest(numbers, sorted(numbers))
    save_tensors(path, arrays, {"claims": claims})


def entry(name, factor, sign=0):
    """Change one entry that matters by a share of the array's scale."""

    def change(arrays, claims, rng):
        array = arrays[name].clone()
        flat = array.view(-1)
        sizes = flat.abs()
        usual = sizes[(sizes > 0) & sizes.isfinite()].median()
        eligible = ((sizes >= usual) & sizes.isfinite()).nonzero()[:, 0].tolist()
        at = rng.choice(eligible)
        way = sign or rng.choice([-1, 1])
        flat[at] += way * factor * rng.uniform(1, 10) * sizes[at].item()
        arrays[name] = array

    return change


def shifted(name, count):
    def change(arrays, claims, rng):
        array = arrays[name].clone()
        rows = range(4, len(array)) if name == "labels" else (array >= 0).nonzero()[:, 0].tolist()
        at = rng.choice(list(rows))
        array[at] = (array[at] + rng.randint(1, count - 1)) % count
        arrays[name] = array

    return change


def claimed(kind):
    def change(arrays, claims, rng):
        if kind == "proved":
            claims["proved"] += rng.choice([-2, -1, 1, 2])
        elif kind == "count":
            rng.choice(claims["certified"])[1] += rng.choice([-1, 1])
        else:
            lower = arrays["lower"][arrays["predicted"] == arrays["labels"]]
            at = rng.choice([1, 2])
            beyond = lower[lower > claims["certified"][at][0]].min().item()
            claims["certified"][at][0] = beyond * rng.uniform(1.0, 1.2)

    return change


def nearest_multiplier(arrays, claims, rng):
    """That of the nearest rival: for another, a worse one may still prove the radius."""
    array = arrays["multiplier"].clone()
    row = rng.randrange(len(array))
    array[row, arrays["rival"][row]] *= rng.choice([0.5, 0.9, 1.1, 2.0])
    arrays["multiplier"] = array


TAMPERED = {
    "values": entry("values", 1e-3),
    "vectors": entry("vectors", 1e-2),
    "labels": shifted("labels", 3),
    "answers": shifted("answers", 3),
    "predicted": shifted("predicted", 3),
    "left": entry("left", 1e-2),
    "right": entry("right", 1e-2),
    "out": entry("out", 1e-2),
    "map": entry("map", 1e-2),
    "tail_lower": entry("tail_lower", 1e-2, -1),
    "tail_upper": entry("tail_upper", 1e-2, -1),
    "lower": entry("lower", 1e-5, 1),
    "upper": entry("upper", 1e-3),
    "multiplier": nearest_multiplier,
    "change": entry("change", 1e-2),
    "inputs": entry("inputs", 1e-2),
    "proved": claimed("proved"),
    "count": claimed("count"),
    "radius": claimed("radius"),
}


@pytest.mark.campaign
def test_a_thousand_tampered_certificates_are_refused(tmp_path):
    build(tmp_path / "good")
    original = (tmp_path / "good").read_bytes()
    rng, refused, passed = random.Random(0), Counter(), []
    for trial in range(1007):
        name = list(TAMPERED)[trial % len(TAMPERED)]
        (tmp_path / "bad").write_bytes(original)
        rewrite(tmp_path / "bad", TAMPERED[name], rng)
        try:
            checker.check(tmp_path / "bad")
            passed.append((trial, name))
        except checker.Refused:
            refused[name] += 1
    assert not passed
    assert min(refused.values()) >= 50
    assert checker.check(tmp_path / "good")


def test_a_weaker_claim_is_accepted_only_if_signed_again(tmp_path):
    """What a changed file says may still be true and proved; then only the digest tells."""
    build(tmp_path / "good")
    original = (tmp_path / "good").read_bytes()
    weaker = {"lower": entry("lower", 1e-6, -1), "upper": entry("upper", 1e-7, 1)}
    for change in weaker.values():
        (tmp_path / "bad").write_bytes(original)
        rewrite(tmp_path / "bad", change, random.Random(0))
        assert checker.check(tmp_path / "bad")
    for name, change in (weaker | TAMPERED).items():
        if name in ("proved", "count", "radius"):
            continue
        (tmp_path / "bad").write_bytes(original)
        rewrite(tmp_path / "bad", change, random.Random(0), sign=False)
        with pytest.raises(checker.Refused, match="is not the one that the claims are about"):
            checker.check(tmp_path / "bad")


def test_any_change_of_bytes_in_weights_or_data_is_refused(tmp_path):
    build(tmp_path / "good")
    original = (tmp_path / "good").read_bytes()
    arrays, _ = load_tensors(tmp_path / "good")
    rng = random.Random(1)
    for name in ("left", "out", "bias_left", "inputs", "labels"):
        for _ in range(10):
            array = arrays[name].clone()
            raw = array.view(torch.uint8).view(-1)
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            _, header = load_tensors(tmp_path / "good")
            save_tensors(tmp_path / "bad", arrays | {name: array}, header)
            with pytest.raises(checker.Refused, match=r"the (model|data) is not the one"):
                checker.check(tmp_path / "bad")
    for length in (0, 4, 50, 500, len(original) // 2, len(original) - 1):
        (tmp_path / "bad").write_bytes(original[:length])
        with pytest.raises(checker.Refused):
            checker.check(tmp_path / "bad")


def test_shapes_that_would_broadcast_are_refused(tmp_path):
    build(tmp_path / "good")
    original = (tmp_path / "good").read_bytes()

    def cut(name, shorter):
        def change(arrays, claims, rng):
            arrays[name] = shorter(arrays[name]).contiguous()

        return change

    for name in ("labels", "predicted", "rival", "lower", "upper", "answers"):
        for shorter in (lambda a: a[:1], lambda a: a[:0], lambda a: a[None], lambda a: a[:-1]):
            (tmp_path / "bad").write_bytes(original)
            rewrite(tmp_path / "bad", cut(name, shorter), None)
            with pytest.raises(checker.Refused, match="one number an input"):
                checker.check(tmp_path / "bad")
    for name in ("multiplier", "change", "values", "vectors", "tail_lower", "map", "centre"):
        (tmp_path / "bad").write_bytes(original)
        rewrite(tmp_path / "bad", cut(name, lambda a: a[:2]), None)
        with pytest.raises(checker.Refused):
            checker.check(tmp_path / "bad")
    for name in ("labels", "answers", "predicted"):
        (tmp_path / "bad").write_bytes(original)
        rewrite(tmp_path / "bad", cut(name, lambda a: a.double()), None)
        with pytest.raises(checker.Refused):
            checker.check(tmp_path / "bad")
    for name in ("lower", "multiplier", "values", "change"):
        (tmp_path / "bad").write_bytes(original)
        rewrite(tmp_path / "bad", cut(name, lambda a: a * float("nan")), None)
        with pytest.raises(checker.Refused, match="NaN"):
            checker.check(tmp_path / "bad")


# ------------------------------------------------------------------ odd models, bad input


def test_rivals_that_no_input_reaches(tmp_path):
    """Logit 0 is a constant 1, logit 1 never positive, logit 2 a plane."""
    eye = torch.eye(3, dtype=f64)
    out = torch.tensor([[0.0, 0, 0], [-1.0, -1, -1], [0, 0, 0]], dtype=f64)
    t = BilinearTensor(eye, eye, out, None, None, torch.tensor([1.0, 0, 0], dtype=f64))
    x = normal(0, 6, 3)
    found = adversarial_distances(t, x)
    assert (found.radius == torch.inf).all()
    write_certificate(tmp_path / "c", t, x, found.predicted, found, radii=[0.0, 1.0, 1e3])
    claims = verify_certificate(tmp_path / "c", t, x, found.predicted)
    assert [count for _, count in claims["certified"]] == [6, 6, 6]


def test_inputs_on_the_boundary(tmp_path):
    t = BilinearTensor(*[torch.zeros(3, 3, dtype=f64)] * 3)
    x = normal(0, 4, 3)
    found = adversarial_distances(t, x)
    write_certificate(tmp_path / "c", t, x, found.predicted, found, radii=[0.0])
    assert verify_certificate(tmp_path / "c")["certified"] == [[0.0, 0]]


def test_another_model_or_other_data_are_refused(tmp_path):
    t, x, labels, *_ = build(tmp_path / "c")
    with pytest.raises(checker.Refused, match="another model"):
        verify_certificate(tmp_path / "c", random_tensor(6, 8, 3, True, 1, torch.float32))
    with pytest.raises(checker.Refused, match="another data"):
        verify_certificate(tmp_path / "c", t, x + 1, labels)
    with pytest.raises(checker.Refused, match="another data"):
        verify_certificate(tmp_path / "c", t, x, (labels + 1) % 3)


def test_bad_input(tmp_path, unchecked):
    t, x, labels, found, known, _ = build(tmp_path / "c")
    with pytest.raises(ValueError, match="a certificate of nothing"):
        write_certificate(tmp_path / "d", t, x, labels)
    other = random_tensor(6, 8, 3, True, 1, torch.float32)
    with pytest.raises(ValueError, match="other weights"):
        write_certificate(tmp_path / "d", other, x, labels, found)
    with pytest.raises(ValueError, match="other weights"):
        write_certificate(tmp_path / "d", other, x, labels, known=known)
    with pytest.raises(ValueError, match="but distances of 24"):
        write_certificate(tmp_path / "d", t, x[:3], labels[:3], found)
    with pytest.raises(ValueError, match="must be at least 0"):
        write_certificate(tmp_path / "d", t, x, labels, found, radii=[-0.1])
    with pytest.raises(ValueError, match="inputs and labels, or neither"):
        verify_certificate(tmp_path / "c", t, x)
    assert not (tmp_path / "d").exists()
    with pytest.raises(FileNotFoundError):
        verify_certificate(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(checker.Refused, match="damaged"):
        verify_certificate(tmp_path / "text")
