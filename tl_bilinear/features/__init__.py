"""A bilinear layer seen through dictionaries: SAELens SAEs and transcoders, or plain matrices.

Nothing here imports SAELens: an SAE is an object that somebody loaded with it.
"""

from tl_bilinear.features.activity import (
    ActivationScatter,
    ActiveInteractions,
    Examples,
    LowRankCorrelation,
    PromotedTokens,
)
from tl_bilinear.features.attribution import Attribution
from tl_bilinear.features.dictionary import Dictionary, Reading
from tl_bilinear.features.interactions import FeatureInteractions
from tl_bilinear.features.passage import Passage
from tl_bilinear.features.results import (
    EigenGeometry,
    FeatureSweep,
    InteractionStatistics,
    Submatrix,
)
from tl_bilinear.features.verification import PairCheck

__all__ = [
    "ActivationScatter",
    "ActiveInteractions",
    "Attribution",
    "Dictionary",
    "EigenGeometry",
    "Examples",
    "FeatureInteractions",
    "FeatureSweep",
    "InteractionStatistics",
    "LowRankCorrelation",
    "PairCheck",
    "Passage",
    "PromotedTokens",
    "Reading",
    "Submatrix",
]
