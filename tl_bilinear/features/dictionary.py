"""What a bilinear layer needs to know of an SAE: directions, constants, and how activations split.

A dictionary of n features writes an activation at its hook as

    ``x = sum_b z_b d_b + rest``,

rows d_b the decoder's, z_b the features' activations. `rest` is what else SAELens adds, each with a
name: "b_dec", "mean" (`normalize_activations="layer_norm"`), "skip" (skip transcoders), and "error",
what the reconstruction misses. With the rest as further rows, every statement about x is exact.

It reads a feature from an activation as

    ``p_a = s e_a . x - e_a . b_dec + b_enc[a]``,

with the token's scale s of the input normalisation (1 for most SAEs) and the b_dec term only under
`apply_b_dec_to_input`. p_a is the pre-activation in units of the feature's activation: the activation
itself wherever the feature is active. Gated SAEs decide by another bias (b_gate) along the same
direction whether it is.

Both are compared with the SAE's own encode and decode when a dictionary is made, so that an
architecture of which this does not hold is refused by name, not misread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_bilinear.tensor import _checks

_TOLERANCE = 1e-3  # of the check against the SAE's own forward, which may run in float32


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
    sae: the SAELens object, if it came from one
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
    sae: Any = None

    def __post_init__(self) -> None:
        _checks.require_tensor("decoder", self.decoder)
        if self.decoder.ndim != 2:
            raise ValueError(
                f"a dictionary is a matrix [n, d], one feature a row, got {_checks.shape(self.decoder)}"
            )
        n, d = self.decoder.shape
        for name, given, expected in (
            ("encoder", self.encoder, (n, None)),
            ("decoder_bias", self.decoder_bias, (d,)),
            ("encoder_bias", self.encoder_bias, (n,)),
            ("encoder_offset", self.encoder_offset, (n,)),
        ):
            if given is not None and not _fits(given, expected):
                raise ValueError(
                    f"{name} must have shape {[n if e is None else e for e in expected]} for a decoder "
                    f"of shape {[n, d]}, got {_checks.shape(given)}"
                )
        if self.labels is not None and len(self.labels) != n:
            raise ValueError(f"{len(self.labels)} labels for {n} features")

    @classmethod
    def of(cls, source: Any, labels: Sequence[str] | None = None) -> Dictionary:
        """A SAELens SAE or transcoder, a matrix [n, d], or a Dictionary (as it is, but for the labels).

        Raises TypeError for anything else, and for an SAE whose decode is not linear in its features.
        """
        if isinstance(source, Dictionary):
            return source if labels is None else replace(source, labels=labels)
        if isinstance(source, Tensor):
            return cls(source.detach(), labels=labels)
        if all(hasattr(source, name) for name in ("W_enc", "W_dec", "cfg", "encode", "decode")):
            return _of_sae(source, labels)
        raise TypeError(
            f"expected a SAELens SAE or transcoder, a matrix [n, d] of directions or a Dictionary, got "
            f"{type(source).__name__}"
        )

    # ------------------------------------------------------------------ what it is

    @property
    def n(self) -> int:
        return self.decoder.shape[0]

    @property
    def d(self) -> int:
        """Width of what it writes."""
        return self.decoder.shape[1]

    @property
    def prepend_bos(self) -> bool | None:
        """Whether it was trained on text with [BOS] in front; None where it does not say."""
        return None if self.sae is None else self.sae.cfg.metadata.prepend_bos

    def label(self, feature: int) -> str:
        return str(feature) if self.labels is None else f"{feature} {self.labels[feature]}"

    def __repr__(self) -> str:
        kind = "matrix" if self.sae is None else type(self.sae).__name__
        return f"Dictionary({kind}, n={self.n}, d={self.d}, hook={self.hook or '?'})"

    # ------------------------------------------------------------------ on activations

    @torch.no_grad()
    def read(
        self, x: Float[Tensor, "... d"], source: Float[Tensor, "... e"] | None = None
    ) -> Reading:
        """Split activations at `hook` into features and named rest, exactly.

        `source` are the activations at `encoder_hook` where that is another (transcoders).

        Raises ValueError for a dictionary that cannot encode.
        """
        if self.encode is None:
            raise ValueError(
                f"{self!r} has directions but no activations: give an SAE, or Dictionary(..., encode=)"
            )
        reads = x if source is None else source
        z = self.encode(reads).to(x.dtype)
        scale, mean = _output_affine(self.sae, reads.to(_dtype_of(self.sae, reads)))
        scale, mean = scale.to(x.dtype), mean.to(x.dtype)
        coefficients = z * scale
        rest = {}
        if self.decoder_bias is not None:
            rest["b_dec"] = scale * self.decoder_bias.to(x.dtype)
        if bool(mean.any()):
            rest["mean"] = mean.expand_as(x)
        made = coefficients @ self.decoder.to(x.dtype) + sum(rest.values())
        if _passes_through(self.sae):
            output = self.sae(reads.to(self.sae.W_dec.dtype)).to(x.dtype)
            rest["skip"] = output - made
            made = output
        rest["error"] = x - made
        return Reading(coefficients, rest)

    @torch.no_grad()
    def input_scale(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """s of the pre-activation: what the SAE's input normalisation multiplies a token by."""
        if self.sae is None or self.sae.cfg.normalize_activations == "none":
            return torch.ones_like(x[..., :1])
        base = x.to(_dtype_of(self.sae, x))
        normalised = self.sae.run_time_activation_norm_fn_in(base)
        self.sae.run_time_activation_norm_fn_out(torch.zeros_like(base))  # clears what it stored
        if _centres(self.sae):
            base = base - base.mean(-1, keepdim=True)
        squares = base.square().sum(-1, keepdim=True)
        scale = (normalised * base).sum(-1, keepdim=True) / squares.clamp_min(
            torch.finfo(squares.dtype).tiny
        )
        return scale.to(x.dtype)

    def preactivation(
        self, x: Float[Tensor, "... d"], features: Tensor | None = None
    ) -> Float[Tensor, "... m"]:
        """p of chosen features (all), from activations at `encoder_hook`: [..., m]."""
        chosen = slice(None) if features is None else features
        if self.encoder is None:
            raise ValueError(f"{self!r} has no encoder, so its features have no pre-activation")
        p = self.input_scale(x) * (x @ self.encoder[chosen].to(x.dtype).T)
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


# ---------------------------------------------------------------------- SAELens


def _of_sae(sae: Any, labels: Sequence[str] | None) -> Dictionary:
    cfg = sae.cfg
    if getattr(cfg, "reshape_activations", "none") != "none":
        raise TypeError(
            f"{type(sae).__name__} reads {cfg.reshape_activations!r}: an SAE around an MLP reads vectors"
        )
    decoder = sae.W_dec.detach()
    gain = torch.ones(len(decoder), dtype=decoder.dtype, device=decoder.device)
    if getattr(cfg, "rescale_acts_by_decoder_norm", False):
        # SAELens encodes as if the decoder had unit rows, and decodes so.
        gain = decoder.norm(dim=-1)
        decoder = decoder / gain[:, None]
    bias = getattr(sae, "b_enc", None)
    bias = None if bias is None else bias.detach() * gain
    if isinstance(getattr(sae, "r_mag", None), Tensor):  # gated: the magnitude is the activation
        gain, bias = sae.r_mag.detach().exp(), sae.b_mag.detach()
    encoder = sae.W_enc.detach().T * gain[:, None]
    offset = None
    if cfg.apply_b_dec_to_input and sae.b_dec.shape == encoder.shape[1:]:
        offset = -(encoder @ sae.b_dec.detach())
    if _centres(sae):  # after the offset: SAELens subtracts b_dec from the normalised input
        encoder = encoder - encoder.mean(-1, keepdim=True)
    metadata = cfg.metadata
    found = Dictionary(
        decoder,
        hook=metadata.hook_name_out or metadata.hook_name,
        encoder=encoder,
        encoder_hook=metadata.hook_name,
        decoder_bias=sae.b_dec.detach(),
        encoder_bias=bias,
        encoder_offset=offset,
        labels=labels,
        encode=sae.encode,
        sae=sae,
    )
    return _checked(found)


@torch.no_grad()
def _checked(found: Dictionary) -> Dictionary:
    """The dictionary, compared with its SAE on a few activations."""
    sae = found.sae
    if sae.W_dec.is_meta or found.encoder is None:
        return found
    generator = torch.Generator().manual_seed(0)
    d = found.encoder.shape[1]
    # Directions of features make some of them active, whatever their thresholds.
    x = torch.randn(16, d, generator=generator).to(sae.W_enc)
    some = torch.linspace(0, found.n - 1, 8).long()
    toward = found.encoder[some] / found.encoder[some].norm(dim=-1, keepdim=True).clamp_min(1e-12)
    x = torch.cat([x, d**0.5 * toward, 10 * d**0.5 * toward])
    try:
        z = sae.encode(x)
        given = sae.decode(z)
    except Exception as error:
        raise TypeError(
            f"{type(sae).__name__} could not encode activations of shape {list(x.shape)}, one by one: "
            f"an SAE around a layer must read each token by itself"
        ) from error
    scale, mean = _output_affine(sae, x)
    linear = scale * (z @ found.decoder) + mean
    bias = found.decoder_bias
    if bias is not None and _difference(given, linear + scale * bias) > _TOLERANCE >= _difference(
        given, linear
    ):
        found = replace(found, decoder_bias=None)  # matching pursuit may leave b_dec out
    elif bias is not None:
        linear = linear + scale * bias
    if (difference := _difference(given, linear)) > _TOLERANCE and not _passes_through(sae):
        raise TypeError(
            f"{type(sae).__name__}: its decode is not W_dec applied to the features plus b_dec (it "
            f"differs by {difference:.1e}), so its features have no directions to read a layer with"
        )
    p = found.preactivation(x)
    active = z != 0
    if bool(active.any()) and _difference(z[active], p[active]) > _TOLERANCE:
        # Features that are not read along a direction (matching pursuit, say) still write along one.
        found = replace(found, encoder=None, encoder_bias=None, encoder_offset=None)
    return found


def _fits(given: Tensor, expected: tuple[int | None, ...]) -> bool:
    return given.ndim == len(expected) and all(
        e is None or e == g for e, g in zip(expected, given.shape, strict=True)
    )


def _difference(given: Tensor, expected: Tensor) -> float:
    scale = given.abs().max().clamp_min(torch.finfo(given.dtype).tiny)
    return float((given - expected).abs().max() / scale)


def _centres(sae: Any) -> bool:
    return sae is not None and sae.cfg.normalize_activations == "layer_norm"


def _dtype_of(sae: Any, x: Tensor) -> torch.dtype:
    return x.dtype if sae is None else sae.W_dec.dtype


def _is_transcoder(sae: Any) -> bool:
    return getattr(sae.cfg, "d_out", None) is not None


def _passes_through(sae: Any) -> bool:
    """Whether the output has a part that does not come from features (and is then "skip")."""
    if sae is None:
        return False
    return getattr(sae, "W_skip", None) is not None or bool(getattr(sae.cfg, "passthrough", 0))


def _output_affine(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale [..., 1], mean [..., 1]) with which the SAE turns ``z W_dec + b_dec`` into its output."""
    ones = torch.ones_like(x[..., :1])
    if sae is None or sae.cfg.normalize_activations == "none" or _is_transcoder(sae):
        return ones, torch.zeros_like(ones)
    # Through SAELens's own functions, which keep a token's scale between the two calls.
    sae.run_time_activation_norm_fn_in(x)
    mean = sae.run_time_activation_norm_fn_out(torch.zeros_like(x))[..., :1]
    sae.run_time_activation_norm_fn_in(x)
    scale = sae.run_time_activation_norm_fn_out(torch.ones_like(x))[..., :1] - mean
    return scale, mean
