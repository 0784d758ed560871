"""The SAEs that the paper's authors published, as SAELens SAEs.

>>> import tl_bilinear
>>> from sae_lens import SAE
>>> sae = SAE.from_pretrained("ts-medium-scope", "4-resid-mid-x4-k30")  # doctest: +SKIP

Pearce et al. 2025, table 3. On the Hugging Face hub: ``tdooms/ts-medium-scope``, ``fw-small-scope`` and
``fw-medium-scope``, for the models that `tl_bilinear.models.published_models` loads. Each folder
``{layer}-{point}-x{expansion}-k{k}[-tag]`` holds ``config.json`` and ``model.safetensors`` with
``w_enc.weight`` [F, d], ``w_dec.weight`` [d, F], ``b_dec`` [d], and ``w_enc.bias`` [F] where
``encoder_bias``. With n = ``normalize`` (1 where there is none):

    ``z = topk(W_enc (x / n - b_dec) + b_enc)``, no ReLU: what is kept keeps its sign
    ``x_hat = n (W_dec z + b_dec)``, and the dimensions of ``passthrough`` are copied from x

n is folded into the weights: W_enc, W_dec and b_dec of the loaded SAE belong to the model's own
activations, and a decoder row has norm n. The same holds for the attention scale (`ATTN_OUT`).

The folder's name is the ``sae_id``. For another repository of this format pass
``converter=published_huggingface_loader`` to ``SAE.from_pretrained``, for a local folder
``converter=published_disk_loader`` to ``SAE.load_from_disk``.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sae_lens
import torch
from jaxtyping import Int
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tl_bilinear.io import read_json
from tl_bilinear.models.files import (
    CONFIG,
    WEIGHTS,
    Source,
    is_repository,
    read_tensors,
    require_numbers,
    require_shapes,
    require_sizes,
)
from tl_bilinear.models.published_models import attention_scale
from tl_bilinear.results import Result

if TYPE_CHECKING:
    import pandas

__all__ = [
    "SignedTopKSAE",
    "SignedTopKSAEConfig",
    "TopSequences",
    "published_disk_loader",
    "published_huggingface_loader",
    "read_top_sequences",
]

ARCHITECTURE = "tl_bilinear_signed_topk"
_LOADER = "tl_bilinear_published"
_SIZES = ("d_model", "expansion", "k")

# The authors record attention's output before its scale, which is in W_O here: an SAE of this point
# is rescaled by the scale with which `HookedBilinearTransformer.from_pretrained` loads the model.
ATTN_OUT = "attn-out"
HOOKS = {
    "resid-pre": "blocks.{}.hook_resid_pre",
    "resid-mid": "blocks.{}.hook_resid_mid",
    "resid-post": "blocks.{}.hook_resid_post",
    "mlp-in": "blocks.{}.mlp.hook_in",
    "mlp-out": "blocks.{}.hook_mlp_out",
    ATTN_OUT: "blocks.{}.hook_attn_out",
}


# ---------------------------------------------------------------------- the SAE


class SignedTopK(nn.Module):
    """Keeps the k largest pre-activations as they are, negative ones too; the others become 0."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        top = x.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(x).scatter(-1, top.indices, top.values)


@dataclass
class SignedTopKSAEConfig(TopKSAEConfig):
    """The config of a `SignedTopKSAE`: TopKSAEConfig and the dimensions that bypass the SAE.

    Raises ValueError for a dimension that the input does not have, and for more active features than
    there are.
    """

    metadata: Any = field(default_factory=SAEMetadata)  # SAELens gives it a dict and converts that
    passthrough: list[int] = field(default_factory=list)

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        outside = [dim for dim in self.passthrough if not 0 <= dim < self.d_in]
        if outside:
            raise ValueError(
                f"passthrough has {outside}; the input's dimensions are 0 to {self.d_in - 1}"
            )
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k = {self.k} features cannot be active of d_sae = {self.d_sae}")


class SignedTopKSAE(TopKSAE):
    """A top-k SAE without ReLU, some of whose input dimensions may bypass it.

    `encode` [..., d_in] -> [..., d_sae] and `decode` back. `decode` copies the dimensions of
    `cfg.passthrough` from the input of the `encode` before it, as SAELens's own SAEs do with the
    statistics of a layer norm; on its own (another shape, or no `encode` since the last `decode`) it
    returns the decoder's output.
    """

    cfg: SignedTopKSAEConfig
    _passed: Tensor | None = None

    def get_activation_fn(self) -> SignedTopK:
        return SignedTopK(self.cfg.k)

    def encode(self, x: Tensor) -> Tensor:
        self._passed = x[..., self.cfg.passthrough] if self.cfg.passthrough else None
        return super().encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        out = super().decode(feature_acts)
        passed, self._passed = self._passed, None
        if passed is None or passed.shape[:-1] != out.shape[:-1]:
            return out
        dims = torch.tensor(self.cfg.passthrough, device=out.device)
        return out.index_copy(-1, dims, passed.to(out.dtype))

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins without the activations of the original, and without their graph.
        return {**self.__dict__, "_passed": None}


# ---------------------------------------------------------------------- loading


def published_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    *,
    attn_scale: float | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """A ``converter`` for ``SAE.from_pretrained(repository, folder)``: config, weights, no sparsity.

    `attn_scale` matters for SAEs of attn-out only: the scale with which the model was loaded, known
    for the three published ones.

    Raises FileNotFoundError or ConnectionError where it cannot be downloaded, ValueError for files
    that are not a published SAE, naming what is wrong.
    """
    source = _on_hub(repo_id, folder_name, force_download)
    return (*_load(source, _scope_of(repo_id), device, cfg_overrides, attn_scale), None)


def published_disk_loader(
    path: str | PathLike[str],
    device: str = "cpu",
    cfg_overrides: dict[str, Any] | None = None,
    *,
    attn_scale: float | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A ``converter`` for ``SAE.load_from_disk(folder)``: config and weights.

    As `published_huggingface_loader`; the scale is known where the folder lies in one that is named
    after a published scope (``fw-small-scope/3-attn-out-x4-k30``).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory")
    source = Source(folder, kind="published SAE")
    return _load(source, _scope_of(folder.resolve().parent.name), device, cfg_overrides, attn_scale)


def published_config_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The config alone, without downloading the weights."""
    source = _on_hub(repo_id, folder_name, force_download)
    _, stored = _read_config(source)
    return _convert_config(stored, _scope_of(repo_id), device, cfg_overrides)


def _on_hub(repo_id: str, folder_name: str, force_download: bool) -> Source:
    return Source(repo_id, folder_name, kind="published SAE", force_download=force_download)


def _load(
    source: Source,
    scope: _Scope | None,
    device: str,
    overrides: Mapping[str, Any] | None,
    attn_scale: float | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path, stored = _read_config(source)
    scale = _unit(path, stored, scope, attn_scale)
    weights = source.require(WEIGHTS)
    tensors = read_tensors(weights)
    d_in, d_sae = stored["d_model"], stored["d_model"] * stored["expansion"]
    shapes = {"w_enc.weight": [d_sae, d_in], "w_dec.weight": [d_in, d_sae], "b_dec": [d_in]}
    if stored.get("encoder_bias"):
        shapes["w_enc.bias"] = [d_sae]
    require_shapes(weights, tensors, shapes)
    require_numbers(weights, tensors)

    dtype = tensors["w_dec.weight"].dtype
    wide = {name: t.to(torch.promote_types(dtype, torch.float32)) for name, t in tensors.items()}
    state = {
        "W_enc": wide["w_enc.weight"].T / scale,
        "b_enc": wide.get("w_enc.bias", torch.zeros(d_sae)),
        "W_dec": wide["w_dec.weight"].T * scale,
        "b_dec": wide["b_dec"] * scale,
    }
    config = _convert_config(
        stored, scope, device, {"dtype": str(dtype).removeprefix("torch."), **(overrides or {})}
    )
    return config, {name: t.to(device, dtype).contiguous() for name, t in state.items()}


def _read_config(source: Source) -> tuple[Path, dict[str, Any]]:
    """The path and content of an SAE's config.json, checked."""
    path = source.require(CONFIG)
    stored = read_json(path)
    known = stored if isinstance(stored, dict) else {}
    missing = [name for name in ("point", *_SIZES) if known.get(name) is None]
    if missing:
        raise ValueError(
            f"{path} is not the config of a published SAE: it lacks {', '.join(missing)}. An SAE that "
            "SAELens saved is loaded without a converter"
        )
    require_sizes(path, stored, _SIZES)
    _require_point(path, stored)
    conflict: str | None = None
    if stored.get("bilinear_encoder"):
        conflict = "bilinear_encoder is true, and its features are products of two directions"
    elif stored.get("token_lookup"):
        conflict = "token_lookup is true, and its reconstruction depends on the token"
    elif stored.get("target") not in (None, stored["point"]):
        conflict = f"target is {stored['target']} and point {stored['point']}: it is a transcoder"
    if conflict is not None:
        raise ValueError(f"{path} does not describe an SAE that SAELens can hold: {conflict}")
    return path, stored


def _require_point(path: Path, stored: Mapping[str, Any]) -> None:
    name, layer = _point(stored)
    if name not in HOOKS or not isinstance(layer, int):
        raise ValueError(
            f"{path}: point is {stored['point']!r}; expected a name and a layer such as ['mlp-in', 4], "
            f"the name one of {', '.join(HOOKS)}"
        )


def _point(stored: Mapping[str, Any]) -> tuple[str, Any]:
    point = stored["point"]
    if not isinstance(point, list) or len(point) != 2:
        return "", None
    return str(point[0]).replace("_", "-"), point[1]


def _unit(
    path: Path, stored: Mapping[str, Any], scope: _Scope | None, attn_scale: float | None
) -> float:
    """What 1 of the SAE's own units is in the model's activations."""
    normalize = stored.get("normalize")
    normalize = 1.0 if normalize is None else normalize
    is_number = isinstance(normalize, int | float) and not isinstance(normalize, bool)
    if not is_number or not 0 < normalize < math.inf:
        raise ValueError(f"{path}: normalize is {normalize!r}; expected null or a positive number")
    if _point(stored)[0] != ATTN_OUT:
        return float(normalize)
    if attn_scale is None:
        if scope is None:
            raise ValueError(
                f"{path} is an SAE of attn-out, before the attention scale, which is in W_O here, and "
                "the model's scale is not known. Say with which scale you load the model: "
                "converter=functools.partial(published_disk_loader, attn_scale=...), or "
                "published_huggingface_loader"
            )
        attn_scale = scope.attn_scale
    return float(normalize) * attn_scale


def _convert_config(
    stored: Mapping[str, Any],
    scope: _Scope | None,
    device: str | None,
    overrides: Mapping[str, Any] | None,
) -> dict[str, Any]:
    name, layer = _point(stored)
    passthrough = stored.get("passthrough")
    if passthrough is None:
        passthrough = []
    metadata = {
        "model_name": None if scope is None else scope.model,
        "model_class_name": "HookedBilinearTransformer",
        "hook_name": HOOKS[name].format(layer),
        "prepend_bos": True,
        "context_size": stored.get("n_ctx"),
        "normalize": stored.get("normalize"),
        "sae_lens_version": sae_lens.__version__,
    }
    config = {
        "architecture": ARCHITECTURE,
        "d_in": stored["d_model"],
        "d_sae": stored["d_model"] * stored["expansion"],
        "k": stored["k"],
        "passthrough": [passthrough] if isinstance(passthrough, int) else list(passthrough),
        "dtype": "float32",
        "device": device or "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    own = {f.name for f in fields(SignedTopKSAEConfig)}
    for key, value in (overrides or {}).items():
        (config if key in own else metadata)[key] = value
    return {**config, "metadata": metadata}


# ---------------------------------------------------------------------- the releases


class _Ids(dict[str, str]):
    """The SAEs of a repository: those that are known, and any name of the right form.

    The list of files is on the hub only. SAELens looks an id up here before it downloads anything.
    """

    _FORM = re.compile(rf"\d+-({'|'.join(HOOKS)})-x\d+-k\d+(-.+)?")

    def __contains__(self, sae_id: object) -> bool:
        return isinstance(sae_id, str) and self._FORM.fullmatch(sae_id) is not None

    def __missing__(self, sae_id: str) -> str:
        if sae_id not in self:
            raise KeyError(sae_id)
        return sae_id


@dataclass(frozen=True)
class _Scope:
    """One published repository of SAEs."""

    model: str
    n_layers: int
    expansion: int
    points: tuple[str, ...]

    @property
    def repository(self) -> str:
        return f"{self.model}-scope"

    @property
    def attn_scale(self) -> float:
        return attention_scale({"n_layer": self.n_layers}, self.model)

    @property
    def ids(self) -> _Ids:
        names = (
            f"{layer}-{point}-x{self.expansion}-k30"
            for layer in range(self.n_layers)
            for point in self.points
        )
        return _Ids({name: name for name in names})


SCOPES = {
    "ts-medium-scope": _Scope("tdooms/ts-medium", 6, 4, ("resid-mid", "mlp-out")),
    "fw-small-scope": _Scope("tdooms/fw-small", 12, 4, ("mlp-in", "mlp-out")),
    "fw-medium-scope": _Scope("tdooms/fw-medium", 16, 8, ("mlp-in", "mlp-out")),
}


def _scope_of(name: str) -> _Scope | None:
    return SCOPES.get(name.rpartition("/")[2])


@functools.cache
def register() -> None:
    """Give SAELens the architecture, the loader and the releases, once."""
    sae_lens.register_sae_class(ARCHITECTURE, SignedTopKSAE, SignedTopKSAEConfig)
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_LOADERS[_LOADER] = published_huggingface_loader
    getters = pretrained_sae_loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS
    getters[_LOADER] = published_config_loader
    _add_releases()


def _add_releases() -> None:
    # SAELens reads its own list, a file that takes more than a second, when it first needs it.
    original = pretrained_saes_directory.get_pretrained_saes_directory
    releases = {
        release: pretrained_saes_directory.PretrainedSAELookup(
            release=release,
            repo_id=scope.repository,
            model=scope.model,
            conversion_func=_LOADER,
            saes_map=scope.ids,
            expected_var_explained={},
            expected_l0={},
            neuronpedia_id={},
            norm_scaling_factor={},
            config_overrides=None,
        )
        for name, scope in SCOPES.items()
        for release in (name, scope.repository)
    }

    @functools.cache
    @functools.wraps(original)
    def with_published() -> dict[str, Any]:
        directory: dict[str, Any] = original()
        for name, release in releases.items():
            directory.setdefault(name, release)
        return directory

    name = "get_pretrained_saes_directory"
    for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == "sae_lens"]:
        if vars(module).get(name) is original:
            setattr(module, name, with_published)


# ---------------------------------------------------------------------- the top sequences


@dataclass(frozen=True, eq=False)
class TopSequences(Result):
    """The text sequences on which each feature of one published SAE is most active.

    Attributes
    ----------
    indices: [n_features, n], most active first: rows of the tokenized data set that the authors
        searched (the first 16,384 sequences, ``tdooms/fineweb-16k`` for the fw models)
    layer, point: of the SAE, such as 4 and "mlp-out"
    """

    indices: Int[Tensor, "n_features n"]
    layer: int
    point: str

    def top(self, k: int) -> TopSequences:
        """The k first sequences of each feature."""
        return TopSequences(self.indices[:, :k], self.layer, self.point)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each feature, a column for each rank."""
        import pandas

        table = pandas.DataFrame(self.indices.numpy())
        return table.rename_axis(index="feature", columns="rank")


def read_top_sequences(source: str | PathLike[str], layer: int, point: str) -> TopSequences:
    """Read one SAE's part of ``top-activations.safetensors``.

    Parameters
    ----------
    source: the file, the folder that holds it, a release ("fw-medium-scope") or a repository
    layer, point: of the SAE, such as 4 and "mlp-out"

    Raises FileNotFoundError or ConnectionError where there is no such file, KeyError naming the SAEs
    that it has, ValueError for a file that is not of this format.
    """
    path = _find_top_activations(source)
    point = point.replace("_", "-")
    try:
        with safe_open(path, framework="pt") as file:
            keys = {key.replace("_", "-"): key for key in file.keys()}  # noqa: SIM118
            if f"{layer}-{point}" not in keys:
                raise KeyError(f"{path} has no {layer}-{point}; it has {', '.join(sorted(keys))}")
            indices = file.get_tensor(keys[f"{layer}-{point}"])
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or not a safetensors file: {error}") from error
    if indices.ndim != 2 or indices.is_floating_point() or 100 not in indices.shape:
        raise ValueError(
            f"{path}: {layer}-{point} has shape {list(indices.shape)} and dtype {indices.dtype}; "
            "expected integers [100, n_features]"
        )
    # The published code writes one column a feature.
    by_column = indices.shape[0] == 100
    return TopSequences((indices.T if by_column else indices).long().contiguous(), layer, point)


def _find_top_activations(source: str | PathLike[str]) -> Path:
    filename = "top-activations.safetensors"
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return Source(path, kind="published scope").require(filename)
    name = fspath(source)
    if name in SCOPES:
        name = SCOPES[name].repository
    if is_repository(name):
        return Source(name, kind="published scope").require(filename)
    raise FileNotFoundError(
        f"{name!r} is neither a file nor a folder here, nor a release ({', '.join(SCOPES)}) or a "
        "repository on the hub"
    )


# Here too: whoever imports this module first imports SAELens by it, and the hook that waits for SAELens
# then finds it half made.
register()
