"""The layer between two dictionaries, from weights, against the tensor written out."""

import pytest
import torch
from sae_lens import HookedSAETransformer
from torch.testing import assert_close
from transformer_lens import HookedTransformer

from tests.features.building import N_IN, N_OUT, TOKENS, D, model, sae
from tests.models.building import config
from tl_bilinear import BilinearTensor, Dictionary, FeatureInteractions
from tl_bilinear.circuits import unembedding
from tl_bilinear.explorer import language_panel
from tl_bilinear.features import (
    EigenGeometry,
    FeatureSweep,
    InteractionStatistics,
    Submatrix,
)
from tl_bilinear.tensor import approximate

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LAYER = "blocks.1"
INPUTS = [f"{LAYER}.mlp.hook_in", f"{LAYER}.ln2.hook_normalized", f"{LAYER}.hook_resid_mid"]


def between(hook=INPUTS[0], out=f"{LAYER}.hook_mlp_out", layer=1, built=None, **fields):
    built = built or model()
    return FeatureInteractions(
        built,
        layer,
        sae(hook, dtype="float64"),
        sae(out, n=N_OUT, seed=1, dtype="float64"),
        **fields,
    )


def written_out(f):
    """B~[a,b,c] at mlp.hook_in by its definition, one output feature at a time."""
    layer = BilinearTensor.from_model(f.model, f.layer).dense()
    e, d = f.directions, f.inputs.decoder
    return torch.stack([d @ torch.einsum("i,ijk->jk", row, layer) @ d.T for row in e])


def test_the_feature_tensor_is_its_definition():
    f = between()
    expected = written_out(f)
    assert f.feature_tensor.shape == (N_OUT, N_IN, N_IN)
    assert_close(f.feature_tensor.dense(), expected, **EXACT)
    assert_close(f.interaction(3).dense(), expected[3], **EXACT)
    assert_close(f.interaction([3, 7]).dense(), expected[[3, 7]], **EXACT)
    assert f.interaction(3, basis="activations").shape == (D, D)
    assert_close(
        f.interaction(3, basis="activations").fold(f.inputs.decoder).dense(), expected[3], **EXACT
    )


def test_decoder_directions_when_asked():
    f = between(output="decoder")
    assert_close(f.directions, f.outputs.decoder, **EXACT)
    assert_close(f.feature_tensor.dense(), written_out(f), **EXACT)


@pytest.mark.parametrize("norm", ["RMS", "RMSPre", "LN", "LNPre", None])
def test_what_lies_between_a_hook_and_the_layer(norm):
    built = model(normalization_type=norm)
    hooks = INPUTS if norm else [INPUTS[0], INPUTS[2]]
    for hook in hooks:
        f = between(hook, built=built)
        run = f.run(TOKENS)
        x = f.passage.map(run.hook_activations) / run.scale
        x = x if f.passage.offset is None else x + f.passage.offset
        assert_close(x, run.x, **EXACT)
        assert_close(f.hook_tensor(run.hook_activations / run.scale), run.output, **EXACT)
        assert f.passage.needs_scale == (hook == INPUTS[2] and norm is not None)
    if norm is None:
        with pytest.raises(
            ValueError, match=r"sae_in is at 'blocks.1.ln2.hook_normalized', but layer 1"
        ):
            between(INPUTS[1], built=built)


def test_parallel_attention_reads_resid_pre():
    built = model(parallel_attn_mlp=True, normalization_type="LN")
    f = between(f"{LAYER}.hook_resid_pre", built=built)
    run = f.run(TOKENS)
    assert_close(f.hook_tensor(run.hook_activations / run.scale), run.output, **EXACT)


@pytest.mark.parametrize("kind", ["all", "self", "cross"])
def test_top_pairs(kind):
    f = between(INPUTS[2])
    dense = f.interaction(5).dense()
    top = f.top(5, k=12, kind=kind)
    weight = 2 * torch.ones_like(dense).triu(1) + torch.eye(N_IN, dtype=torch.float64)
    if kind != "all":
        weight = weight * (torch.eye(N_IN) if kind == "self" else 1 - torch.eye(N_IN))
    expected = (weight * dense.abs()).flatten().topk(12).values
    assert_close(top.coefficients.abs(), expected, **EXACT)
    assert_close(dense[top.first, top.second], top.values, **EXACT)
    assert top.space == f"features at {INPUTS[2]}"


def test_top_pairs_of_the_whole_tensor():
    f = between()
    dense = f.feature_tensor.dense()
    weight = 2 * torch.ones(N_IN, N_IN).triu(1) + torch.eye(N_IN)
    expected = (weight * dense.abs()).flatten().topk(25)
    pairs = f.top_overall(25)
    assert_close(pairs.coefficients.abs(), expected.values, **EXACT)
    assert set(
        zip(pairs.features.tolist(), pairs.first.tolist(), pairs.second.tolist(), strict=True)
    ) == {(i // N_IN**2, i // N_IN % N_IN, i % N_IN) for i in expected.indices.tolist()}


def test_submatrix(tmp_path):
    f = between()
    found = f.submatrix(4, k=6)
    dense = f.interaction(4).dense()
    assert_close(found.matrix, dense[found.features][:, found.features], **EXACT)
    top = f.top(4, k=6)
    assert set(found.features.tolist()) == set(top.first.tolist()) | set(top.second.tolist())
    assert found.to_pandas().shape == (len(found.features),) * 2
    found.save(tmp_path / "x")
    assert torch.equal(Submatrix.load(tmp_path / "x").matrix, found.matrix)


def test_statistics(tmp_path):
    f = between()
    dense = f.interaction(2).dense()
    upper = dense[torch.ones(N_IN, N_IN, dtype=torch.bool).triu(1)]
    found = f.statistics(2, bins=31, sigmas=2.0)
    assert_close(found.self_values, dense.diagonal(), **EXACT)
    assert found.cross_mean == pytest.approx(float(upper.mean()), abs=1e-10)
    assert found.cross_std == pytest.approx(float(upper.std(correction=0)), rel=1e-9)
    z = (upper - upper.mean()) / upper.std(correction=0)
    assert found.cross_kurtosis == pytest.approx(float((z**4).mean() - 3), rel=1e-8)
    assert found.outliers == int((z.abs() > 2).sum())
    assert found.expected_outliers == pytest.approx(len(upper) * 0.0455, rel=1e-3)
    assert int(found.counts.sum()) == len(upper)
    assert float(found.self_shares.sum()) == pytest.approx(1)
    assert float(found.cross_shares.sum()) == pytest.approx(1)
    assert_close(
        found.eigenvalues,
        torch.linalg.eigvalsh(f.interaction(2, "activations").dense()).flip(0),
        **EXACT,
    )
    assert_close(
        found.counts, torch.histogram(upper.float(), found.edges.float())[0], rtol=0, atol=1
    )
    found.save(tmp_path / "x")
    assert InteractionStatistics.load(tmp_path / "x").outliers == found.outliers


def test_the_reference_spectrum_is_that_of_random_symmetric_matrices():
    from tl_bilinear.features.statistics import semicircle

    d = 400
    noise = torch.randn(d, d, dtype=torch.float64)
    random = (noise + noise.T) / 2**0.5
    expected = torch.linalg.eigvalsh(random).flip(0)
    edge = 2 * float(random.norm()) / d**0.5
    assert_close(semicircle(edge, d), expected, rtol=0, atol=0.04 * edge)


def test_geometry(tmp_path):
    f = between()
    extra = {"somewhere": torch.randn(D, dtype=torch.float64)}
    found = f.geometry(4, k=5, extra=extra)
    every = f.interaction(4, basis="activations").eigh()
    assert float(found.eigenvalues[0]) == pytest.approx(float(every.values.max()))
    assert float(found.eigenvalues[1]) == pytest.approx(float(every.values.min()))
    row = extra["somewhere"] / extra["somewhere"].norm()
    best = every.vectors[every.values.argmax()]
    assert float(found.cosines[-1, 0]) == pytest.approx(float(row @ best), abs=1e-10)
    assert found.names[-1] == "somewhere"
    assert len(found.to_pandas()) == len(found.names)
    found.save(tmp_path / "x")
    assert EigenGeometry.load(tmp_path / "x").names == found.names
    with pytest.raises(ValueError, match="'wrong' must have shape"):
        f.geometry(4, extra={"wrong": torch.zeros(3)})


def test_clusters_tell_directions_apart():
    built = model()
    generator = torch.Generator().manual_seed(0)
    vectors = f_vectors = between(built=built).interaction(4, basis="activations").eigh(2).vectors
    signs = torch.tensor([[3.0, 0.2], [3.0, -0.1], [0.1, 3.0], [-0.2, 3.0], [0.0, -3.0]])
    rows = signs.double() @ f_vectors
    rows = rows + 0.01 * torch.randn(rows.shape, generator=generator)
    f = FeatureInteractions(
        built, 1, rows, sae(f"{LAYER}.hook_mlp_out", n=N_OUT, seed=1, dtype="float64")
    )
    found = f.geometry(4, k=15)
    groups = dict(zip(found.names, found.clusters.tolist(), strict=True))
    assert groups["0"] == groups["1"]
    assert groups["2"] == groups["3"]
    assert len({groups[n] for n in "024"}) == 3
    assert vectors.shape == (2, D)


def test_sweep(tmp_path):
    f = between(INPUTS[2])
    found = f.sweep(k=2, progress=False)
    table = found.to_pandas()
    assert len(table) == N_OUT
    dense = f.interaction().dense()
    forms = f.interaction(basis="activations").dense()
    decoder = f.outputs.decoder / f.outputs.decoder.norm(dim=1, keepdim=True)
    for row in table.to_dict("records"):
        a = row["feature"]
        values = torch.linalg.eigvalsh(forms[a])
        assert abs(row["value_1"]) == pytest.approx(float(values.abs().max()))
        assert row["norm"] == pytest.approx(float(forms[a].norm()))
        cross = dense[a].triu(1).abs()
        b, c = divmod(int(cross.argmax()), N_IN)
        assert (row["first"], row["second"]) == (b, c)
        size = 2 * abs(float(dense[a, b, c]))
        own = abs(float(dense[a, b, b])) + abs(float(dense[a, c, c]))
        assert row["and_gate"] == pytest.approx(size / (size + own))
        cosines = decoder @ decoder[a]
        assert row["opposite"] == int(cosines.argmin())
        assert row["opposite_cosine"] == pytest.approx(float(cosines.min()))
    found.save(tmp_path / "x")
    loaded = FeatureSweep.load(tmp_path / "x")
    assert torch.equal(loaded.features, found.features)
    assert len(loaded.top(3)) == 3


def test_sweep_of_a_shortlist_goes_on_where_it_stopped(tmp_path):
    f = between()
    whole = f.sweep([4, 9, 2, 20], k=1, progress=False)
    assert set(whole.features.tolist()) == {4, 9, 2, 20}
    screened = f.sweep([4, 9, 2, 20], k=1, screen=2, checkpoint=tmp_path / "s", progress=False)
    assert len(screened) == 2
    stored = sorted((tmp_path / "s").rglob("*.safetensors"))
    stamps = [p.stat().st_mtime_ns for p in stored]
    again = f.sweep([4, 9, 2, 20], k=1, screen=2, checkpoint=tmp_path / "s", progress=False)
    assert [p.stat().st_mtime_ns for p in stored] == stamps
    assert torch.equal(again.coefficients, screened.coefficients)
    with pytest.raises(ValueError, match="holds the batches of another sweep"):
        f.sweep([4, 9, 2, 21], k=1, screen=2, checkpoint=tmp_path / "s", progress=False)


def test_and_gate_scores():
    """An AND of two directions scores 1, the square of their sum 1/2."""
    d_and = Dictionary(torch.eye(2))
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])

    def score(tensor):
        Q = tensor.interaction()[0]
        own = Q.entries(d_and.decoder).abs().sum()
        size = Q.top(1, kind="cross").coefficients.abs()
        return float(size / (size + own))

    assert score(BilinearTensor(left, right, torch.ones(1, 1))) == 1
    total = left + right
    assert score(BilinearTensor(total, total, torch.ones(1, 1))) == 0.5


def test_plain_matrices_are_at_the_layer_itself():
    f = FeatureInteractions(model(), -1, torch.randn(7, D), torch.randn(3, D))
    assert (f.layer, f.passage.hook, f.output) == (1, INPUTS[0], "decoder")
    assert f.feature_tensor.shape == (3, 7, 7)


def test_transcoders_are_used_where_they_write():
    made = sae(INPUTS[0], "transcoder", hook_out=f"{LAYER}.hook_mlp_out", dtype="float64")
    f = FeatureInteractions(model(), 1, torch.randn(7, D), made)
    assert f.output == "decoder"
    assert_close(f.directions, made.W_dec.detach(), **EXACT)
    with pytest.raises(
        ValueError, match=r"sae_out is at 'blocks.1.mlp.hook_in', but layer 1 writes at"
    ):
        FeatureInteractions(model(), 1, torch.randn(7, D), made, output="encoder")


@pytest.mark.usefixtures("unchecked")
def test_wrong_places_are_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"sae_in is at 'blocks.0.mlp.hook_in', but layer 1 reads at blocks.1.mlp.hook_in, .*"
        r"the nearest is 'blocks.1.mlp.hook_in'",
    ):
        between("blocks.0.mlp.hook_in")
    with pytest.raises(
        ValueError, match=r"sae_out is at 'blocks.1.hook_resid_post', but layer 1 writes"
    ):
        between(out="blocks.1.hook_resid_post")
    with pytest.raises(IndexError, match="layer 2 does not exist"):
        between(layer=2)
    with pytest.raises(
        ValueError, match="sae_in has width 5, but layer 1 of the model has width 16"
    ):
        FeatureInteractions(model(), 1, torch.randn(7, 5), torch.randn(3, D))
    plain = HookedTransformer.from_config(config(act_fn="relu"), bilinear=False)
    with pytest.raises(ValueError, match="is not bilinear"):
        FeatureInteractions(plain, 1, torch.randn(7, D), torch.randn(3, D))
    with pytest.raises(IndexError, match="output features are 0 to 29, got"):
        between().top(30)
    with pytest.raises(ValueError, match="output='encoder', but Dictionary"):
        FeatureInteractions(model(), 1, torch.randn(7, D), torch.randn(3, D), output="encoder")
    with pytest.raises(ValueError, match="basis must be"):
        between().interaction(1, basis="pixels")


def test_a_gated_layer_that_is_not_bilinear_is_read_through_its_approximation():
    fields = config(dtype=torch.float64, act_fn="silu", gated_mlp=True)
    gated = HookedSAETransformer.from_config(fields, bilinear=False)
    with pytest.raises(ValueError, match="is not bilinear"):
        between(built=gated)
    tokens = torch.randint(0, 23, (60, 12), generator=torch.Generator().manual_seed(0))
    _, cache = gated.run_with_cache(tokens)
    inputs = cache[INPUTS[0]].flatten(0, 1)
    with pytest.warns(UserWarning, match="variance"):
        found = approximate(gated.blocks[1].mlp, inputs, warn_below=1.0)
    f = between(INPUTS[2], built=gated, layer_tensor=found.tensor)
    assert f.top(3, k=4).values.shape == (4,)
    run = f.run(tokens[:1])
    errors = [run.attribute(3, position).error for position in range(2, 6)]
    assert max(errors) > 1e-9  # an approximation, and it says so
    shown = language_panel(run, title="layer 1").manifest["facts"]
    assert shown["not the model's own layer"].startswith("approximation of a silu layer")
    measured = f.outputs.preactivation(cache["blocks.1.hook_mlp_out"][0, 4])[3]
    assert run.attribute(3, 4).measured == pytest.approx(float(measured))
    plain = HookedTransformer.from_config(fields, bilinear=False)  # its MLP has no hook_in
    with pytest.raises(ValueError, match=r"the model has no hook blocks\.1\.mlp\.hook_in"):
        between(INPUTS[2], built=plain, layer_tensor=found.tensor).run(tokens)


@pytest.mark.usefixtures("unchecked")
def test_features_are_numbers():
    f = between()
    for wrong in ("she", None, ["she"], 1.5, torch.tensor([True])):
        with pytest.raises(TypeError, match="output features are 0 to 29, numbers, got"):
            f.top(wrong) if wrong is not None else f.numbers(wrong, "output")
    with pytest.raises(TypeError, match="one output feature is read at a time, got"):
        f.statistics([1, 2])
    with pytest.raises(TypeError, match="k must be an int, got 'five'"):
        f.top(1, "five")
    with pytest.raises(ValueError, match="k must lie between 1 and 820"):
        f.top(1, 821)
    run = f.run(TOKENS)
    with pytest.raises(TypeError, match="output features are 0 to 29, numbers, got 'she'"):
        run.attribute("she")
    with pytest.raises(IndexError, match="input features are 0 to 39, got"):
        run.examples(40, side="input")
    with pytest.raises(ValueError, match="side must be 'input' or 'output', got 'in'"):
        run.labels("in")
    with pytest.raises(IndexError, match="input features are 0 to 39, got"):
        run.verify_pairs(3, [(1, 40)])


def test_unembedding_directions_reach_the_layer():
    for hook in INPUTS:
        f = between(hook)
        row = f.model.W_U[:, 5] * f.model.ln_final.w
        x = row if hook == INPUTS[2] else row * f.model.blocks[1].ln2.w
        if hook == INPUTS[1]:
            x = row  # the weight comes after this hook
        assert_close(f.unembedding(5), x.detach(), **EXACT)
    built = model(normalization_type="LN")
    f = between(INPUTS[2], built=built)
    assert_close(f.unembedding(5), unembedding(built).decoder[5].detach(), **EXACT)
    logits = f.outputs.decoder[3] @ unembedding(built).decoder.T
    assert f.promoted(3, k=4).promoted.tolist() == logits.topk(4).indices.tolist()
