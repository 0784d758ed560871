"""Linear algebra on factored bilinear tensors; knows no framework but torch.

Values (a bilinear tensor, an interaction matrix, an eigendecomposition) know their own algebra. A method
is a function of values, one file each: `hosvd`, `tucker`, `cp`, `reexpress`, `spectrum`, `approximate`,
`functional_similarity`, `match_eigenvectors`.
"""

from tl_bilinear.tensor.baselines import ShapleyValues, shapley
from tl_bilinear.tensor.bilinear import BilinearParts, BilinearTensor
from tl_bilinear.tensor.compare import (
    EigenvectorMatch,
    functional_inner,
    functional_similarity,
    match_eigenvectors,
    pairwise_similarity,
)
from tl_bilinear.tensor.cp import CP, cp
from tl_bilinear.tensor.eigendecomposition import Eigendecomposition, EigenProjector
from tl_bilinear.tensor.fidelity import Fidelity, Massive
from tl_bilinear.tensor.gated import Approximation, GatedLayer, approximate, approximation_note
from tl_bilinear.tensor.hosvd import HOSVD, Tucker, hosvd, tucker
from tl_bilinear.tensor.interaction import InteractionMatrix, TopInteractions
from tl_bilinear.tensor.moments import InputMoments, Metric
from tl_bilinear.tensor.odt import ODT, odt
from tl_bilinear.tensor.product_head import ProductHead, ProductTerms
from tl_bilinear.tensor.quartic import QuarticDirections, QuarticForm, with_residual
from tl_bilinear.tensor.reexpress import Reexpression, reexpress
from tl_bilinear.tensor.registry import (
    register_gated_reader,
    register_mlp_reader,
    register_model_reader,
)
from tl_bilinear.tensor.spectrum import Spectrum, spectrum
from tl_bilinear.tensor.stack import BilinearStack

__all__ = [
    "CP",
    "HOSVD",
    "ODT",
    "Approximation",
    "BilinearParts",
    "BilinearStack",
    "BilinearTensor",
    "EigenProjector",
    "Eigendecomposition",
    "EigenvectorMatch",
    "Fidelity",
    "GatedLayer",
    "InputMoments",
    "InteractionMatrix",
    "Massive",
    "Metric",
    "ProductHead",
    "ProductTerms",
    "QuarticDirections",
    "QuarticForm",
    "Reexpression",
    "ShapleyValues",
    "Spectrum",
    "TopInteractions",
    "Tucker",
    "approximate",
    "approximation_note",
    "cp",
    "functional_inner",
    "functional_similarity",
    "hosvd",
    "match_eigenvectors",
    "odt",
    "pairwise_similarity",
    "reexpress",
    "register_gated_reader",
    "register_mlp_reader",
    "register_model_reader",
    "shapley",
    "spectrum",
    "tucker",
    "with_residual",
]
