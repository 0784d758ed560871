"""A bilinear layer seen through dictionaries: SAELens SAEs and transcoders, or plain matrices.

Nothing here imports SAELens: an SAE is an object that somebody loaded with it. Only `published_saes`
does, which gives SAELens the SAEs of the paper's authors; it runs once SAELens is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tl_bilinear.features import architectures as _architectures  # noqa: F401  registers SAELens's
from tl_bilinear.features.attribution import Attribution
from tl_bilinear.features.chance import PairChance, SpectrumChance, discoveries
from tl_bilinear.features.correlation import ActivationScatter, LowRankCorrelation
from tl_bilinear.features.dictionary import Dictionary, Reading, register_dictionary
from tl_bilinear.features.effects import CentredAttribution, FeatureEffects
from tl_bilinear.features.evaluation import SAEEvaluation, evaluate_saes
from tl_bilinear.features.examples import Examples
from tl_bilinear.features.feature_sweep import FeatureSweep
from tl_bilinear.features.geometry import EigenGeometry, Submatrix
from tl_bilinear.features.interactions import FeatureInteractions
from tl_bilinear.features.nearest import NearestInputs
from tl_bilinear.features.pair_counts import PairCounts, RankedPairs
from tl_bilinear.features.pairs import ActiveInteractions, FeaturePairs
from tl_bilinear.features.passage import Passage
from tl_bilinear.features.run import FeatureRun
from tl_bilinear.features.shares import FeatureShapley
from tl_bilinear.features.statistics import InteractionStatistics
from tl_bilinear.features.term_names import TermNames
from tl_bilinear.features.terms import FeatureTerms
from tl_bilinear.features.unembedding import PromotedTokens
from tl_bilinear.features.verification import PairCheck

if TYPE_CHECKING:
    from tl_bilinear.features.published_saes import (
        SignedTopKSAE,
        SignedTopKSAEConfig,
        TopSequences,
        published_disk_loader,
        published_huggingface_loader,
        read_top_sequences,
    )

__all__ = [
    "ActivationScatter",
    "ActiveInteractions",
    "Attribution",
    "CentredAttribution",
    "Dictionary",
    "EigenGeometry",
    "Examples",
    "FeatureEffects",
    "FeatureInteractions",
    "FeaturePairs",
    "FeatureRun",
    "FeatureShapley",
    "FeatureSweep",
    "FeatureTerms",
    "InteractionStatistics",
    "LowRankCorrelation",
    "NearestInputs",
    "PairChance",
    "PairCheck",
    "PairCounts",
    "Passage",
    "PromotedTokens",
    "RankedPairs",
    "Reading",
    "SAEEvaluation",
    "SignedTopKSAE",
    "SignedTopKSAEConfig",
    "SpectrumChance",
    "Submatrix",
    "TermNames",
    "TopSequences",
    "discoveries",
    "evaluate_saes",
    "published_disk_loader",
    "published_huggingface_loader",
    "read_top_sequences",
    "register_dictionary",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # all that is not imported above lives there
        return getattr(importlib.import_module("tl_bilinear.features.published_saes"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
