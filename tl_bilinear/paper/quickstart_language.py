"""The quickstart's second part, on language: a bilinear layer between two SAEs, read and checked.

Everything comes from `FeatureInteractions`: this module chooses features, asks, and keeps the answers.
The text is cut in two. Features are chosen on the first half. What is measured of them on text is
measured on the second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear.features import (
    ActiveInteractions,
    Attribution,
    Examples,
    FeatureEffects,
    FeatureInteractions,
    FeaturePairs,
    FeatureRun,
    InteractionStatistics,
    LowRankCorrelation,
    NearestInputs,
    PairChance,
    PairCheck,
    PromotedTokens,
    RankedPairs,
    Submatrix,
    TermNames,
)
from tl_bilinear.hooks import LossAdded, Verification, loss_added, verify
from tl_bilinear.paper.page import SummaryTable

POINT = "mlp_in"
LEAST_ACTIVE = 100  # tokens of the first half: with few, a correlation is high by chance
RANKS = (1, 2, 4, 8)
COMPONENTS = 2
NEAR = 0.5  # an input feature whose activation correlates as much with one's own is the same thing
READABLE = 5  # tokens promoted most that are whole words: "##ge" says nothing to who meets it first
SHARED_TOKENS = 3  # of ten promoted ones: two features that share as many count as one
ROWS = 64  # of text that are looked at, at most
_SEQUENCES, _FEWER = 8, 3  # rows on which interventions are run: on fewer where every token counts


@dataclass(frozen=True, eq=False)
class OutputFeature:
    """All that is shown of one output feature.

    Attributes
    ----------
    name: tokens it is most active on
    strongest, submatrix, statistics: its interactions, from weights alone
    active: the pairs that made it where it was active
    ranked: pairs by coefficient, by mean contribution on the text, and where it is active
    effects: main effects and interactions, as shares of what varies where it is active
    chance: all pairs beside randomly rotated input features
    alone: all pairs beside hidden neurons whose factors are paired at random
    attribution: of its largest activation, ``examples.positions[0]`` of ``examples.tokens[0]``
    pairs: interventions on the pairs that contribute most in the rows where it is strongest
    eigenvectors: interventions on its leading eigenvectors, at the layer's input
    downstream: what removing these components from the layer's output, along the feature's decoder
        row, does to the log-probability of the promoted tokens together, where the feature is active
    loss: what removing both does to the loss of the tokens that follow an active one
    """

    feature: int
    name: str
    promoted: PromotedTokens
    examples: Examples
    strongest: FeaturePairs
    submatrix: Submatrix
    statistics: InteractionStatistics
    active: ActiveInteractions
    ranked: RankedPairs
    effects: FeatureEffects
    chance: PairChance
    alone: PairChance
    attribution: Attribution
    pairs: PairCheck
    eigenvectors: Verification
    downstream: Verification
    loss: LossAdded


@dataclass(frozen=True, eq=False)
class LanguageQuickstart:
    """What the quickstart found about a language model.

    Attributes
    ----------
    features: the layer between its SAEs, the input features named
    choice: correlations of all output features with 1 and 2 eigenvectors, on the first half
    correlation: those of the features shown with up to 8, on the second half
    fitted: those of one direction each, fitted where the feature is active in the first half, on the
        second
    nearest: the input feature that each output feature is most like, on the first half
    directions: what those read along, and what excites them looks like in the second half
    found: the features shown
    tokens: how many the two halves have
    sample: a story; facts: what else is known of the model, by name
    seconds: of analysis
    """

    features: FeatureInteractions
    choice: LowRankCorrelation
    correlation: LowRankCorrelation
    fitted: LowRankCorrelation
    nearest: NearestInputs
    directions: TermNames
    found: list[OutputFeature]
    tokens: tuple[int, int]
    sample: str
    facts: Mapping[str, str]
    seconds: float

    @property
    def labels(self) -> Sequence[str]:
        """Names of the input features."""
        return self.features.inputs.labels or ()

    def summary(self) -> dict[str, object]:
        """The numbers, for JSON."""
        features, choice = self.features, self.choice
        return {
            "layer": features.layer,
            "input_hook": features.passage.hook,
            "output_hook": features.output_hook,
            "input_features": features.inputs.n,
            "output_features": features.outputs.n,
            "facts": dict(self.facts),
            "tokens": self.tokens,
            "all_features": {
                "active_tokens_at_least": LEAST_ACTIVE,
                "counted": int(choice.enough(LEAST_ACTIVE).sum()),
                "mean_active_correlation": choice.mean_active(LEAST_ACTIVE).tolist(),
                "share_above_0.75_with_2": choice.share_above(min_active=LEAST_ACTIVE),
            },
            "features": [self._summary_of(index) for index in range(len(self.found))],
            "seconds": round(self.seconds, 1),
        }

    def summary_tables(self) -> list[SummaryTable]:
        """The main numbers, as a table for a terminal or a notebook."""
        import pandas as pd

        rows = []
        for one, correlation in zip(self.found, self.correlation.active.tolist(), strict=True):
            b, c = int(one.active.first[0]), int(one.active.second[0])
            pair = [self.labels[b]] if b == c else [self.labels[b], self.labels[c]]
            promoted = " ".join(one.promoted.words[:3])
            rows.append((one.feature, one.name, promoted, correlation[1], " x ".join(pair)))
        columns = [
            "feature",
            "active on",
            "promotes",
            "r of 2 eigenvectors",
            "strongest pair there",
        ]
        sums = max(one.attribution.error for one in self.found)
        checked = max(float(one.eigenvectors.error.max()) for one in self.found)
        control = min(float(one.eigenvectors.control_error.min()) for one in self.found)
        return [
            SummaryTable(
                f"A language model: {len(self.found)} of {self.features.outputs.n} features of layer "
                f"{self.features.layer}'s output",
                pd.DataFrame(rows, columns=columns),
                f"Attributions sum to within {sums:.0e}; interventions agree with the weights to "
                f"{checked:.0e} (random directions miss by {control:.0e})   ({self.seconds:.0f} s)",
            )
        ]

    def told(self, index: int) -> list[str]:
        """What is known of a feature shown, in sentences that claim no more than was measured."""
        one = self.found[index]
        made, chance, cause = told(one)
        near = int(self.nearest.nearest[one.feature])
        made.insert(
            1,
            f"The layer makes it: no input feature is the same. The nearest, “{self.labels[near]}”, "
            f"correlates with it by {float(self.nearest.correlations[one.feature]):.2f}.",
        )
        read, alike = self.directions.words(index, 0)
        direction = (
            f"One direction of the layer's input, fitted to where it fires in the first half of the "
            f"text, predicts how strongly it fires in the second with a correlation of "
            f"{float(self.fitted.active[index, 0]):.2f}. It reads along {read} (cosines); in this text, "
            f"what it responds to looks like {alike} (correlations)."
        )
        return [*made, direction, *chance, cause]

    def _summary_of(self, index: int) -> dict[str, object]:
        one, labels = self.found[index], self.labels
        shown = len(one.promoted.promoted)
        return {
            "feature": one.feature,
            "name": one.name,
            "promoted": one.promoted.words[:shown],
            "suppressed": one.promoted.words[shown:],
            "active_tokens": int(self.correlation.counts[index]),
            "active_correlation": {
                str(rank): float(self.correlation.active[index, rank - 1]) for rank in RANKS
            },
            "one_fitted_direction": float(self.fitted.active[index, 0]),
            "effects": {
                "tokens": one.effects.tokens,
                "constant": one.effects.constant,
                "mean": one.effects.mean,
                "main_effects": float(one.effects.main.sum()),
                "interactions": one.effects.interactions,
                "rest": one.effects.rest,
            },
            "pairs": one.ranked.to_pandas().to_dict("records"),
            "pairs_better_than_chance": {
                "rotated_input_features": one.chance.discoveries,
                "neurons_paired_at_random": one.alone.discoveries,
                "of": one.chance.tested,
                "false_discovery_rate": one.chance.rate,
            },
            "told": self.told(index),
            "eigenvalues": one.statistics.eigenvalues[[0, -1]].tolist(),
            "effective_rank": one.statistics.effective_rank,
            "strongest_pairs": [
                {"first": b, "second": c, "names": [labels[b], labels[c]], "coefficient": value}
                for b, c, value in zip(
                    one.strongest.first.tolist(),
                    one.strongest.second.tolist(),
                    one.strongest.coefficients.tolist(),
                    strict=True,
                )
            ],
            "attribution": {
                "position": one.attribution.position,
                "measured": one.attribution.measured,
                "total": one.attribution.total,
                "error": one.attribution.error,
                "terms": one.attribution.terms(),
            },
            "pair_checks": one.pairs.to_pandas().to_dict("records"),
            "eigenvector_checks": one.eigenvectors.to_pandas().to_dict("records"),
            "downstream": one.downstream.to_pandas().to_dict("records"),
            "loss_without_both": one.loss.to_pandas().to_dict("records")[0],
        }


def language_quickstart(
    model: Any,
    saes: Mapping[str, Any],
    tokens: Int[Tensor, "rows context"],
    *,
    layer: int,
    point: str = POINT,
    count: int = 3,
    sample: str = "",
    facts: Mapping[str, str] | None = None,
    progress: bool = True,
) -> LanguageQuickstart:
    """Read `count` output features of a layer between two SAEs, and check what is read.

    Parameters
    ----------
    model: a bilinear HookedTransformer with a tokenizer
    saes: by point, "mlp_out" and `point`
    tokens: [rows, context], of which at most `ROWS` are looked at
    layer: int
    sample: some text, and facts: what is to be said of the model, by name

    Raises ValueError for less than two rows, and where fewer than `count` features can be chosen.
    """
    if len(tokens) < 2:
        raise ValueError(
            f"the text is cut in two: give at least 2 rows of tokens, got {len(tokens)}"
        )
    start = time.monotonic()
    with tqdm(total=3 + count, unit="step", desc="language", disable=not progress) as bar:
        unnamed = FeatureInteractions(model, layer, saes[point], saes["mlp_out"])
        rows = tokens[:ROWS].to(model.W_U.device)
        mask = torch.ones_like(rows, dtype=torch.bool)
        mask[:, 0] = False  # special tokens are read: `choose_features` leaves their features out
        text = unnamed.run(rows, mask=mask, progress=False)
        bar.update()
        text = text.labelled(progress=False)
        features = text.features
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
        bar.update()
        choice = first.low_rank_correlation(COMPONENTS, progress=False)
        nearest = first.nearest_inputs(progress=False)
        chosen = choose_features(choice, nearest, first, count)
        correlation = second.low_rank_correlation(RANKS[-1], chosen, progress=False)
        fitted = second.low_rank_correlation(
            1, chosen, metric="active", by="fit", fit=first, progress=False
        )
        directions = second.term_names(
            first.terms(1, chosen, metric="active", by="fit", progress=False), progress=False
        )
        bar.update()
        found = []
        for feature in chosen:
            found.append(read_feature(feature, second))
            bar.update()
    return LanguageQuickstart(
        features=features,
        choice=choice,
        correlation=correlation,
        fitted=fitted,
        nearest=nearest,
        directions=directions,
        found=found,
        tokens=(first.tokens.numel(), second.tokens.numel()),
        sample=sample,
        facts=facts or {},
        seconds=time.monotonic() - start,
    )


def demo_quickstart(*, progress: bool = True) -> LanguageQuickstart:
    """`language_quickstart` of the model that ships, at the last layer that has SAEs."""
    from tl_bilinear.demo import (
        demo_card,
        demo_layers,
        load_demo_model,
        load_demo_saes,
        load_demo_stories,
        load_demo_tokens,
    )

    layer, stories = demo_layers()[-1], load_demo_stories()
    return language_quickstart(
        load_demo_model(),
        load_demo_saes(layer),
        load_demo_tokens(),
        layer=layer,
        sample=next((story for story in stories if story.startswith("once")), stories[0]),
        facts=_facts(demo_card(), layer),
        progress=progress,
    )


def _facts(card: Mapping[str, Any], layer: int) -> dict[str, str]:
    """What the model card says, in words."""
    model = card["model"]
    found = {
        "parameters": f"{model['parameters']:,}",
        "loss on validation stories": f"{model['loss']:.3f} nats a token",
        "trained on": f"{model['text_tokens']:,} tokens of {model['stories']['train']:,} stories, "
        f"{model['tokens'] / model['text_tokens']:.1f} times",
    }
    for each in card["saes"]["evaluation"]:
        if each["sae"] in (f"{layer}-{POINT}", f"{layer}-mlp_out"):
            found[f"SAE {each['sae']}"] = (
                f"{each['features']:,} features, {each['l0']:.0f} active at once; misses "
                f"{each['nmse']:.0%} of the variance, and in the place of the activations adds "
                f"{each['loss_added']:.3f} nats ({each['loss_added_relative']:.1%}) to the loss"
            )
    return found


def told(one: OutputFeature) -> tuple[list[str], list[str], str]:
    """What makes a feature, whether it is more than chance, and whether it is a cause, in sentences."""
    effects, ranked = one.effects, one.ranked
    labels = effects.input_labels or {}

    def names(numbers: list[int]) -> str:
        words = list(dict.fromkeys(f"“{labels.get(b, b)}”" for b in numbers))
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

    strongest = effects.main.topk(3).indices.tolist()
    helping = [b for b in strongest if float(effects.main[b]) > 0.02]
    own = one.name.partition(" -> ")[0]
    share, together = float(effects.main.sum()), effects.interactions
    sentences = [
        f"It fires on “{own}”, and there it raises the logits of "
        f"{' '.join(one.promoted.words[:3])} most."
    ]
    if helping:
        made = float(effects.main[helping].sum())
        sentences.append(
            f"Where it fires, how strongly it does is decided mostly by single input features: main "
            f"effects make {share:.0%} of what varies, {made:.0%} by {names(helping)} alone."
            if share > 0.5
            else f"Where it fires, main effects of single input features make {share:.0%} of what "
            f"varies; the largest are of {names(helping)}."
        )
    else:
        sentences.append(
            f"Where it fires, no single input feature decides how strongly: all main effects together "
            f"make {share:.0%} of what varies, the largest of them less than 2 %."
        )
    sentences.append(
        f"What input features do together, beyond that, makes {together:.0%}; what is no feature, "
        f"{effects.rest:.0%}. Negative shares work against the others."
    )
    pair = ranked.top(1)
    b, c = int(pair.first[0]), int(pair.second[0])
    what = f"{names([b])} with itself" if b == c else f"{names([b])} with {names([c])}"
    if b != c and labels.get(b) == labels.get(c):
        what = f"two input features that are both named {names([b])}"
    sentences.append(
        f"The pair that contributes most there is {what}, {float(pair.where_active[0]):+.2f} of a mean "
        f"pre-activation of {effects.mean:+.2f}; by its coefficient alone it is number "
        f"{int(pair.ranks[0, 0]):,} among the pairs met."
    )
    chance = [one.chance.verdict]
    if not one.alone.discoveries:
        chance.append(
            "Beside the stricter null, hidden neurons whose factors are paired at random, none is: that "
            "many neurons read these input features would make pairs as strong."
        )
    else:
        chance.append(one.alone.verdict)
    return sentences, chance, _cause(one)


def _cause(one: OutputFeature) -> str:
    """What the tokens that a feature raises lose without its first eigenvector."""
    found = one.downstream.to_pandas().iloc[0]
    change, low, high = (float(found[name]) for name in ("effect", "low", "high"))
    numbers = (
        f"{change:+.2f} (95 % interval {low:+.2f} to {high:+.2f}; as much removed along a random "
        f"direction: {float(found['control_effect']):+.2f})"
    )
    without = "Without its first eigenvector in what the layer writes, where it fires, the"
    if high < 0:
        return (
            f"{without} ten tokens that it raises become less likely: the logarithm of their "
            f"probability changes by {numbers}. So it is a cause of them, in this text."
        )
    if low > 0:
        return (
            f"{without} ten tokens that it raises become likelier: the logarithm of their probability "
            f"changes by {numbers}. So it is no cause of them, in this text."
        )
    return (
        f"{without} logarithm of the probability of the ten tokens that it raises changes by {numbers}. "
        f"The interval holds zero: that it is a cause of them is not shown."
    )


def choose_features(
    choice: LowRankCorrelation, nearest: NearestInputs, text: FeatureRun, count: int
) -> list[int]:
    """Features made by the layer that two eigenvectors predict best, told apart by what they promote.

    Of those active on at least `LEAST_ACTIVE` tokens and correlated with no input feature by `NEAR` or
    more, by falling active-only correlation. `choice` and `nearest` are of all output features. Left out
    are features that are most active on a special token, where a story begins or ends, those one of
    whose `READABLE` most promoted tokens is a part of a word or a sign, and those that share
    `SHARED_TOKENS` of ten promoted tokens with one already chosen.

    Raises ValueError where there are fewer than `count`.
    """
    features = text.features
    special = set(features.model.tokenizer.all_special_ids)
    made = nearest.correlations < NEAR
    kept = (choice.enough(LEAST_ACTIVE) & made).nonzero()[:, 0]
    order = choice.active[kept, COMPONENTS - 1].argsort(descending=True, stable=True)
    chosen: dict[int, set[int]] = {}
    for feature in choice.features[kept[order]].tolist():
        raised = features.promoted(feature)
        promoted = set(raised.promoted.tolist())
        if not all(word.strip().isalpha() for word in raised.words[:READABLE]):
            continue
        if any(len(promoted & other) >= SHARED_TOKENS for other in chosen.values()):
            continue
        best = text.examples(feature, k=1, progress=False)
        if int(best.tokens[0, best.positions[0]]) in special:
            continue
        chosen[feature] = promoted
        if len(chosen) == count:
            return list(chosen)
    raise ValueError(
        f"{len(chosen)} output features, not {count}, are active on at least {LEAST_ACTIVE} of "
        f"{choice.tokens} tokens, resemble no input feature (a correlation below {NEAR:g}), promote "
        f"whole words and differ in what they promote: give more text"
    )


def read_feature(feature: int, text: FeatureRun) -> OutputFeature:
    """What there is to say of one output feature, from weights, on text and by intervention.

    Raises ValueError for a feature that is active nowhere in the text.
    """
    features = text.features
    examples = text.examples(feature, k=_SEQUENCES, progress=False)
    if not len(examples.sequences):
        raise ValueError(f"output feature {feature} is active nowhere in this text: give more")
    promoted = features.promoted(feature)
    active = text.active_interactions(feature, limit=300, progress=False)
    strongest = text[examples.sequences[:_FEWER]]
    there = strongest.active_interactions(feature, progress=False)
    cross = int((there.first != there.second).sum())
    tokens, on = examples.tokens, examples.strengths > 0
    written = features.components(feature, COMPONENTS, write="feature")

    def chance_of_promoted(logits: Tensor, tokens: Tensor) -> Tensor:
        chances = logits.log_softmax(-1)[..., promoted.promoted].logsumexp(-1)
        return (chances * on).sum(-1) / on.sum(-1)

    return OutputFeature(
        feature=feature,
        name=(examples.output_labels or {})[feature],
        promoted=promoted,
        examples=examples,
        strongest=features.top(feature, 8),
        submatrix=features.submatrix(feature, 8),
        statistics=features.statistics(feature, progress=False),
        active=active,
        ranked=text.ranked_pairs(feature, 6),
        effects=text.effects(feature),
        chance=features.pair_chance(feature, null="dictionary"),
        alone=features.pair_chance(feature),
        attribution=text.attribute(feature, int(examples.positions[0]), int(examples.sequences[0])),
        pairs=strongest.verify_pairs(
            feature, there.top(min(3, cross), kind="cross"), limit=5, progress=False
        ),
        eigenvectors=verify(
            features.model,
            strongest.tokens,
            features.components(feature, COMPONENTS),
            at="input",
            positions=on[:_FEWER],
            progress=False,
        ),
        downstream=verify(
            features.model,
            tokens,
            written,
            at="output",
            effect=chance_of_promoted,
            positions=on,
            progress=False,
        ),
        loss=loss_added(
            features.model,
            tokens,
            {"without both": written.ablate(positions=on)},
            mask=on.roll(1, dims=1),
            batch_size=len(tokens),  # the mask is of all of them
            progress=False,
        ),
    )
