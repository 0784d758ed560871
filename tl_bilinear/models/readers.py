"""How `BilinearTensor.from_model` and `from_mlp` read TransformerLens models and plain modules.

Nothing here imports a framework: a TransformerLens object exists only where TransformerLens is
loaded already, and is recognised by the names of its classes.

Plain modules are recognised by the names of their maps:

- ``left``, ``right``, ``out``
- ``gate_proj``, ``up_proj``, ``down_proj`` (Hugging Face's Llama with ``hidden_act="linear"``; the
  whole model is read by `from_model`)
- ``gate_up_proj``, ``down_proj``, the first two in one matrix (Phi-3 and others)
- ``W_gate``, ``W_in``, ``W_out``, tensors in TransformerLens's layout, with ``b_gate``, ``b_in``,
  ``b_out`` where there are biases

and under any other names by ``from_mlp(module, maps=...)``; torch.nn.Bilinear by its class. Names do not
say what a forward does, so what was read from a plain module is compared with the module on a few
random inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_bilinear.tensor import BilinearTensor, register_mlp_reader, register_model_reader
from tl_bilinear.tensor.readers import read_mlp, set_maps_reader

_ACTIVATION_NAMES = ("act_fn", "act", "activation", "activation_fn", "nonlinearity")
_IDENTITY_NAMES = ("identity", "linear")

_registered = False


def register() -> None:
    """Register the readers below. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    # The last registered is asked first: a class that we know goes before names that it may share.
    set_maps_reader(read_maps)
    register_mlp_reader("torch.nn.Bilinear", read_torch_bilinear)
    register_mlp_reader("W_gate/W_in/W_out", read_tl_layout)
    register_mlp_reader("gate_up_proj/down_proj", read_fused_gate_up)
    register_mlp_reader("gate_proj/up_proj/down_proj", read_gate_up_down)
    register_mlp_reader("left/right/out", read_left_right_out)
    register_mlp_reader("transformer-lens", read_tl_mlp)
    register_model_reader("transformer-lens", read_transformer)
    register_model_reader("hugging-face-llama", read_llama)


# ---------------------------------------------------------------------- TransformerLens


def read_transformer(model: Any, layer: int | None) -> BilinearTensor | None:
    """A layer of a HookedTransformer or a TransformerBridge (any subclass); None for another model."""
    if not _is_hooked(model):
        return None
    index = require_layer(layer, len(model.blocks))
    block, name = model.blocks[index], f"blocks.{index}"
    if not hasattr(block, "mlp"):
        raise ValueError(f"{name} has no MLP: the model is attention only (attn_only=True)")
    input_space, output_space = _spaces(model.cfg, block, name)
    tensor = _read_if_tl(block.mlp, f"{name}.mlp")
    if tensor is None:  # somebody put their own there
        tensor = read_mlp(block.mlp)
    return dataclasses.replace(tensor, input_space=input_space, output_space=output_space)


def read_tl_mlp(module: Any) -> BilinearTensor | None:
    """The MLP of a HookedTransformer or of a TransformerBridge, if it has no nonlinearity."""
    # TransformerLens names the modules of a model when it sets up its hooks.
    return _read_if_tl(module, getattr(module, "name", None) or "this MLP")


def _read_if_tl(mlp: Any, name: str) -> BilinearTensor | None:
    if _is_a(mlp, "transformer_lens", "CanBeUsedAsMLP"):
        return _read_tl(mlp, name)
    if _is_a(mlp, "transformer_lens", "GeneralizedComponent"):
        return _read_bridge(mlp, name)
    return None


def _is_hooked(model: Any) -> bool:
    classes = ("HookedTransformer", "TransformerBridge")
    return any(_is_a(model, "transformer_lens", name) for name in classes)


def _read_tl(mlp: Any, name: str) -> BilinearTensor:
    if _runs_as(mlp, "tl_bilinear", "BilinearMLP"):
        b_gate, b_in, b_out = (_bias(getattr(mlp, b)) for b in ("b_gate", "b_in", "b_out"))
    elif _runs_as(mlp, "transformer_lens", "GatedMLP") and is_identity(mlp.act_fn):
        b_gate = b_in = None
        # Its b_in is added after the product: a constant b_in W_out at the output.
        b_out = _bias(mlp.b_out.detach() + mlp.b_in.detach() @ mlp.W_out.detach())
    else:
        raise ValueError(_not_bilinear(mlp, name))
    return BilinearTensor(
        _transposed(mlp.W_gate),
        _transposed(mlp.W_in),
        _transposed(mlp.W_out),
        b_gate,
        b_in,
        b_out,
    )


def _read_bridge(mlp: Any, name: str) -> BilinearTensor:
    if not _runs_as(mlp, "tl_bilinear", "BilinearMLPBridge"):
        _require_linear_bridge(mlp, name)
    maps = [getattr(mlp, part) for part in ("gate", "in", "out")]
    weights = [_copy(linear.weight) for linear in maps]
    return BilinearTensor(*weights, *(_bias(linear.bias) for linear in maps))


def _require_linear_bridge(mlp: Any, name: str) -> None:
    """Raise ValueError unless TransformerLens's own gated bridge runs a bilinear MLP as it is."""
    kind = type(mlp).__name__
    wrapped = getattr(mlp, "original_component", None)
    activation = getattr(wrapped, "act_fn", None)
    if not _runs_as(mlp, "transformer_lens", "GatedMLPBridge") or activation is None:
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
        "TransformerBridge.boot_bilinear makes it, or the bridge of a Llama with hidden_act='linear'"
    )


def _not_bilinear(mlp: Any, name: str) -> str:
    cfg, kind = mlp.cfg, type(mlp).__name__
    if cfg.num_experts:
        return (
            f"{name} is not bilinear: it is a mixture of experts ({kind}, {cfg.num_experts} experts, "
            f"act_fn={cfg.act_fn!r}). Read one expert with BilinearTensor.from_mlp if it is bilinear"
        )
    if _is_a(mlp, "tl_bilinear", "BilinearMLP"):
        return (
            f"{name} may not be bilinear: it is a {kind}, a subclass of BilinearMLP with a forward of "
            "its own. Add a reader for it with register_mlp_reader"
        )
    return (
        f"{name} is not bilinear: it is a {kind} with act_fn={cfg.act_fn!r}. Expected a BilinearMLP "
        "(HookedTransformer.from_config(bilinear=True, ...)) or a GatedMLP with an identity activation"
    )


_AFTER = {
    None: "no normalisation",
    "RMS": "after RMSNorm and its weight",
    "RMSPre": "after RMSNorm without a weight",
    "LN": "after LayerNorm, its weight and its bias",
    "LNPre": "after LayerNorm without weight and bias",
}


def layer_spaces(model: Any, layer: int) -> tuple[str, str] | None:
    """`input_space` and `output_space` of `from_model(model, layer)`, without reading a weight.

    None for a model other than a HookedTransformer or a TransformerBridge.
    """
    if not _is_hooked(model):
        return None
    return _spaces(model.cfg, model.blocks[layer], f"blocks.{layer}")


_AFTER = {
    None: "no normalisation",
    "RMS": "after RMSNorm and its weight",
    "RMSPre": "after RMSNorm without a weight",
    "LN": "after LayerNorm, its weight and its bias",
    "LNPre": "after LayerNorm without weight and bias",
}


def _spaces(cfg: Any, block: Any, name: str) -> tuple[str, str]:
    """Where a block's MLP reads and writes, in words that results carry along."""
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    # TransformerLens's own MLP has no hook_in.
    reads = f"{name}.mlp.hook_in" if hasattr(block.mlp, "hook_in") else f"input of {name}.mlp"
    post_norm = cfg.original_architecture in POST_NORM_ARCHITECTURES
    reads += f" (input of the MLP, {_AFTER[None if post_norm else _norm_kind(cfg, block)]})"
    if post_norm or cfg.use_normalization_before_and_after:
        hook = f"{name}.mlp.hook_out" if hasattr(block.mlp, "hook_out") else f"output of {name}.mlp"
        return reads, f"{hook} (before the norm that follows the MLP)"
    return reads, f"{name}.hook_mlp_out"


def _norm_kind(cfg: Any, block: Any) -> str | None:
    """The norm before a block's MLP, as HookedTransformer's `normalization_type` names it."""
    kind: str | None = cfg.normalization_type
    if kind in ("RMS", "LN") and _is_a(block, "transformer_lens", "GeneralizedComponent"):
        # A bridge keeps its normalization_type when the norm is folded, and a weight of ones.
        weight, bias = (getattr(block.ln2, name, None) for name in ("w", "b"))
        if (weight is None or bool((weight == 1).all())) and (bias is None or not bool(bias.any())):
            return f"{kind}Pre"
    return kind


def require_layer(layer: int | None, n_layers: int) -> int:
    valid = f"0 to {n_layers - 1}, or {-n_layers} to -1 from the end"
    if layer is None:
        if n_layers != 1:
            raise ValueError(f"this model has {n_layers} layers: say which one ({valid})")
        return 0
    index = operator.index(layer)
    if not -n_layers <= index < n_layers:
        raise IndexError(f"layer {index} does not exist: the model's layers are {valid}")
    return index % n_layers


# ---------------------------------------------------------------------- Hugging Face


def read_llama(model: Any, layer: int | None) -> BilinearTensor | None:
    """A layer of a Hugging Face Llama with ``hidden_act="linear"``; None for another kind of model.

    As it stands in the model, behind the norm and its weight. The spaces bear TransformerLens's
    names, under which `HookedBilinearTransformer.from_hf` has them.
    """
    if not _is_a(model, "transformers", "LlamaPreTrainedModel"):
        return None
    layers = getattr(model, "model", model).layers
    index = require_layer(layer, len(layers))
    block = layers[index]
    refuse_nonlinear(block.mlp, f"model.layers.{index}.mlp")
    # A weight of ones is none: the model is what from_hf makes of it with the norm folded.
    norm = "RMSPre" if (block.post_attention_layernorm.weight == 1).all() else "RMS"
    return dataclasses.replace(
        read_mlp(block.mlp),
        input_space=f"blocks.{index}.mlp.hook_in (input of the MLP, {_AFTER[norm]})",
        output_space=f"blocks.{index}.hook_mlp_out",
    )


def refuse_nonlinear(mlp: Any, name: str) -> None:
    """Raise ValueError for a Hugging Face MLP with an activation on its gate."""
    if not is_identity(mlp.act_fn):
        raise ValueError(gated_through(name, type(mlp.act_fn).__name__))


def gated_through(name: str, activation: str) -> str:
    """Why a gated MLP is refused, and the way to make it bilinear."""
    return (
        f"{name} is not bilinear: its gate goes through {activation}, where a bilinear Llama has "
        "hidden_act='linear'. `tl-bilinear finetune` anneals the activation away (Pearce et al. "
        "2025, appendix H)"
    )


# ---------------------------------------------------------------------- plain modules


def read_left_right_out(module: Any) -> BilinearTensor | None:
    """Linear maps left, right, out; or tensors of those names in BilinearTensor's layout."""
    return _read_plain(module, ("left", "right", "out"), ("bias_left", "bias_right", "bias_out"))


def read_gate_up_down(module: Any) -> BilinearTensor | None:
    """Linear maps gate_proj, up_proj, down_proj, as in Hugging Face's LlamaMLP."""
    return _read_plain(module, ("gate_proj", "up_proj", "down_proj"), None)


def read_fused_gate_up(module: Any) -> BilinearTensor | None:
    """Linear maps gate_up_proj, whose output is cut into halves, and down_proj, as in Phi3MLP."""
    return _read_plain(module, ("gate_up_proj", "down_proj"), None)


def read_tl_layout(module: Any) -> BilinearTensor | None:
    """Tensors W_gate, W_in [d_in, d_hidden], W_out [d_hidden, d_out] and biases before the product."""
    return _read_plain(
        module, ("W_gate", "W_in", "W_out"), ("b_gate", "b_in", "b_out"), transposed=True
    )


def read_torch_bilinear(module: Any) -> BilinearTensor | None:
    """A torch.nn.Bilinear with both inputs the same: ``x^T A[a] x + bias[a]``, A its weight.

    Exact and without arithmetic on the weights beyond symmetrising them: each row of each A[a] is one
    hidden neuron (d_out d_in of them), or each pair of inputs is one (d_in (d_in + 1) / 2), whichever
    is fewer.
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
        left, right = eye.repeat(d_out, 1), _copy(weight.reshape(-1, d_in))
        out = one.repeat_interleave(d_in, dim=1)
    else:
        rows, columns = torch.triu_indices(d_in, d_in, device=weight.device)
        left, right = eye[rows], eye[columns]
        out = weight[:, rows, columns] + weight[:, columns, rows] * (rows != columns)
    return BilinearTensor(left, right, out, bias_out=_bias(module.bias))


def read_maps(module: Any, maps: Sequence[str]) -> BilinearTensor:
    """Linear maps of these names: left, right and out, or both in one and out. See `from_mlp`."""
    if isinstance(maps, str) or len(maps) not in (2, 3):
        raise ValueError(
            "maps are three names (left, right, out), or two where one matrix holds left and right, "
            f"got {maps!r}"
        )
    tensor = _read_plain(module, tuple(maps), None)
    if tensor is not None:
        return tensor
    linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    missing = ", ".join(repr(name) for name in maps if name not in linear)
    raise ValueError(
        f"this {type(module).__name__} has no linear map {missing}; it has "
        f"{', '.join(linear) or 'none'}; name three of them, or {_BY_HAND}"
    )


def _read_plain(
    module: Any,
    map_names: tuple[str, ...],
    bias_names: tuple[str, str, str] | None,
    *,
    transposed: bool = False,
) -> BilinearTensor | None:
    """Linear maps under these names, or tensors where their biases have names too; None for neither."""
    maps: list[Any] = [_find(module, name) for name in map_names]
    if all(isinstance(one, nn.Linear) for one in maps):
        factors = [_copy(one.weight) for one in maps]
        biases = [None if one.bias is None else _copy(one.bias) for one in maps]
    elif all(isinstance(one, Tensor) for one in maps) and bias_names is not None:
        factors = [(_transposed if transposed else _copy)(one) for one in maps]
        biases = [_bias(getattr(module, name, None)) for name in bias_names]
    else:
        return None
    if len(factors) == 2:
        factors = [*_halves(factors[0], map_names[0]), factors[1]]
        bias = biases[0]
        biases = [*((None, None) if bias is None else bias.chunk(2)), biases[1]]
    _refuse_activation(module)
    tensor = BilinearTensor(*factors, *biases)
    _compare_with_forward(module, tensor, like=factors[0])
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
    for name in _ACTIVATION_NAMES:
        activation = getattr(module, name, None)
        if activation is not None and not is_identity(activation):
            shown = getattr(activation, "__name__", None) or str(activation)
            raise ValueError(
                f"this {type(module).__name__} is not bilinear: its {name} is {shown}, "
                "where a bilinear layer has the identity"
            )


def _compare_with_forward(module: Any, tensor: BilinearTensor, like: Tensor) -> None:
    """Refuse a module whose forward is another function than the tensor read from its weights."""
    if not callable(module) or like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    # Inputs of several lengths: a forward that normalises first would pass at length sqrt(d) alone.
    lengths = torch.linspace(0.5, 4, 8)[:, None]
    x = (lengths * torch.randn(1, 8, tensor.d_in, generator=generator)).to(like)
    kind = type(module).__name__
    try:
        with torch.no_grad(), _evaluating(module):
            given = module(x)
    except NotImplementedError:  # a container without a forward has nothing to compare with
        return
    except Exception as error:
        raise ValueError(
            f"this {kind} has the names of a bilinear layer, but could not be run on an input of "
            f"shape {list(x.shape)} to compare; {_BY_HAND}"
        ) from error
    if not isinstance(given, Tensor):
        raise ValueError(f"this {kind} returns a {type(given).__name__}, not a tensor; {_BY_HAND}")
    expected = tensor(x)
    if given.shape != expected.shape:
        raise ValueError(
            f"this {kind} returns shape {list(given.shape)}, the bilinear layer read from its "
            f"weights {list(expected.shape)}; {_BY_HAND}"
        )
    difference = (given.to(expected) - expected).abs().max().item()
    scale = expected.abs().max().item()
    # Another function differs by its own size; 16-bit and TF32 products by a few per cent at most.
    if not difference <= (0.1 if like.dtype.itemsize < 4 else 0.01) * scale:
        raise ValueError(
            f"this {kind} has the names of a bilinear layer, but its forward computes something "
            f"else: outputs up to {scale:.3g} differ by {difference:.3g}; {_BY_HAND}"
        )


_BY_HAND = "build BilinearTensor(left, right, out, ...) from the weights that make the layer"


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode (no dropout), each submodule put back as it was."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    training = [one.training for one in modules]
    try:
        for one in modules:
            one.training = False
        yield
    finally:
        for one, was in zip(modules, training, strict=True):
            one.training = was


# ---------------------------------------------------------------------- small parts


def _is_a(value: Any, package: str, class_name: str) -> bool:
    """isinstance by name, for classes of a package that may not be importable."""
    return any(
        cls.__name__ == class_name and cls.__module__.partition(".")[0] == package
        for cls in type(value).__mro__
    )


def _runs_as(module: Any, package: str, class_name: str) -> bool:
    """Whether a module is of a class, recognised by name, and has the forward of that class."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner.__name__ == class_name and owner.__module__.partition(".")[0] == package


def is_identity(activation: Any) -> bool:
    """Whether an activation leaves every number as it is, found by trying."""
    if isinstance(activation, str):
        return activation in _IDENTITY_NAMES
    magnitudes = torch.logspace(-4, 4, 65)
    probe = torch.cat([-magnitudes, torch.zeros(1), magnitudes])[None, None]
    try:
        with torch.no_grad():
            return torch.equal(activation(probe), probe)
    except Exception:  # an activation of another signature is in any case not the identity
        return False


def _bias(bias: Tensor | None) -> Tensor | None:
    """A bias as the tensor holds it: zeros that cannot train are no bias."""
    if bias is None or (not isinstance(bias, nn.Parameter) and not bias.any()):
        return None
    return _copy(bias)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.contiguous_format)


def _transposed(weight: Tensor) -> Tensor:
    return weight.detach().T.clone(memory_format=torch.contiguous_format)
