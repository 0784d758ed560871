"""A head of product attention: a form in (query, query, key, key, value), in factored form.

Between a query token x and a key token y, at positions i and j, such a head writes

    ``h(x, y) = ((q x) . R(i-j) (k y)) ((q2 x) . R(i-j) (k2 y))  O V y``,

a polynomial of degree two in x and three in y: two bilinear forms of rank d_head times a linear map.
With dictionaries of features for x and y (`fold`), its output along u is the sum over quintuples

    ``sum S1[a,c] S2[b,e] w[g]  z_a z_b  y_c y_e y_g``,  ``S = D q^T R k E^T``,  ``w = E V^T O^T u``,

n^2 m^3 terms that are products of three factors and are never formed. The leading ones come from the
leading pairs of each score (`leading`); leading directions of the pattern, a quartic form of [x, y],
from `QuarticForm.leading` (`pattern_form`).

>>> head = product_head(model, layer=1, head=2)          # of a model (circuits)
>>> here = head.between(7, 3)                            # rotated to positions 7 (query) and 3 (key)
>>> here.fold(queries, keys).leading(u, k=10)            # strongest terms along u
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_bilinear import checks
from tl_bilinear.results import Result
from tl_bilinear.tensor.quartic import QuarticForm
from tl_bilinear.tensor.two_input import TwoInputForm

if TYPE_CHECKING:
    import pandas


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows x [..., d_head] rotated by minus the angles, first half with second; tables broadcast."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


@dataclass(frozen=True, eq=False)
class ProductHead(Result):
    """The factors of a head; an immutable value.

    Parameters
    ----------
    query, query2: [d_head, d_query]; key, key2: [d_head, d_key]
        The scores' scale is in them.
    value: [d_head, d_key], out: [d_out, d_head]
    cos, sin: [positions, d_head / 2], optional
        Rotary tables; None where positions play no part, or were taken in by `between`.
    space: str, optional
        What the coordinates of a token are.

    Raises ValueError for shapes that disagree.
    """

    query: Float[Tensor, "d_head d_query"]
    key: Float[Tensor, "d_head d_key"]
    query2: Float[Tensor, "d_head d_query"]
    key2: Float[Tensor, "d_head d_key"]
    value: Float[Tensor, "d_value d_key"]
    out: Float[Tensor, "d_out d_value"]
    cos: Float[Tensor, "pos half"] | None = None
    sin: Float[Tensor, "pos half"] | None = None
    space: str | None = None

    def __post_init__(self) -> None:
        agree = (
            self.query.shape == self.query2.shape
            and self.key.shape == self.key2.shape
            and len(self.query) == len(self.key)
            and self.value.shape[1] == self.key.shape[1]
            and self.out.shape[1] == len(self.value)
        )
        if not agree:
            shapes = {n: list(getattr(self, n).shape) for n in _FACTORS}
            raise ValueError(
                f"query and query2 are [d_head, d_query], key and key2 [d_head, d_key], value "
                f"[d_value, d_key] and out [d_out, d_value], got {shapes}"
            )

    @property
    def d_query(self) -> int:
        return self.query.shape[1]

    @property
    def d_key(self) -> int:
        return self.key.shape[1]

    # ------------------------------------------------------------------ evaluation

    def scores(
        self, x: Float[Tensor, "... d_query"], y: Float[Tensor, "... d_key"]
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """The two scores between query tokens and key tokens.

        Raises ValueError for a head whose positions have not been chosen (`between`).
        """
        self._require_placed()
        x = checks.require_rows("x", x, self.d_query, "d_query", self.query)
        y = checks.require_rows("y", y, self.d_key, "d_key", self.query)
        pairs = ((self.query, self.key), (self.query2, self.key2))
        first, second = (((x @ q.T) * (y @ k.T)).sum(-1) for q, k in pairs)
        return first, second

    def __call__(
        self, x: Float[Tensor, "... d_query"], y: Float[Tensor, "... d_key"]
    ) -> Float[Tensor, "... d_out"]:
        """What the query token receives from the key token."""
        first, second = self.scores(x, y)
        return (first * second)[..., None] * (y.to(self.value) @ self.value.T @ self.out.T)

    # ------------------------------------------------------------------ change of basis

    def between(self, query: int, key: int) -> ProductHead:
        """The head between two positions: its queries and keys rotated.

        Raises IndexError for a position that the tables do not have, ValueError for a key after the
        query.
        """
        if self.cos is None or self.sin is None:
            return self
        for name, position in (("query", query), ("key", key)):
            if not 0 <= position < len(self.cos):
                raise IndexError(f"{name} position {position} is not of 0 to {len(self.cos) - 1}")
        if key > query:
            raise ValueError(f"a query at {query} does not read a key after it, at {key}")
        turned: dict[str, Any] = {}
        for name, place in (("query", query), ("query2", query), ("key", key), ("key2", key)):
            rows = getattr(self, name)
            turned[name] = rotated(rows.T, self.cos[place].to(rows), self.sin[place].to(rows)).T
        return replace(self, **turned, cos=None, sin=None)

    def fold(
        self,
        queries: Float[Tensor, "n d_query"] | None = None,
        keys: Float[Tensor, "m d_key"] | None = None,
    ) -> ProductHead:
        """In coordinates of features: ``head.fold(D, E)(z, y) == head(z @ D, y @ E)``.

        Raises ValueError for directions of another width.
        """
        changed: dict[str, Any] = {}
        for rows, names, width in (
            (queries, ("query", "query2"), self.d_query),
            (keys, ("key", "key2", "value"), self.d_key),
        ):
            if rows is not None:
                rows = checks.require_matrix("directions", rows, width, "d_model", self.query)
                changed |= {name: getattr(self, name) @ rows.T for name in names}
        return replace(self, **changed)

    # ------------------------------------------------------------------ as what the solvers take

    def score_form(self) -> TwoInputForm:
        """Both scores as one form of two inputs: [2, d_query, d_key]."""
        self._require_placed()
        out = torch.eye(2, dtype=self.query.dtype, device=self.query.device)
        query, key = (None if self.space is None else f"{n} {self.space}" for n in ("query", "key"))
        return TwoInputForm(
            torch.cat([self.query, self.query2]),
            torch.cat([self.key, self.key2]),
            out.repeat_interleave(len(self.query), 1),
            left_space=query,
            right_space=key,
            output_space="scores",
        )

    def pattern_form(self) -> QuarticForm:
        """The pattern as a quartic form of [x, y]: ``((s1 + s2)^2 - (s1 - s2)^2) / 4``."""
        scores = self.score_form().stacked()
        mix = torch.tensor([[1.0, 1], [1, -1]], dtype=scores.dtype, device=scores.device)
        signs = torch.tensor([0.25, -0.25], dtype=scores.dtype, device=scores.device)
        return QuarticForm(scores.left, scores.right, mix @ scores.out, signs, scores.input_space)

    def leading(self, direction: Float[Tensor, " d_out"], k: int) -> ProductTerms:
        """The k strongest terms of the output along a direction, exact.

        A term is a pair (query, key) of each score and a coordinate of the value. Its coefficient is a
        product, so that the k best use the k best of each: pairs are found by `PairMatrix.top`.

        Raises ValueError for more terms than there are, or a direction of another width.
        """
        u = checks.require_vector("direction", direction, len(self.out), "d_out", self.out)
        count = self.d_query * self.d_key
        checks.require_count("k", k, count * count * self.d_key, "the terms of the head")
        axes = torch.eye(2, dtype=self.query.dtype, device=self.query.device)
        one, two = (self.score_form().matrix(axis).top(min(k, count)) for axis in axes)
        weights = u @ self.out @ self.value
        order = weights.abs().argsort(descending=True, stable=True)[:k]
        chosen, values = _best_products([one.coefficients, two.coefficients, weights[order]], k)
        i, j, g = chosen.T
        return ProductTerms(
            query_first=one.first[i],
            key_first=one.second[i],
            query_second=two.first[j],
            key_second=two.second[j],
            value=order[g],
            coefficients=values,
        )

    def _require_placed(self) -> None:
        if self.cos is not None:
            raise ValueError(
                "scores depend on positions: choose them with head.between(query, key)"
            )


_FACTORS = ("query", "key", "query2", "key2", "value", "out")


@dataclass(frozen=True, eq=False)
class ProductTerms(Result):
    """Terms ``coefficient z_first z_second y_first y_second y_value`` of a head, strongest first.

    Attributes
    ----------
    query_first, key_first: [k], the pair of the first score; query_second, key_second: of the second
    value: [k], what the value reads of the key token
    coefficients: [k]

    Two terms may multiply the same activations: those whose scores change places, for one.
    """

    query_first: Int[Tensor, " k"]
    key_first: Int[Tensor, " k"]
    query_second: Int[Tensor, " k"]
    key_second: Int[Tensor, " k"]
    value: Int[Tensor, " k"]
    coefficients: Float[Tensor, " k"]

    def contributions(
        self, z: Float[Tensor, "... n"], y: Float[Tensor, "... m"]
    ) -> Float[Tensor, "... k"]:
        """Each term on the activations of a query token and of a key token."""
        queries = z[..., self.query_first] * z[..., self.query_second]
        keys = y[..., self.key_first] * y[..., self.key_second] * y[..., self.value]
        return self.coefficients * queries * keys

    def to_pandas(self) -> pandas.DataFrame:
        """One row a term."""
        import pandas as pd

        names = ("query_first", "key_first", "query_second", "key_second", "value", "coefficients")
        return pd.DataFrame({name: getattr(self, name).tolist() for name in names})


def _best_products(lists: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest products of one entry of each list, by magnitude; lists fall in magnitude."""
    sizes = [values.abs().tolist() for values in lists]
    start = tuple(0 for _ in lists)
    heap = [(-_product(sizes, start), start)]
    seen = {start}
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < k:
        _, place = heapq.heappop(heap)
        chosen.append(place)
        for axis in range(len(lists)):
            further = tuple(p + (a == axis) for a, p in enumerate(place))
            if further[axis] < len(sizes[axis]) and further not in seen:
                seen.add(further)
                heapq.heappush(heap, (-_product(sizes, further), further))
    index = torch.tensor(chosen, device=lists[0].device)
    values = torch.stack([values[index[:, a]] for a, values in enumerate(lists)]).prod(0)
    return index, values


def _product(sizes: list[list[float]], place: tuple[int, ...]) -> float:
    result = 1.0
    for values, at in zip(sizes, place, strict=True):
        result *= values[at]
    return result
