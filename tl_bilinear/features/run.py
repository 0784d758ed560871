"""One run of the model on a text, and everything that is asked of it.

The model runs once; the run holds the activations around the layer and answers from them:

>>> run = features.run(tokens).labelled()                  # features named by what they are active on
>>> run.examples(749).to_pandas(model.tokenizer)
>>> run.low_rank_correlation().to_pandas()
>>> run.attribute(749, position=7, sequence=3).to_pandas()

**Which tokens count.** `mask` [batch, pos] says so, and every statistic keeps to it. Unless the caller
gives one, it leaves out the first token of a row (as the paper does), [BOS], the special tokens that
the SAEs were not trained on, and the padding of texts of unequal length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.features.attribution import Attribution, contributions
from tl_bilinear.features.correlation import (
    ActivationScatter,
    LayerTokens,
    LowRankCorrelation,
    activation_scatter,
    low_rank_correlation,
)
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.effects import (
    Around,
    CentredAttribution,
    FeatureEffects,
    centred_attribution,
    feature_effects,
)
from tl_bilinear.features.examples import Examples, Side
from tl_bilinear.features.labels import NEVER, name_features, plain, special_tokens
from tl_bilinear.features.nearest import NearestInputs, nearest_inputs
from tl_bilinear.features.pair_counts import (
    PairCounter,
    PairOrder,
    RankedPairs,
    ranked_pairs,
)
from tl_bilinear.features.pairs import (
    ActiveInteractions,
    ActiveTokens,
    FeaturePairs,
    active_interactions,
)
from tl_bilinear.features.passage import fires_as, refuse_attached
from tl_bilinear.features.populations import MomentSums, population_names
from tl_bilinear.features.shares import FeatureShapley, feature_shapley
from tl_bilinear.features.term_names import TermNames, term_names
from tl_bilinear.features.terms import By, FeatureTerms, MetricName, feature_terms
from tl_bilinear.features.verification import PairCheck, check_pairs
from tl_bilinear.tensor import InputMoments, Metric

if TYPE_CHECKING:
    from tl_bilinear.features.interactions import FeatureInteractions

_PER_TOKEN = ("hook_activations", "source", "x", "scale", "output", "output_scale")


@dataclass(frozen=True, eq=False, repr=False)
class FeatureRun:
    """Activations [batch, pos, ...] of a text around a layer between two dictionaries.

    Made by `FeatureInteractions.run`. It holds two to four vectors [d] a token in memory (`nbytes`).

    Attributes
    ----------
    features: the layer and its dictionaries
    tokens: [batch, pos]
    mask: [batch, pos], which tokens count
    lengths: [batch], tokens of each row before its padding
    hook_activations: at the input dictionary's hook
    source: at the hook that the input dictionary encodes from, where that is another
    x: the layer's input, ``mlp.hook_in``
    scale: [batch, pos, 1], the token's norm scale between the two (1 where there is none)
    output: the layer's output
    output_scale: [batch, pos], what the output dictionary's normalisation multiplies it by
    batch_size: how many sequences are worked on at a time
    """

    features: FeatureInteractions
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    hook_activations: Float[Tensor, "batch pos d"]
    source: Float[Tensor, "batch pos e"] | None
    x: Float[Tensor, "batch pos d"]
    scale: Float[Tensor, "batch pos 1"]
    output: Float[Tensor, "batch pos d"]
    output_scale: Float[Tensor, "batch pos"]
    batch_size: int = field(default=16)

    def __repr__(self) -> str:
        batch, length = self.tokens.shape
        return (
            f"FeatureRun({batch} x {length} tokens, {int(self.mask.sum()):,} of which count, "
            f"{self.nbytes / 2**20:.0f} MB, of {self.features!r})"
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the activations held."""
        held = {id(t): t.nbytes for t in map(self.__getattribute__, _PER_TOKEN) if t is not None}
        return sum(held.values())

    def __getitem__(self, rows: Any) -> FeatureRun:
        """Some of the sequences: one, a slice, or their numbers; ``run[rows, :stop]`` cuts them."""
        rows, stop = rows if isinstance(rows, tuple) else (rows, slice(None))
        if isinstance(rows, int):
            checks.require_int("sequence", rows)
            if not -len(self) <= rows < len(self):
                raise IndexError(f"sequence {rows} of a run of {len(self)}")
            rows = slice(rows, rows + 1 or None)
        names = ("tokens", "mask", *_PER_TOKEN)
        held = {name: getattr(self, name) for name in names}
        chosen: Any = {name: None if v is None else v[rows][:, stop] for name, v in held.items()}
        lengths = self.lengths[rows].clamp_max(chosen["tokens"].shape[1])
        return replace(self, lengths=lengths, **chosen)

    def _parts(self, progress: bool) -> Iterator[FeatureRun]:
        """`batch_size` sequences at a time."""
        with tqdm(total=len(self), unit="sequence", disable=not progress) as bar:
            for start in range(0, len(self), self.batch_size):
                part = self[start : start + self.batch_size]
                yield part
                bar.update(len(part))

    # ------------------------------------------------------------------ activations

    @torch.no_grad()
    def preactivations(
        self, features: Int[Tensor, " m"] | Sequence[int] | None = None
    ) -> Float[Tensor, "batch pos m"]:
        """Pre-activations of output features (all), of every token.

        With ``output="decoder"`` the products with the decoder's rows, without any constant.
        """
        return self._preactivations(
            slice(None) if features is None else self.features.numbers(features)
        )

    def _preactivations(self, index: Any, output: Tensor | None = None) -> Tensor:
        known, output = self.features, self.output if output is None else output
        if known.output == "encoder":
            return known.outputs.preactivation(output, index)
        return output @ known.directions[index].to(output).T

    @torch.no_grad()
    def activations(
        self,
        features: Int[Tensor, " m"] | Sequence[int] | None = None,
        *,
        side: Side = "output",
    ) -> Float[Tensor, "batch pos m"]:
        """Activations of features (all) of a side, of every token.

        Input features in units of their decoder rows. An output feature that has no activation of its
        own (a row of a matrix, say) counts as active where its pre-activation is positive.
        """
        known = self.features
        index = slice(None) if features is None else known.numbers(features, side)
        if side == "input":
            return known.inputs.read(self.hook_activations, self.source).coefficients[..., index]
        known.side(side)
        if known.output == "encoder" and known.outputs.encode is not None:
            return known.outputs.encode(self.output)[..., index]
        return self._preactivations(index).clamp_min(0)

    def _counted(self, index: Any, progress: bool) -> Iterator[LayerTokens]:
        """The tokens that count, some sequences at a time, for some output features."""
        for part in self._parts(progress):
            yield LayerTokens(
                part.x[part.mask],
                part._preactivations(index)[part.mask],
                part.activations(index)[part.mask] != 0,
                part.output_scale[part.mask],
            )

    def mean_input(self, mask: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, " d"]:
        """Mean activation at the input dictionary's hook over the tokens that count, or of `mask`.

        Raises ValueError where there is no such token.
        """
        counted = self.mask if mask is None else checks.require_mask(mask, self.mask.shape)
        chosen = self.hook_activations[counted]
        if len(chosen) == 0:
            raise ValueError("no token was chosen")
        return chosen.mean(0)

    # ------------------------------------------------------------------ populations

    @torch.no_grad()
    def inputs_of(
        self, features: Int[Tensor, " m"] | Sequence[int] | None = None
    ) -> list[Float[Tensor, "n d"]]:
        """What the layer reads on the tokens that count, or where each output feature is active."""
        if features is None:
            return [self.x[self.mask]]
        index = self.features.numbers(features).reshape(-1)
        parts = [
            (part.x[part.mask], part.activations(index)[part.mask] != 0)
            for part in self._parts(progress=False)
        ]
        return [torch.cat([x[on[:, i]] for x, on in parts]) for i in range(len(index))]

    @torch.no_grad()
    def read(self, mask: Bool[Tensor, "batch pos"] | None = None) -> Iterator[ReadTokens]:
        """The tokens that count (of `mask`) as features and rest, some sequences at a time."""
        known = self.features
        chosen = (
            self.mask if mask is None else self.mask & checks.require_mask(mask, self.tokens.shape)
        )
        for start in range(0, len(self), self.batch_size):
            part = self[start : start + self.batch_size]
            at = chosen[start : start + self.batch_size]
            source = None if part.source is None else part.source[at]
            reading = known.inputs.read(part.hook_activations[at], source)
            rest = torch.stack([row.expand_as(part.x[at]) for row in reading.rest.values()]).sum(0)
            yield ReadTokens(
                replace(part, mask=at),
                reading.coefficients / part.scale[at],
                rest / part.scale[at],
                part.output_scale[at],
            )

    def population(
        self, around: Around | Bool[Tensor, "batch pos"], feature: int
    ) -> tuple[Bool[Tensor, "batch pos"], str]:
        """Which tokens "all", "active" (where an output feature is), or a mask mean, and in words."""
        if isinstance(around, Tensor):
            return self.mask & checks.require_mask(around, self.tokens.shape), "chosen tokens"
        if around == "all":
            return self.mask, "all tokens"
        if around != "active":
            raise ValueError(f"a population is 'all', 'active' or a mask, got {around!r}")
        on = [part.activations([feature])[..., 0] != 0 for part in self._parts(progress=False)]
        return self.mask & torch.cat(on), f"the tokens where output feature {feature} is active"

    def moments(
        self,
        features: int | Sequence[int] | Tensor | None = None,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        population: str | None = None,
        progress: bool = True,
    ) -> Any:
        """The moments of what the layer reads, ``mlp.hook_in``, of a population of tokens.

        Parameters
        ----------
        features: optional
            An output feature: the tokens where it is active. Several: a list of moments, one each, d x d
            float64 numbers each. Without: all tokens that count.
        mask: [batch, pos], optional
            Tokens chosen otherwise, of those that count.
        population: what a chosen population is called, in words

        Returns InputMoments, or a list of them. Raises ValueError for a population without tokens.
        """
        space = self.features.layer_tensor.input_space
        if features is not None and mask is not None:
            raise ValueError("give features or a mask, not both")
        if features is None:
            chosen = (
                self.mask
                if mask is None
                else self.mask & checks.require_mask(mask, self.tokens.shape)
            )
            name = population or ("tokens" if mask is None else "chosen tokens")
            return InputMoments.of(self.x, mask=chosen, population=name, space=space)
        given = self.features.numbers(features)
        index = given.reshape(-1)
        sums = MomentSums(len(index), self.x.shape[-1], self.x.device)
        for part in self._parts(progress):
            for number, x in enumerate(part.inputs_of(index)):
                sums.add(number, x)
        found = sums.moments(population_names(self.features, index), space)
        return found if given.ndim else found[0]

    # ------------------------------------------------------------------ names and examples

    def examples(
        self, feature: int, k: int = 10, *, side: Side = "output", progress: bool = True
    ) -> Examples:
        """The sequences on which a feature is most active, with its strength on every token (App. M)."""
        checks.require_positive("k", k)
        feature = self.features.number(feature, side)
        strengths = [
            part.activations([feature], side=side)[..., 0].masked_fill(~part.mask, 0)
            for part in self._parts(progress)
        ]
        found = Examples.of(feature, side, self.tokens, torch.cat(strengths), k)
        labels = self.features.side(side).labels_of([feature])
        return (
            replace(found, input_labels=labels)
            if side == "input"
            else replace(found, output_labels=labels)
        )

    def labels(self, side: Side = "input", *, k: int = 20, progress: bool = True) -> list[str]:
        """A name for every feature of a side, from what distinguishes its k strongest activations.

        Against how common each token is in the whole text (`tl_bilinear.features.labels.label`):
        ``happy``; ``(not) happy`` where that stands before; ``happy | glad``; ``. after sad cry`` where
        the token itself is everywhere. A feature that was seen on fewer than ten tokens says so. Those
        of the output side add the two tokens that they promote most: ``happy -> she her``. A name says
        where a feature is active, not what it does. `labelled` sets them.
        """
        checks.require_positive("k", k)
        activations = (
            part.activations(side=side).masked_fill(~part.mask[..., None], 0)
            for part in self._parts(progress)
        )
        tokenizer = self.features.model.tokenizer
        names = name_features(tokenizer, self.tokens, activations, k, self.mask)
        if side == "input":
            return names
        raised = self.features.raised(2)
        return [
            name if name == NEVER else f"{name} -> {' '.join(plain(tokenizer, t) for t in row)}"
            for name, row in zip(names, raised.tolist(), strict=True)
        ]

    def labelled(self, *, k: int = 20, progress: bool = True) -> FeatureRun:
        """This run with `labels` of both sides set, to be shown by every table and figure from here on.

        Labels that a dictionary has already are kept; input features that have no activations get none.
        """
        known = self.features
        missing: list[Side] = []
        if known.inputs.labels is None and known.inputs.encode is not None:
            missing.append("input")
        if known.outputs.labels is None:
            missing.append("output")
        found = {side: self.labels(side, k=k, progress=progress) for side in missing}
        return replace(self, features=known.with_labels(**found))

    def nearest_inputs(
        self,
        features: Int[Tensor, " m"] | Sequence[int] | None = None,
        *,
        progress: bool = True,
    ) -> NearestInputs:
        """The input feature that each output feature (all) is most like, by correlation over tokens.

        Near 1, the layer passes on what it is given; where no input feature comes near, it makes
        something. One pass over the tokens that count. Raises ValueError for input features that have
        no activations.
        """
        known = self.features
        index = known.numbers(range(known.outputs.n) if features is None else features).reshape(-1)
        return nearest_inputs(self, index, progress=progress)

    # ------------------------------------------------------------------ what made a feature

    @torch.no_grad()
    def attribute(self, feature: int, position: int = -1, sequence: int = 0) -> Attribution:
        """An output feature's pre-activation at one token as a sum over pairs of input features.

        Exact: the pairs, the named rest (b_dec, SAE error, biases) and the constants sum to what the
        model computes (`Attribution.error` says how nearly). A negative position counts from the end of
        the sequence, before its padding.

        Raises IndexError for a feature, position or sequence that does not exist.
        """
        known = self.features
        index = known.number(feature)
        one = self[checks.require_int("sequence", sequence)]
        position = checks.require_position(position, int(one.lengths[0]))
        at = (0, position)
        source = None if one.source is None else one.source[at]
        reading = known.inputs.read(one.hook_activations[at], source)
        active = reading.coefficients.nonzero()[:, 0]
        z = reading.coefficients[active]
        written = z[:, None] * known.input_directions[active].to(z)
        rows = torch.cat([written, torch.stack(list(reading.rest.values()))]) / one.scale[at]
        layer = known.hook_tensor.project(known.directions[index][None])
        quadratic, linear, constants = contributions(layer, rows, float(one.output_scale[at]))
        if known.output == "encoder":
            for name, values in (
                ("- e . b_dec", known.outputs.encoder_offset),
                ("b_enc", known.outputs.encoder_bias),
            ):
                constants[name] = 0.0 if values is None else float(values[index])
        return Attribution(
            feature=index,
            position=position,
            features=active,
            activations=z,
            labels=[known.inputs.label(int(i)) for i in active],
            rest_names=list(reading.rest),
            quadratic=quadratic,
            linear=linear,
            constants={name: value for name, value in constants.items() if value},
            measured=float(one._preactivations([index], one.output[at])[0]),
            input_labels=known.inputs.labels_of(active),
            output_labels=known.outputs.labels_of([index]),
        )

    def centred(
        self,
        feature: int,
        position: int = -1,
        sequence: int = 0,
        *,
        around: Around | Bool[Tensor, "batch pos"] = "all",
    ) -> CentredAttribution:
        """`attribute`, around a mean: a constant, main effects of input features, and interactions.

        `around` is the population of this run whose mean activation is the centre: "all" tokens that
        count, those where the feature is "active", or a mask. Exact, as `attribute`.

        Raises ValueError for an empty population, and what `attribute` does.
        """
        known = self.features.number(feature)
        chosen, name = self.population(around, known)
        return centred_attribution(self, known, position, sequence, chosen, name)

    def effects(
        self,
        feature: int,
        *,
        around: Around | Bool[Tensor, "batch pos"] = "active",
        k: int = 50,
        max_bytes: int = checks.MAX_DENSE_BYTES,
    ) -> FeatureEffects:
        """How much of what varies in an output feature main effects and interactions make.

        Over a population as in `centred`, by default the tokens where the feature is active. The k
        largest pairs are kept. Memory: two tables of all pairs of input features.

        Raises ValueError for a population of fewer than 2 tokens.
        """
        checks.require_positive("k", k)
        known = self.features.number(feature)
        chosen, name = self.population(around, known)
        return feature_effects(self, known, chosen, name, k, max_bytes)

    def shapley(
        self,
        feature: int,
        position: int = -1,
        sequence: int = 0,
        *,
        baseline: Around | Bool[Tensor, "batch pos"] | None = None,
        max_bytes: int = checks.MAX_DENSE_BYTES,
    ) -> FeatureShapley:
        """Exact Shapley values (integrated gradients) of the input features at one token.

        `baseline`: None for no feature active, everything else as it is; or a population of this run,
        whose tokens take the place of what is absent ("all", "active", a mask). Of a population the
        moments of all features are taken, two tables [n_in + d, n_in + d].

        Raises ValueError for an empty population, MemoryError beyond `max_bytes`.
        """
        known = self.features.number(feature)
        chosen, name = (None, "") if baseline is None else self.population(baseline, known)
        return feature_shapley(self, known, position, sequence, chosen, name, max_bytes)

    def ranked_pairs(self, feature: int, k: int = 10, *, by: PairOrder = "active") -> RankedPairs:
        """The k first pairs of an output feature in each of three orders (`features.pair_counts`)."""
        known = self.features
        counter = PairCounter(known, known.numbers([known.number(feature)]))
        counter.add(self)
        return ranked_pairs(known, feature, counter.result(), k, by)

    @torch.no_grad()
    def active_interactions(
        self, feature: int, *, limit: int = 2000, progress: bool = True
    ) -> ActiveInteractions:
        """The pairs that made an output feature on the tokens where it is active (section 3.1).

        At most `limit` such tokens are looked at.
        """
        known = self.features
        feature = known.number(feature)
        checks.require_count("limit", limit, 2**31, "tokens to look at")
        form = known.interaction(feature, basis="activations").dense()
        tokens = self._active(feature, limit, progress)
        found = active_interactions(feature, form, known.input_directions, tokens)
        return replace(
            found,
            input_labels=known.inputs.labels_of(torch.cat([found.first, found.second])),
            output_labels=known.outputs.labels_of([feature]),
        )

    def _active(self, feature: int, limit: int, progress: bool) -> Iterator[ActiveTokens]:
        for part in self._parts(progress):
            active = (part.activations([feature])[..., 0] != 0) & part.mask
            at = active.nonzero(as_tuple=True)
            at = (at[0][:limit], at[1][:limit])
            source = None if part.source is None else part.source[at]
            reading = self.features.inputs.read(part.hook_activations[at], source)
            yield ActiveTokens(
                reading.coefficients / part.scale[at],
                part.output_scale[at],
                part._preactivations([feature])[at][:, 0],
            )
            limit -= len(at[0])
            if limit <= 0:
                return

    def terms(
        self,
        k: int = 1,
        features: Int[Tensor, " m"] | Sequence[int] | None = None,
        *,
        metric: MetricName | Metric = "euclidean",
        by: By = "magnitude",
        ridge: float = 0.3,
        progress: bool = True,
    ) -> FeatureTerms:
        """k terms ``value (vector . x)^2`` for each output feature (all), chosen on this run.

        Parameters
        ----------
        metric: whose inputs matter
            "euclidean": every direction is as common as another (the paper's). "all": the second moment
            of all tokens that count. "active": of the tokens where the feature is active. Or a Metric.
        by: which terms are the first
            "magnitude", by |value|; "contribution", "variance" or "covariance" of the term on tokens
            where the feature is active (`Eigendecomposition.ordered`). "fit", with metric="active":
            not eigenvectors but the direction whose term explains most of how the feature varies where
            it is active (`tl_bilinear.features.fitted`), and so on for what is left.
        ridge: of the metric

        One eigendecomposition [d, d] a feature, and all tokens' activations of the features. Of "fit"
        two for each term. Raises ValueError for options that do not exist or go together.
        """
        known = self.features
        index = known.numbers(range(known.outputs.n) if features is None else features).reshape(-1)
        return feature_terms(self, index, k, metric, by, ridge=ridge, progress=progress)

    def term_names(self, terms: FeatureTerms, n: int = 3, *, progress: bool = True) -> TermNames:
        """Names of `terms`: n input features that each reads along, and n that look like what it reads.

        Two questions (`tl_bilinear.features.term_names`): with the first an intervention would move
        ``w . x``, the second is what one sees in this text where ``w . x`` is large. One pass over the
        tokens that count. Raises ValueError for input features that have no activations and for terms
        of another width.
        """
        return term_names(self, terms, n, progress=progress)

    def low_rank_correlation(
        self,
        k: int = 10,
        features: Int[Tensor, " m"] | Sequence[int] | None = None,
        *,
        metric: MetricName | Metric = "euclidean",
        by: By = "magnitude",
        ridge: float = 0.3,
        fit: FeatureRun | None = None,
        progress: bool = True,
    ) -> LowRankCorrelation:
        """How well 1 to k terms predict pre-activations, on all and on active tokens (Fig. 9).

        By default the terms are eigenvectors of the layer at ``mlp.hook_in``, after the norm, by
        |eigenvalue|, as the paper's; `metric`, `by` and `ridge` as in `terms`. `fit` is the run that the
        terms are chosen on: give another text than this one wherever they depend on text, or the
        correlation flatters them. About ``2 k m d`` flops a token for m features.

        Raises ValueError where terms depend on text and `fit` is missing.
        """
        known = self.features
        index = known.numbers(range(known.outputs.n) if features is None else features).reshape(-1)
        checks.require_number("ridge", ridge, "is a share of the covariance")
        terms: Any
        if metric == "euclidean" and by == "magnitude":
            terms = known.layer_tensor.interaction(known.directions[index]).eigh(k)
        elif isinstance(metric, Metric) and by == "magnitude":
            terms = known.layer_tensor.interaction(known.directions[index]).eigh(k, metric=metric)
        elif fit is None:
            raise ValueError(
                f"metric={metric!r}, by={by!r} choose terms by a text: give a run of other text as fit= "
                f"(run[:half] and run[half:], say)"
            )
        else:
            terms = feature_terms(fit, index, k, metric, by, ridge=ridge, progress=progress)
        found = low_rank_correlation(index, terms, self._counted(index, progress))
        return replace(found, output_labels=known.outputs.labels_of(index))

    def scatter(self, feature: int, k: int = 2, *, progress: bool = True) -> ActivationScatter:
        """A feature's pre-activation beside its approximation by k eigenvectors, token by token."""
        known = self.features
        feature = known.number(feature)
        eigen = known.layer_tensor.interaction(known.directions[feature]).eigh(k)
        found = activation_scatter(feature, eigen, self._counted([feature], progress))
        return replace(found, output_labels=known.outputs.labels_of([feature]))

    # ------------------------------------------------------------------ by intervention

    def verify_pairs(
        self,
        feature: int,
        pairs: FeaturePairs
        | ActiveInteractions
        | Int[Tensor, "m 2"]
        | Sequence[tuple[int, int]]
        | int = 10,
        *,
        limit: int = 64,
        seed: int = 0,
        progress: bool = True,
    ) -> PairCheck:
        """Check pairs of input features causally: effect predicted from weights against measured.

        Each pair's features are removed from the model's activations one at a time and together, on at
        most `limit` tokens where both are active, with the norm scale held (see `verification`). `pairs`
        may be a number: that many of the strongest cross-interactions of the weights. A feature with
        itself is left out. Random directions of the same length serve as the control.
        """
        known = self.features
        index = known.number(feature)
        checks.require_count("limit", limit, 2**31, "tokens to measure a pair on")
        if isinstance(pairs, int):
            pairs = known.top(index, pairs, kind="cross")
        if isinstance(pairs, FeaturePairs | ActiveInteractions):
            chosen = torch.stack([pairs.first.flatten(), pairs.second.flatten()], 1).tolist()
        else:
            chosen = known.numbers(pairs, "input").reshape(-1, 2).tolist()
        different = [(int(one), int(other)) for one, other in chosen if one != other]
        return check_pairs(self, index, different, limit=limit, seed=seed, progress=progress)


class ReadTokens(NamedTuple):
    """t tokens as features and the rest: ``x s = coefficients @ decoder + rest``, over the scale s.

    run: the sequences, whose mask says which tokens these are
    coefficients: [t, n]; rest: [t, d]; gain: [t], the output dictionary's
    """

    run: FeatureRun
    coefficients: Tensor
    rest: Tensor
    gain: Tensor


# ---------------------------------------------------------------------- running the model


def run_model(
    features: FeatureInteractions,
    text: Any,
    *,
    mask: Tensor | None,
    batch_size: int,
    progress: bool,
) -> FeatureRun:
    """See `FeatureInteractions.run`."""
    checks.require_count("batch_size", batch_size, 2**31, "sequences of a forward")
    refuse_attached(features.model)
    tokens, lengths = tokenise(features.model, text, (features.inputs, features.outputs))
    if mask is None:
        mask = default_mask(features, tokens, lengths)
    else:
        checks.require_mask(mask, tokens.shape)
    parts: list[dict[str, Tensor]] = []
    with tqdm(total=len(tokens), unit="sequence", desc="model", disable=not progress) as bar:
        for rows in tokens.split(batch_size):
            parts.append(_forward(features, rows))
            bar.update(len(rows))
    held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return _run_with(features, tokens, mask, lengths, held, batch_size)


def run_of(
    features: FeatureInteractions,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"],
    batch_size: int,
) -> FeatureRun:
    """The run of a few sequences, all in one forward."""
    return _run_with(features, tokens, mask, lengths, _forward(features, tokens), batch_size)


def _run_with(
    features: FeatureInteractions,
    tokens: Tensor,
    mask: Tensor,
    lengths: Tensor,
    activations: dict[str, Tensor],
    batch_size: int,
) -> FeatureRun:
    held: Any = {"x": activations["hook_activations"]} | activations
    device = held["output"].device
    return FeatureRun(
        features=features,
        tokens=tokens.to(device),
        mask=mask.to(device),
        lengths=lengths.to(device),
        **{"source": None} | held,
        batch_size=batch_size,
    )


def tokenise(
    model: Any, text: Any, dictionaries: Iterable[Dictionary]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Token ids [batch, pos] of text, and how many of each row are not padding.

    With [BOS] in front as the dictionaries were trained. Shorter texts are padded behind. Token ids are
    taken as they are.

    Raises TypeError for what is neither, ValueError where the dictionaries disagree about [BOS].
    """
    if isinstance(text, Tensor):
        if text.ndim not in (1, 2) or text.dtype.is_floating_point or text.dtype == torch.bool:
            raise ValueError(
                f"tokens must be ids [batch, pos] or [pos], got {list(text.shape)} {text.dtype}"
            )
        tokens = text if text.ndim == 2 else text[None]
        if not tokens.numel():
            raise ValueError(f"there are no tokens in a text of shape {list(text.shape)}")
        checks.require_tokens(tokens, model.cfg.d_vocab)
        return tokens, torch.full((len(tokens),), tokens.shape[1])
    texts = (
        [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else [text]
    )
    if not texts or not all(isinstance(each, str) for each in texts):
        raise TypeError(
            f"text is a string, several strings, or token ids [batch, pos], got {text!r:.80}"
        )
    wanted = {d.prepend_bos for d in dictionaries} - {None}
    if len(wanted) > 1:
        raise ValueError(
            "one dictionary was trained with [BOS] in front and one without: give token ids"
        )
    given = {} if not wanted else {"prepend_bos": wanted.pop()}
    rows = [model.to_tokens(each, **given)[0] for each in texts]
    lengths = torch.tensor([len(row) for row in rows])
    if not bool(lengths.all()):
        raise ValueError(f"text {int(lengths.argmin())} has no tokens")
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad), lengths


def default_mask(
    features: FeatureInteractions, tokens: Tensor, lengths: Tensor
) -> Bool[Tensor, "batch pos"]:
    tokenizer = features.model.tokenizer
    special = {getattr(tokenizer, "bos_token_id", None)} - {None}
    for found in (features.inputs, features.outputs):
        special |= special_tokens(tokenizer, found.special_tokens)
    ids = tokens.cpu()
    mask = ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype))
    mask[:, 0] = False
    mask &= torch.arange(ids.shape[1]) < lengths[:, None]
    if (padding := getattr(tokenizer, "pad_token_id", None)) is not None:  # of ids padded elsewhere
        mask &= (ids == padding).flip(1).cumprod(1).flip(1) == 0
    return mask


@torch.no_grad()
def _forward(features: FeatureInteractions, tokens: Tensor) -> dict[str, Tensor]:
    """The activations of some sequences, by name."""
    model, passage, inputs = features.model, features.passage, features.inputs
    encodes = inputs.encoder_hook if inputs.encode is not None else None
    hooks = {"hook_activations": passage.hook, "output": features.output_hook}
    if encodes not in (None, passage.hook):
        hooks["source"] = encodes
    if passage.layer_hook != passage.hook:
        hooks["x"] = passage.layer_hook
    if passage.scale_hook is not None:
        hooks["scale"] = passage.scale_hook
    fired = {name: fires_as(model, hook) for name, hook in hooks.items()}
    if missing := sorted(set(fired.values()) - model.hook_dict.keys()):
        raise ValueError(
            f"the model has no hook {', '.join(missing)}; a HookedTransformer whose MLPs are "
            f"TransformerLens's own has none at the MLP's input: load it as HookedSAETransformer"
        )
    _, cache = model.run_with_cache(
        tokens,
        names_filter=lambda name: name in fired.values(),
        return_type=None,
        stop_at_layer=features.layer + 1,
    )
    found = {name: cache[hook] for name, hook in fired.items()}
    output = found["output"]
    found.setdefault("scale", torch.ones_like(found["hook_activations"][..., :1]))
    reads = features.output == "encoder"
    gain = features.outputs.scale_of(output) if reads else torch.ones_like(output[..., :1])
    return found | {"output_scale": gain[..., 0]}
