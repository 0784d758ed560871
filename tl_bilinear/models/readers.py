"""How `BilinearTensor.from_model` and `from_mlp` read models of TransformerLens and plain modules.

Plain modules are recognised by the names of their maps:

- ``left``, ``right``, ``out``
- ``gate_proj``, ``up_proj``, ``down_proj`` (Hugging Face's Llama with ``hidden_act="linear"``; the
  whole model is read by `from_model`)
- ``gate_up_proj``, ``down_proj``, the first two in one matrix (Phi-3 and others)
- ``W_gate``, ``W_in``, ``W_out``, tensors in TransformerLens's layout, with ``b_gate``, ``b_in``,
  ``b_out`` where there are biases

and under any other names by ``from_mlp(module, maps=...)``. A torch.nn.Bilinear is recognised by its
class. Names do not say what a forward does, so a plain module and what was read from it are compared on
a few random inputs.

Gated MLPs with an activation are read for `approximate`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tl_bilinear.models.modules import (
    ACTIVATION_NAMES,
    copied,
    copied_bias,
    is_a,
    is_identity,
    require_same_forward,
    runs_as,
    transposed,
)
from tl_bilinear.models.spaces import is_hooked, layer_spaces, llama_spaces, require_layer
from tl_bilinear.tensor import (
    BilinearTensor,
    GatedLayer,
    register_gated_reader,
    register_mlp_reader,
    register_model_reader,
)
from tl_bilinear.tensor.registry import NamedMaps, read_gated, read_mlp

Spaces = tuple[str | None, str | None]

_BY_HAND = "build BilinearTensor(left, right, out, ...) from the weights that make the layer"
_GATED = (
    "A gated layer is read through the bilinear one nearest to it, approximate_llama(model, tokens)"
)
_LLAMA_MAPS = ("gate_proj", "up_proj", "down_proj")

_registered = False


def register() -> None:
    """Register the readers below. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    # The last registered is asked first: a class that we know goes before names that it may share.
    register_mlp_reader("maps", read_named_maps)
    register_mlp_reader("torch.nn.Bilinear", read_torch_bilinear)
    register_mlp_reader("W_gate/W_in/W_out", read_tl_layout)
    register_mlp_reader("gate_up_proj/down_proj", read_fused_gate_up)
    register_mlp_reader("gate_proj/up_proj/down_proj", read_gate_up_down)
    register_mlp_reader("left/right/out", read_left_right_out)
    register_mlp_reader("transformer-lens", read_tl_mlp)
    register_model_reader("transformer-lens", read_transformer)
    register_model_reader("hugging-face-llama", read_llama)
    register_gated_reader("gate_proj/up_proj/down_proj", read_gated_projections)
    register_gated_reader("gate_up_proj/down_proj", read_gated_fused)
    register_gated_reader("transformer-lens", read_gated_tl)
    register_gated_reader("transformer-bridge", read_gated_bridge)


# ---------------------------------------------------------------------- TransformerLens


def read_transformer(model: Any, layer: int | None) -> BilinearTensor | None:
    """A layer of a HookedTransformer or a TransformerBridge (any subclass); None for another model."""
    if not is_hooked(model):
        return None
    index = require_layer(layer, len(model.blocks))
    block, name = model.blocks[index], f"blocks.{index}"
    if not hasattr(block, "mlp"):
        raise ValueError(f"{name} has no MLP: the model is attention only (attn_only=True)")
    spaces = layer_spaces(model, index) or (None, None)
    tensor = _read_if_tl(block.mlp, f"{name}.mlp", spaces)
    return _in_spaces(read_mlp(block.mlp), spaces) if tensor is None else tensor


def read_tl_mlp(module: Any) -> BilinearTensor | None:
    """The MLP of a HookedTransformer or of a TransformerBridge, if it has no nonlinearity."""
    # TransformerLens names the modules of a model when it sets up its hooks.
    return _read_if_tl(module, getattr(module, "name", None) or "this MLP", (None, None))


def _read_if_tl(mlp: Any, name: str, spaces: Spaces) -> BilinearTensor | None:
    if is_a(mlp, "transformer_lens", "CanBeUsedAsMLP"):
        factors = _factors_of_hooked(mlp, name)
    elif is_a(mlp, "transformer_lens", "GeneralizedComponent"):
        factors = _factors_of_bridge(mlp, name)
    else:
        return None
    return BilinearTensor(*factors, input_space=spaces[0], output_space=spaces[1])


def _factors_of_hooked(mlp: Any, name: str) -> list[Any]:
    """left, right, out and their biases, of a HookedTransformer's MLP."""
    if runs_as(mlp, "tl_bilinear", "BilinearMLP"):
        biases = [copied_bias(getattr(mlp, b)) for b in ("b_gate", "b_in", "b_out")]
    elif runs_as(mlp, "transformer_lens", "GatedMLP") and is_identity(mlp.act_fn):
        biases = [None, None, copied_bias(_bias_after_product(mlp))]
    else:
        raise ValueError(_not_bilinear(mlp, name))
    return [transposed(getattr(mlp, w)) for w in ("W_gate", "W_in", "W_out")] + biases


def _bias_after_product(mlp: Any) -> Tensor:
    """b_out of TransformerLens's GatedMLP with its b_in, which is added after the product."""
    bias: Tensor = mlp.b_out.detach() + mlp.b_in.detach() @ mlp.W_out.detach()
    return bias


def _factors_of_bridge(mlp: Any, name: str) -> list[Any]:
    if not runs_as(mlp, "tl_bilinear", "BilinearMLPBridge"):
        _require_linear_bridge(mlp, name)
    maps = [getattr(mlp, part) for part in ("gate", "in", "out")]
    return [copied(one.weight) for one in maps] + [copied_bias(one.bias) for one in maps]


def _require_linear_bridge(mlp: Any, name: str) -> None:
    """Raise ValueError unless TransformerLens's own gated bridge runs a bilinear MLP as it is."""
    kind = type(mlp).__name__
    wrapped = getattr(mlp, "original_component", None)
    activation = getattr(wrapped, "act_fn", None)
    if not runs_as(mlp, "transformer_lens", "GatedMLPBridge") or activation is None:
        found = f"it is a {kind} around a {type(wrapped).__name__}"
    elif not is_identity(activation):
        found = f"its gate goes through {type(activation).__name__}"
    elif getattr(mlp, "_use_processed_weights", False):
        found = (
            "TransformerLens puts SiLU on its gate in compatibility mode. Import tl_bilinear before "
            "the bridge is booted, and it does not"
        )
    else:
        return
    raise ValueError(
        f"{name} is not bilinear: {found}. Expected a BilinearMLPBridge, as "
        "TransformerBridge.boot_bilinear makes it, or the bridge of a Llama with hidden_act='linear'. "
        f"{_GATED}"
    )


def _not_bilinear(mlp: Any, name: str) -> str:
    cfg, kind = mlp.cfg, type(mlp).__name__
    if cfg.num_experts:
        return (
            f"{name} is not bilinear: it is a mixture of experts ({kind}, {cfg.num_experts} experts, "
            f"act_fn={cfg.act_fn!r}). Read one expert with BilinearTensor.from_mlp if it is bilinear"
        )
    if is_a(mlp, "tl_bilinear", "BilinearMLP"):
        return (
            f"{name} may not be bilinear: it is a {kind}, a subclass of BilinearMLP with a forward of "
            "its own. Add a reader for it with register_mlp_reader"
        )
    return (
        f"{name} is not bilinear: it is a {kind} with act_fn={cfg.act_fn!r}. Expected a BilinearMLP "
        "(HookedTransformer.from_config(bilinear=True, ...)) or a GatedMLP with an identity activation. "
        f"{_GATED}"
    )


# ---------------------------------------------------------------------- Hugging Face


def read_llama(model: Any, layer: int | None) -> BilinearTensor | None:
    """A layer of a Hugging Face Llama with ``hidden_act="linear"``; None for another kind of model.

    As it stands in the model, behind the norm and its weight. The spaces have TransformerLens's names,
    those of `HookedBilinearTransformer.from_hf`.
    """
    if not is_a(model, "transformers", "LlamaPreTrainedModel"):
        return None
    layers = getattr(model, "model", model).layers
    index = require_layer(layer, len(layers))
    mlp, spaces = layers[index].mlp, llama_spaces(layers[index], index)
    refuse_nonlinear(mlp, f"model.layers.{index}.mlp")
    if runs_as(mlp, "transformers", "LlamaMLP"):
        tensor = _read_plain(mlp, _LLAMA_MAPS, None, spaces=spaces)
        if tensor is not None:
            return tensor
    return _in_spaces(read_mlp(mlp), spaces)


def _in_spaces(tensor: BilinearTensor, spaces: Spaces) -> BilinearTensor:
    """What another reader read from a module, which does not know in which model the module stands."""
    return dataclasses.replace(tensor, input_space=spaces[0], output_space=spaces[1])


def refuse_nonlinear(mlp: Any, name: str) -> None:
    """Raise ValueError for a Hugging Face MLP with an activation on its gate."""
    if not is_identity(mlp.act_fn):
        raise ValueError(gated_through(name, type(mlp.act_fn).__name__))


def gated_through(name: str, activation: str) -> str:
    """The error for a gated MLP with an activation, with the way to make it bilinear."""
    return (
        f"{name} is not bilinear: its gate goes through {activation}, where a bilinear Llama has "
        f"hidden_act='linear'. {_GATED}; `tl-bilinear finetune` anneals the activation away (Pearce et "
        "al. 2025, appendix H)"
    )


# ---------------------------------------------------------------------- plain modules


def read_left_right_out(module: Any) -> BilinearTensor | None:
    """Linear maps left, right, out; or tensors of those names in BilinearTensor's layout."""
    return _read_plain(module, ("left", "right", "out"), ("bias_left", "bias_right", "bias_out"))


def read_gate_up_down(module: Any) -> BilinearTensor | None:
    """Linear maps gate_proj, up_proj, down_proj, as in Hugging Face's LlamaMLP."""
    return _read_plain(module, _LLAMA_MAPS, None)


def read_fused_gate_up(module: Any) -> BilinearTensor | None:
    """Linear maps gate_up_proj, whose output is cut into halves, and down_proj, as in Phi3MLP."""
    return _read_plain(module, ("gate_up_proj", "down_proj"), None)


def read_tl_layout(module: Any) -> BilinearTensor | None:
    """Tensors W_gate, W_in [d_in, d_hidden], W_out [d_hidden, d_out] and biases before the product."""
    names, biases = ("W_gate", "W_in", "W_out"), ("b_gate", "b_in", "b_out")
    return _read_plain(module, names, biases, copy=transposed)


def read_torch_bilinear(module: Any) -> BilinearTensor | None:
    """A torch.nn.Bilinear with both inputs the same: ``x^T A[a] x + bias[a]``, A its weight.

    Exact; symmetrising is the only arithmetic on the weights. The hidden neurons are the rows of the
    A[a] (d_out d_in of them) or the pairs of inputs (d_in (d_in + 1) / 2), whichever are fewer.
    """
    if not isinstance(module, nn.Bilinear):
        return None
    weight = module.weight.detach()
    d_out, d_in, other = weight.shape
    if other != d_in:
        raise ValueError(
            f"this {type(module).__name__} has inputs of {d_in} and {other} dimensions: a bilinear "
            "layer multiplies one input with itself"
        )
    eye = torch.eye(d_in, dtype=weight.dtype, device=weight.device)
    if 2 * d_out <= d_in + 1:
        one = torch.eye(d_out, dtype=weight.dtype, device=weight.device)
        left, right = eye.repeat(d_out, 1), copied(weight.reshape(-1, d_in))
        out = one.repeat_interleave(d_in, dim=1)
    else:
        i, j = torch.triu_indices(d_in, d_in, device=weight.device)
        left, right = eye[i], eye[j]
        out = weight[:, i, j] + weight[:, j, i] * (i != j)
    return BilinearTensor(left, right, out, bias_out=copied_bias(module.bias))


def read_named_maps(value: Any) -> BilinearTensor | None:
    """Maps or matrices that the caller has named: left, right and out, or both in one and out."""
    if not isinstance(value, NamedMaps):
        return None
    module, maps = value.module, value.maps
    if isinstance(maps, str) or len(maps) not in (2, 3):
        raise ValueError(
            "maps are three names (left, right, out), or two where one matrix holds left and right, "
            f"got {maps!r}"
        )
    tensor = _read_plain(module, tuple(maps), ())
    if tensor is not None:
        return tensor
    linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    linear += [n for n, one in module.named_parameters() if n.rpartition(".")[0] not in linear]
    missing = ", ".join(repr(name) for name in maps if name not in linear)
    raise ValueError(
        f"this {type(module).__name__} has no linear map {missing}; it has "
        f"{', '.join(linear) or 'none'}; name three of them, or {_BY_HAND}"
    )


def _read_plain(
    module: Any,
    map_names: tuple[str, ...],
    bias_names: tuple[str, ...] | None,
    *,
    copy: Any = copied,
    spaces: Spaces = (None, None),
) -> BilinearTensor | None:
    """The layer whose linear maps have these names; None for a module without them.

    Where `bias_names` are given, the maps may also be bare tensors, which `copy` copies.
    """
    maps: list[Any] = [_find(module, name) for name in map_names]
    if all(isinstance(one, nn.Linear) for one in maps):
        factors = [copied(one.weight) for one in maps]
        biases = [None if one.bias is None else copied(one.bias) for one in maps]
    elif all(isinstance(one, Tensor) for one in maps) and bias_names is not None:
        factors = [copy(one) for one in maps]
        named = bias_names or ("",) * 3  # matrices without maps bring no biases
        biases = [copied_bias(getattr(module, name, None)) for name in named]
    else:
        return None
    if len(factors) == 2:
        factors = [*_halves(factors[0], map_names[0]), factors[1]]
        bias = biases[0]
        biases = [*((None, None) if bias is None else bias.chunk(2)), biases[1]]
    _refuse_activation(module)
    tensor = BilinearTensor(*factors, *biases, input_space=spaces[0], output_space=spaces[1])
    require_same_forward(module, tensor, factors[0], kind="a bilinear layer", remedy=_BY_HAND)
    return tensor


def _find(module: Any, name: str) -> Any:
    """An attribute, or one of a submodule: "mlp.w1"."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _halves(fused: Tensor, name: str) -> tuple[Tensor, ...]:
    if fused.shape[0] % 2:
        raise ValueError(f"{name} has {fused.shape[0]} rows: left and right take half of them each")
    return fused.chunk(2)


def _refuse_activation(module: Any) -> None:
    for name in ACTIVATION_NAMES:
        activation = getattr(module, name, None)
        if activation is not None and not is_identity(activation):
            shown = getattr(activation, "__name__", None) or str(activation)
            raise ValueError(
                f"this {type(module).__name__} is not bilinear: its {name} is {shown}, "
                "where a bilinear layer has the identity"
            )


# ---------------------------------------------------------------------- gated MLPs, not bilinear


def read_gated_projections(module: Any) -> GatedLayer | None:
    """Linear maps gate_proj, up_proj and down_proj with an activation on the gate (Llama, Gemma ...)."""
    maps = [getattr(module, name, None) for name in _LLAMA_MAPS]
    if not all(map(_is_linear, maps)):
        return None
    return _compared(module, _gated_of(module, *maps))


def read_gated_fused(module: Any) -> GatedLayer | None:
    """gate_up_proj, the gate's rows first, and down_proj, with an activation on the gate (Phi-3)."""
    maps: list[Any] = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(map(_is_linear, maps)):
        return None
    fused, down = maps
    gate, up = _halves(copied(fused.weight), "gate_up_proj")
    bias_gate, bias_up = (
        (None, None) if fused.bias is None else _halves(copied(fused.bias), "gate_up_proj")
    )
    bias_out = None if down.bias is None else copied(down.bias)
    activation = _activation(module)
    return _compared(
        module,
        GatedLayer(gate, up, copied(down.weight), activation, bias_gate, bias_up, bias_out),
    )


def read_gated_bridge(module: Any) -> GatedLayer | None:
    """The gated MLP of a TransformerBridge, raw or with processed weights."""
    if not is_a(module, "transformer_lens", "GatedMLPBridge"):
        return None
    if not getattr(module, "_use_processed_weights", False):
        return read_gated(module.original_component)
    parts = ("gate", "in", "out")
    gate, up, out = (copied(getattr(module, f"_processed_W_{part}")) for part in parts)
    given = (getattr(module, f"_processed_b_{part}") for part in parts)
    biases = (None if one is None else copied(one) for one in given)
    activation = _activation(module.original_component)
    return _compared(module, GatedLayer(gate, up, out, activation, *biases))


def _is_linear(module: Any) -> bool:
    """Whether a module is a linear map, TransformerLens's wrapper of one included."""
    return isinstance(module, nn.Linear) or is_a(module, "transformer_lens", "LinearBridge")


def _activation(module: Any) -> Any:
    found = (getattr(module, name, None) for name in ACTIVATION_NAMES)
    activation = next((one for one in found if callable(one)), None)
    if activation is None:
        raise ValueError(
            f"this {type(module).__name__} has the maps of a gated MLP, but no activation "
            f"under {', '.join(ACTIVATION_NAMES)}: build GatedLayer(gate, up, out, activation)"
        )
    return activation


def _gated_of(module: Any, *maps: Any) -> GatedLayer:
    gate, up, out = (copied(one.weight) for one in maps)
    biases = (None if one.bias is None else copied(one.bias) for one in maps)
    return GatedLayer(gate, up, out, _activation(module), *biases)


def read_gated_tl(module: Any) -> GatedLayer | None:
    """TransformerLens's GatedMLP, whose b_in is added after the product."""
    if not is_a(module, "transformer_lens", "GatedMLP"):
        return None
    gate, up, out = (transposed(getattr(module, name)) for name in ("W_gate", "W_in", "W_out"))
    bias = _bias_after_product(module)
    return _compared(module, GatedLayer(gate, up, out, module.act_fn, bias_out=bias))


def _compared(module: Any, layer: GatedLayer) -> GatedLayer:
    remedy = "build GatedLayer(gate, up, out, activation) from the weights that make the layer"
    require_same_forward(module, layer, layer.gate, kind="a gated MLP", remedy=remedy)
    return layer
