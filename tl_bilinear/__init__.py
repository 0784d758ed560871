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

from tl_bilinear import models as models
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
    approximate,
    cp,
    functional_inner,
    functional_similarity,
    hosvd,
    match_eigenvectors,
    pairwise_similarity,
    reexpress,
    register_gated_reader,
    register_mlp_reader,
    register_model_reader,
    spectrum,
    tucker,
)

if TYPE_CHECKING:
    from tl_bilinear import circuits as circuits
    from tl_bilinear import demo as demo
    from tl_bilinear import features as features
    from tl_bilinear import hooks as hooks
    from tl_bilinear import plots as plots
    from tl_bilinear import recipes as recipes
    from tl_bilinear import tensor as tensor
    from tl_bilinear.demo import load_demo_model, load_demo_saes
    from tl_bilinear.features import Dictionary, FeatureInteractions
    from tl_bilinear.models import (
        BilinearMLP,
        BilinearTransformerConfig,
        HookedBilinearTransformer,
        HookedTransformer,
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
    "HookedTransformer",
    "InteractionMatrix",
    "Reexpression",
    "Spectrum",
    "TopInteractions",
    "Tucker",
    "approximate",
    "cp",
    "functional_inner",
    "functional_similarity",
    "hosvd",
    "load_demo_model",
    "load_demo_saes",
    "match_eigenvectors",
    "pairwise_similarity",
    "reexpress",
    "register_gated_reader",
    "register_mlp_reader",
    "register_model_reader",
    "spectrum",
    "tucker",
]

_LAZY = {
    "Dictionary": "tl_bilinear.features",
    "FeatureInteractions": "tl_bilinear.features",
    "BilinearMLP": "tl_bilinear.models",
    "BilinearTransformerConfig": "tl_bilinear.models",
    "HookedBilinearTransformer": "tl_bilinear.models",
    "HookedTransformer": "tl_bilinear.models",
    "load_demo_model": "tl_bilinear.demo",
    "load_demo_saes": "tl_bilinear.demo",
}
_PACKAGES = ("circuits", "demo", "features", "hooks", "models", "plots", "recipes", "tensor")

models.register()
_saelens.register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES})
