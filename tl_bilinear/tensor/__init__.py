"""Linear algebra on factored bilinear tensors; knows no framework but torch."""

from tl_bilinear.tensor.bilinear import BilinearParts, BilinearTensor
from tl_bilinear.tensor.compare import (
    EigenvectorMatch,
    functional_inner,
    match_eigenvectors,
    pairwise_similarity,
)
from tl_bilinear.tensor.cp import CP
from tl_bilinear.tensor.eigen import Eigendecomposition, EigenProjector
from tl_bilinear.tensor.gated import Approximation, GatedLayer
from tl_bilinear.tensor.hosvd import HOSVD, Tucker
from tl_bilinear.tensor.interaction import InteractionMatrix, TopInteractions
from tl_bilinear.tensor.quartic import QuarticDirections, QuarticForm, with_residual
from tl_bilinear.tensor.readers import (
    register_gated_reader,
    register_mlp_reader,
    register_model_reader,
)
from tl_bilinear.tensor.reexpress import Reexpression
from tl_bilinear.tensor.spectrum import Spectrum

__all__ = [
    "CP",
    "HOSVD",
    "Approximation",
    "BilinearParts",
    "BilinearTensor",
    "EigenProjector",
    "Eigendecomposition",
    "EigenvectorMatch",
    "GatedLayer",
    "InteractionMatrix",
    "QuarticDirections",
    "QuarticForm",
    "Reexpression",
    "Spectrum",
    "TopInteractions",
    "Tucker",
    "functional_inner",
    "match_eigenvectors",
    "pairwise_similarity",
    "register_gated_reader",
    "register_mlp_reader",
    "register_model_reader",
    "with_residual",
]
