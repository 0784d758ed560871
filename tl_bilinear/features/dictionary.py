"""What a bilinear layer needs to know of an SAE: directions, constants, and how activations split.

A dictionary of n features writes an activation at its hook as

    ``x = sum_b z_b d_b + rest``,

rows d_b the decoder's, z_b the features' activations. `rest` is everything else, each part with a name:
"b_dec", "mean" (what SAELens adds back under `normalize_activations="layer_norm"`), "skip" (skip
transcoders), and "error", what the reconstruction misses. With the rest as further rows, every statement
about x is exact.

It reads a feature from an activation as

    ``p_a = s e_a . x - e_a . b_dec + b_enc[a]``,

with the token's scale s of the input normalisation (1 for most SAEs), and the b_dec term only under
`apply_b_dec_to_input`. p_a is the pre-activation in units of the feature's activation: it equals the
activation wherever the feature is active. Gated SAEs decide by another bias (b_gate), along the same
direction, whether a feature is active.

**Architectures** are readers in a registry. SAELens's are in `features.architectures`; a class of your
own takes one function:

>>> def read(mine):
...     return Dictionary(mine.directions, hook=mine.hook, encoder=mine.reads, encode=mine.encode)
>>> register_dictionary("mine", lambda source: isinstance(source, MySAE), read)
>>> FeatureInteractions(model, 4, MySAE(...), sae_out)

What a reader returns is compared with the source's own encode and decode, so that an SAE of which the
two formulas do not hold is refused by name, not misread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear import checks

_TOLERANCE = 1e-3  # of the comparison with the source's own forward, which may run in float32


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """Feature directions at a hook, with what it takes to read and write them.

    Usually made by `Dictionary.of(sae)`; a plain matrix is ``Dictionary(rows, hook=...)``.

    Parameters
    ----------
    decoder: [n, d]
        One direction a row, where the features write.
    hook: str, optional
        The hook whose activations the rows make; None fits the layer's own input or output.
    encoder: [n, d_read], optional
        Directions that features are read along; without it there are no pre-activations.
    encoder_hook: str, optional
        Where they read; another than `hook` for transcoders.
    decoder_bias: [d], encoder_bias, encoder_offset: [n], optional
        b_dec, b_enc, and ``- e . b_dec`` where the SAE subtracts b_dec from its input.
    labels: sequence of str, optional
        A name for each feature.
    encode: callable, optional
        From activations [..., d_read] to feature activations [..., n].
    input_scale, output_scale: callables, optional
        Of an SAE that normalises its input: from activations [..., d_read], the scale s of the
        pre-activation [..., 1], and (scale, mean), both [..., 1], of its output
        ``scale (z W_dec + b_dec) + mean``.
    forward: callable, optional
        From activations to the whole output [..., d], where a part of it comes from no feature ("skip").
    prepend_bos: bool, optional
        Whether it was trained on text with [BOS] in front.
    special_tokens: sequence of int, or True for all of the tokenizer's
        Tokens that it was not trained on.
    sae: the object it came from, if any
    """

    decoder: Float[Tensor, "n d"]
    hook: str | None = None
    encoder: Float[Tensor, "n d_read"] | None = None
    encoder_hook: str | None = None
    decoder_bias: Float[Tensor, " d"] | None = None
    encoder_bias: Float[Tensor, " n"] | None = None
    encoder_offset: Float[Tensor, " n"] | None = None
    labels: Sequence[str] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    input_scale: Callable[[Tensor], Tensor] | None = None
    output_scale: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    forward: Callable[[Tensor], Tensor] | None = None
    prepend_bos: bool | None = None
    special_tokens: Sequence[int] | bool = ()
    sae: Any = None

    def __post_init__(self) -> None:
        checks.require_tensor("decoder", self.decoder)
        if self.decoder.ndim != 2:
            raise ValueError(
                f"a dictionary is a matrix [n, d], one feature a row, got {checks.shape(self.decoder)}"
            )
        n, d = self.decoder.shape
        for name, given, expected in (
            ("encoder", self.encoder, (n, "d_read")),
            ("decoder_bias", self.decoder_bias, (d,)),
            ("encoder_bias", self.encoder_bias, (n,)),
            ("encoder_offset", self.encoder_offset, (n,)),
        ):
            if given is not None and not _fits(given, expected):
                raise ValueError(
                    f"{name} must have shape [{', '.join(map(str, expected))}] for a decoder of shape "
                    f"{[n, d]}, got {checks.shape(given)}"
                )
        if self.labels is not None and len(self.labels) != n:
            raise ValueError(f"{len(self.labels)} labels for {n} features")
        if self.labels is not None and not all(isinstance(each, str) for each in self.labels):
            raise TypeError("labels must be strings, one for each feature")
        for name in ("decoder", "encoder"):
            if (rows := getattr(self, name)) is not None:
                checks.require_finite(f"the {name} of the dictionary", rows, "an SAE is finite")
        for name in ("decoder_bias", "encoder_bias", "encoder_offset"):
            if (values := getattr(self, name)) is not None:
                checks.require_finite(f"the {name} of the dictionary", values, "an SAE is finite")

    @classmethod
    def of(cls, source: Any, labels: Sequence[str] | None = None) -> Dictionary:
        """A SAELens SAE or transcoder, a matrix [n, d], or a Dictionary (as it is, but for the labels).

        Anything else needs a reader (`register_dictionary`). Raises TypeError for what no reader knows,
        and for an SAE whose decode is not linear in its features.
        """
        if isinstance(source, Dictionary):
            found = source
        elif isinstance(source, Tensor):
            found = cls(source.detach())
        else:
            found = _checked(_read(source), source)
        return found if labels is None else replace(found, labels=labels)

    # ------------------------------------------------------------------ what it is

    @property
    def n(self) -> int:
        return self.decoder.shape[0]

    @property
    def d(self) -> int:
        """Width of what it writes."""
        return self.decoder.shape[1]

    def label(self, feature: int) -> str:
        """The feature's number, and its name where it has one."""
        return str(feature) if self.labels is None else f"{feature} {self.labels[feature]}"

    def labels_of(self, features: Tensor | Iterable[int]) -> dict[int, str] | None:
        """Names of some features, by number; None for a dictionary without labels.

        Raises TypeError and IndexError for what is no number of a feature.
        """
        if self.labels is None:
            return None
        given = features if isinstance(features, Tensor) else list(features)
        if not len(given):
            return {}
        index = checks.require_index(
            "features", given, self.n, "features", self.decoder.new_empty(0)
        )
        return {i: self.labels[i] for i in index.flatten().tolist()}

    def __repr__(self) -> str:
        kind = "matrix" if self.sae is None else type(self.sae).__name__
        return f"Dictionary({kind}, n={self.n}, d={self.d}, hook={self.hook or '?'})"

    # ------------------------------------------------------------------ on activations

    @torch.no_grad()
    def read(
        self, x: Float[Tensor, "... d"], source: Float[Tensor, "... e"] | None = None
    ) -> Reading:
        """Split activations at `hook` into features and named rest, exactly.

        `source` are the activations at `encoder_hook` where that is another hook (transcoders).

        Raises ValueError for a dictionary that cannot encode.
        """
        if self.encode is None:
            raise ValueError(
                f"{self!r} has directions but no activations: give an SAE, or Dictionary(..., encode=)"
            )
        reads = x if source is None else source
        z = self.encode(reads).to(x.dtype)
        scale, mean = (part.to(x.dtype) for part in self._affine(reads))
        coefficients = z * scale
        rest = {}
        if self.decoder_bias is not None:
            rest["b_dec"] = scale * self.decoder_bias.to(x.dtype)
        if bool(mean.any()):
            rest["mean"] = mean.expand_as(x)
        made = coefficients @ self.decoder.to(x.dtype) + sum(rest.values())
        if self.forward is not None:
            output = self.forward(reads.to(self.decoder.dtype)).to(x.dtype)
            rest["skip"] = output - made
            made = output
        rest["error"] = x - made
        return Reading(coefficients, rest)

    def _affine(self, reads: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, mean) of its output, [..., 1] each."""
        if self.output_scale is not None:
            return self.output_scale(reads.to(self.decoder.dtype))
        ones = torch.ones_like(reads[..., :1])
        return ones, torch.zeros_like(ones)

    @torch.no_grad()
    def scale_of(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """s of the pre-activation: what the input normalisation multiplies a token by."""
        x = self._fitting(x)
        if self.input_scale is None:
            return torch.ones_like(x[..., :1])
        return self.input_scale(x.to(self.decoder.dtype)).to(x.dtype)

    def _fitting(self, x: Any) -> Tensor:
        width = self.d if self.encoder is None else self.encoder.shape[1]
        hook = self.encoder_hook or self.hook
        return checks.require_rows("x", x, width, checks.meaning("d", hook), like=x)

    def preactivation(
        self, x: Float[Tensor, "... d"], features: Any = None
    ) -> Float[Tensor, "... m"]:
        """p of chosen features (all), from activations at `encoder_hook`: [..., m]."""
        chosen = slice(None) if features is None else features
        if self.encoder is None:
            raise ValueError(f"{self!r} has no encoder, so its features have no pre-activation")
        x = self._fitting(x)
        p = self.scale_of(x) * (x @ self.encoder[chosen].to(x.dtype).T)
        for constant in (self.encoder_bias, self.encoder_offset):
            if constant is not None:
                p = p + constant[chosen].to(x.dtype)
        return p


@dataclass(frozen=True, eq=False)
class Reading:
    """An activation as ``coefficients @ decoder + sum of rest``.

    Attributes
    ----------
    coefficients: [..., n], feature activations in units of the decoder's rows
    rest: name to [..., d], in the order b_dec, mean, skip, error
    """

    coefficients: Float[Tensor, "... n"]
    rest: dict[str, Float[Tensor, "... d"]]


# ---------------------------------------------------------------------- architectures

_readers: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Dictionary]]] = {}


def register_dictionary(
    name: str, matches: Callable[[Any], bool], reader: Callable[[Any], Dictionary]
) -> None:
    """Let `Dictionary.of` read another class: `reader` makes a Dictionary of what `matches`.

    The reader registered last is asked first, so that yours goes before those that ship.

    Raises ValueError if the name is taken.
    """
    if name in _readers:
        raise ValueError(
            f"a dictionary reader named {name!r} is registered already; names taken: {sorted(_readers)}"
        )
    _readers[name] = (matches, reader)


def _read(source: Any) -> Dictionary:
    for matches, reader in reversed(_readers.values()):
        if matches(source):
            return reader(source)
    raise TypeError(
        f"expected a SAELens SAE or transcoder, a matrix [n, d] of directions or a Dictionary, got "
        f"{type(source).__name__}; register_dictionary(...) adds a reader for a class of your own "
        f"(there are {', '.join(sorted(_readers))})"
    )


@torch.no_grad()
def _checked(found: Dictionary, source: Any) -> Dictionary:
    """The dictionary, compared on a few activations with the source's own encode and decode."""
    name, decode = type(source).__name__, getattr(source, "decode", None)
    if found.encode is None or decode is None or found.encoder is None or found.decoder.is_meta:
        return found
    generator = torch.Generator().manual_seed(0)
    d = found.encoder.shape[1]
    # Directions of features make some of them active, whatever their thresholds.
    x = torch.randn(16, d, generator=generator).to(found.encoder)
    some = torch.linspace(0, found.n - 1, 8).long()
    toward = found.encoder[some] / found.encoder[some].norm(dim=-1, keepdim=True).clamp_min(1e-12)
    x = torch.cat([x, d**0.5 * toward, 10 * d**0.5 * toward])
    try:
        z = found.encode(x)
        given = decode(z)
    except Exception as error:
        raise TypeError(
            f"{name} could not encode activations of shape {list(x.shape)}, one by one: "
            f"an SAE around a layer must read each token by itself"
        ) from error
    scale, mean = found._affine(x)
    linear = scale * (z @ found.decoder) + mean
    bias = found.decoder_bias
    if bias is not None and _difference(given, linear + scale * bias) > _TOLERANCE >= _difference(
        given, linear
    ):
        found = replace(found, decoder_bias=None)  # matching pursuit may leave b_dec out
    elif bias is not None:
        linear = linear + scale * bias
    if (difference := _difference(given, linear)) > _TOLERANCE and found.forward is None:
        raise TypeError(
            f"{name}: its decode is not W_dec applied to the features plus b_dec (it "
            f"differs by {difference:.1e}), so its features have no directions to read a layer with"
        )
    active = z != 0
    if bool(active.any()) and _difference(z[active], found.preactivation(x)[active]) > _TOLERANCE:
        # Features that are not read along a direction (matching pursuit, say) still write along one.
        found = replace(found, encoder=None, encoder_bias=None, encoder_offset=None)
    return found


def _fits(given: Tensor, expected: tuple[int | str, ...]) -> bool:
    return given.ndim == len(expected) and all(
        isinstance(e, str) or e == g for e, g in zip(expected, given.shape, strict=True)
    )


def _difference(given: Tensor, expected: Tensor) -> float:
    scale = given.abs().max().clamp_min(torch.finfo(given.dtype).tiny)
    return float((given - expected).abs().max() / scale)
