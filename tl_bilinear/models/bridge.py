"""Bilinear MLPs in TransformerLens's TransformerBridge, on TransformerLens 3.9 and on 4.

A bridge wraps a model that lives elsewhere. Two of them are bilinear: Hugging Face's Llama with
``hidden_act="linear"``, and TransformerLens's own native model with the MLP below.

>>> import tl_bilinear
>>> from transformer_lens.model_bridge import TransformerBridge
>>> bridge = TransformerBridge.boot_transformers("runs/small/model")  # a Llama, its gate linear
>>> bridge = TransformerBridge.boot_bilinear(                         # from scratch
...     n_layers=2, d_model=64, d_head=16, n_heads=4, n_ctx=32, d_vocab=100, normalization_type="RMS",
... )
>>> tl_bilinear.BilinearTensor.from_model(bridge, 1)                  # [64, 64, 64]

TransformerLens's own bridge of such a Llama runs it as it is until compatibility mode, and then puts
SiLU on the gate, silently: its table of activations has no "linear". Where tl_bilinear is installed
(an entry point brings it in, imported or not) the MLP is a :class:`BilinearMLPBridge`, which has no
activation to look up.

**Compatibility mode** folds and centres weights. TransformerLens tells axes apart by their lengths, and
takes the wrong one where two are equal. This module repairs that for the MLP (LayerNorm with
d_mlp == d_model), and folds and centres both W_gate and W_in. Models that it cannot repair are refused.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.gated_mlp import GatedMLPBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model
from transformer_lens.model_bridge.sources.native.model import NativeGatedMLP
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.native import NativeArchitectureAdapter
from transformers import LlamaForCausalLM

from tl_bilinear.io import read_json
from tl_bilinear.models import conversion, folders
from tl_bilinear.models.fields import require_fields, require_values
from tl_bilinear.models.files import CONFIG, WEIGHTS, Source, read_tensors, require_shapes
from tl_bilinear.models.folding import fold_norm
from tl_bilinear.models.pretrained import stored_tokenizer
from tl_bilinear.models.readers import gated_through

ARCHITECTURE = "TLBilinearNative"
NATIVE = "TransformerLensNative"
LLAMA = "LlamaForCausalLM"
IDENTITY = "identity"
_LAYER_NORMS = ("LN", "LNPre")


class BilinearMLPBridge(GatedMLPBridge):
    """``((x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out``, around three wrapped linear maps.

    Weights, aliases and hooks are GatedMLPBridge's: hook_in, hook_pre (x W_gate + b_gate),
    hook_pre_linear (x W_in + b_in), hook_post (their product), hook_out; all of them fire with and
    without compatibility mode.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        # The wrapped maps hold the processed weights themselves.
        x = self.hook_in(hidden_states)
        output: Tensor = self.hook_out(self.out(self.gate(x) * getattr(self, "in")(x)))
        return output

    def set_processed_weights(
        self, weights: Mapping[str, Tensor | None], verbose: bool = False
    ) -> None:
        d_mlp = self.gate.weight.shape[0]
        super().set_processed_weights(
            {name: _without_dead_neuron(name, t, d_mlp) for name, t in weights.items()}, verbose
        )


class _BilinearAdapter:
    """What both adapters add to TransformerLens's: the MLP, and how its weights are processed."""

    cfg: Any
    component_mapping: Any

    def _make_mlp_bilinear(self) -> None:
        submodules = self.component_mapping["blocks"].submodules
        mlp = submodules.get("mlp")  # attn_only has none
        if mlp is not None:
            parts = {name: LinearBridge(name=part.name) for name, part in mlp.submodules.items()}
            submodules["mlp"] = BilinearMLPBridge(name=mlp.name, config=self.cfg, submodules=parts)

    def preprocess_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What TransformerLens calls before it folds and centres (not with ``no_processing=True``)."""
        cfg = self.cfg
        _refuse_processing(cfg)
        state = dict(super().preprocess_weights(state_dict))  # type: ignore[misc]
        if cfg.attn_only:
            return state
        centred = cfg.normalization_type in _LAYER_NORMS
        for layer in range(cfg.n_layers):
            block = f"blocks.{layer}."
            if self._fold_ln_requested:  # type: ignore[attr-defined]
                _fold_mlp_norm(state, block, center=centred)
            if centred and cfg.d_mlp == cfg.d_model:
                _add_dead_neuron(state, f"{block}mlp.")
        return state


class BilinearLlamaAdapter(_BilinearAdapter, LlamaArchitectureAdapter):
    """A Hugging Face Llama with ``hidden_act="linear"``."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._make_mlp_bilinear()


class BilinearNativeAdapter(_BilinearAdapter, NativeArchitectureAdapter):
    """TransformerLens's native model with bilinear MLPs (`native_model`)."""

    def __init__(self, cfg: Any) -> None:
        cfg.gated_mlp, cfg.act_fn = True, IDENTITY
        super().__init__(cfg)
        self._make_mlp_bilinear()


# ---------------------------------------------------------------------- weight processing


def _refuse_processing(cfg: Any) -> None:
    """Raise ValueError for what TransformerLens's processing is known to change."""
    problem = None
    d_vocab_out = cfg.d_vocab_out if cfg.d_vocab_out > 0 else cfg.d_vocab
    if cfg.normalization_type in _LAYER_NORMS and cfg.final_rms:
        problem = f"normalization_type={cfg.normalization_type!r} with final_rms=True"
    elif not cfg.d_model != cfg.d_vocab == d_vocab_out:
        problem = (
            f"d_vocab={cfg.d_vocab}, d_vocab_out={d_vocab_out} beside d_model={cfg.d_model} (it finds "
            "the axis of W_U to centre by its length)"
        )
    if problem is not None:
        raise ValueError(
            f"TransformerLens does not process this model correctly: {problem}; its log-probabilities "
            "would change. The weights are as they were: pass no_processing=True to "
            "enable_compatibility_mode"
        )


def _fold_mlp_norm(state: dict[str, Tensor], block: str, *, center: bool) -> None:
    """Fold ln2 into both maps that read it; TransformerLens then finds an identity there."""
    norm_weight, norm_bias = state.get(f"{block}ln2.weight"), state.get(f"{block}ln2.bias")
    for part in ("gate", "in"):
        key = f"{block}mlp.{part}."
        weight = state[f"{key}weight"].T
        ones = torch.ones_like(weight[:, 0])
        weight, bias = fold_norm(
            weight,
            state.get(f"{key}bias"),
            ones if norm_weight is None else norm_weight,
            norm_bias,
            center=center,
        )
        state[f"{key}weight"] = weight.T.contiguous()
        if bias is not None:
            state[f"{key}bias"] = bias
    if norm_weight is not None:
        state[f"{block}ln2.weight"] = torch.ones_like(norm_weight)
    if norm_bias is not None:
        state[f"{block}ln2.bias"] = torch.zeros_like(norm_bias)


# With d_mlp == d_model TransformerLens cannot tell the axes of the MLP's weights apart, and centres over
# the wrong one. So while it processes them, they have one more hidden neuron, which is always zero.


def _add_dead_neuron(state: dict[str, Tensor], mlp: str) -> None:
    for part, padding in (("gate", (0, 0, 0, 1)), ("in", (0, 0, 0, 1)), ("out", (0, 1, 0, 0))):
        state[f"{mlp}{part}.weight"] = F.pad(state[f"{mlp}{part}.weight"], padding)
        if part != "out" and f"{mlp}{part}.bias" in state:
            state[f"{mlp}{part}.bias"] = F.pad(state[f"{mlp}{part}.bias"], (0, 1))


def _without_dead_neuron(name: str, values: Tensor | None, d_mlp: int) -> Tensor | None:
    if values is None or name == "out.bias":
        return values
    return values[:, :d_mlp].contiguous() if name == "out.weight" else values[:d_mlp]


# ---------------------------------------------------------------------- the native model


class NativeBilinearMLP(NativeGatedMLP):
    """The bilinear MLP of the native model: linear maps gate, in and out, biases where wanted."""

    def __init__(self, cfg: Any) -> None:
        nn.Module.__init__(self)  # the parent refuses an activation that it does not know
        d_in, d_hidden, bias = cfg.d_model, cfg.d_mlp, cfg.bilinear_bias
        self.gate = nn.Linear(d_in, d_hidden, bias=bias)
        self.add_module("in", nn.Linear(d_in, d_hidden, bias=bias))
        self.out = nn.Linear(d_hidden, d_in, bias=bias)
        if bias:
            for linear in self.children():
                nn.init.zeros_(linear.bias)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        x = hidden_states
        output: Tensor = self.out(self.gate(x) * getattr(self, "in")(x))
        return output


def native_model(cfg: Any) -> NativeModel:
    """TransformerLens's native model with bilinear MLPs, initialised as its gated one is.

    `cfg.bilinear_bias` gives the MLPs biases, zero at first; `cfg.init_weights`, `cfg.init_mode` and
    `cfg.seed` are obeyed as in `TransformerBridge.boot_native`, and the caller's random state moves as
    there. The config is completed in place.
    """
    with torch.random.fork_rng(devices=[], enabled=cfg.init_weights and cfg.seed is not None):
        cfg.gated_mlp, cfg.act_fn = True, "relu"  # for the MLPs that are replaced below
        model = NativeModel(cfg)
        cfg.act_fn = IDENTITY
        if not cfg.attn_only:
            for block in model.layers:
                block.mlp = NativeBilinearMLP(cfg)
        if cfg.init_weights:
            initialize_native_model(model, cfg)
    return model


# ---------------------------------------------------------------------- booting


def boot_bilinear(
    cls: type,
    source: Any,
    *,
    bilinear_bias: bool,
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    fields: Mapping[str, Any],
) -> Any:
    """What `TransformerBridge.boot_bilinear` does; documented there."""
    where = {"tokenizer": tokenizer, "device": device, "dtype": dtype}
    given = [*fields, *(["bilinear_bias"] if bilinear_bias else [])]
    if source is None or isinstance(source, Mapping):
        values = {**(source or {}), **fields}
        cfg = _config(values, values.pop("bilinear_bias", False) or bilinear_bias)
        bridge = _wrap(native_model(cfg), cfg, **where)
    elif isinstance(source, TransformerBridgeConfig) and not fields:
        cfg = _native(copy.deepcopy(source), bilinear_bias)
        bridge = _wrap(native_model(cfg), cfg, **where)
    elif given:
        raise TypeError(
            f"{', '.join(given)}: fields are for a new model, made from a dict or from nothing, and "
            f"source is a {type(source).__name__}"
        )
    elif isinstance(source, str | PathLike):
        bridge = _from_folder(Path(source).expanduser(), **where)
    elif _is_hooked_bilinear(source):
        where["tokenizer"] = source.tokenizer if tokenizer is None else tokenizer
        bridge = _from_state("the model", source.state_dict(), vars(source.cfg), **where)
    elif isinstance(source, LlamaForCausalLM):
        bridge = _from_llama(source, **where)
    else:
        raise TypeError(
            "boot_bilinear takes fields of a config, a dict, a TransformerBridgeConfig, a "
            "HookedBilinearTransformer or the folder of one, or a LlamaForCausalLM, not "
            f"{type(source).__module__}.{type(source).__qualname__}"
        )
    if not isinstance(bridge, cls):
        # SAELens makes its own bridges like this; these are the fields that its constructor adds.
        bridge.__class__ = cls
        bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}
    return bridge


def _is_hooked_bilinear(source: Any) -> bool:
    """isinstance by name: the class needs TransformerLens 3.9."""
    names = ("tl_bilinear.models.transformer", "HookedBilinearTransformer")
    return any((cls.__module__, cls.__name__) == names for cls in type(source).__mro__)


def _config(values: Mapping[str, Any], bilinear_bias: bool) -> Any:
    """A new config from fields."""
    values = {"act_fn": IDENTITY, "gated_mlp": True, **copy.deepcopy(dict(values))}
    known = {*inspect.signature(TransformerBridgeConfig).parameters, *_parent_fields()} - {"kwargs"}
    require_fields("TransformerBridgeConfig", values, known, _REQUIRED)
    require_values({**values, "bilinear_bias": bilinear_bias})
    if values["act_fn"] not in (None, IDENTITY, "linear"):
        raise ValueError(
            f"act_fn={values['act_fn']!r}: a bilinear MLP has no element-wise nonlinearity (leave "
            "act_fn out)"
        )
    if not values["gated_mlp"]:
        raise ValueError("gated_mlp=False: a bilinear MLP is gated (leave gated_mlp out)")
    return _native(TransformerBridgeConfig(**values), bilinear_bias)


_REQUIRED = ("n_layers", "d_model", "d_head", "n_ctx", "d_vocab")


def _parent_fields() -> set[str]:
    return {
        field.name
        for cls in TransformerBridgeConfig.__mro__
        if dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
    }


def _native(cfg: Any, bilinear_bias: bool) -> Any:
    """The config with our fields added, in place. Raises ValueError for another kind of model."""
    if cfg.architecture not in (None, ARCHITECTURE, NATIVE):
        raise ValueError(
            f"architecture={cfg.architecture!r}: only a native model is made from a config (leave "
            "architecture out)"
        )
    if cfg.num_experts:
        raise ValueError(f"num_experts={cfg.num_experts}: mixtures of experts are not bilinear")
    cfg.bilinear_bias = bilinear_bias
    return cfg


def _wrap(
    model: NativeModel,
    cfg: Any,
    *,
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Any:
    model.to(device=cfg.device if device is None else device, dtype=dtype or cfg.dtype)
    # The entry point registers it where the package is installed; this line where it is on the path.
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, BilinearNativeAdapter)
    bridge = build_bridge_from_module(
        model, ARCHITECTURE, tl_config=cfg, tokenizer=tokenizer, model_name=cfg.model_name
    )
    bridge.cfg.architecture = NATIVE  # as boot_native has it; the adapter is chosen by now
    return bridge


def _from_folder(folder: Path, *, tokenizer: Any, **where: Any) -> Any:
    source = Source(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a directory: boot_bilinear takes one that save_pretrained wrote, and "
            "boot_transformers a Hugging Face Llama"
        )
    path = source.require(CONFIG)
    stored = read_json(path)
    if not folders.is_ours(stored):
        raise ValueError(
            f"{path} was not written by save_pretrained (its 'format' should be {folders.FORMAT!r}). A "
            "Hugging Face Llama is booted by TransformerBridge.boot_transformers; a published model "
            "is loaded with HookedBilinearTransformer.from_pretrained (TransformerLens 3.9), whose "
            "result boot_bilinear takes"
        )
    weights = source.require(WEIGHTS)
    fields, tensors = folders.read_fields(path, stored), read_tensors(weights)
    folders.require_weights(weights, tensors, fields)
    folders.require_known(weights, tensors, conversion.names_of(fields))
    return _from_state(
        weights,
        tensors,
        fields,
        tokenizer=stored_tokenizer(source) if tokenizer is None else tokenizer,
        **where,
    )


def _from_state(
    source: Path | str, state: Mapping[str, Tensor], config: Mapping[str, Any], **where: Any
) -> Any:
    """A native bridge with a HookedBilinearTransformer's weights; `source` names them in errors."""
    converted = conversion.to_bridge(state, config)
    bias = config["bilinear_bias"] or any(
        bool(values.any())
        for name, values in converted.items()
        if name.endswith(conversion.MLP_BIASES)
    )
    if not bias:
        converted = {n: t for n, t in converted.items() if not n.endswith(conversion.MLP_BIASES)}
    fields = conversion.bridge_fields(config)
    cfg = _config({**fields, "init_weights": False}, bias)
    if where["device"] is None:
        where["device"] = config.get("device")
    with torch.random.fork_rng(devices=[]):  # its initial weights are replaced
        model = native_model(cfg)
    bridge = _wrap(model, cfg, **where)
    bridge.cfg.init_weights = True  # what TransformerLens's own loaders leave there
    expected = bridge.state_dict()
    require_shapes(source, converted, {name: values.shape for name, values in expected.items()})
    bridge.load_state_dict(converted)
    return bridge


def _from_llama(
    llama: Any, *, tokenizer: Any, device: str | torch.device | None, dtype: torch.dtype | None
) -> Any:
    if not _is_linear(llama.config.hidden_act):
        raise ValueError(gated_through("this Llama", llama.config.hidden_act))
    llama.to(device=device, dtype=dtype)
    llama.set_attn_implementation("eager")  # the others do not show attention patterns to hooks
    return build_bridge_from_module(
        llama,
        LLAMA,
        hf_config=llama.config,
        tokenizer=tokenizer,
        model_name=llama.config.name_or_path or "llama",
    )


def _is_linear(activation: Any) -> bool:
    return activation in (IDENTITY, "linear")


def llama_adapter(stock: Callable[[Any], Any], cfg: Any) -> Any:
    """The adapter of a Llama: ours where its gate is linear, else the one that TransformerLens has."""
    return BilinearLlamaAdapter(cfg) if _is_linear(cfg.act_fn) else stock(cfg)


# ---------------------------------------------------------------------- back


def save_bridge(bridge: Any, directory: str | PathLike[str]) -> None:
    """Save a bilinear bridge as `HookedBilinearTransformer.save_pretrained` does, on either version.

    `HookedBilinearTransformer.from_pretrained` loads it on TransformerLens 3.9, with the same logits,
    and `TransformerBridge.boot_bilinear` on 3.9 and 4. Weights are saved as they are now, processed or
    not, with half-rotated rotary embeddings. The directory appears whole or not at all, and replaces a
    model saved there before.

    Raises TypeError for anything but a bridge, ValueError for one that is not bilinear or has a rotary
    embedding that the format does not hold, FileExistsError for a directory that holds anything else.
    """
    if not isinstance(bridge, TransformerBridge):
        raise TypeError(
            f"save_bridge takes a TransformerBridge, not {type(bridge).__module__}."
            f"{type(bridge).__qualname__}; a HookedBilinearTransformer has save_pretrained"
        )
    if not isinstance(bridge.adapter, _BilinearAdapter):
        raise ValueError(
            f"the bridge is not bilinear: its adapter is a {type(bridge.adapter).__name__}. Boot it "
            "with TransformerBridge.boot_bilinear, or a Llama with hidden_act='linear' after "
            "`import tl_bilinear`"
        )
    config = conversion.hooked_fields(bridge.cfg)
    is_llama = isinstance(bridge.adapter, BilinearLlamaAdapter)
    if is_llama:
        config |= _llama_rotary(bridge.original_model.config)
    elif getattr(bridge.cfg, "rope_scaling", None):
        raise ValueError(f"rope_scaling={bridge.cfg.rope_scaling!r} cannot be saved")
    state = bridge.state_dict()
    config["bilinear_bias"] = any(name.endswith(conversion.MLP_BIASES) for name in state)
    converted = conversion.from_bridge(state, config, adjacent_pairs=not is_llama)
    folders.write(directory, config, converted, bridge.tokenizer)


def _llama_rotary(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1:
        raise ValueError(
            f"rope_parameters={rope!r} cannot be saved: only the default rotary embedding can. Hugging "
            "Face's save_pretrained keeps the others"
        )
    return {"rotary_base": rope["rope_theta"]}
