"""The config of a new HookedTransformer, made from keyword arguments, a dict or another config."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

from tl_bilinear.models.component import BilinearTransformerConfig
from tl_bilinear.models.fields import require_fields


def asks_for_bilinear(cfg: Any) -> bool:
    """Whether a config, or a dict of its fields, is that of a bilinear model."""
    if isinstance(cfg, Mapping):
        return bool(cfg.get("bilinear", False))
    return isinstance(cfg, BilinearTransformerConfig)


def make_config(
    cfg: HookedTransformerConfig | Mapping[str, Any] | None,
    overrides: Mapping[str, Any],
    *,
    bilinear: bool,
) -> Any:
    """A new config from `cfg` and `overrides`; neither is changed."""
    wanted: type = BilinearTransformerConfig if bilinear else HookedTransformerConfig
    if cfg is None:
        values: dict[str, Any] = {}
    elif isinstance(cfg, Mapping):
        values = dict(cfg)
    elif isinstance(cfg, HookedTransformerConfig):
        if issubclass(type(cfg), wanted):
            wanted = type(cfg)
        values = _fields_of(cfg, overrides)
        if bilinear and not isinstance(cfg, BilinearTransformerConfig):
            # A config object cannot say whether these were asked for or are the defaults.
            values = {
                name: value
                for name, value in values.items()
                if (name, value) not in (("act_fn", "relu"), ("gated_mlp", False))
            }
    else:
        raise TypeError(
            "cfg must be a HookedTransformerConfig, a BilinearTransformerConfig or a dict, "
            f"not {type(cfg).__module__}.{type(cfg).__qualname__}"
        )
    if not bilinear:
        _refuse_bilinear(cfg, values | dict(overrides))
        values.pop("bilinear", None)
    values = copy.deepcopy(values) | dict(overrides)
    required = [f.name for f in fields(wanted) if f.default is f.default_factory is MISSING]
    known = [f.name for f in fields(wanted)]
    require_fields(wanted.__name__, values, known, sorted(required))
    return wanted(**values)


def _refuse_bilinear(cfg: Any, values: Mapping[str, Any]) -> None:
    if isinstance(cfg, BilinearTransformerConfig) or values.get("bilinear", False):
        raise ValueError("bilinear=False contradicts cfg, which asks for a bilinear model.")
    if "bilinear_bias" in values:
        raise ValueError("bilinear_bias is for bilinear models: pass bilinear=True with it.")


def _fields_of(cfg: HookedTransformerConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, without those that it derived from a field about to change.

    A config object fills in n_heads, d_mlp and others when it is made. Kept beside a new d_model
    they would describe the old one.
    """
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    gpt2 = cfg.init_mode == "gpt2"
    derived = {
        "n_heads": (("d_model", "d_head"), cfg.d_model // cfg.d_head),
        "d_mlp": (("d_model",), 4 * cfg.d_model),
        "d_vocab_out": (("d_vocab",), cfg.d_vocab),
        "attn_scale": (("d_head",), math.sqrt(cfg.d_head)),
        "rotary_dim": (("d_head",), cfg.d_head),
        "initializer_range": (
            ("d_model", "init_mode"),
            0.8 / math.sqrt(cfg.d_model) if gpt2 else 1.0,
        ),
    }
    for name, (sources, value) in derived.items():
        if any(source in overrides for source in sources) and values[name] == value:
            del values[name]
    return values
