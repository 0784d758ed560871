"""SAELens's architectures as dictionaries: how each one's weights become directions and constants.

The readers look at what an object has, not at its class, so SAELens need not be imported here. Most of
its classes differ only in how `encode` chooses the active features, and one reader serves them all;
gated SAEs have another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_bilinear.features.dictionary import Dictionary, register_dictionary


def _is_sae(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("W_enc", "W_dec", "cfg", "encode", "decode"))


def _is_gated(source: Any) -> bool:
    return _is_sae(source) and isinstance(getattr(source, "r_mag", None), Tensor)


def _is_transcoder(source: Any) -> bool:
    return _is_sae(source) and getattr(source.cfg, "d_out", None) is not None


def _read_sae(sae: Any) -> Dictionary:
    bias = getattr(sae, "b_enc", None)
    return _read_with(sae, None, None if bias is None else bias.detach())


def _read_gated(sae: Any) -> Dictionary:
    # The magnitude is the activation: its direction has a gain, and its bias is b_mag.
    return _read_with(sae, sae.r_mag.detach().exp(), sae.b_mag.detach())


def _read_with(sae: Any, gain: Tensor | None, bias: Tensor | None) -> Dictionary:
    """An SAE whose active features read ``gain W_enc . x + bias``."""
    cfg, metadata = sae.cfg, sae.cfg.metadata
    if getattr(cfg, "reshape_activations", "none") != "none":
        raise TypeError(
            f"{type(sae).__name__} reads {cfg.reshape_activations!r}: an SAE around an MLP reads vectors"
        )
    decoder, encoder = sae.W_dec.detach(), sae.W_enc.detach().T
    if getattr(cfg, "rescale_acts_by_decoder_norm", False):
        # SAELens encodes as if the decoder had unit rows, and decodes so.
        norms = decoder.norm(dim=-1)
        if not bool(norms.all()):
            raise ValueError(
                f"feature {int((norms == 0).nonzero()[0])} of {type(sae).__name__} has a decoder row "
                "of zeros, and its activation is divided by the row's norm "
                "(rescale_acts_by_decoder_norm): remove the feature"
            )
        decoder = decoder / norms[:, None]
        if gain is None:
            gain, bias = norms, None if bias is None else bias * norms
    if gain is not None:
        encoder = encoder * gain[:, None]
    offset = None
    if cfg.apply_b_dec_to_input and sae.b_dec.shape == encoder.shape[1:]:
        offset = -(encoder @ sae.b_dec.detach())
    normalises = cfg.normalize_activations != "none"
    if _centres(sae):  # after the offset: SAELens subtracts b_dec from the normalised input
        encoder = encoder - encoder.mean(-1, keepdim=True)
    passes = getattr(sae, "W_skip", None) is not None or bool(getattr(cfg, "passthrough", 0))
    return Dictionary(
        decoder,
        hook=metadata.hook_name_out or metadata.hook_name,
        encoder=encoder,
        encoder_hook=metadata.hook_name,
        decoder_bias=sae.b_dec.detach(),
        encoder_bias=bias,
        encoder_offset=offset,
        encode=sae.encode,
        input_scale=partial(_input_scale, sae) if normalises else None,
        # A transcoder normalises what it reads, not what it writes.
        output_scale=partial(_output_scale, sae)
        if normalises and not _is_transcoder(sae)
        else None,
        forward=sae if passes else None,
        prepend_bos=metadata.prepend_bos,
        special_tokens=getattr(metadata, "exclude_special_tokens", None) or (),
        sae=sae,
    )


def _centres(sae: Any) -> bool:
    return bool(sae.cfg.normalize_activations == "layer_norm")


def _input_scale(sae: Any, x: Tensor) -> Tensor:
    normalised = sae.run_time_activation_norm_fn_in(x)
    sae.run_time_activation_norm_fn_out(torch.zeros_like(x))  # clears what it stored
    if _centres(sae):
        x = x - x.mean(-1, keepdim=True)
    squares = x.square().sum(-1, keepdim=True)
    tiny = torch.finfo(squares.dtype).tiny
    return (normalised * x).sum(-1, keepdim=True) / squares.clamp_min(tiny)


def _output_scale(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    # Through SAELens's own functions, which keep a token's scale between the two calls.
    sae.run_time_activation_norm_fn_in(x)
    mean = sae.run_time_activation_norm_fn_out(torch.zeros_like(x))[..., :1]
    sae.run_time_activation_norm_fn_in(x)
    scale = sae.run_time_activation_norm_fn_out(torch.ones_like(x))[..., :1] - mean
    return scale, mean


register_dictionary("sae", _is_sae, _read_sae)
register_dictionary("gated sae", _is_gated, _read_gated)
