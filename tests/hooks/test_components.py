"""Eigencomponents and HOSVD components: what each intervention writes, against slow references."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.hooks.running import EXACT, LAYER, TOKENS, directions, edited, eigen, model64, through
from tests.hooks.running import activation as one_activation
from tl_bilinear import BilinearTensor
from tl_bilinear.hooks import EigenComponents, HOSVDComponents, ReplaceLayer
from tl_bilinear.tensor import hosvd


@pytest.fixture(scope="module")
def model():
    return model64()


@pytest.fixture(scope="module")
def biased():
    return model64(bilinear_bias=True)


@pytest.fixture(scope="module")
def clean(model):
    return through(model)


def writes(parts, kind):
    """u / |u|^2, or the pseudo-inverse rows, from their definitions."""
    if kind == "minimal":
        return torch.stack([u / (u @ u) for u in parts.reads])
    gram = parts.reads @ parts.reads.T
    return torch.linalg.inv(gram) @ parts.reads


@given(
    st.integers(1, 4), st.integers(1, 16), st.sampled_from(["minimal", "dual"]), st.integers(0, 99)
)
def test_ablating_is_the_formula(model, clean, n, k, kind, seed):
    x, out, _ = clean
    parts = eigen(model, n, k, seed, write=kind)
    w = writes(parts, kind)
    assert_close(parts.writes, w, **EXACT)
    assert_close((parts.reads * parts.writes).sum(1), torch.ones(n, dtype=torch.float64), **EXACT)
    direction, pair = seed % n, seed % k
    expected = edited(
        x, out, lambda x, _: [(w[direction], -one_activation(parts, x, direction, pair))]
    )
    assert_close(through(model, parts.ablate((direction, pair)))[1], expected, **EXACT)


def test_scaling_and_steering_are_the_formula(model, clean):
    x, out, _ = clean
    parts = eigen(model, 2, 5)
    w = writes(parts, "minimal")
    chosen = [(0, 1), (1, 1)]

    def expected(new):
        def change(x, _):
            for (u, i), to in zip(chosen, new, strict=True):
                a = one_activation(parts, x, u, i)
                yield w[u], to(a) - a

        return edited(x, out, change)

    which = (slice(None), 1)
    run = through(model, parts.scale(-2.5, which))[1]
    assert_close(run, expected([lambda a: -2.5 * a] * 2), **EXACT)
    factors = torch.tensor([3.0, 0.5], dtype=torch.float64)
    run = through(model, parts.scale(factors, which))[1]
    assert_close(run, expected([lambda a: 3 * a, lambda a: 0.5 * a]), **EXACT)
    run = through(model, parts.steer(which, by=factors))[1]
    assert_close(run, expected([lambda a: a + 3, lambda a: a + 0.5]), **EXACT)
    run = through(model, parts.steer(which, to=0.7))[1]
    assert_close(run, expected([lambda a: 0.7] * 2), **EXACT)


@pytest.mark.parametrize("kind", ["minimal", "dual"])
def test_only_the_dual_leaves_the_other_directions(model, clean, kind):
    x, out, _ = clean
    parts = eigen(model, 3, write=kind)
    change = through(model, parts.ablate((1, slice(4))))[1] - out
    read = change @ parts.reads.T
    assert_close(read[..., 1], -parts.activations(x)[..., 1, :4].sum(-1), **EXACT)
    others = read[..., [0, 2]].abs().max()
    assert others < 1e-10 if kind == "dual" else others > 1e-3


def test_a_given_write_direction_is_scaled(model, clean):
    x, out, _ = clean
    decoder = directions(3, seed=5)
    parts = eigen(model, 3, write=decoder)
    expected = torch.stack([d / (u @ d) for u, d in zip(parts.reads, decoder, strict=True)])
    assert_close(parts.writes, expected, **EXACT)
    change = through(model, parts.ablate((2, 0)))[1] - out
    assert_close(change, -parts.activations(x)[..., 2, 0, None] * expected[2], **EXACT)
    assert_close(change @ parts.reads[2], -parts.activations(x)[..., 2, 0], **EXACT)


def test_ablating_all_pairs_of_a_direction_leaves_nothing_of_it(model, clean):
    parts = eigen(model, None)
    assert parts.shape == (16,)
    _, out, _ = through(model, parts.ablate())
    assert (out @ parts.eigen.directions).abs().max() < 1e-12
    assert (clean[1] @ parts.eigen.directions).abs().max() > 0.01


def test_keeping_is_ablating_the_others(model):
    parts = eigen(model, 3, write="dual")
    others = torch.ones(parts.shape, dtype=torch.bool)
    others[0, 1] = others[2, :3] = False
    kept = parts.keep(~others)
    assert_close(through(model, kept)[1], through(model, parts.ablate(others))[1], **EXACT)
    single = eigen(model, None)
    assert_close(
        through(model, single.keep([0, 3]))[1],
        through(model, single.ablate([1, 2, *range(4, 16)]))[1],
        **EXACT,
    )


@pytest.mark.parametrize("outside", ["keep", "drop"])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_low_rank_is_the_tensor_of_truncated_forms(model, clean, k, outside):
    """A second way: the layer's own tensor, less its part in span(U), plus the truncated forms."""
    tensor = BilinearTensor.from_model(model, LAYER)
    u = directions(3)
    dual = torch.linalg.pinv(u.T)
    spectrum = tensor.interaction(u).eigh(k)
    vectors = spectrum.vectors.flatten(0, 1)
    forms = BilinearTensor(vectors, vectors, (dual.T[:, :, None] * spectrum.values).flatten(1))
    expected = forms if outside == "drop" else tensor - tensor.project(u.T @ dual) + forms
    parts = eigen(model, 3, k=16)  # write="minimal": low_rank takes the dual by itself
    edit = parts.low_rank(k, outside=outside)
    assert_close(through(model, edit)[1], expected(clean[0]), **EXACT)
    replaced = ReplaceLayer(expected, layer=LAYER)
    assert_close(through(model, edit)[2], through(model, replaced)[2], **EXACT)
    if k == 16 and outside == "keep":
        assert_close(through(model, edit)[2], clean[2], **EXACT)
    else:
        assert (through(model, edit)[1] - clean[1]).abs().max() > 1e-3


def test_a_truncated_spectrum_keeps_only_what_it_holds(model):
    whole, held = eigen(model, 2, write="dual"), eigen(model, 2, k=3, write="dual")
    assert_close(through(model, held.keep())[1], through(model, whole.low_rank(3))[1], **EXACT)


# ---------------------------------------------------------------------- biases


def test_with_biases_the_form_is_the_interaction_part(biased):
    x, _, _ = through(biased)
    tensor = BilinearTensor.from_model(biased, LAYER)
    parts = eigen(biased, None)
    rest = through(biased, parts.ablate())[1] @ parts.eigen.directions
    split = tensor.parts()
    expected = (x @ split.linear.T + split.constant) @ parts.eigen.directions
    assert_close(rest, expected, **EXACT)
    assert expected.abs().max() > 0.01


def test_augmented_spectra_hold_the_biases(biased):
    x, out, _ = through(biased)
    tensor = BilinearTensor.from_model(biased, LAYER)
    u = directions(2)
    spectrum = tensor.augmented().interaction(u).eigh()
    parts = EigenComponents(spectrum, layer=LAYER, write="dual")
    assert parts.augmented
    assert_close(parts.activations(x).sum(-1), out @ u.T, **EXACT)
    assert (through(biased, parts.ablate())[1] @ u.T).abs().max() < 1e-10
    change = (through(biased, parts.ablate((0, 2)))[1] - out) @ u.T
    one = torch.cat([x, torch.ones_like(x[..., :1])], -1) @ spectrum.vectors[0, 2]
    assert_close(change[..., 0], -spectrum.values[0, 2] * one**2, **EXACT)
    assert_close(through(biased, parts.low_rank(17))[2], through(biased)[2], **EXACT)


# ---------------------------------------------------------------------- HOSVD


def test_hosvd_components_are_forms_and_directions(model, clean):
    x, out, _ = clean
    parts = HOSVDComponents(hosvd(BilinearTensor.from_model(model, LAYER), 5), layer=LAYER)
    u = parts.hosvd.vectors
    assert_close(parts.activations(x), out @ u.T, **EXACT)
    expected = edited(x, out, lambda _, out: [(u[i], -float(out @ u[i])) for i in (0, 3)])
    ablated = through(model, parts.ablate([0, 3]))[1]
    assert_close(ablated, expected, **EXACT)
    assert_close(ablated @ u.T, (out @ u.T) * torch.tensor([0, 1, 1, 0, 1]), **EXACT)
    # Taken away twice it is gone once: an orthogonal projection.
    twice = through(model, parts.ablate(0), parts.ablate([0, 3]))[1]
    assert_close(twice, ablated, **EXACT)
    assert_close(
        through(model, parts.keep([1, 2], outside="drop"))[1],
        (out @ u[1:3].T) @ u[1:3],
        **EXACT,
    )
    whole = HOSVDComponents(hosvd(BilinearTensor.from_model(model, LAYER)), layer=LAYER)
    assert_close(through(model, whole.keep(outside="drop"))[2], clean[2], **EXACT)


def test_hosvd_with_biases(biased):
    x, out, _ = through(biased)
    tensor = BilinearTensor.from_model(biased, LAYER)
    parts = HOSVDComponents(hosvd(tensor.augmented(), 4), layer=LAYER)
    assert parts.augmented
    u = parts.hosvd.vectors
    assert_close(parts.activations(x), out @ u.T, **EXACT)
    bare = HOSVDComponents(hosvd(tensor, 4), layer=LAYER)
    assert_close(bare.activations(x), tensor.parts().interaction(x) @ bare.reads.T, **EXACT)
    assert (through(biased, bare.ablate())[1] @ bare.reads.T).abs().max() < 1e-12


# ---------------------------------------------------------------------- precision, places


def test_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        model = model64().to(dtype)
        model.cfg.dtype = dtype
        x, out, _ = through(model)
        parts = eigen(model, 2, write="dual")
        assert parts.writes.dtype == torch.float32
        ablated = through(model, parts.ablate((0, 0)))[1]
        assert ablated.dtype == dtype
        expected = -parts.activations(x)[..., 0, 0]
        read = (ablated - out).float() @ parts.reads.T
        scale = float((out.float() @ parts.reads.T).abs().max())
        assert_close(read[..., 0], expected, rtol=0, atol=tolerance * scale)
        assert_close(read[..., 1], 0 * expected, rtol=0, atol=tolerance * scale)


def test_to_moves_all_of_them(model):
    tensor = BilinearTensor.from_model(model, LAYER)
    for parts in (
        eigen(model, 2, write="dual"),
        eigen(model, 2, write=directions(2, 7)),
        HOSVDComponents(hosvd(tensor, 3), layer=LAYER),
    ):
        moved = parts.to(torch.float32)
        assert moved.reads.dtype == moved.writes.dtype == torch.float32
        assert_close(moved.writes.double(), parts.writes, rtol=1e-5, atol=1e-6)
        x = torch.randn(4, 16)
        assert moved.activations(x).dtype == torch.float32
        assert_close(moved.activations(x).double(), parts.activations(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "where"),
    [
        (2, [2]),
        (-1, [5]),
        (slice(1, None, 2), [1, 3, 5]),
        ([0, 4], [0, 4]),
        (torch.tensor([0, -2]), [0, 4]),
        (torch.tensor([True, False, False, True, False, False]), [0, 3]),
        (slice(0, 0), []),
    ],
)
def test_positions(model, clean, positions, where):
    out = clean[1]
    for edit in (
        lambda positions: eigen(model, 2).ablate(0, positions=positions),
        lambda positions: eigen(model, 2).keep(0, positions=positions),
        lambda positions: ReplaceLayer(
            2.0 * BilinearTensor.from_model(model, LAYER), layer=LAYER, positions=positions
        ),
    ):
        everywhere, chosen = through(model, edit(None))[1], through(model, edit(positions))[1]
        expected = out.clone()
        expected[:, where] = everywhere[:, where]
        assert torch.equal(chosen, expected)


def test_a_mask_of_tokens(model, clean):
    mask = TOKENS == 3
    ablated = through(model, eigen(model, 2).ablate(positions=mask))[1]
    changed = (ablated != clean[1]).any(-1)
    assert torch.equal(changed, mask)


# ---------------------------------------------------------------------- choosing


def test_a_choice_outside_the_grid_is_an_error(model):
    parts = eigen(model, 2, k=3)
    with pytest.raises(
        IndexError, match=r"\(0, 3\) chooses nothing in components of shape \[2, 3\]"
    ):
        parts.ablate((0, 3))
    with pytest.raises(IndexError, match="'first' chooses nothing"):
        parts.keep("first")
    with pytest.raises(IndexError, match=r"\[0, 0\] names a component twice"):
        parts.scale(2, [0, 0])
    with pytest.raises(ValueError, match=r"components of shape \[3\] were given in shape \[2\]"):
        parts.scale(torch.ones(2), 0)
    with pytest.raises(ValueError, match=r"its new value\); got by=None, to=None"):
        parts.steer(0)
    with pytest.raises(ValueError, match=r"its new value\); got by=1, to=2"):
        parts.steer(0, by=1, to=2)
    with pytest.raises(ValueError, match=r"k must lie between 1 and 3 \(the pairs held\), got 4"):
        parts.low_rank(4)


def test_directions_that_nothing_can_be_written_along(model):
    eigenpairs = eigen(model, 2).eigen

    def parts(u, **options):
        return EigenComponents(
            dataclasses.replace(eigenpairs, directions=u), layer=LAYER, **options
        )

    with pytest.raises(ValueError, match="do not say which output direction they belong to"):
        parts(None)
    u = directions(2)
    u[1] = 0
    with pytest.raises(ValueError, match=r"output directions \[1\] are zero"):
        parts(u)
    with pytest.raises(ValueError, match="these 2 have rank 1"):
        parts(directions(1).repeat(2, 1), write="dual")
    u = torch.eye(16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"write directions \[0, 1\] are orthogonal"):
        parts(u[:2], write=u[2:4])
    grid = BilinearTensor.from_model(model, LAYER).interaction(directions(4).reshape(2, 2, 16))
    with pytest.raises(ValueError, match=r"a batch of shape \[2, 2\]: flatten the directions"):
        EigenComponents(grid.eigh(1), layer=LAYER)


@pytest.mark.usefixtures("unchecked")
def test_options_of_another_kind(model):
    with pytest.raises(ValueError, match="outside must be 'keep' or 'drop', got 'lose'"):
        eigen(model, 2).keep(0, outside="lose")
    eigenpairs = eigen(model, 2).eigen
    with pytest.raises(ValueError, match="write must be 'minimal', 'dual' or a tensor, got 'u'"):
        EigenComponents(eigenpairs, layer=LAYER, write="u")
    with pytest.raises(TypeError, match="float"):
        eigen(model, 2).scale([1.0, 2.0], [0, 1])
    with pytest.raises(ValueError, match=r"write must have shape \[\.\.\., 16\]"):
        EigenComponents(eigenpairs, layer=LAYER, write=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"one direction for each of 2, got \[16\]"):
        EigenComponents(eigenpairs, layer=LAYER, write=torch.ones(16))


def test_an_hosvd_of_input_directions_is_refused(model):
    tensor = BilinearTensor.from_model(model, LAYER)
    with pytest.raises(ValueError, match="this HOSVD is of mode 'input'"):
        HOSVDComponents(hosvd(tensor, 3, mode="input"), layer=LAYER)


def test_a_loaded_hosvd_is_intervened_on_but_has_no_forms(model, clean, tmp_path):
    from tl_bilinear import HOSVD

    tensor = BilinearTensor.from_model(model, LAYER)
    hosvd(tensor, 3).save(tmp_path / "h.safetensors")
    parts = HOSVDComponents(HOSVD.load(tmp_path / "h.safetensors"), layer=LAYER)
    whole = HOSVDComponents(hosvd(tensor, 3), layer=LAYER)
    assert torch.equal(through(model, parts.ablate(1))[1], through(model, whole.ablate(1))[1])
    with pytest.raises(ValueError, match="holds no quadratic forms"):
        parts.activations(clean[0])


def test_one_long_direction_of_writing_does_not_make_another_one_orthogonal(model):
    known = eigen(model, 2)
    read = directions(2)
    long = torch.stack([1e18 * read[0], read[1]])
    parts = EigenComponents(known.eigen, layer=LAYER, write=long)
    assert_close(parts.writes, read / read.square().sum(-1, keepdim=True), **EXACT)
