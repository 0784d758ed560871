"""Bilinear layers inside the mathematical framework for transformer circuits (Sharkey 2023).

What a prompt adds up, exactly (`paths`); what the weights say of tokens, heads and earlier layers
(`embedding`, `through_head`, `source_pairs`, `direct_path` into `FeatureInteractions`) and of
features over several layers (`FeatureCircuit`); two layers as one form of degree four (`composed`);
which pairs of features make a head attend (`AttentionInteractions`), in any TransformerLens model.
"""

from tl_bilinear.circuits.attention import (
    AttentionInteractions,
    AttentionPairs,
    HeadDirections,
    OffsetProfile,
    PairsChance,
    SelfScores,
)
from tl_bilinear.circuits.attention_run import AttentionRun, why
from tl_bilinear.circuits.composition import composed
from tl_bilinear.circuits.graph import FeatureCircuit, FeatureGraph
from tl_bilinear.circuits.paths import PathCheck, Paths, check_paths, paths
from tl_bilinear.circuits.polynomial import (
    TensorPolynomial,
    product_head,
    tensor_polynomial,
)
from tl_bilinear.circuits.residual import (
    SourcePairs,
    VirtualWeights,
    direct_path,
    embedding,
    positions,
    source_pairs,
    through_head,
    virtual_weights,
)
from tl_bilinear.circuits.scores import ScoreAttribution, ScoreCheck, ScoreDifference
from tl_bilinear.features.unembedding import unembedding

__all__ = [
    "AttentionInteractions",
    "AttentionPairs",
    "AttentionRun",
    "FeatureCircuit",
    "FeatureGraph",
    "HeadDirections",
    "OffsetProfile",
    "PairsChance",
    "PathCheck",
    "Paths",
    "ScoreAttribution",
    "ScoreCheck",
    "ScoreDifference",
    "SelfScores",
    "SourcePairs",
    "TensorPolynomial",
    "VirtualWeights",
    "check_paths",
    "composed",
    "direct_path",
    "embedding",
    "paths",
    "positions",
    "product_head",
    "source_pairs",
    "tensor_polynomial",
    "through_head",
    "unembedding",
    "virtual_weights",
    "why",
]
