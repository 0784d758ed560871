"""A bilinear layer between two dictionaries, as documents of a bundle.

Weights go in whole, as float32: with them the page computes exact sums, spectra and interaction matrices
itself. From text go in, for every token, what the input dictionary saw and which features of both sides
were active. What the page could not compute at once is computed here: strongest pairs over all pairs,
tokens promoted, nearest directions, and which tokens are examples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear.explorer.documents import Document, Panel, Read, packed, unpacked
from tl_bilinear.explorer.whatif import Change, WhatIf, writes_itself
from tl_bilinear.features import Dictionary, FeatureRun
from tl_bilinear.features.chance import PAIRED_AT_RANDOM, paired_at_random
from tl_bilinear.features.examples import Side
from tl_bilinear.features.geometry import unit
from tl_bilinear.features.labels import pieces
from tl_bilinear.features.passage import residual_passage
from tl_bilinear.features.unembedding import token_names, unembedding
from tl_bilinear.hooks.effects import starts_at_blocks
from tl_bilinear.io import digest_of
from tl_bilinear.tensor import (
    BilinearTensor,
    Eigendecomposition,
    InteractionMatrix,
    approximation_note,
)
from tl_bilinear.tensor.grams import pair_gram_tiles

BLOCK = 64  # features in a document
PAIRS, TOKENS, NEIGHBOURS, FEEDS = 20, 10, 8, 12
BEFORE, AFTER = 14, 8  # tokens of an example around its strongest
STRONGEST, QUANTILES, EACH = 6, (0.9, 0.5, 0.1), 2
FULL_SPECTRUM, LEADING = 384, 8  # the page decomposes layers up to this width by itself
SEARCHED_WHOLE = 2048  # input features up to this number are all searched for pairs
SHORTLIST = 256
NEURONS = 512  # that shortlisted input features go through at a time
GRAM = 512  # neurons whose Gram is held at a time
ACTIVATIONS = 2**20  # of a side that are looked at together
CHANCE_DRAWS, CHANCE_DRAWS_WIDE = 4, 1  # of the null of each feature; in layers wider than that
# What if, beforehand: of how many examples, by how many eigenvectors, tokens shown, random changes.
EFFECTS, EFFECT_VECTORS, EFFECT_TOKENS, EFFECT_CONTROLS = 2, 2, 5, 4
SEARCHED = 5  # tokens of each kind that a search finds a feature by


def language_panel(
    run: FeatureRun, *, title: str, facts: Mapping[str, str] | None = None, name: str = "language"
) -> Panel:
    """A panel of the layer and the text of a run.

    Parameters
    ----------
    run: a run whose features may have labels (`FeatureRun.labelled`)
    title: str
    facts: what else is to be said of the model, by name
    name: of the panel, the beginning of its documents' names

    Raises ValueError for input features without activations, of which no token can be taken apart.
    """
    if run.features.inputs.encode is None:
        raise ValueError(
            f"{run.features.inputs!r} has directions but no activations, so no token can be taken "
            f"apart: give an SAE, or Dictionary(..., encode=)"
        )
    note = approximation_note(run.features.layer_tensor)
    said = {} if note is None else {"not the model's own layer": note}
    return _Language(run, title, {**said, **(facts or {})}, name).panel()


@dataclass(frozen=True, eq=False)
class _Active:
    """Which features were active on which tokens: the entries of a sparse matrix.

    tokens, features, values: [m], by token, then feature; starts: [tokens + 1]
    """

    tokens: Int[Tensor, " m"]
    features: Int[Tensor, " m"]
    values: Float[Tensor, " m"]
    starts: Int[Tensor, " t"]

    @classmethod
    def of(cls, parts: Iterator[Tensor], tokens: int) -> _Active:
        """From activations [some, n] of tokens in order."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        first = 0
        for z in parts:
            where = z.nonzero()
            found.append((where[:, 0] + first, where[:, 1], z[where[:, 0], where[:, 1]]))
            first += len(z)
        token, feature, value = (torch.cat(each).cpu() for each in zip(*found, strict=True))
        starts = torch.zeros(tokens + 1, dtype=torch.long)
        starts[1:] = torch.bincount(token, minlength=tokens).cumsum(0)
        return cls(token, feature, value, starts)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """features, tokens, values sorted by feature."""
        order = self.features.argsort(stable=True)
        return self.features[order], self.tokens[order], self.values[order]

    def of_feature(self, feature: int) -> tuple[Tensor, Tensor]:
        """(tokens, values) where one feature was active."""
        features, tokens, values = self.by_feature
        bounds = torch.searchsorted(features, torch.tensor([feature, feature + 1]))
        part = slice(int(bounds[0]), int(bounds[1]))
        return tokens[part], values[part]

    def of_row(self, row: int, length: int) -> Document:
        """The entries of one row of the text, as a document's part."""
        starts = self.starts[row * length : (row + 1) * length + 1]
        part = slice(int(starts[0]), int(starts[-1]))
        return {
            "starts": packed(starts - starts[0]),
            "features": packed(_smallest_integers(self.features[part])),
            "values": packed(self.values[part]),
        }


class _Language:
    """Makes the documents; every method that makes one is named for it."""

    def __init__(self, run: FeatureRun, title: str, facts: dict[str, str], name: str) -> None:
        self.run, self.title, self.facts, self.name = run, title, facts, name
        self.known = run.features
        self.tensor = self.known.hook_tensor
        self.sides: dict[Side, Dictionary] = {
            "output": self.known.outputs,
            "input": self.known.inputs,
        }
        self.rows, self.length = run.tokens.shape

    def panel(self) -> Panel:
        documents: dict[str, Callable[[Read], Document]] = {self._named("layer"): self._layer}
        for side in self.sides:
            for block, part in enumerate(self._blocks(side)):
                documents[self._named(f"{side}-directions-{block}")] = self._directions(side, part)
        documents[self._named("words")] = self._words
        for row in range(self.rows):
            documents[self._named(f"text-{row}")] = self._text(row)
            documents[self._named(f"activations-{row}")] = self._activations(row)
        for block, part in enumerate(self._blocks("output")):
            documents[self._named(f"output-{block}")] = self._outputs(part)
        for block, part in enumerate(self._blocks("input")):
            documents[self._named(f"input-{block}")] = self._inputs(part)
        documents[self._named("table")] = self._table
        return Panel(self._manifest(), documents, self._identity())

    def _named(self, document: str) -> str:
        return f"{self.name}-{document}"

    def _blocks(self, side: Side) -> list[range]:
        n = self.sides[side].n
        return [range(first, min(first + BLOCK, n)) for first in range(0, n, BLOCK)]

    def _identity(self) -> str:
        known, run = self.known, self.run
        weights = {
            "left": self.tensor.left, "right": self.tensor.right, "out": self.tensor.out,
            "directions": known.directions, "inputs": known.input_directions, "tokens": run.tokens,
            "x": run.hook_activations, "mask": run.mask,
        }  # fmt: skip
        labels = [list(side.labels or ()) for side in self.sides.values()]
        return digest_of(weights, {"labels": labels, "manifest": self._manifest()})

    def _manifest(self) -> Document:
        known, tensor = self.known, self.tensor
        return {
            "kind": "language",
            "name": self.name,
            "title": self.title,
            "facts": self.facts,
            "layer": known.layer,
            "input_hook": known.passage.hook,
            "output_hook": known.output_hook,
            "along": known.output,
            "needs_scale": known.passage.needs_scale,
            "d_in": tensor.d_in,
            "d_out": tensor.d_out,
            "d_hidden": tensor.d_hidden,
            "n_in": known.inputs.n,
            "n_out": known.outputs.n,
            "rows": self.rows,
            "row_length": self.length,
            "counted": int(self.run.mask.sum()),
            "block": BLOCK,
            "window": [BEFORE, AFTER],
            "null": {
                "what": PAIRED_AT_RANDOM,
                "draws": CHANCE_DRAWS if self._narrow else CHANCE_DRAWS_WIDE,
            },
        }

    @property
    def _narrow(self) -> bool:
        """Whether the page decomposes the layer by itself."""
        return self.tensor.d_in <= FULL_SPECTRUM

    # ------------------------------------------------------------------ weights

    def _layer(self, read: Read) -> Document:
        tensor = self.tensor
        found: Document = {name: packed(getattr(tensor, name)) for name in ("left", "right", "out")}
        for name in ("bias_left", "bias_right", "bias_out"):
            bias = getattr(tensor, name)
            if bias is not None:
                found[name] = packed(bias)
        if self.known.output == "encoder":
            for name, values in (
                ("- e . b_dec", self.known.outputs.encoder_offset),
                ("b_enc", self.known.outputs.encoder_bias),
            ):
                if values is not None:
                    found.setdefault("constants", {})[name] = packed(values)
        return found

    def _directions(self, side: Side, part: range) -> Callable[[Read], Document]:
        rows = self.known.directions if side == "output" else self.known.input_directions
        return lambda read: {"directions": packed(rows[part.start : part.stop])}

    # ------------------------------------------------------------------ text

    @cached_property
    def _used(self) -> tuple[Tensor, Tensor]:
        """The token ids that occur, and the number of each token among them."""
        used, place = self.run.tokens.cpu().unique(return_inverse=True)
        return used, place

    def _words(self, read: Read) -> Document:
        return {"words": pieces(self.known.model.tokenizer, self._used[0].tolist())}

    @cached_property
    def _active(self) -> dict[Side, _Active]:
        count = self.rows * self.length

        def of(side: Side) -> _Active:
            step = max(1, ACTIVATIONS // (self.length * self.sides[side].n))
            parts = (
                part.activations(side=side).flatten(0, 1)
                for part in (self.run[i : i + step] for i in range(0, self.rows, step))
            )
            return _Active.of(parts, count)

        return {side: of(side) for side in self.sides}

    @cached_property
    def _counted(self) -> Tensor:
        return self.run.mask.cpu().flatten()

    def _text(self, row: int) -> Callable[[Read], Document]:
        def make(read: Read) -> Document:
            return {
                "tokens": packed(self._used[1][row]),
                "length": int(self.run.lengths[row]),
                "counted": packed(self.run.mask[row].to(torch.uint8)),
                "input": self._active["input"].of_row(row, self.length),
                "output": self._active["output"].of_row(row, self.length),
            }

        return make

    def _activations(self, row: int) -> Callable[[Read], Document]:
        return lambda read: activations_document(self.run, row)

    # ------------------------------------------------------------------ features

    def _examples(self, side: Side, feature: int) -> list[list[Any]]:
        """[row, position, activation, quantile] of tokens: the strongest rows, then quantiles."""
        tokens, values = self._active[side].of_feature(feature)
        kept = self._counted[tokens] & (values > 0)
        tokens, values = tokens[kept], values[kept]
        order = values.argsort(descending=True, stable=True)
        tokens, values = tokens[order], values[order]
        chosen: list[tuple[int, float]] = []
        rows: set[int] = set()
        for rank, token in enumerate(tokens.tolist()):
            if token // self.length not in rows:
                rows.add(token // self.length)
                chosen.append((rank, 1.0))
            if len(chosen) == STRONGEST:
                break
        taken = {rank for rank, _ in chosen}
        for quantile in QUANTILES:
            middle = max(0, round((1 - quantile) * (len(tokens) - 1)))
            for rank in range(middle, min(middle + EACH, len(tokens))):
                if rank not in taken:
                    taken.add(rank)
                    chosen.append((rank, quantile))
        return [
            [*divmod(int(tokens[rank]), self.length), float(values[rank]), quantile]
            for rank, quantile in chosen
        ]

    @cached_property
    def _unembedding(self) -> Tensor:
        return unembedding(self.known.model).decoder

    @cached_property
    def _token_names(self) -> list[str]:
        count = len(self._unembedding)
        return token_names(self.known.model, count) or [str(i) for i in range(count)]

    def _promoted(self, side: Side, part: range) -> list[Document]:
        """Tokens that features promote and suppress through the unembedding, as `promoted` says."""
        known = self.known
        rows = self.sides[side].decoder[part.start : part.stop].to(self._unembedding)
        weight = getattr(getattr(known.model.blocks[known.layer], "ln2", None), "w", None)
        before = residual_passage(known.model, known.layer)
        if side == "input" and known.passage.hook == before.layer_hook and weight is not None:
            rows = rows / weight.detach().to(rows)
        logits = rows @ self._unembedding.T
        k = min(TOKENS, logits.shape[1])
        ends = {"promoted": logits.topk(k), "suppressed": logits.topk(k, largest=False)}
        return [
            {
                name: [
                    [self._token_names[token], value]
                    for token, value in zip(
                        end.indices[i].tolist(), end.values[i].tolist(), strict=True
                    )
                ]
                for name, end in ends.items()
            }
            for i in range(len(part))
        ]

    @cached_property
    def _lengths(self) -> dict[Side, Tensor]:
        """Of every direction of the decoders; 1 for one that is zero, as `unit` takes it."""
        lengths = {side: it.decoder.norm(dim=1) for side, it in self.sides.items()}
        return {side: torch.where(each > 0, each, 1.0) for side, each in lengths.items()}

    def _neighbours(self, side: Side, part: range) -> list[Document]:
        """Nearest and most opposed directions of the decoder."""
        rows = self.sides[side].decoder
        cosines = (unit(rows[part.start : part.stop]) @ rows.T) / self._lengths[side]
        own = torch.arange(len(part))
        cosines[own, own + part.start] = 0.0
        k = min(NEIGHBOURS, cosines.shape[1])
        near, lowest = cosines.topk(k), cosines.min(1)
        return [
            {
                "neighbours": _numbered(near.indices[i], near.values[i]),
                "opposite": [int(lowest.indices[i]), float(lowest.values[i])],
            }
            for i in range(len(part))
        ]

    def _outputs(self, part: range) -> Callable[[Read], Document]:
        def make(read: Read) -> Document:
            known = self.known
            Q = known.interaction(list(part), basis="activations")
            eigen = Q.eigh(None if self._narrow else min(LEADING, self.tensor.d_in))
            null = None if self._narrow else self._null_spectra(part)
            pairs = self._pairs(part, Q, eigen)
            model = self.run.preactivations(list(part)).flatten(0, 1).cpu()
            if self._what is not None:
                own = eigen
                if known.layer_tensor is not self.tensor:
                    directions = known.directions[part.start : part.stop]
                    own = known.layer_tensor.interaction(directions).eigh(EFFECT_VECTORS)
                self._what.prepare(list(part), own, EFFECT_VECTORS)
            found = []
            for i, feature in enumerate(part):
                examples = self._examples("output", feature)
                one: Document = {
                    "feature": feature,
                    "examples": examples,
                    "measured": packed(self._measured(model[:, i], examples)),
                    "pairs": pairs[i],
                    "norm": float(self._norms[feature]),
                    "eigenvalues": packed(eigen.values[i]),
                }
                if self._what is not None:
                    one["effects"] = self._effects(feature, examples)
                if null is not None:
                    one["eigenvectors"] = packed(eigen.vectors[i])
                    one["null_eigenvalues"] = packed(null.values[i])
                    one["chance"] = _ratio(
                        eigen.values[i, 0].abs() / self._norms[feature],
                        null.values[i, 0].abs() / self._null_norms[feature],
                    )
                found.append(one)
            return {"features": self._with_directions("output", part, found)}

        return make

    @cached_property
    def _null(self) -> BilinearTensor:
        """One draw of the null, the same for all features; each reads it along its own direction.

        A feature's own null, and not one for all: where few neurons write a feature, any pairing leaves
        it concentrated (in the model that ships, the null of a feature holds 0.19 to 0.41 of its form).
        """
        return paired_at_random(self.tensor, torch.Generator().manual_seed(0))

    def _null_spectra(self, part: range) -> Eigendecomposition:
        """Leading eigenvalues of output features by chance, in a layer too wide for all of them."""
        directions = self.known.directions[part.start : part.stop]
        return self._null.interaction(directions).eigh(min(LEADING, self.tensor.d_in))

    @cached_property
    def _what(self) -> WhatIf | None:
        """None where it would take long: many features, or a model that cannot start at a block."""
        if self.known.outputs.n > SEARCHED_WHOLE or not starts_at_blocks(self.known.model):
            return None
        return WhatIf(self.run, controls=EFFECT_CONTROLS, changed=EFFECT_TOKENS)

    def _effects(self, feature: int, examples: list[list[Any]]) -> list[Document]:
        """Changes at the strongest examples: eigenvectors, the feature, its strongest pair there."""
        assert self._what is not None
        found = []
        for row, position, _, quantile in examples[:EFFECTS]:
            if quantile != 1:
                continue
            changes = [Change("eigen", factor, k=EFFECT_VECTORS) for factor in (0.0, 2.0)]
            if writes_itself(self.run):
                changes.append(Change("feature", 0.0))
            pair = self._what.strongest_pair(feature, row, position)
            if pair is not None:
                changes.append(Change("pair", 0.0, first=pair[0], second=pair[1]))
            effects = self._what.effects(feature, row, position, changes)
            found.append({"row": row, "position": position, "effects": effects})
        return found

    def _pairs(
        self, part: range, Q: InteractionMatrix, eigen: Eigendecomposition
    ) -> list[Document]:
        """The strongest pairs of a block's features: of all, or in a large dictionary of a shortlist."""
        known, n = self.known, self.known.inputs.n
        if n <= SEARCHED_WHOLE and self._narrow:
            pairs = known.top(list(part), min(PAIRS, n * (n + 1) // 2))
            return [
                {
                    "first": packed(_smallest_integers(pairs.first[i])),
                    "second": packed(_smallest_integers(pairs.second[i])),
                    "coefficient": packed(pairs.coefficients[i]),
                }
                for i in range(len(part))
            ]
        return self._shortlisted(Q, eigen)

    @cached_property
    def _norms(self) -> Tensor:
        """``||Q||_F`` of every output feature: the Gram is the costly part, and the same for all."""
        return norms_along(self.known.directions, self.tensor)

    @cached_property
    def _null_norms(self) -> Tensor:
        return norms_along(self.known.directions, self._null)

    def _shortlisted(self, Q: InteractionMatrix, eigen: Eigendecomposition) -> list[Document]:
        """For each matrix, the strongest pairs among the `SHORTLIST` input features of largest reach.

        With ``reach_b^2 = sum |lambda| (v . d_b)^2 + bound |rest of d_b|^2``, no pair is larger than
        ``reach_b reach_c``. Where this shuts out every pair beyond the shortlist, the result is that of
        a search over all; `searched` then says so.
        """
        rows = self.known.input_directions
        lengths = rows.square().sum(1)
        lists, beyond = [], []
        for vectors, values, bound in zip(eigen.vectors, eigen.values, eigen.bound, strict=True):
            along = (rows @ vectors.T).square()
            rest = (lengths - along.sum(1)).clamp_min(0)
            reach = (along @ values.abs() + bound * rest).sqrt()
            order = reach.argsort(descending=True)
            lists.append(order[:SHORTLIST].sort().values)
            left_out = order[SHORTLIST:][:1]
            beyond.append(2 * float(reach[order[0]] * reach[left_out]) if len(left_out) else 0.0)
        chosen = torch.stack(lists)
        first, second = torch.triu_indices(chosen.shape[1], chosen.shape[1])
        found = []
        for members, half, shut_out in zip(chosen, self._among(chosen, Q), beyond, strict=True):
            values = torch.where(first == second, 0.5, 1.0) * (half + half.T)[first, second]
            best = values.abs().topk(min(PAIRS, len(values))).indices
            all_of_them = shut_out <= float(values[best[-1]].abs())
            found.append(
                {
                    "first": packed(_smallest_integers(members[first[best]])),
                    "second": packed(_smallest_integers(members[second[best]])),
                    "coefficient": packed(values[best]),
                    "searched": len(rows) if all_of_them else len(members),
                }
            )
        return found

    def _among(self, chosen: Int[Tensor, "n m"], Q: InteractionMatrix) -> Float[Tensor, "n m m"]:
        """``(left d_b * p) . (right d_c)`` of each matrix's chosen features, some neurons at a time.

        Directions go through the factors once for all matrices, and are not kept: in a large layer they
        would take more memory than its weights.
        """
        members, places = chosen.unique(return_inverse=True)
        rows = self.known.input_directions[members]
        found = rows.new_zeros(*chosen.shape, chosen.shape[1])
        for neurons in torch.arange(self.tensor.d_hidden).split(NEURONS):
            part = slice(int(neurons[0]), int(neurons[-1]) + 1)
            left, right = rows @ self.tensor.left[part].T, rows @ self.tensor.right[part].T
            for into, at, weights in zip(found, places, Q.weights[:, part], strict=True):
                into.addmm_(left[at] * weights, right[at].T)
        return found

    def _measured(self, model: Tensor, examples: list[list[Any]]) -> Tensor:
        """The model's own pre-activations on the tokens of examples [examples, window]; NaN outside."""
        values = torch.full((len(examples), BEFORE + 1 + AFTER), torch.nan)
        for i, (row, position, *_) in enumerate(examples):
            for j, at in enumerate(range(position - BEFORE, position + AFTER + 1)):
                if 0 <= at < self.length:
                    values[i, j] = model[row * self.length + at]
        return values

    def _with_directions(self, side: Side, part: range, found: list[Document]) -> list[Document]:
        extra = zip(self._promoted(side, part), self._neighbours(side, part), strict=True)
        return [one | more[0] | more[1] for one, more in zip(found, extra, strict=True)]

    def _inputs(self, part: range) -> Callable[[Read], Document]:
        def make(read: Read) -> Document:
            rows = self.known.input_directions[part.start : part.stop]
            own = self.known.hook_tensor.parts().interaction(rows) @ self.known.directions.T
            k = min(FEEDS, own.shape[1])
            strongest = own.abs().topk(k).indices
            met = self._met(read)
            found = [
                {
                    "feature": feature,
                    "examples": self._examples("input", feature),
                    # Output features, with d Q d^T: what the feature by itself makes of each.
                    "own": _numbered(strongest[i], own[i, strongest[i]]),
                    # [output feature, other input feature, coefficient]
                    "crossed": met.get(feature, [])[:FEEDS],
                }
                for i, feature in enumerate(part)
            ]
            return {"features": self._with_directions("input", part, found)}

        return make

    def _met(self, read: Read) -> dict[int, list[list[Any]]]:
        """For each input feature, the cross pairs that it is in among output features' strongest."""
        if not hasattr(self, "_crossed"):
            crossed: dict[int, list[list[Any]]] = defaultdict(list)
            for one in self._written(read, "output"):
                first, second, coefficients = (
                    unpacked_list(one["pairs"][name]) for name in ("first", "second", "coefficient")
                )
                for b, c, value in zip(first, second, coefficients, strict=True):
                    if b != c:
                        crossed[int(b)].append([one["feature"], int(c), value])
                        crossed[int(c)].append([one["feature"], int(b), value])
            for pairs in crossed.values():
                pairs.sort(key=lambda pair: -abs(pair[2]))
            self._crossed = crossed
        return self._crossed

    def _written(self, read: Read, side: Side) -> Iterator[Document]:
        for block in range(len(self._blocks(side))):
            yield from read(self._named(f"{side}-{block}"))["features"]

    # ------------------------------------------------------------------ the table

    def _table(self, read: Read) -> Document:
        return {side: self._columns(side, read) for side in self.sides}

    def _columns(self, side: Side, read: Read) -> Document:
        n, known = self.sides[side].n, self.sides[side]
        active = self._active[side]
        kept = self._counted[active.tokens]
        counts = torch.bincount(active.features[kept], minlength=n)
        largest = torch.zeros(n).scatter_reduce_(
            0, active.features[kept], active.values[kept].float(), "amax"
        )
        columns: dict[str, list[Any]] = defaultdict(list)
        for one in self._written(read, side):
            columns["promoted"].append([word for word, _ in one["promoted"][:SEARCHED]])
            columns["opposite"].append(one["opposite"][0])
            columns["opposite_cosine"].append(one["opposite"][1])
            if side == "input":
                columns["own_output"].append(one["own"][0][0])
                columns["own_value"].append(one["own"][0][1])
                continue
            values = unpacked_list(one["eigenvalues"])
            squares = sorted((value * value for value in values), reverse=True)
            columns["largest"].append(max(values))
            columns["lowest"].append(min(values))
            columns["share"].append(sum(squares[:2]) / one["norm"] ** 2 if one["norm"] else 0.0)
            columns["norm"].append(one["norm"])
            if "chance" in one:
                columns["chance"].append(one["chance"])
            for name in ("first", "second", "coefficient"):
                columns[name].append(unpacked_list(one["pairs"][name])[0])
        if side == "output" and self._narrow:
            columns["chance"] = self._over_chance()
        found: Document = {
            "labels": list(known.labels) if known.labels is not None else None,
            "count": packed(counts),
            "strongest": packed(largest),
            "promoted": columns.pop("promoted"),
        }
        return found | {name: packed(torch.tensor(values)) for name, values in columns.items()}

    def _over_chance(self) -> list[float]:
        """``|lambda_1| / ||Q||_F`` of every output feature, over its mean in a few draws of the null."""
        found = self.known.spectrum_chance(
            range(self.known.outputs.n), draws=CHANCE_DRAWS, rate=0.5, progress=False
        )
        pairs = zip(found.concentration, found.null_concentration, strict=True)
        return [_ratio(own, null) for own, null in pairs]


def activations_document(run: FeatureRun, row: int) -> Document:
    """What one row's tokens are made of, at the input dictionary's hook.

    ``x [length, d]``, ``scale`` and ``gain [length]``, and the named parts of x beside the features: a
    shared vector times a number of each token, or a vector of each token. What is left is "error".
    """
    part = run[row]
    source = None if part.source is None else part.source[0]
    x = part.hook_activations[0]
    reading = run.features.inputs.read(x, source)
    rest: list[Document] = []
    for name, values in reading.rest.items():
        if name == "error":
            continue
        shared = values[0]
        factors = (values @ shared) / shared.square().sum().clamp_min(1e-30)
        if torch.allclose(factors[:, None] * shared, values, rtol=1e-6, atol=0):
            rest.append({"name": name, "vector": packed(shared), "factors": packed(factors)})
        else:
            rest.append({"name": name, "vectors": packed(values)})
    return {
        "x": packed(x),
        "scale": packed(part.scale[0, :, 0]),
        "gain": packed(part.output_scale[0]),
        "rest": rest,
    }


def sparse_document(z: Float[Tensor, "t n"]) -> Document:
    """Activations of some tokens as a document's part: starts [t + 1], features and values."""
    return _Active.of(iter([z]), len(z)).of_row(0, len(z))


def unpacked_list(array: Document) -> list[Any]:
    """The entries of a flat array of the format."""
    found: list[Any] = unpacked(array).tolist()
    return found


def norms_along(directions: Float[Tensor, "n d_out"], layer: BilinearTensor) -> Float[Tensor, " n"]:
    """``||Q_u||_F`` of many u, in float64: ``||Q_u||^2 = u^T G u``, G the Gram of the layer's outputs.

    The Gram of hidden neurons that G is made of is met in squares, so that memory holds little of it.
    """
    left, right, out = (each.split(GRAM, dim) for each, dim in (
        (layer.left, 0), (layer.right, 0), (layer.out, 1),
    ))  # fmt: skip
    gram: Tensor = torch.zeros(layer.d_out, layer.d_out, dtype=torch.double)
    for i in range(len(out)):
        for j in range(i, len(out)):
            for rows, tile in pair_gram_tiles(left[i], right[i], left[j], right[j]):
                half = out[i][:, rows].double() @ tile.double() @ out[j].double().T
                gram += half if i == j else 2 * half  # as a form: half stands for its transpose
    squares = [((u.double() @ gram) * u).sum(1) for u in directions.split(GRAM)]
    return torch.cat(squares).clamp_min(0).sqrt()


def _ratio(own: Tensor, null: Tensor) -> float:
    """What own is of null; 0 where there is none."""
    ratio = float(own) / float(null) if float(null) > 0 else 0.0
    return ratio if math.isfinite(ratio) else 0.0


def _smallest_integers(numbers: Tensor) -> Tensor:
    """Feature numbers as 16 bits where they fit: a text is full of them."""
    fit = not numbers.numel() or int(numbers.max()) < 2**15
    return numbers.to(torch.int16 if fit else torch.int32)


def _numbered(index: Tensor, values: Tensor) -> list[list[Any]]:
    return [list(pair) for pair in zip(index.tolist(), values.tolist(), strict=True)]
