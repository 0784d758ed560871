"""The authors' published SAEs: SignedTopKSAE, its loaders, the releases, the top sequences."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, HookedSAETransformer
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from safetensors.torch import save_file
from torch.testing import assert_close

from tests.models import published_format as models
from tl_bilinear.features import FeatureInteractions
from tl_bilinear.features.published_saes import (
    HOOKS,
    SignedTopKSAE,
    SignedTopKSAEConfig,
    TopSequences,
    published_disk_loader,
    published_huggingface_loader,
    read_top_sequences,
)
from tl_bilinear.models import HookedBilinearSAETransformer

D, EXPANSION, K = 16, 3, 7
PLAIN_ID = "1-mlp-in-x3-k7"


def config(**fields):
    """As the published code writes it: every setting of its config object."""
    return {
        "point": ["mlp-in", 1],
        "target": None,
        "expansion": EXPANSION,
        "lr": 1e-4,
        "in_batch": 32,
        "out_batch": 4096,
        "d_model": D,
        "n_ctx": 12,
        "k": K,
        "normalize": None,
        "bilinear_encoder": False,
        "encoder_bias": False,
        "token_lookup": False,
        "normalize_decoder": True,
        "tag": None,
        "kwargs": {},
        **fields,
    }


def weights(cfg, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    n = cfg["expansion"] * cfg["d_model"]
    decoder = random(cfg["d_model"], n)
    tensors = {
        "w_dec.weight": decoder / decoder.norm(dim=0),
        "w_enc.weight": random(n, cfg["d_model"]) / 4,
        "b_dec": random(cfg["d_model"]) / 2,
    }
    if cfg["encoder_bias"]:
        tensors["w_enc.bias"] = random(n)
    return tensors


def write(folder, cfg=None, tensors=None):
    cfg = config() if cfg is None else cfg
    tensors = weights(cfg) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def reference(cfg, tensors, x):
    """Features and reconstruction of one input, in float64, a feature at a time."""
    tensors = {name: t.double() for name, t in tensors.items()}
    n = cfg["normalize"] or 1.0
    features = []
    for f, direction in enumerate(tensors["w_enc.weight"]):
        value = sum(direction[i] * (x[i].double() / n - tensors["b_dec"][i]) for i in range(len(x)))
        features.append(value + tensors["w_enc.bias"][f] if cfg["encoder_bias"] else value)
    kept = sorted(range(len(features)), key=lambda f: -float(features[f]))[: cfg["k"]]
    z = torch.zeros(len(features), dtype=torch.float64)
    for f in kept:
        z[f] = features[f]
    out = n * (sum(z[f] * tensors["w_dec.weight"][:, f] for f in kept) + tensors["b_dec"])
    passed = cfg.get("passthrough") or []
    for dim in [passed] if isinstance(passed, int) else passed:
        out[dim] = x[dim]
    return z, out


def expected(cfg, tensors, x):
    rows = [reference(cfg, tensors, row) for row in x.reshape(-1, x.shape[-1])]
    z, out = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return z.reshape(*x.shape[:-1], -1), out.reshape(x.shape)


def load(folder, **options):
    return SAE.load_from_disk(folder, converter=partial(published_disk_loader, **options))


def assert_same_as_reference(sae, cfg, tensors, x, unit=1.0, tolerance=1e-6):
    """`unit`: the size in x of 1 of the units that the SAE was trained in."""
    z, out = expected(cfg, tensors, x.double() / unit)
    assert_close(sae.encode(x).double(), z, rtol=tolerance, atol=tolerance)
    assert_close(sae(x).double(), out * unit, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- the SAE


VARIANTS = [
    {},
    {"encoder_bias": True},
    {"normalize": 2.5},
    {"passthrough": [3]},
    {"passthrough": 11},
    {"passthrough": []},
    {"passthrough": None},
    {"normalize": 0.3, "encoder_bias": True, "passthrough": [0, 15, 7]},
    {"k": 48},
    {"k": 1, "expansion": 1},
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_outputs(tmp_path, fields, dtype, tolerance):
    cfg = config(**fields)
    tensors = {name: t.to(dtype) for name, t in weights(cfg).items()}
    write(tmp_path / "sae", cfg, tensors)
    sae = load(tmp_path / "sae")
    assert type(sae) is SignedTopKSAE
    for shape in ((2, 5, D), (D,)):
        x = torch.randn(shape, dtype=dtype)
        assert_same_as_reference(sae, cfg, tensors, x, tolerance=tolerance)


def test_the_reference_sees_what_matters(tmp_path):
    """Each setting changes the output by more than the tolerance of `test_outputs`."""
    x = torch.randn(4, D)
    _, plain = expected(config(), weights(config()), x)
    for fields in ({"normalize": 2.5}, {"passthrough": [3]}, {"k": 6}):
        _, other = expected(config(**fields), weights(config()), x)
        assert (other - plain).abs().max() > 1e-3, fields


def test_kept_features_keep_their_sign(tmp_path):
    cfg = config(k=40)  # of 48: about 16 of them negative
    tensors = write(tmp_path / "sae", cfg)
    sae = load(tmp_path / "sae")
    acts = sae.encode(torch.randn(9, D))
    assert torch.equal((acts != 0).sum(-1), torch.full((9,), 40))
    assert (acts < 0).sum() > 9
    z, _ = expected(cfg, tensors, torch.zeros(1, D))
    assert (z < 0).any()


def test_bfloat16(tmp_path):
    cfg = config(normalize=2.5)
    tensors = {name: t.bfloat16() for name, t in weights(cfg).items()}
    write(tmp_path / "sae", cfg, tensors)
    assert load(tmp_path / "sae").W_dec.dtype == torch.bfloat16
    wide = SAE.load_from_disk(tmp_path / "sae", dtype="float32", converter=published_disk_loader)
    assert wide.W_dec.dtype == torch.float32
    assert_close(wide.W_dec, 2.5 * tensors["w_dec.weight"].float().T, rtol=1e-2, atol=1e-2)


def test_passthrough_is_copied_exactly(tmp_path):
    write(tmp_path / "sae", config(passthrough=[2, 5], normalize=2.5))
    sae = load(tmp_path / "sae")
    x = torch.randn(3, 4, D)
    out = sae(x)
    assert torch.equal(out[..., [2, 5]], x[..., [2, 5]])
    assert not torch.isclose(out[..., [0, 1]], x[..., [0, 1]]).any()


def test_passthrough_belongs_to_the_encode_before(tmp_path):
    write(tmp_path / "sae", config(passthrough=[2]))
    sae = load(tmp_path / "sae")
    x = torch.randn(3, D)
    acts = sae.encode(x)
    decoded = acts @ sae.W_dec + sae.b_dec
    assert_close(sae.decode(acts[:2]), decoded[:2])  # another shape
    assert_close(sae.decode(acts), decoded)  # no encode since the last decode
    edited = 0 * sae.encode(x)
    out = sae.decode(edited)
    assert torch.equal(out[:, 2], x[:, 2])
    assert_close(out[:, 3], sae.b_dec[3].expand(3))


def test_gradients_pass_through(tmp_path):
    write(tmp_path / "sae", config(passthrough=[2]))
    sae = load(tmp_path / "sae")
    x = torch.randn(3, D, requires_grad=True)
    sae(x)[:, 2].sum().backward()
    assert torch.equal(x.grad, torch.eye(D)[2].expand(3, D))
    sae.encode(x)
    twin = copy.deepcopy(sae)
    assert torch.equal(twin(x), sae(x))


def test_decoder_norms_do_not_fold(tmp_path):
    write(tmp_path / "sae")
    with pytest.raises(NotImplementedError, match="topk"):
        load(tmp_path / "sae").fold_W_dec_norm()


@pytest.mark.parametrize("fields", VARIANTS[:4], ids=str)
def test_sae_lens_saves_and_loads_it(tmp_path, fields):
    write(tmp_path / "sae", config(**fields))
    sae = load(tmp_path / "sae")
    sae.save_model(tmp_path / "saved")
    again = SAE.load_from_disk(tmp_path / "saved")
    assert type(again) is SignedTopKSAE
    assert again.cfg.to_dict() == sae.cfg.to_dict()
    x = torch.randn(6, D)
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"passthrough": [16]}, r"passthrough has \[16\]; the input's dimensions are 0 to 15"),
        ({"passthrough": [-1]}, "0 to 15"),
        ({"k": 49}, "k = 49 features cannot be active of d_sae = 48"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        SignedTopKSAEConfig(**{"d_in": 16, "d_sae": 48, "k": 3, **fields})


# ---------------------------------------------------------------------- hooks and units


@pytest.mark.parametrize("point", [p for p in HOOKS if p != "attn-out"])
@pytest.mark.parametrize("spelling", ["-", "_"])
def test_hook_names(tmp_path, point, spelling):
    write(tmp_path / "sae", config(point=[point.replace("-", spelling), 2]))
    metadata = load(tmp_path / "sae").cfg.metadata
    assert (
        metadata.hook_name
        == {
            "resid-pre": "blocks.2.hook_resid_pre",
            "resid-mid": "blocks.2.hook_resid_mid",
            "resid-post": "blocks.2.hook_resid_post",
            "mlp-in": "blocks.2.mlp.hook_in",
            "mlp-out": "blocks.2.hook_mlp_out",
        }[point]
    )
    assert (metadata.context_size, metadata.prepend_bos) == (12, True)


@pytest.mark.parametrize("normalize", [None, 2.5])
@pytest.mark.parametrize(("scope", "scale"), [("ts", 1.0), ("fw-small", 24**-0.5), (None, 0.4)])
def test_attn_out_is_rescaled_with_w_o(tmp_path, scope, scale, normalize):
    cfg = config(point=["attn-out", 1], normalize=normalize)
    folder = tmp_path / (f"{scope}-scope" if scope == "fw-small" else "ts-medium-scope") / "sae"
    if scope is None:
        folder = tmp_path / "sae"
    tensors = write(folder, cfg)
    sae = load(folder) if scope else load(folder, attn_scale=scale)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_attn_out"
    assert_same_as_reference(sae, cfg, tensors, scale * torch.randn(5, D), unit=scale)


def test_attn_out_of_an_unknown_model(tmp_path):
    write(tmp_path / "sae", config(point=["attn-out", 1]))
    with pytest.raises(ValueError, match=r"before the attention scale.*attn_scale=\.\.\."):
        load(tmp_path / "sae")


@pytest.fixture
def spliced(tmp_path):
    """A published model in which published SAEs can be attached, and a function that loads them."""
    models.write(tmp_path / "ts-medium", models.config())
    model = HookedBilinearSAETransformer.from_pretrained(tmp_path / "ts-medium")

    def sae(point, **fields):
        folder = tmp_path / "ts-medium-scope" / f"1-{point}"
        write(folder, config(point=[point, 1], **fields))
        return load(folder)

    return model, sae


@pytest.mark.parametrize("point", list(HOOKS))
@pytest.mark.parametrize("fields", [{}, {"passthrough": [3, 9], "normalize": 0.7}], ids=str)
def test_spliced_into_the_model(spliced, point, fields):
    model, make = spliced
    assert isinstance(model, HookedSAETransformer)
    sae = make(point, **fields)
    hook = sae.cfg.metadata.hook_name
    logits, clean = model.run_with_cache(models.TOKENS)
    replaced, cache = model.run_with_cache_with_saes(models.TOKENS, saes=[sae])
    assert_close(cache[f"{hook}.hook_sae_acts_post"], sae.encode(clean[hook]))
    by_hand = model.run_with_hooks(
        models.TOKENS, fwd_hooks=[(hook, lambda value, hook: sae(value))]
    )
    assert_close(replaced, by_hand)
    assert (replaced - logits).abs().max() > 1e-2
    with model.saes([sae], use_error_term=True):
        assert_close(model(models.TOKENS), logits, rtol=0, atol=1e-5)
    assert torch.equal(model(models.TOKENS), logits)


def test_an_ablated_feature_with_the_error_term(spliced):
    """The error stays what it was, so the reconstruction moves by that feature's decoder row."""
    model, make = spliced
    sae = make("mlp-out", passthrough=[3])
    hook = "blocks.1.hook_mlp_out"
    _, clean = model.run_with_cache(models.TOKENS)
    acts = sae.encode(clean[hook])
    feature = int(acts[0, -1].abs().argmax())

    def ablate(value, hook):
        value[..., feature] = 0
        return value

    model.add_sae(sae, use_error_term=True)
    with model.hooks(fwd_hooks=[(f"{hook}.hook_sae_acts_post", ablate)]):
        _, cache = model.run_with_cache(models.TOKENS)
    model.reset_saes()
    moved = -acts[..., feature, None] * sae.W_dec[feature]
    moved[..., 3] = 0
    assert moved.abs().max() > 1e-2
    assert_close(cache[f"{hook}.hook_sae_output"], clean[hook] + moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("point", ["resid-mid", "mlp-in"])
@pytest.mark.parametrize("fields", [{}, {"passthrough": [3], "normalize": 0.7}], ids=str)
def test_exact_attribution_between_published_saes(spliced, point, fields):
    model, make = spliced
    f = FeatureInteractions(model, 1, make(point, **fields), make("mlp-out", **fields))
    _, cache = model.run_with_cache(models.TOKENS[:1])
    z = f.outputs.encode(cache["blocks.1.hook_mlp_out"])[0, -1].detach()
    feature = int(z.abs().argmax())
    found = f.run(models.TOKENS[0]).attribute(feature)
    assert found.total == pytest.approx(float(z[feature]), rel=1e-5)
    assert found.measured == pytest.approx(float(z[feature]), rel=1e-5)
    assert ("skip" in found.rest_names) is bool(fields)


# ---------------------------------------------------------------------- releases


@pytest.mark.parametrize(
    ("scope", "sae_id"),
    [
        ("ts-medium-scope", "4-resid-mid-x4-k30"),
        ("ts-medium-scope", "0-mlp-out-x3-k7"),
        ("fw-small-scope", "8-mlp-in-x4-k30"),
        ("fw-medium-scope", "7-mlp-out-x8-k30"),
        ("fw-medium-scope", "12-mlp-out-x16-k30-v3"),
    ],
)
@pytest.mark.parametrize("owner", ["", "tdooms/"])
def test_releases(hub, scope, sae_id, owner, recwarn):
    layer, point = int(sae_id.split("-")[0]), "-".join(sae_id.split("-")[1:3])
    cfg = config(point=[point, layer])
    tensors = write(hub / "tdooms" / scope / sae_id, cfg)
    sae = SAE.from_pretrained(owner + scope, sae_id)
    assert_same_as_reference(sae, cfg, tensors, torch.randn(4, D))
    assert sae.cfg.metadata.model_name == f"tdooms/{scope.removesuffix('-scope')}"
    assert sae.cfg.metadata.hook_name == HOOKS[point].format(layer)
    assert not [w for w in recwarn if "sae_lens" in w.filename]
    again = load_sae_config_from_huggingface(owner + scope, sae_id)
    assert again["d_sae"] == sae.cfg.d_sae
    assert again["metadata"]["hook_name"] == sae.cfg.metadata.hook_name


def test_attn_out_release_has_its_models_scale(hub):
    cfg = config(point=["attn-out", 3])
    tensors = write(hub / "tdooms" / "fw-medium-scope" / "3-attn-out-x8-k30", cfg)
    sae = SAE.from_pretrained("fw-medium-scope", "3-attn-out-x8-k30")
    scale = 32**-0.5
    assert_same_as_reference(sae, cfg, tensors, scale * torch.randn(5, D), unit=scale)


def test_other_repositories_through_the_converter(hub):
    cfg = config()
    tensors = write(hub / "somebody" / "facts-scope" / PLAIN_ID, cfg)
    sae = SAE.from_pretrained(
        "somebody/facts-scope", PLAIN_ID, converter=published_huggingface_loader
    )
    assert_same_as_reference(sae, cfg, tensors, torch.randn(4, D))
    assert sae.cfg.metadata.model_name is None


def test_ids_that_cannot_be_are_refused_before_downloading(hub):
    with pytest.raises(ValueError, match=r"ID blocks.4.hook_mlp_out not found.*0-resid-mid-x4-k30"):
        SAE.from_pretrained("ts-medium-scope", "blocks.4.hook_mlp_out")
    (hub / "tdooms" / "ts-medium-scope").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"has no file 4-mlp-in-x9-k30/config\.json"):
        SAE.from_pretrained("ts-medium-scope", "4-mlp-in-x9-k30")


def test_offline():
    with pytest.raises(ConnectionError, match=r"'tdooms/ts-medium-scope'.*path of a folder"):
        SAE.from_pretrained("ts-medium-scope", "4-resid-mid-x4-k30")


def test_sae_lens_keeps_its_own_releases():
    from sae_lens.loading import pretrained_saes_directory

    directory = pretrained_saes_directory.get_pretrained_saes_directory()
    assert "gpt2-small-res-jb" in directory
    assert set(directory) >= {"ts-medium-scope", "tdooms/fw-medium-scope"}
    ids = directory["fw-medium-scope"].saes_map
    assert "7-mlp-out-x8-k30" in list(ids)
    assert ids["7-mlp-out-x16-k30"] == "7-mlp-out-x16-k30"
    with pytest.raises(KeyError):
        ids["7"]


def run(program, *folders):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import sae_lens, tl_bilinear",
        "import tl_bilinear, sae_lens",
        "import tl_bilinear.features.published_saes",
    ],
)
def test_registered_whichever_is_imported_first(tmp_path, imports):
    write(tmp_path / "sae")
    run(
        f"{imports}\n"
        "from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory\n"
        "theirs = get_pretrained_saes_directory.__wrapped__.__wrapped__\n"
        "assert theirs.cache_info().currsize == 0, 'the list was read'\n"
        "assert 'ts-medium-scope' in get_pretrained_saes_directory()\n"
        "from sae_lens.registry import get_sae_class\n"
        "assert get_sae_class('tl_bilinear_signed_topk')[0].__name__ == 'SignedTopKSAE'\n"
    )


def test_a_sae_lens_without_what_is_needed_still_imports(tmp_path):
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("__version__ = '9.0'\n")
    _, warned = run("import tl_bilinear, sae_lens\nprint(sae_lens.__version__)", tmp_path)
    assert "SAELens 9.0 does not take tl_bilinear's SAEs" in warned
    assert "TopKSAE" in warned


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("name", ["w_enc.weight", "w_dec.weight", "b_dec", "w_enc.bias"])
@pytest.mark.parametrize("wrong", ["missing", "shape", "transposed"])
def test_each_tensor_that_does_not_fit_is_named(tmp_path, name, wrong):
    cfg = config(encoder_bias=True)
    tensors = weights(cfg)
    if wrong == "missing":
        del tensors[name]
    elif wrong == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name] = (
            tensors[name].T.contiguous() if tensors[name].ndim == 2 else tensors[name][None]
        )
    write(tmp_path / "sae", cfg, tensors)
    found = "is missing" if wrong == "missing" else "has shape"
    with pytest.raises(ValueError, match=rf"{name} {found}"):
        load(tmp_path / "sae")


def test_extra_tensors_are_named(tmp_path):
    for name in ("w_enc.bias", "norm.linear.weight", "lookup"):
        write(tmp_path / name, config(), {**weights(config()), name: torch.ones(48)})
        with pytest.raises(ValueError, match=f"{name} is not in the model"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bilinear_encoder": True}, "products of two directions"),
        ({"token_lookup": True}, "depends on the token"),
        ({"target": ["mlp-out", 1]}, "it is a transcoder"),
        ({"point": ["mlp-mid", 1]}, "point is .*one of resid-pre, resid-mid"),
        ({"point": ["pattern", 1]}, "point is "),
        ({"point": "1-mlp-in"}, "expected a name and a layer"),
        ({"point": ["mlp-in", "1"]}, "expected a name and a layer"),
        ({"point": None}, "lacks point"),
        ({"k": None}, "lacks k"),
        ({"k": 0}, "k is 0; expected a positive integer"),
        ({"expansion": 4.5}, r"expansion is 4\.5"),
        ({"k": 100}, "k = 100 features cannot be active of d_sae = 48"),
        ({"normalize": 0}, "normalize is 0"),
        ({"normalize": True}, "normalize is True"),
        ({"passthrough": [702]}, "dimensions are 0 to 15"),
    ],
)
def test_configs_that_are_not_a_published_sae(tmp_path, fields, message):
    write(tmp_path / "sae", config(**fields), weights(config()))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "sae")


def test_a_target_that_is_the_point_is_an_sae(tmp_path):
    write(tmp_path / "sae", config(target=["mlp-in", 1]))
    assert load(tmp_path / "sae").cfg.d_in == D


def test_files_that_are_missing_or_truncated(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        load(tmp_path / "nowhere")
    write(tmp_path / "sae")
    (tmp_path / "sae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path / "sae")
    (tmp_path / "sae" / "config.json").write_text("[]")
    with pytest.raises(
        ValueError, match="not the config of a published SAE: it lacks point, d_model"
    ):
        load(tmp_path / "sae")
    write(tmp_path / "sae")
    path = tmp_path / "sae" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is truncated"):
        load(tmp_path / "sae")
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"not a published SAE: it has no model\.safetensors"
    ):
        load(tmp_path / "sae")


# ---------------------------------------------------------------------- top sequences


N_FEATURES = 130


@pytest.fixture
def activations():
    """Random maxima of each feature over each of 300 sequences: [sequence, feature]."""
    return torch.randn(300, N_FEATURES)


def write_top(folder, activations, key="4-mlp-out", **other):
    folder.mkdir(parents=True, exist_ok=True)
    top = activations.topk(100, dim=0).indices
    save_file({key: top.contiguous(), **other}, folder / "top-activations.safetensors")
    return folder / "top-activations.safetensors"


@pytest.mark.parametrize("key", ["4-mlp-out", "4-mlp_out"])
def test_top_sequences(tmp_path, hub, activations, key):
    path = write_top(hub / "tdooms" / "fw-medium-scope", activations, key)
    for source in (path, path.parent, "fw-medium-scope", "tdooms/fw-medium-scope"):
        for point in ("mlp-out", "mlp_out"):
            top = read_top_sequences(source, 4, point)
            assert top.indices.shape == (N_FEATURES, 100)
            assert (top.layer, top.point) == (4, "mlp-out")
    for feature in (0, 57, N_FEATURES - 1):
        values = activations[top.indices[feature], feature]
        assert torch.equal(values, activations[:, feature].sort(descending=True).values[:100])


def test_top_sequences_stored_by_row(tmp_path, activations):
    by_row = activations.topk(100, dim=0).indices.T.contiguous()
    save_file({"0-mlp-in": by_row}, tmp_path / "top-activations.safetensors")
    assert torch.equal(read_top_sequences(tmp_path, 0, "mlp-in").indices, by_row)


def test_top_sequences_as_a_result(tmp_path, activations):
    top = read_top_sequences(write_top(tmp_path, activations), 4, "mlp-out")
    assert torch.equal(top.top(3).indices, top.indices[:, :3])
    table = top.top(3).to_pandas()
    assert table.shape == (N_FEATURES, 3)
    assert (table.index.name, table.columns.name) == ("feature", "rank")
    assert table.loc[57, 1] == int(top.indices[57, 1])
    top.save(tmp_path / "top.safetensors")
    again = TopSequences.load(tmp_path / "top.safetensors")
    assert torch.equal(again.indices, top.indices)
    assert (again.layer, again.point) == (4, "mlp-out")


def test_top_sequences_that_are_not_there(tmp_path, hub, activations):
    path = write_top(tmp_path / "scope", activations, **{"1-mlp-in": torch.ones(2, 2).long()})
    with pytest.raises(KeyError, match="has no 2-mlp-in; it has 1-mlp-in, 4-mlp-out"):
        read_top_sequences(path, 2, "mlp-in")
    with pytest.raises(ValueError, match=r"1-mlp-in has shape \[2, 2\].*expected integers \[100"):
        read_top_sequences(path, 1, "mlp-in")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="is truncated"):
        read_top_sequences(path, 4, "mlp-out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"published scope: it has no top-activations"):
        read_top_sequences(path.parent, 4, "mlp-out")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder here, nor a release"):
        read_top_sequences("nonsense", 4, "mlp-out")
    with pytest.raises(FileNotFoundError, match="no repository 'tdooms/fw-small-scope'"):
        read_top_sequences("fw-small-scope", 4, "mlp-out")
