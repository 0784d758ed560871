"""Linear algebra on factored bilinear tensors; knows no framework but torch."""

from tl_bilinear.tensor.bilinear import BilinearParts, BilinearTensor
from tl_bilinear.tensor.eigen import Eigendecomposition, EigenProjector
from tl_bilinear.tensor.hosvd import HOSVD, Tucker
from tl_bilinear.tensor.interaction import InteractionMatrix, TopInteractions
from tl_bilinear.tensor.readers import register_mlp_reader, register_model_reader

__all__ = [
    "HOSVD",
    "BilinearParts",
    "BilinearTensor",
    "EigenProjector",
    "Eigendecomposition",
    "InteractionMatrix",
    "TopInteractions",
    "Tucker",
    "register_mlp_reader",
    "register_model_reader",
]
