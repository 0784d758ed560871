"""A HookedTransformer whose MLPs are bilinear.

>>> import tl_bilinear
>>> from transformer_lens import HookedTransformer
>>> model = HookedTransformer.from_config(
...     bilinear=True, n_layers=2, d_model=64, d_head=16, n_ctx=32, d_vocab=100,
...     normalization_type="RMS",
... )
>>> logits, cache = model.run_with_cache(torch.randint(0, 100, (1, 8)))
>>> cache["blocks.1.mlp.hook_in"].shape                    # the input of the bilinear tensor
torch.Size([1, 8, 64])
>>> tl_bilinear.BilinearTensor.from_model(model, 1)        # [64, 64, 64], from the weights alone

Everything of HookedTransformer works on it: hooks, caches, generation, weight processing.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.components import LayerNormPre, RMSNormPre
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
from transformer_lens.weight_processing import ProcessWeights

from tl_bilinear.models import folders, huggingface, pretrained
from tl_bilinear.models.component import BilinearMLP, BilinearTransformerConfig
from tl_bilinear.models.configs import asks_for_bilinear, make_config
from tl_bilinear.models.folding import fold_norm, widened

if TYPE_CHECKING:
    import transformers
    from sae_lens import HookedSAETransformer

    from tl_bilinear.models.registration import HookedTransformer
else:
    from transformer_lens.HookedTransformer import HookedTransformer

Model = TypeVar("Model", bound="HookedBilinearTransformer")

__all__ = [
    "BilinearMLP",
    "BilinearTransformerConfig",
    "HookedBilinearTransformer",
    "bilinear_class",
]


class HookedBilinearTransformer(HookedTransformer):
    """HookedTransformer with a :class:`BilinearMLP` in every block (Pearce et al. 2025, section 2).

    Usually made by ``HookedTransformer.from_config(bilinear=True, ...)``. The constructor takes a
    BilinearTransformerConfig, a HookedTransformerConfig or a dict, which it copies.

    Hooks of a block's MLP: ``blocks.L.mlp.hook_in`` [batch, pos, d_model], ``hook_pre``,
    ``hook_pre_linear``, ``hook_post`` [batch, pos, d_mlp], ``hook_out`` [batch, pos, d_model].
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | Mapping[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: Literal["left", "right"] | None = None,
    ) -> None:
        cfg = make_config(cfg, {}, bilinear=True)
        # The blocks are built with TransformerLens's own MLP, so initialising waits for the swap.
        wanted, cfg.init_weights = cfg.init_weights, False
        super().__init__(
            cfg, tokenizer, move_to_device=False, default_padding_side=default_padding_side
        )
        cfg.init_weights = wanted
        if not cfg.attn_only:
            for block in self.blocks:
                block.mlp = BilinearMLP(cfg)
        if cfg.init_weights:
            self.init_weights()
        if move_to_device:
            self.move_model_modules_to_device()
        self.setup()

    if TYPE_CHECKING:

        @classmethod
        def from_config(
            cls,
            cfg: HookedTransformerConfig | Mapping[str, Any] | None = None,
            *,
            bilinear: bool | None = None,
            bilinear_bias: bool = False,
            tokenizer: Any = None,
            move_to_device: bool = True,
            **cfg_kwargs: Any,
        ) -> Self: ...

    def setup(self) -> None:
        for mlp in self._bilinear_mlps():
            mlp.drop_foreign_forward()
        super().setup()

    def set_tokenizer(
        self, tokenizer: Any, default_padding_side: Literal["left", "right"] | None = None
    ) -> None:
        """As HookedTransformer's, also for tokenizers made in memory."""
        with named_tokenizer(tokenizer) as named:
            super().set_tokenizer(named, default_padding_side)

    @property
    def b_gate(self) -> Float[Tensor, "n_layers d_mlp"]:
        """The gate biases of all layers, stacked like TransformerLens's b_in and b_out."""
        return torch.stack([block.mlp.b_gate for block in self.blocks])

    def load_and_process_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """As HookedTransformer's, exact for bilinear MLPs.

        Folding a norm puts its weight into both W_gate and W_in, its bias into b_gate and b_in, and
        under LayerNorm centres both over d_model. Log-probabilities do not change.

        One block at a time, each in place of the last: beside the model this needs the memory of a few
        blocks (TransformerLens holds up to three more copies of the model).

        Raises ValueError for LayerNorm with ``final_rms=True``, which TransformerLens changes, and for
        a state dict of other shapes.
        """
        is_ln = self.cfg.normalization_type in ("LN", "LNPre")
        if is_ln and self.cfg.final_rms and (fold_ln or center_writing_weights):
            raise ValueError(
                "TransformerLens does not process a LayerNorm model with final_rms=True correctly: "
                "its log-probabilities would change. Pass fold_ln=False, center_writing_weights=False"
            )
        state = self.fill_missing_keys(dict(state_dict))
        self._refuse_other_shapes(state)
        fold_ln = fold_ln and self._fold_norms_away(state)
        for names, cfg in _parts(state, self.cfg):
            part = {inner: state[name] for inner, name in names.items()}
            if fold_ln:
                part = _fold_norms(part, cfg)
            if center_unembed:
                part = _center_unembed(part)
            part = ProcessWeights.process_weights(
                {**_first_rows(state), **part},
                cfg,
                fold_ln=fold_ln,
                center_writing_weights=center_writing_weights,
                center_unembed=False,
                fold_value_biases=fold_value_biases,
                refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            )
            self.load_state_dict({name: part[inner] for inner, name in names.items()}, strict=False)
        if fold_ln:
            self.setup()

    def _refuse_other_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError before anything is loaded: parts are loaded one after the other."""
        own = self.state_dict()
        wrong = [n for n, value in state.items() if n in own and value.shape != own[n].shape]
        if wrong:
            raise ValueError(
                f"the state dict is of another model: {wrong[0]} has shape "
                f"{list(state[wrong[0]].shape)}, this model's {list(own[wrong[0]].shape)} "
                f"({len(wrong)} of {len(state)} differ)"
            )

    def _fold_norms_away(self, state: Mapping[str, Tensor]) -> bool:
        """Put norms without weights in place of those with; whether the state has some to fold."""
        kind = self.cfg.normalization_type
        if kind not in ("LN", "LNPre", "RMS", "RMSPre"):
            logging.warning("fold_ln=True, but normalization_type is %r: nothing is folded", kind)
            return False
        if not any(name.endswith((".ln1.w", ".ln2.w", "ln_final.w")) for name in state):
            logging.warning("fold_ln=True, but the state dict has no norm's weight to fold")
            return False
        if kind in ("LN", "RMS"):
            norm = LayerNormPre if kind == "LN" else RMSNormPre
            self.cfg.normalization_type = f"{kind}Pre"
            self.ln_final = norm(self.cfg)
            for block in self.blocks:
                for name in ("ln1", "ln2"):
                    if hasattr(block, name):
                        setattr(block, name, norm(self.cfg))
        return True

    def fold_layer_norm(
        self,
        state_dict: Mapping[str, Tensor],
        fold_biases: bool = True,
        center_weights: bool = True,
    ) -> dict[str, Tensor]:
        """As HookedTransformer's, on a state dict, exact for bilinear MLPs."""
        state_dict = _fold_norms(
            state_dict, self.cfg, fold_biases=fold_biases, center_weights=center_weights
        )
        return super().fold_layer_norm(state_dict, fold_biases, center_weights)

    def center_unembed(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As HookedTransformer's, on a state dict."""
        return _center_unembed(state_dict)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Save weights, config and tokenizer: safetensors and JSON, no pickle.

        The directory appears whole or not at all, and replaces a model saved there before.

        Raises FileExistsError for a directory that holds anything else.
        """
        folders.save(self, directory)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name: str | PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        move_to_device: bool = True,
        attn_scale: float | None = None,
    ) -> Model:
        """Load a model that `save_pretrained` wrote, or one that the paper's authors published.

        `name` is a folder or, where there is none, a repository on the Hugging Face hub, which is
        downloaded into the hub's cache: "tdooms/ts-medium", "tdooms/fw-small", "tdooms/fw-medium", or
        any other of either format. A saved model has equal logits, folded weights included.

        `device` defaults to TransformerLens's choice, `dtype` to the stored one, `tokenizer` to the
        stored one. `attn_scale` is for published models: the factor on attention's output, folded into
        W_O. By default the model's config and name decide (see `tl_bilinear.models.published_models`).

        Raises FileNotFoundError or NotADirectoryError if there is no such model, ConnectionError if the
        hub is out of reach, ValueError for a file that is truncated or not such a model, naming the
        file and what is wrong with it.
        """
        return pretrained.load(
            cls,
            name,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            move_to_device=move_to_device,
            attn_scale=attn_scale,
        )

    # Weights are loaded as they were stored, without processing, under either name.
    from_pretrained_no_processing = from_pretrained

    @classmethod
    def from_hf(
        cls: type[Model],
        model: Any,
        *,
        fold_ln: bool = True,
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        move_to_device: bool = True,
    ) -> Model:
        """A Hugging Face Llama with ``hidden_act="linear"`` as this class: the same logits.

        Takes biases (``mlp_bias``, ``attention_bias``), grouped-query attention, tied embeddings and
        the rotary embeddings 'default', 'linear' and 'llama3'. Logits agree to 1e-5 in float32
        (tested).

        Parameters
        ----------
        model: LlamaForCausalLM, or a folder or hub name of one
            An object is copied, never changed.
        fold_ln:
            Fold the norms' weights into the weights that read them, so that a bilinear tensor takes
            the normalised vector itself. False keeps them as parameters.
        tokenizer:
            Default: the one in the folder, if there is one. An object comes without.
        device, dtype:
            Default: TransformerLens's choice, and the dtype of the weights.

        Raises ValueError for an activation on the gate (naming the way to remove it), for a rotary
        embedding that TransformerLens lacks and for a tokenizer larger than the vocabulary;
        TypeError for another kind of model.
        """
        return huggingface.from_hf(
            cls,
            model,
            fold_ln=fold_ln,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            move_to_device=move_to_device,
        )

    def to_hf(self, directory: str | PathLike[str] | None = None) -> transformers.LlamaForCausalLM:
        """This model as a Hugging Face LlamaForCausalLM with ``hidden_act="linear"``.

        Logits agree to 1e-5 in float32 (tested). Embedding and unembedding are tied if they are equal.
        With `directory` the model is also written there, with its tokenizer, whole or not at all.

        Raises ValueError naming each setting that a Llama does not have (LayerNorm, learned
        positions, an unembedding bias, ...); FileExistsError for a directory that holds anything but
        a Llama.
        """
        return huggingface.to_hf(self, directory)

    def _bilinear_mlps(self) -> Iterable[BilinearMLP]:
        for block in self.blocks:
            mlp = getattr(block, "mlp", None)
            if isinstance(mlp, BilinearMLP):
                yield mlp


@contextmanager
def named_tokenizer(tokenizer: Any) -> Iterator[Any]:
    """A tokenizer as TransformerLens takes it, which loads it again by its name.

    One made in memory has none: within the block it is that of a folder.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    is_tokenizer = isinstance(tokenizer, PreTrainedTokenizerBase)
    if not is_tokenizer or "name_or_path" in tokenizer.init_kwargs:
        yield tokenizer  # TransformerLens refuses other things
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield AutoTokenizer.from_pretrained(folder, local_files_only=True)


# ---------------------------------------------------------------------- bilinear subclasses

if TYPE_CHECKING:

    class HookedBilinearSAETransformer(HookedSAETransformer, HookedBilinearTransformer):
        """SAELens's HookedSAETransformer with bilinear MLPs: it takes SAEs."""


@functools.cache
def bilinear_class(cls: type) -> type:
    """The bilinear subclass of a HookedTransformer class.

    HookedTransformer gives HookedBilinearTransformer; SAELens's HookedSAETransformer gives a class
    that is both (`tl_bilinear.models.HookedBilinearSAETransformer`). Instances pickle and deepcopy.

    Raises TypeError for a class that is not a HookedTransformer.
    """
    if issubclass(cls, HookedBilinearTransformer):
        return cls
    if cls is HookedTransformer:
        return HookedBilinearTransformer
    if not issubclass(cls, HookedTransformer):
        raise TypeError(f"{cls.__qualname__} is not a subclass of HookedTransformer")
    stem = cls.__name__.removeprefix("Hooked")
    return type(
        f"HookedBilinear{stem}",
        (cls, HookedBilinearTransformer),
        {
            "__module__": __name__,
            "__doc__": f"{cls.__qualname__} with bilinear MLPs (see HookedBilinearTransformer).",
            "__reduce_ex__": functools.partialmethod(_reduce_generated, cls),
        },
    )


def _reduce_generated(self: Any, base: type, protocol: int) -> Any:
    if type(self) is not bilinear_class(base):  # a named subclass, which pickles by its own name
        return HookedBilinearTransformer.__reduce_ex__(self, protocol)
    return _new_generated, (base,), self.__getstate__()


def _new_generated(base: type) -> Any:
    return object.__new__(bilinear_class(base))


def __getattr__(name: str) -> Any:
    if name == "HookedBilinearSAETransformer":
        from sae_lens import HookedSAETransformer

        return bilinear_class(HookedSAETransformer)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def model_from_config(
    cls: type,
    cfg: HookedTransformerConfig | Mapping[str, Any] | None,
    *,
    bilinear: bool | None,
    tokenizer: Any,
    move_to_device: bool,
    overrides: Mapping[str, Any],
) -> Any:
    """What `HookedTransformer.from_config` does; documented there."""
    if bilinear is None:
        bilinear = issubclass(cls, HookedBilinearTransformer) or asks_for_bilinear(cfg)
    if not bilinear and issubclass(cls, HookedBilinearTransformer):
        raise ValueError(f"{cls.__name__} is bilinear: bilinear=False contradicts it.")
    config = make_config(cfg, overrides, bilinear=bilinear)
    target = bilinear_class(cls) if bilinear else cls
    return target(config, tokenizer=tokenizer, move_to_device=move_to_device)


# ---------------------------------------------------------------------- weight processing


def _parts(
    state: Mapping[str, Tensor], cfg: HookedTransformerConfig
) -> Iterator[tuple[dict[str, str], HookedTransformerConfig]]:
    """The pieces of a state dict that are processed apart, each as the model of at most one block.

    A piece is the embedding, the last norm with the unembedding, or a block: names as block 0 to names
    in the model.
    """
    pieces: dict[str, dict[str, str]] = {}
    for name in state:
        head, *rest = name.split(".", 2)
        if head == "blocks":
            pieces.setdefault(f"block {rest[0]}", {})[f"blocks.0.{rest[1]}"] = name
        else:
            piece = "unembedding" if head in ("ln_final", "unembed") else "embedding"
            pieces.setdefault(piece, {})[name] = name
    for piece, names in pieces.items():
        own = copy.copy(cfg)
        own.n_layers = int(piece.startswith("block"))
        yield names, own


def _first_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins for the embeddings, which TransformerLens's centring asks for with every piece."""
    return {name: state[name][:1] for name in ("embed.W_E", "pos_embed.W_pos") if name in state}


def _fold_norms(
    state_dict: Mapping[str, Tensor],
    cfg: HookedTransformerConfig,
    *,
    fold_biases: bool = True,
    center_weights: bool | None = None,
) -> dict[str, Tensor]:
    """Fold the norms before the MLPs and the unembedding; TransformerLens folds the others.

    TransformerLens centres W_in but not W_gate. It also guesses from shapes whether a weight is stored
    transposed, and is wrong for d_mlp == d_model and d_vocab_out == d_model. A norm that is folded here
    becomes the identity, on which TransformerLens's own folding has no effect.
    """
    state_dict = dict(state_dict)
    if cfg.normalization_type is None:
        return state_dict
    if cfg.original_architecture in POST_NORM_ARCHITECTURES:  # there ln2 follows the MLP
        return state_dict
    if center_weights is None:
        center_weights = cfg.normalization_type in ("LN", "LNPre")
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}."
        norm = f"{block}ln2"
        if cfg.parallel_attn_mlp and f"{norm}.w" not in state_dict:
            # One norm for both (GPT-J): attention reads it too, so its own entry stays for
            # TransformerLens, and an identity in ln2's place keeps it away from the MLP.
            norm = f"{block}ln1"
        if cfg.attn_only or f"{norm}.w" not in state_dict:
            continue
        readers = [(f"{block}mlp.{w}", f"{block}mlp.{b}") for w, b in _MLP_READERS]
        weight, bias = _fold_norm(state_dict, norm, readers, fold_biases, center_weights)
        state_dict[f"{block}ln2.w"] = torch.ones_like(weight)
        if bias is not None:
            state_dict[f"{block}ln2.b"] = torch.zeros_like(bias)
    if "ln_final.w" in state_dict:
        readers = [("unembed.W_U", "unembed.b_U")]
        weight, bias = _fold_norm(state_dict, "ln_final", readers, fold_biases, center=False)
        state_dict["ln_final.w"] = torch.ones_like(weight)
        if bias is not None:
            state_dict["ln_final.b"] = torch.zeros_like(bias)
    return state_dict


_MLP_READERS = (("W_gate", "b_gate"), ("W_in", "b_in"))


def _fold_norm(
    state_dict: dict[str, Tensor],
    norm: str,
    readers: Iterable[tuple[str, str]],
    fold_biases: bool,
    center: bool,
) -> tuple[Tensor, Tensor | None]:
    """Put a norm's weight and bias into what reads it; return them, the bias if it was folded."""
    w = state_dict[f"{norm}.w"]
    b = state_dict.get(f"{norm}.b") if fold_biases else None
    for weight_key, bias_key in readers:
        weight, bias = state_dict[weight_key], state_dict.get(bias_key)
        state_dict[weight_key], bias = fold_norm(weight, bias, w, b, center=center)
        if bias is not None:
            state_dict[bias_key] = bias
    return w, b


def _center_unembed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtract W_U's mean over the vocabulary, which softmax does not see.

    TransformerLens's own function guesses the axis from shapes, and is wrong for d_vocab == d_model
    with another d_vocab_out.
    """
    state_dict = dict(state_dict)
    for key in ("unembed.W_U", "unembed.b_U"):
        if key in state_dict:
            values = widened(state_dict[key])
            state_dict[key] = (values - values.mean(dim=-1, keepdim=True)).to(state_dict[key].dtype)
    return state_dict
