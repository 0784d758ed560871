"""Where factored tensors come from: bilinear layers inside models.

Importing this package loads no framework: each name is loaded at first use. HookedTransformers need
TransformerLens 3.9 or a later 3.x, bridges work with 4 too. Where it is missing, the name raises an
ImportError that says what to install, and everything in `tl_bilinear.tensor` still works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_bilinear.models.attention_scales import AttentionScales, compare_attention_scales
    from tl_bilinear.models.bridge import BilinearMLPBridge, save_bridge
    from tl_bilinear.models.component import BilinearMLP, BilinearTransformerConfig
    from tl_bilinear.models.registration import HookedTransformer
    from tl_bilinear.models.tensor_transformer import TensorTransformer
    from tl_bilinear.models.transformer import (
        HookedBilinearSAETransformer,
        HookedBilinearTransformer,
        bilinear_class,
    )

__all__ = [
    "AttentionScales",
    "BilinearMLP",
    "BilinearMLPBridge",
    "BilinearTransformerConfig",
    "HookedBilinearSAETransformer",
    "HookedBilinearTransformer",
    "HookedTransformer",
    "TensorTransformer",
    "bilinear_class",
    "compare_attention_scales",
    "register",
    "save_bridge",
]

_LAZY = {
    "AttentionScales": "tl_bilinear.models.attention_scales",
    "BilinearMLP": "tl_bilinear.models.component",
    "BilinearMLPBridge": "tl_bilinear.models.bridge",
    "BilinearTransformerConfig": "tl_bilinear.models.component",
    "HookedBilinearSAETransformer": "tl_bilinear.models.transformer",
    "HookedBilinearTransformer": "tl_bilinear.models.transformer",
    "HookedTransformer": "transformer_lens.HookedTransformer",
    "TensorTransformer": "tl_bilinear.models.tensor_transformer",
    "bilinear_class": "tl_bilinear.models.transformer",
    "compare_attention_scales": "tl_bilinear.models.attention_scales",
    "save_bridge": "tl_bilinear.models.bridge",
}


def register() -> None:
    """Register the readers of `BilinearTensor.from_model`, and what TransformerLens learns from us.

    Importing `tl_bilinear` calls it; calling it again changes nothing.
    """
    from tl_bilinear.models import readers, registration

    readers.register()
    registration.register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ImportError as error:
        from tl_bilinear.models.registration import explain_missing

        explained = explain_missing(name, error)
        if explained is None:
            raise
        raise explained from error


def __dir__() -> list[str]:
    return sorted(__all__)
