"""Why a head attends: its scores as a form of two inputs between two dictionaries, from weights alone.

The score of a query token with residual stream r_i and a key token with r_j,

    ``score(i, j) = scale (x_i W_Q + b_Q) R(i - j) (x_j W_K + b_K)^T``,  ``x = (r A) / s + c``,

is a form of two inputs of rank d_head (`TwoInputForm`): A and c are the norm before attention, s its
scale, R the rotation of rotary positions. Between dictionaries of what the two tokens carry it says
which pairs (query feature, key feature) raise or lower the score, at each offset:

>>> head = AttentionInteractions(model, 1, 4, sae)         # one dictionary for both tokens, or two
>>> head.top(20, offset=1).to_pandas()                     # the strongest pairs, one token apart
>>> head.profile(head.top(5), range(32))                   # the same pairs at every offset
>>> head.singular(4)                                       # what is matched with what, in directions
>>> run = head.run("the cat sat on the mat")
>>> run.score(5, 4).to_pandas(10)                          # that score as an exact sum over pairs

Every TransformerLens model whose scores are made so is read (`models.heads`), a bilinear one or not; the
others are refused by name. Reading is checked: the form must make all scores of a run on a few tokens.

**Up to positive factors.** A dictionary of the residual stream holds up to ``1 / s`` of each token, a
head with QK-norm up to ``1 / s`` of its queries and keys. Signs hold, and the order of pairs of two
given tokens. On a prompt all scales are the run's, frozen, and the sum is exact.

**What a score is not.** Softmax compares all scores of a query. A sum over pairs explains a score, or
the difference of two, which is the logarithm of the ratio of two attention weights: never one weight
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_bilinear import checks
from tl_bilinear.circuits.attention_run import AttentionRun, whole_scores
from tl_bilinear.circuits.residual import writes_before_attention
from tl_bilinear.features.chance import random_rotation
from tl_bilinear.features.dictionary import Dictionary
from tl_bilinear.features.passage import Passage, attention_passages, refuse_attached
from tl_bilinear.models.heads import (
    AttentionHead,
    UnreadAttention,
    architecture,
    read_head,
    sample_tokens,
    through_norm,
    tolerance,
)
from tl_bilinear.results import Result
from tl_bilinear.tensor import SVD, PairMatrix, TwoInputForm
from tl_bilinear.tensor.factors import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class AttentionPairs(Result):
    """The strongest pairs of a query feature with a key feature of one head, strongest first.

    Attributes
    ----------
    layer, head: whose; offset: query position less key position
    query, key: [k], numbers of features
    coefficients: [k], what stands before the product of their activations in the score
    query_labels, key_labels: [k] names
    """

    _finite = ("coefficients",)

    layer: int
    head: int
    offset: int
    query: Int[Tensor, " k"]
    key: Int[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    query_labels: list[str]
    key_labels: list[str]

    def top(self, k: int) -> AttentionPairs:
        """The first k of them."""
        checks.require_count("k", k, len(self.query), "the pairs held")
        names = ("query", "key", "coefficients", "query_labels", "key_labels")
        return replace(self, **{name: getattr(self, name)[:k] for name in names})

    def to_pandas(self) -> pandas.DataFrame:
        """One row a pair: query, key, their labels, coefficient."""
        import pandas as pd

        return pd.DataFrame(
            {
                "query": self.query.tolist(),
                "key": self.key.tolist(),
                "label_query": self.query_labels,
                "label_key": self.key_labels,
                "coefficient": self.coefficients.tolist(),
            }
        )


@dataclass(frozen=True, eq=False)
class OffsetProfile(Result):
    """Coefficients of some pairs of features at several offsets.

    Attributes
    ----------
    layer, head: whose
    offsets: [m], query position less key position
    coefficients: [pairs, m]; labels: of the pairs, query x key
    """

    layer: int
    head: int
    offsets: Int[Tensor, " m"]
    coefficients: Float[Tensor, "pairs m"]
    labels: list[str]

    def to_pandas(self) -> pandas.DataFrame:
        """One row an offset, one column a pair."""
        import pandas as pd

        columns = dict(zip(self.labels, self.coefficients.tolist(), strict=True))
        return pd.DataFrame(columns, index=pd.Index(self.offsets.tolist(), name="offset"))


@dataclass(frozen=True, eq=False)
class HeadDirections(Result):
    """Singular directions of a head's form, and the features that lie along them.

    Attributes
    ----------
    layer, head, offset: of which form
    svd: query directions (left) and key directions (right), in the space of each dictionary's hook
    query_features, key_features: [k, m], the features of largest cosine with each direction, in size
    query_cosines, key_cosines: [k, m], decoder row with direction. Within a pair both signs may be
        changed together
    query_labels, key_labels: k lists of m names
    """

    layer: int
    head: int
    offset: int
    svd: SVD
    query_features: Int[Tensor, "k m"]
    key_features: Int[Tensor, "k m"]
    query_cosines: Float[Tensor, "k m"]
    key_cosines: Float[Tensor, "k m"]
    query_labels: list[list[str]]
    key_labels: list[list[str]]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a direction, side and feature: number, value, share, side, feature, label, cosine."""
        import pandas as pd

        table = self.svd.to_pandas()
        rows = []
        for i, (value, share) in enumerate(table.itertuples(index=False)):
            for side in ("query", "key"):
                names = getattr(self, f"{side}_labels")[i]
                numbers = getattr(self, f"{side}_features")[i].tolist()
                cosines = getattr(self, f"{side}_cosines")[i].tolist()
                rows += [
                    (i, value, share, side, *each)
                    for each in zip(numbers, names, cosines, strict=True)
                ]
        names = ["direction", "value", "share", "side", "feature", "label", "cosine"]
        return pd.DataFrame(rows, columns=names)


@dataclass(frozen=True, eq=False)
class SelfScores(Result):
    """Coefficients of features with themselves, and their place among all keys of the same query.

    Attributes
    ----------
    layer, head, offset: of which form
    coefficients: [n], of feature i as query with feature i as key
    places: [n], share of keys that the query scores no higher. By chance it is 0.5 on average, whatever
        the scales: a head that looks for what is the same (duplicate tokens, induction) is near 1, one
        that avoids it near 0
    """

    layer: int
    head: int
    offset: int
    coefficients: Float[Tensor, " n"]
    places: Float[Tensor, " n"]

    @property
    def mean_place(self) -> float:
        return float(self.places.mean())

    @property
    def first(self) -> float:
        """Share of queries whose own key is the strongest of all; 1 / n by chance."""
        return float((self.places == 1).double().mean())

    def to_pandas(self) -> pandas.DataFrame:
        """One row: mean place, share that is first, and both by chance."""
        import pandas as pd

        return pd.DataFrame(
            {
                "mean place": [self.mean_place],
                "by chance": [0.5],
                "own key first": [self.first],
                "first by chance": [1 / len(self.places)],
            }
        )


@dataclass(frozen=True, eq=False)
class PairsChance(Result):
    """The strongest pairs of a head beside those of dictionaries that the head was not made for.

    Attributes
    ----------
    pairs: the pairs
    null: [draws, k], sizes of the strongest coefficients, the key dictionary rotated at random
    """

    pairs: AttentionPairs
    null: Float[Tensor, "draws k"]

    @property
    def p(self) -> Float[Tensor, " k"]:
        """[k], how often the strongest pair of a rotated dictionary is as strong as this: family-wise.

        Never below 1 / (draws + 1).
        """
        largest = self.null[:, 0]
        above = (largest[None] >= self.pairs.coefficients.abs()[:, None]).sum(1)
        return (1 + above) / (1 + len(largest))

    def to_pandas(self) -> pandas.DataFrame:
        """The pairs, with the mean of the null at their rank and their p."""
        table = self.pairs.to_pandas()
        table["null at this rank"] = self.null.mean(0).tolist()
        table["p"] = self.p.tolist()
        return table


class AttentionInteractions:
    """The score of one attention head between two dictionaries.

    Parameters
    ----------
    model: any HookedTransformer or TransformerBridge (or SAELens's of either)
    layer, head: int
        From 0; negative from the end.
    dictionary_query: SAE, Dictionary or matrix [n, d_model]
        Its decoder rows are the query features. At ``blocks.L.hook_resid_pre`` (or a copy of it:
        `hook_q_input`, `hook_attn_in`, the last layer's `hook_resid_post`), where a bare matrix is
        taken to be; at ``ln1.hook_normalized``; or at what is written into the residual stream before:
        `hook_embed`, an earlier layer's `hook_mlp_out`, `through_head` (then along the direct path).
    dictionary_key: optional
        Of the key tokens; the same by default.

    Attributes
    ----------
    reading: AttentionHead, the head's weights, positions, norms and scale, in float64
    query, key: Dictionary
    query_passage, key_passage: from each dictionary's hook to the input of attention

    Raises IndexError for a head that does not exist; UnreadAttention (a ValueError) for a model whose
    scores are not made in this way, by name; ValueError for a dictionary that does not fit.
    """

    def __init__(
        self, model: Any, layer: int, head: int, dictionary_query: Any, dictionary_key: Any = None
    ) -> None:
        refuse_attached(model)
        self.model = model
        if not hasattr(model, "blocks"):
            raise UnreadAttention(
                f"attention scores of {architecture(model)} are not read: it has no blocks (an "
                f"encoder and a decoder, or no transformer)"
            )
        self.layer = _existing(layer, len(model.blocks), "layer")
        self.head = _existing(head, model.cfg.n_heads, "head")
        self.query = Dictionary.of(dictionary_query)
        self.key = self.query if dictionary_key is None else Dictionary.of(dictionary_key)
        self.query_passage, self.query_direct = self._passage("query", self.query)
        self.key_passage, self.key_direct = self._passage("key", self.key)
        tokens = sample_tokens(model)
        self.reading: AttentionHead = read_head(model, self.layer, self.head, tokens)
        self._check(tokens)

    def _passage(self, side: str, dictionary: Dictionary) -> tuple[Passage, bool]:
        """What lies between a dictionary and attention, and whether it is upstream of that."""
        passages = attention_passages(self.model, self.layer)
        here = f"blocks.{self.layer}.hook_resid_pre"
        if dictionary.d != self.model.cfg.d_model:
            raise ValueError(
                f"dictionary_{side} has width {dictionary.d}, the residual stream "
                f"{self.model.cfg.d_model}"
            )
        if dictionary.hook is None:
            return passages[here], False
        if dictionary.hook in passages:
            return passages[dictionary.hook], False
        if writes_before_attention(dictionary, self.layer):
            return passages[here], True
        raise ValueError(
            f"dictionary_{side} is at {dictionary.hook!r}, which attention of layer {self.layer} does "
            f"not read: give one at {', '.join(sorted({p.hook for p in passages.values()}))}, or of "
            f"what is written into the residual stream before"
        )

    def _check(self, tokens: Tensor) -> None:
        """Raise UnreadAttention where the form does not make the scores of a run."""
        made, measured = whole_scores(self, tokens)
        seen = measured.isfinite() & (measured > -1e30)
        error = float((made - measured)[seen].abs().max() / measured[seen].abs().max())
        if not error < tolerance(self.model):
            raise UnreadAttention(
                f"attention scores of {architecture(self.model)} (layer {self.layer}, head {self.head}) "
                f"are not read: queries and keys are not made of {self.query_passage.hook} by its norm "
                f"and weights alone (scores are off by {error:.1e})"
            )

    def __repr__(self) -> str:
        return (
            f"AttentionInteractions(head {self.reading.name}: {self.query.n} query features at "
            f"{self.query.hook or self.query_passage.hook}, {self.key.n} key features at "
            f"{self.key.hook or self.key_passage.hook}; {self.positions})"
        )

    @property
    def positions(self) -> str:
        """How the head knows positions, in words."""
        rotary, (_, slope, _) = self.reading.rotary, self.reading.position
        if rotary is not None:
            pairs = "adjacent" if rotary.adjacent else "half-rotated"
            return f"rotary, {2 * len(rotary.frequencies)} coordinates, {pairs}"
        return f"ALiBi, slope {slope:.3g}" if slope else "none of its own"

    # ------------------------------------------------------------------ the form

    def form(self, offset: int = 0, *, scales: tuple[float, float] = (1.0, 1.0)) -> TwoInputForm:
        """The score at an offset as a form of both tokens' activations at the dictionaries' hooks.

        Activations are over the norm's scale, where the hook lies before the norm. Biases, of the norm
        too, are the form's.

        scales: of the queries' and keys' own norms (QK-norm); the pairs hold up to their product
        """
        head, ((W_Q, b_Q), (W_K, b_K)) = self.reading, self._normed(scales)
        if head.rotary is not None:
            W_Q, b_Q = head.rotary.by(W_Q, offset), head.rotary.by(b_Q, offset)
        constant = -head.position[1] * offset
        return TwoInputForm(
            W_Q.T.contiguous(),
            W_K.T.contiguous(),
            W_Q.new_full((1, W_Q.shape[1]), head.scale),
            b_Q if bool(b_Q.any()) else None,
            b_K if bool(b_K.any()) else None,
            None if constant == 0 else W_Q.new_full((1,), constant),
            left_space=self.query_passage.hook,
            right_space=self.key_passage.hook,
            output_space=f"score of head {head.name} at offset {offset}",
        ).to(checks.compute_dtype(self.query.decoder.dtype))

    def side(self, side: str) -> tuple[Float[Tensor, "d d_head"], Float[Tensor, " d_head"]]:
        """What maps activations at a dictionary's hook, over the norm's scale, to queries or keys."""
        head = self.reading
        passage = self.query_passage if side == "query" else self.key_passage
        weight, bias = (head.W_Q, head.b_Q) if side == "query" else (head.W_K, head.b_K)
        if passage.offset is not None:
            bias = bias + passage.offset.to(weight) @ weight
        return (weight if passage.matrix is None else passage.matrix.to(weight) @ weight), bias

    def _normed(
        self, scales: tuple[float, float]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weights and biases of queries and keys, their own norms included, before positions."""
        head = self.reading
        return (
            through_norm(head.q_norm, *self.side("query"), scales[0]),
            through_norm(head.k_norm, *self.side("key"), scales[1]),
        )

    def matrix(self, offset: int = 0) -> PairMatrix:
        """The pairs of the form: [d_query, d_key] at the hooks, of rank d_head."""
        return self.form(offset).matrix()

    # ------------------------------------------------------------------ from weights

    def top(self, k: int = 20, offset: int = 0) -> AttentionPairs:
        """The k pairs (query feature, key feature) of largest absolute coefficient, exact.

        Of all pairs of the two dictionaries; most are never computed (`PairMatrix.top`).
        """
        checks.require_int("offset", offset)
        found = self.matrix(offset).top(k, left=self._rows("query"), right=self._rows("key"))
        return AttentionPairs(
            self.layer,
            self.head,
            offset,
            found.first,
            found.second,
            found.coefficients,
            [self.query.label(i) for i in found.first.tolist()],
            [self.key.label(j) for j in found.second.tolist()],
        )

    def profile(
        self,
        pairs: AttentionPairs | Sequence[tuple[int, int]],
        offsets: Iterable[int] = range(32),
    ) -> OffsetProfile:
        """Coefficients of chosen pairs at several offsets (the same at all without rotary positions).

        pairs: of `top`, or (query feature, key feature) numbers

        Raises IndexError for features that do not exist.
        """
        if isinstance(pairs, AttentionPairs):
            chosen = list(zip(pairs.query.tolist(), pairs.key.tolist(), strict=True))
        else:
            chosen = [(int(a), int(b)) for a, b in pairs]
        if not chosen:
            raise ValueError("a profile is of at least one pair: (query feature, key feature)")
        numbers = []
        for index, dictionary, name in ((0, self.query, "query"), (1, self.key, "key")):
            given = torch.tensor([pair[index] for pair in chosen], dtype=torch.long)
            numbers.append(
                checks.require_index(
                    name, given, dictionary.n, f"{name} features", dictionary.decoder
                )
            )
        listed = [checks.require_int("an offset", offset) for offset in offsets]
        (W_Q, _), (W_K, _) = self._normed((1.0, 1.0))
        rows = [
            self._rows(side)[index].double()
            for side, index in zip(("query", "key"), numbers, strict=True)
        ]
        q, k, rotary = self.reading.scale * (rows[0] @ W_Q), rows[1] @ W_K, self.reading.rotary
        columns = [
            ((q if rotary is None else rotary.by(q, offset)) * k).sum(1) for offset in listed
        ]
        labels = [
            f"{self.query.label(a)} x {self.key.label(b)}"
            for a, b in zip(*(n.tolist() for n in numbers), strict=True)
        ]
        return OffsetProfile(
            self.layer, self.head, torch.tensor(listed), torch.stack(columns, 1).float(), labels
        )

    def singular(self, k: int = 4, offset: int = 0, features: int = 5) -> HeadDirections:
        """The k leading singular pairs of the form, with the features most aligned to each direction."""
        svd = self.matrix(offset).svd(k)
        found: list[Any] = []
        for name, dictionary, directions in (
            ("query", self.query, svd.left),
            ("key", self.key, svd.right),
        ):
            checks.require_count("features", features, dictionary.n, "the features")
            rows = torch.nn.functional.normalize(self._rows(name), dim=1)
            cosines = directions @ rows.T
            chosen = cosines.abs().topk(features).indices
            names = [[dictionary.label(i) for i in row] for row in chosen.tolist()]
            found.append((chosen, cosines.gather(1, chosen), names))
        (q, q_cosines, q_names), (key, key_cosines, key_names) = found
        return HeadDirections(
            self.layer, self.head, offset, svd, q, key, q_cosines, key_cosines, q_names, key_names
        )

    def self_scores(self, offset: int = 1) -> SelfScores:
        """Features with themselves: does the head look for what is the same, or avoid it?

        Of two dictionaries of one size, feature i of the one with feature i of the other (a token, and
        the same token carried by an earlier head). Raises ValueError for other sizes.
        """
        if self.query.n != self.key.n:
            raise ValueError(
                f"feature i is compared with feature i: the dictionaries have {self.query.n} and "
                f"{self.key.n} features"
            )
        M = self.form(offset).matrix()
        q = self._rows("query") @ M.left.T * M.weights
        k = self._rows("key") @ M.right.T
        own = (q * k).sum(1)
        places = torch.empty_like(own)
        step = max(1, BLOCK_ELEMENTS // len(k))
        for start in range(0, len(q), step):
            rows = slice(start, start + step)
            block = q[rows] @ k.T
            index = torch.arange(start, start + len(block), device=q.device)
            block[torch.arange(len(block)), index] = own[rows]  # rounded alike
            places[rows] = (block <= own[rows, None]).to(own).mean(1)
        return SelfScores(self.layer, self.head, offset, own, places)

    def chance(
        self,
        k: int = 20,
        offset: int = 0,
        *,
        draws: int = 19,
        seed: int = 0,
        progress: bool = True,
    ) -> PairsChance:
        """The k strongest pairs beside those that the head makes of dictionaries it was not made for.

        The key features are rotated together at random: their lengths and angles are kept, and the head;
        what is tested is that it knows *these* directions. One search a draw.
        """
        checks.require_count("draws", draws, 10**6, "draws of the null")
        pairs = self.top(k, offset)
        M, rows, keys = self.matrix(offset), self._rows("query"), self._rows("key")
        generator = checks.generator(seed)
        null = []
        for _ in tqdm(range(draws), unit="draw", disable=not progress):
            rotation = random_rotation(keys.shape[1], generator).to(keys)
            null.append(M.top(k, left=rows, right=keys @ rotation).coefficients.abs())
        return PairsChance(pairs, torch.stack(null))

    def _rows(self, side: str) -> Float[Tensor, "n d"]:
        rows = (self.query if side == "query" else self.key).decoder.detach()
        return rows.to(checks.compute_dtype(self.query.decoder.dtype))

    # ------------------------------------------------------------------ on a prompt

    def run(self, tokens: Tensor | str) -> AttentionRun:
        """The head on one prompt: its scores as sums over pairs (`circuits.attention_run`).

        tokens: [pos] or [1, pos], or text. Raises ValueError for a batch, and for a dictionary that has
        directions but no activations.
        """
        return AttentionRun(self, tokens)


def _existing(index: int, count: int, what: str) -> int:
    checks.require_int(what, index)
    if not -count <= index < count:
        raise IndexError(f"{what} {index} does not exist: there are {count} (0 to {count - 1})")
    return index % count
