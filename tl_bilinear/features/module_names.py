"""SAEs that were trained at modules of a Hugging Face model, by the hooks of TransformerLens.

SAELens's runner with ``model_class_name="AutoModelForCausalLM"`` records the outputs of modules, and its
SAEs carry their names:

| module | hook |
| --- | --- |
| ``model.layers.L`` | ``blocks.L.hook_resid_post`` |
| ``model.layers.L.mlp`` | ``blocks.L.hook_mlp_out``; ``mlp.hook_out`` where a norm follows (Gemma 2) |
| ``model.layers.L.self_attn`` | ``blocks.L.hook_attn_out``; ``attn.hook_out`` where a norm follows |
| the norm before the MLP | ``blocks.L.mlp.hook_in``, of a model whose norms keep their weight |
| the norm after the MLP | ``blocks.L.hook_mlp_out`` |

The norm before the MLP is ``post_attention_layernorm``, and ``pre_feedforward_layernorm`` in Gemma 2.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.models.spaces import norm_follows, norm_is_folded

_MODULE = re.compile(r"(?:model\.)?(?:\w+\.)?layers\.(\d+)(?:\.(\w+))?")


def hook_of(model: Any, name: str) -> str:
    """The hook of a model at which the output of a module of Hugging Face stands; another name as it is.

    Raises ValueError for a module whose output no hook of this model has, saying what there is.
    """
    found = _MODULE.fullmatch(name)
    if found is None or name in getattr(model, "hook_dict", {}):
        return name
    layer, part = int(found[1]), found[2]
    if layer >= len(model.blocks):
        raise ValueError(
            f"{name!r} is of layer {layer}: the model's are 0 to {len(model.blocks) - 1}"
        )
    block, apart = f"blocks.{layer}", norm_follows(model, layer)
    hooks = {
        None: "hook_resid_post",
        "mlp": "mlp.hook_out" if apart else "hook_mlp_out",
        "self_attn": "attn.hook_out" if apart else "hook_attn_out",
    }
    if apart:
        hooks["post_feedforward_layernorm"] = "hook_mlp_out"
    before = "pre_feedforward_layernorm" if apart else "post_attention_layernorm"
    if part == before:
        if norm_is_folded(model, layer):
            raise ValueError(
                f"{name!r} is what the norm of layer {layer} writes, its weight included, and this "
                f"model's norm has none: {block}.mlp.hook_in has other coordinates once it is folded. "
                "Take the model as it is loaded, without processing; or, if the norm never had a "
                f"weight, Dictionary.of(sae) with hook='{block}.mlp.hook_in' (dataclasses.replace)"
            )
        hooks[before] = "mlp.hook_in"
    if part not in hooks:
        known = ", ".join(
            f"model.layers.{layer}{f'.{p}' if p else ''} ({block}.{h})" for p, h in hooks.items()
        )
        raise ValueError(
            f"{name!r} is a module of Hugging Face whose output has no hook of its own here; those "
            f"that have: {known}"
        )
    return f"{block}.{hooks[part]}"


def placed(model: Any, dictionary: Dictionary) -> Dictionary:
    """A dictionary with the hooks of this model in place of names of modules."""
    hook, encoder_hook = (
        None if name is None else hook_of(model, name)
        for name in (dictionary.hook, dictionary.encoder_hook)
    )
    if (hook, encoder_hook) == (dictionary.hook, dictionary.encoder_hook):
        return dictionary
    return replace(dictionary, hook=hook, encoder_hook=encoder_hook)
