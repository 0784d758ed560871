"""Bilinear MLPs and weight-based interpretability for TransformerLens and SAELens.

The whole public API. Data flows one way:

    weights -> BilinearTensor -> fold / project -> InteractionMatrix -> Eigendecomposition -> plot

Importing this package gives TransformerLens's class ``HookedTransformer.from_config(bilinear=True)`` and
SAELens the SAEs that the paper's authors published. It imports neither of them, nor torch: every name is
loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from tl_bilinear.models import registration

if TYPE_CHECKING:
    from tl_bilinear import circuits as circuits
    from tl_bilinear import demo as demo
    from tl_bilinear import explorer as explorer
    from tl_bilinear import features as features
    from tl_bilinear import hooks as hooks
    from tl_bilinear import models as models
    from tl_bilinear import paper as paper
    from tl_bilinear import plots as plots
    from tl_bilinear import recipes as recipes
    from tl_bilinear import tensor as tensor
    from tl_bilinear.demo import load_demo_model, load_demo_saes
    from tl_bilinear.explorer import explore
    from tl_bilinear.features import Dictionary, FeatureInteractions, register_dictionary
    from tl_bilinear.models import (
        BilinearMLP,
        BilinearTransformerConfig,
        HookedBilinearTransformer,
        HookedTransformer,
    )
    from tl_bilinear.tensor import (
        Approximation,
        BilinearParts,
        BilinearTensor,
        Eigendecomposition,
        EigenProjector,
        EigenvectorMatch,
        GatedLayer,
        InputMoments,
        InteractionMatrix,
        TopInteractions,
        adversarial_distances,
        approximate,
        certified_accuracy,
        functional_inner,
        functional_similarity,
        match_eigenvectors,
        pairwise_similarity,
        register_gated_reader,
        register_mlp_reader,
        register_model_reader,
    )
    from tl_bilinear.tensor.cp import CP, cp
    from tl_bilinear.tensor.hosvd import HOSVD, Tucker, hosvd, tucker
    from tl_bilinear.tensor.reexpress import Reexpression, reexpress
    from tl_bilinear.tensor.spectrum import Spectrum, spectrum

__version__ = "0.2.0"

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
    "InputMoments",
    "InteractionMatrix",
    "Reexpression",
    "Spectrum",
    "TopInteractions",
    "Tucker",
    "adversarial_distances",
    "approximate",
    "certified_accuracy",
    "cp",
    "explore",
    "functional_inner",
    "functional_similarity",
    "hosvd",
    "load_demo_model",
    "load_demo_saes",
    "match_eigenvectors",
    "pairwise_similarity",
    "reexpress",
    "register_dictionary",
    "register_gated_reader",
    "register_mlp_reader",
    "register_model_reader",
    "spectrum",
    "tucker",
]

# Where the names live that are not in `tl_bilinear.tensor`.
_ELSEWHERE = {
    "explore": "explorer",
    "Dictionary": "features",
    "FeatureInteractions": "features",
    "register_dictionary": "features",
    "BilinearMLP": "models",
    "BilinearTransformerConfig": "models",
    "HookedBilinearTransformer": "models",
    "HookedTransformer": "models",
    "load_demo_model": "demo",
    "load_demo_saes": "demo",
}
_PACKAGES = (
    "circuits",
    "demo",
    "explorer",
    "features",
    "hooks",
    "models",
    "paper",
    "plots",
    "recipes",
    "tensor",
)


def _tell_tensors(_: Any) -> None:
    from tl_bilinear import models
    from tl_bilinear.tensor import registry

    registry.when_first_used(models.register)


def _tell_saelens(_: Any) -> None:
    from tl_bilinear.features import saelens

    saelens.register()


registration.register()
wrapt.register_post_import_hook(_tell_tensors, "tl_bilinear.tensor")
wrapt.register_post_import_hook(_tell_saelens, "sae_lens")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        home = _ELSEWHERE.get(name, "tensor")
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
