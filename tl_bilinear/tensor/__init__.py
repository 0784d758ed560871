"""Linear algebra on factored bilinear tensors; knows no framework but torch.

Values (a bilinear tensor, an interaction matrix, an eigendecomposition) know their own algebra. A method
is a function of values, one file each: `hosvd`, `tucker`, `cp`, `reexpress`, `spectrum`, `approximate`,
`functional_similarity`, `match_eigenvectors`. What can be proved about a classifier is in `robustness`
(exact distances), `margins` (from k eigenpairs), `regions` (over all inputs of a region) and
`certificates` (in a file that an independent checker accepts).
"""

from tl_bilinear.tensor.attacks import Attack, BoxBounds, box_attack, projected_gradient_attack
from tl_bilinear.tensor.baselines import ShapleyValues, shapley
from tl_bilinear.tensor.bilinear import BilinearParts, BilinearTensor
from tl_bilinear.tensor.certificates import folded, verify_certificate, write_certificate
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
from tl_bilinear.tensor.linf import linf_bound, linf_sdp_bound
from tl_bilinear.tensor.margins import (
    InputMetric,
    MarginSpectrum,
    ProvedAccuracy,
    euclidean_metric,
    margin_spectrum,
    moment_metric,
    proved_accuracy,
    proving_metric,
)
from tl_bilinear.tensor.moments import InputMoments, Metric
from tl_bilinear.tensor.odt import ODT, odt
from tl_bilinear.tensor.pair_matrix import SVD, PairMatrix, TopPairs
from tl_bilinear.tensor.product_head import ProductHead, ProductTerms
from tl_bilinear.tensor.quadratic import QuadraticForm
from tl_bilinear.tensor.quartic import QuarticDirections, QuarticForm, with_residual
from tl_bilinear.tensor.reexpress import Reexpression, reexpress
from tl_bilinear.tensor.regions import (
    ChangeBounds,
    Extremes,
    InputRegion,
    change_bounds,
    extremes,
    truncation_change,
)
from tl_bilinear.tensor.registry import (
    register_gated_reader,
    register_mlp_reader,
    register_model_reader,
)
from tl_bilinear.tensor.robustness import (
    AdversarialDistances,
    CertifiedAccuracy,
    adversarial_distances,
    certified_accuracy,
)
from tl_bilinear.tensor.spectrum import Spectrum, spectrum
from tl_bilinear.tensor.stack import BilinearStack
from tl_bilinear.tensor.two_input import TwoInputForm, TwoInputParts

__all__ = [
    "CP",
    "HOSVD",
    "ODT",
    "SVD",
    "AdversarialDistances",
    "Approximation",
    "Attack",
    "BilinearParts",
    "BilinearStack",
    "BilinearTensor",
    "BoxBounds",
    "CertifiedAccuracy",
    "ChangeBounds",
    "EigenProjector",
    "Eigendecomposition",
    "EigenvectorMatch",
    "Extremes",
    "Fidelity",
    "GatedLayer",
    "InputMetric",
    "InputMoments",
    "InputRegion",
    "InteractionMatrix",
    "MarginSpectrum",
    "Massive",
    "Metric",
    "PairMatrix",
    "ProductHead",
    "ProductTerms",
    "ProvedAccuracy",
    "QuadraticForm",
    "QuarticDirections",
    "QuarticForm",
    "Reexpression",
    "ShapleyValues",
    "Spectrum",
    "TopInteractions",
    "TopPairs",
    "Tucker",
    "TwoInputForm",
    "TwoInputParts",
    "adversarial_distances",
    "approximate",
    "approximation_note",
    "box_attack",
    "certified_accuracy",
    "change_bounds",
    "cp",
    "euclidean_metric",
    "extremes",
    "folded",
    "functional_inner",
    "functional_similarity",
    "hosvd",
    "linf_bound",
    "linf_sdp_bound",
    "margin_spectrum",
    "match_eigenvectors",
    "moment_metric",
    "odt",
    "pairwise_similarity",
    "projected_gradient_attack",
    "proved_accuracy",
    "proving_metric",
    "reexpress",
    "register_gated_reader",
    "register_mlp_reader",
    "register_model_reader",
    "shapley",
    "spectrum",
    "truncation_change",
    "tucker",
    "verify_certificate",
    "with_residual",
    "write_certificate",
]
