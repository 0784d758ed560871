"""Bilinear MLPs and weight-based interpretability for TransformerLens and SAELens.

The whole public API. Data flows one way:

    weights -> BilinearTensor -> fold / project -> InteractionMatrix -> Eigendecomposition -> plot

Importing this package gives TransformerLens's class ``HookedTransformer.from_config(bilinear=True)`` and
SAELens the SAEs that the paper's authors published, and imports neither TransformerLens nor SAELens:
names that need them are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tl_bilinear import models
from tl_bilinear.features import saelens as _saelens
from tl_bilinear.tensor import (
    CP,
    HOSVD,
    Approximation,
    BilinearParts,
    BilinearTensor,
    Eigendecomposition,
    EigenProjector,
    EigenvectorMatch,
    GatedLayer,
    InteractionMatrix,
    Reexpression,
    Spectrum,
    TopInteractions,
    Tucker,
    functional_inner,
    match_eigenvectors,
    pairwise_similarity,
    register_gated_reader,
    register_mlp_reader,
    register_model_reader,
)

if TYPE_CHECKING:
    from tl_bilinear.demo import load_demo_model, load_demo_saes
    from tl_bilinear.features import Dictionary, FeatureInteractions
    from tl_bilinear.models import (
        BilinearMLP,
        BilinearTransformerConfig,
        HookedBilinearTransformer,
    )

__version__ = "0.1.0"

__all__ = [
    "CP",
    "HOSVD",
    "Approximation",
    "BilinearMLP",
    "BilinearParts",
    "BilinearTensor",
    "BilinearTransformerConfig",
    "Dictionary",
    "EigenProjector",
    "Eigendecomposition",
    "EigenvectorMatch",
    "FeatureInteractions",
    "GatedLayer",
    "HookedBilinearTransformer",
    "InteractionMatrix",
    "Reexpression",
    "Spectrum",
    "TopInteractions",
    "Tucker",
    "functional_inner",
    "load_demo_model",
    "load_demo_saes",
    "match_eigenvectors",
    "pairwise_similarity",
    "register_gated_reader",
    "register_mlp_reader",
    "register_model_reader",
]

_LAZY = {
    "Dictionary": "tl_bilinear.features",
    "FeatureInteractions": "tl_bilinear.features",
    "BilinearMLP": "tl_bilinear.models",
    "BilinearTransformerConfig": "tl_bilinear.models",
    "HookedBilinearTransformer": "tl_bilinear.models",
    "load_demo_model": "tl_bilinear.demo",
    "load_demo_saes": "tl_bilinear.demo",
}

models.register()
_saelens.register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
