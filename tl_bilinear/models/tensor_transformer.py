"""Tensor transformers, the second public family of bilinear models, as HookedTransformers.

>>> from tl_bilinear.models import TensorTransformer
>>> model = TensorTransformer.from_pretrained("Elriggs/gpt2-bilinear-sqrd-attn-18l-9h-1152embd")
>>> logits, cache = model.run_with_cache(tokens)
>>> cache["blocks.3.attn.hook_pattern"]          # the product of two scores, not normalised
>>> BilinearTensor.from_model(model, 3)          # the MLP of any layer

`tensor_format` says what the format holds, and which of its configurations are polynomials.
"""

from __future__ import annotations

import dataclasses
import logging
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from tl_bilinear.io import DIGEST, digest_of, read_json, whole_directory, write_json
from tl_bilinear.models.files import (
    CONFIG,
    WEIGHTS,
    Source,
    is_repository,
    read_tensors,
    read_tokenizer,
    require_numbers,
    require_shapes,
)
from tl_bilinear.models.tensor_attention import (
    Carried,
    NormedEmbed,
    TensorBlock,
    TensorTransformerConfig,
)
from tl_bilinear.models.tensor_format import LOGIT_CAP, TensorFields, read_fields
from tl_bilinear.models.transformer import named_tokenizer

if TYPE_CHECKING:
    from tl_bilinear.models.registration import HookedTransformer
else:
    from transformer_lens.HookedTransformer import HookedTransformer

KIND = "tensor transformer"
PICKLED = "pytorch_model.bin"
_GPT2, _GPT2_ENTRIES = "openai-community/gpt2", 50257
Model = TypeVar("Model", bound="TensorTransformer")
_log = logging.getLogger(__name__)


class TensorTransformer(HookedTransformer):
    """A tensor transformer with HookedTransformer's hooks, caches and names of weights.

    Its own: ``attn.W_Q2``, ``W_K2``, ``lamb`` and ``lambdas``, and the hooks of `TensorAttention` and
    `TensorBlock`. Text can be padded. There is no cache of keys, and no `start_at_layer`: every block
    reads the embedding and the first block's values.
    """

    def __init__(
        self,
        cfg: TensorTransformerConfig,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: Any = None,
    ) -> None:
        cfg = dataclasses.replace(cfg)
        wanted, cfg.init_weights = cfg.init_weights, False
        super().__init__(
            cfg, tokenizer, move_to_device=False, default_padding_side=default_padding_side
        )
        cfg.init_weights = wanted
        self.carried = Carried()
        self.embed = NormedEmbed(cfg)
        for layer in range(cfg.n_layers):
            self.blocks[layer] = TensorBlock(cfg, layer, self.carried)
        if wanted:
            self.init_weights()
        if move_to_device:
            self.move_model_modules_to_device()
        self.setup()

    def set_tokenizer(self, tokenizer: Any, default_padding_side: Any = None) -> None:
        """As HookedTransformer's, also for tokenizers made in memory."""
        with named_tokenizer(tokenizer) as named:
            super().set_tokenizer(named, default_padding_side)

    def forward(self, input: Any, *args: Any, **options: Any) -> Any:
        """As HookedTransformer's. Raises ValueError for a later `start_at_layer` and a cache of keys."""
        for name in ("start_at_layer", "past_kv_cache"):
            if options.get(name):  # starting at 0 is starting at the embedding
                raise ValueError(
                    f"{name} does not fit a tensor transformer: every block reads the embedding and the "
                    "first block's values beside the stream. Run the whole model"
                )
        self.carried.clear()
        try:
            return super().forward(input, *args, **options)
        finally:
            self.carried.clear()

    def generate(self, *args: Any, **options: Any) -> Any:
        """As HookedTransformer's, reading the whole text for each token."""
        return super().generate(*args, **{"use_past_kv_cache": False, **options})

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name: str | PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        n_ctx: int | None = None,
        move_to_device: bool = True,
    ) -> Model:
        """Load a model of the published format, from a folder or the Hugging Face hub.

        Reads what was published (``pytorch_model.bin``, of which only tensors are taken), what
        `save_pretrained` wrote and what `tl-bilinear train lm --attention product` trained.

        `tokenizer` defaults to the one in the folder; a published model's is GPT-2's, from the hub, and
        the vocabulary's last entries are padding. `n_ctx` is the longest text (default: the config's, or
        1,024; memory for masks grows with its square).

        Raises FileNotFoundError, ConnectionError and ValueError as
        `HookedBilinearTransformer.from_pretrained`.
        """
        source = _find(name)
        path = source.require(CONFIG)
        fields = read_fields(path, read_json(path))
        if n_ctx is not None:
            fields = dataclasses.replace(fields, n_ctx=n_ctx)
        weights, tensors = _stored_weights(source)
        require_shapes(weights, tensors, fields.shapes())
        require_numbers(weights, tensors)
        if tokenizer is None:
            tokenizer = _tokenizer(source, fields)
        dtype = dtype or tensors["lm_head.weight"].dtype
        cfg = make_config(fields, dtype, None if device is None else str(device))
        cfg.model_name = Path(fspath(name)).name
        model = cls(cfg, tokenizer=tokenizer, move_to_device=False)
        state = {**model.state_dict(), **from_published(tensors, fields)}
        model.load_state_dict({n: t.to(dtype) for n, t in state.items()})
        if move_to_device:
            model.move_model_modules_to_device()
        return model

    from_pretrained_no_processing = from_pretrained

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write the model in the published format: config.json, model.safetensors, the tokenizer.

        The folder appears whole or not at all, and replaces such a model saved there before. Fields that
        the published code does not know (``norm``, ``n_ctx``) are written where they are no defaults.

        Raises FileExistsError for a folder that holds anything else.
        """
        default = TensorFields()
        stored = {
            name: value
            for name, value in vars(self.cfg.tensor).items()
            if name not in ("norm", "n_ctx") or value != getattr(default, name)
        }
        tensors = to_published(self)
        with whole_directory(directory, KIND) as staging:
            write_json(staging / CONFIG, stored)
            metadata = {"format": "pt", DIGEST: digest_of(tensors, {})}
            save_file(tensors, staging / WEIGHTS, metadata=metadata)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staging)


# ---------------------------------------------------------------------- format and hooked model


def make_config(
    fields: TensorFields, dtype: torch.dtype, device: str | None = None
) -> TensorTransformerConfig:
    """HookedTransformer's config of a model with these fields."""
    activation = {"gated": "silu", "relu2": "relu"}.get(fields.mlp, "identity")
    return TensorTransformerConfig(
        tensor=fields,
        n_layers=fields.n_layer,
        d_model=fields.n_embd,
        d_head=fields.d_head,
        n_heads=fields.n_head,
        n_ctx=fields.n_ctx,
        d_mlp=fields.d_mlp,
        d_vocab=fields.vocab_size,
        act_fn=activation,
        gated_mlp=fields.bilinear,
        normalization_type="RMSPre" if fields.norm else None,
        eps=torch.finfo(dtype).eps,
        positional_embedding_type="rotary",
        rotary_dim=fields.d_head,
        attn_scale=fields.d_head**0.5 if fields.attention == "softmax" else float(fields.d_head),
        output_logits_soft_cap=LOGIT_CAP if fields.norm else -1.0,
        original_architecture="tensor-transformer",
        init_weights=False,
        dtype=dtype,
        device=device,
    )


_ATTENTION = {"c_q": "W_Q", "c_k": "W_K", "c_v": "W_V", "c_q2": "W_Q2", "c_k2": "W_K2"}
_MLP = {
    True: {
        "Left.weight": "W_gate",
        "Right.weight": "W_in",
        "Down.weight": "W_out",
        "Down_bias": "b_out",
    },
    False: {"c_fc.weight": "W_in", "c_proj.weight": "W_out", "bias": "b_out"},
}


def from_published(tensors: dict[str, Tensor], fields: TensorFields) -> dict[str, Tensor]:
    """The hooked model's parameters from the published tensors."""
    state = {
        "embed.W_E": tensors["transformer.wte.weight"],
        "unembed.W_U": tensors["lm_head.weight"].T,
    }
    for layer in range(fields.n_layer):
        for theirs, ours, layout in _pairs(layer, fields):
            tensor = tensors[theirs]
            state[ours] = rearrange(tensor, layout, n=fields.n_head) if "n" in layout else tensor
            if tensor.ndim == 2 and "n" not in layout:
                state[ours] = tensor.T
        if fields.mlp == "squared":
            state[f"blocks.{layer}.mlp.W_gate"] = state[f"blocks.{layer}.mlp.W_in"]
    return state


def to_published(model: TensorTransformer) -> dict[str, Tensor]:
    """The published tensors of a hooked model, contiguous and on the CPU."""
    state, fields = model.state_dict(), model.cfg.tensor
    tensors = {
        "transformer.wte.weight": state["embed.W_E"],
        "lm_head.weight": state["unembed.W_U"].T,
    }
    for layer in range(fields.n_layer):
        for theirs, ours, layout in _pairs(layer, fields):
            tensor = state[ours]
            back = " -> ".join(reversed(layout.split(" -> ")))
            tensors[theirs] = rearrange(tensor, back) if "n" in layout else tensor
            if tensor.ndim == 2 and "n" not in layout:
                tensors[theirs] = tensor.T
    whole = torch.contiguous_format
    return {n: t.detach().cpu().clone(memory_format=whole) for n, t in tensors.items()}


def _pairs(layer: int, fields: TensorFields) -> list[tuple[str, str, str]]:
    """For each tensor of a block: its published name, ours, and the change of layout of heads."""
    theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
    pairs = [
        (f"{theirs}.lambdas", f"{ours}.lambdas", ""),
        (f"{theirs}.attn.lamb", f"{ours}.attn.lamb", ""),
    ]
    for name, own in _ATTENTION.items():
        if fields.bilinear_attn or "2" not in name:
            heads = "(n h) d -> n d h"
            pairs.append((f"{theirs}.attn.{name}.weight", f"{ours}.attn.{own}", heads))
    pairs.append((f"{theirs}.attn.c_proj.weight", f"{ours}.attn.W_O", "d (n h) -> n h d"))
    if fields.attention == "difference":
        pairs.append((f"{theirs}.attn.bilinear_lamb", f"{ours}.attn.bilinear_lamb", ""))
    maps = _MLP[fields.bilinear].items()
    return pairs + [(f"{theirs}.mlp.{name}", f"{ours}.mlp.{own}", "") for name, own in maps]


# ---------------------------------------------------------------------- files


def _find(name: str | PathLike[str]) -> Source:
    folder = Path(name).expanduser().resolve()
    if folder.is_dir():
        return Source(folder, kind=KIND)
    if not folder.exists() and is_repository(fspath(name)):
        return Source(fspath(name), kind=KIND)
    raise FileNotFoundError(
        f"TensorTransformer.from_pretrained takes a folder, or a name on the hub such as "
        f"'Elriggs/gpt2-bilinear-sqrd-attn-18l-9h-1152embd'; {fspath(name)!r} is neither"
    )


def _stored_weights(source: Source) -> tuple[Path, dict[str, Tensor]]:
    path = source.find(WEIGHTS)
    if path is not None:
        return path, read_tensors(path)
    path = source.require(PICKLED)
    try:  # only tensors: nothing in the file is run
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file each layer of torch has its own
        raise ValueError(f"{path} is truncated, or holds more than tensors: {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ValueError(f"{path} holds no table of tensors by name")
    return path, dict(stored)


def _tokenizer(source: Source, fields: TensorFields) -> Any:
    folder = source.find_tokenizer()
    if folder is None and source.on_hub and fields.vocab_size >= _GPT2_ENTRIES:
        folder = Source(_GPT2).find_tokenizer()
        if folder is None:
            _log.warning(
                "%s is loaded without a tokenizer: %s cannot be downloaded. Pass tokenizer=, or tokens "
                "instead of text",
                source,
                _GPT2,
            )
    return None if folder is None else read_tokenizer(folder)
