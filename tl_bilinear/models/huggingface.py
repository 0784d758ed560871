"""Convert Hugging Face's Llama with a linear gate to the bilinear HookedTransformer, and back.

``LlamaForCausalLM`` with ``hidden_act="linear"`` computes ``down((gate(x) + b) * (up(x) + c)) + b'``,
biases where ``mlp_bias``: the bilinear layer, pre-product biases included (appendix J). With
right-multiplying weights, W_gate = gate_proj.weight.T, W_in = up_proj.weight.T and
W_out = down_proj.weight.T.

>>> hf = LlamaForCausalLM.from_pretrained("runs/small/model")   # as `tl-bilinear train lm` writes it
>>> model = tl_bilinear.HookedBilinearTransformer.from_hf(hf)   # the same logits
>>> model.to_hf("copy")                                         # and back, into a folder

TransformerLens is imported only where one of its models is made: training does not need it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_bilinear.io import read_table, whole_directory
from tl_bilinear.models.files import (
    CONFIG,
    WEIGHTS,
    Source,
    read_tokenizer,
    require_numbers,
    require_shapes,
    require_sizes,
)
from tl_bilinear.models.folders import is_ours
from tl_bilinear.models.layouts import weight_pairs
from tl_bilinear.models.readers import gated_through, refuse_nonlinear
from tl_bilinear.tensor.registry import read_mlp

ARCHITECTURE = "LlamaForCausalLM"

# Fields of the config that do not change a forward pass, or that `to_hf` takes into account.
_NEUTRAL = frozenset(
    """attn_scale bilinear_bias checkpoint_index checkpoint_label_type checkpoint_value
    default_prepend_bos device dtype final_rms from_checkpoint init_mode init_weights
    initializer_range model_name n_devices n_key_value_heads n_params normalization_type
    original_architecture seed tie_word_embeddings tokenizer_name tokenizer_prepends_bos
    trust_remote_code ungroup_grouped_query_attention use_attn_in use_attn_result use_attn_scale
    use_hook_mlp_in use_hook_tokens use_split_qkv_input""".split()  # noqa: SIM905
)


# ---------------------------------------------------------------------- from Hugging Face


def from_hf(
    cls: type,
    source: Any,
    *,
    fold_ln: bool,
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    move_to_device: bool,
) -> Any:
    """See HookedBilinearTransformer.from_hf."""
    from tl_bilinear.models.component import BilinearTransformerConfig

    if isinstance(source, str | PathLike):
        source = Path(source).expanduser() if Path(source).expanduser().exists() else source
        llama = _load(str(source), dtype)
        tokenizer = load_tokenizer(str(source)) if tokenizer is None else tokenizer
    else:
        llama = source
    _require_bilinear(llama)
    config = llama.config
    require_numbers(config.name_or_path or "the Llama", llama.state_dict())
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries and the model embeds {config.vocab_size}: "
            "pass the tokenizer that the model was trained with"
        )
    values = transformer_lens_config(config)
    values["dtype"] = dtype or llama.dtype
    if device is not None:
        values["device"] = str(device)
    cfg = BilinearTransformerConfig(**values, init_weights=False)
    model = cls(cfg, tokenizer=tokenizer, move_to_device=False)
    model.cfg.init_weights = True  # what TransformerLens's own loaders leave there
    model.load_and_process_state_dict(
        _state_from_hf(llama, model),
        fold_ln=fold_ln,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    if move_to_device:
        model.move_model_modules_to_device()
    return model


def transformer_lens_config(config: Any) -> dict[str, Any]:
    """The fields of BilinearTransformerConfig that describe a LlamaConfig, its activation aside.

    Raises ValueError for a rotary embedding that TransformerLens does not have.
    """
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    grouped = config.num_key_value_heads not in (None, heads)
    return {
        "model_name": getattr(config, "name_or_path", None) or "llama",
        "original_architecture": ARCHITECTURE,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": heads,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
        "d_mlp": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "bilinear_bias": bool(config.mlp_bias),
        "initializer_range": config.initializer_range,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_adjacent_pairs": False,
        **_rotary_from_hf(config),
    }


def _rotary_from_hf(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    fields: dict[str, Any] = {"rotary_base": rope["rope_theta"]}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "partial_rotary_factor is not supported: all of a head is rotated in Llama"
        )
    if kind == "linear":
        fields["rotary_scaling_factor"] = rope["factor"]
    elif kind == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    elif kind != "default":
        raise ValueError(
            f"rope_type {kind!r} is not supported; TransformerLens and this adapter agree on "
            "'default', 'linear' and 'llama3'"
        )
    return fields


def _load(source: str, dtype: torch.dtype | None) -> Any:
    """A Llama from a folder or by its name on the hub."""
    # The config first: a model that will be refused is not downloaded.
    config = read_llama_config(source)
    if config.model_type != "llama":
        raise TypeError(
            f"{source} is a {config.model_type!r} model; expected a Llama (model_type 'llama') with "
            "hidden_act='linear'"
        )
    if config.hidden_act not in ("linear", "identity"):
        raise ValueError(gated_through(source, config.hidden_act))
    return read_llama(source, config, dtype)


def read_llama_config(source: str) -> Any:
    """The config of a model of Hugging Face's kind, a folder or a name on the hub; sizes are checked.

    Raises FileNotFoundError, and ValueError naming the file and what is wrong with it.
    """
    from transformers import AutoConfig

    folder = Path(source)
    if folder.exists():
        _require_hf_folder(folder)
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError:
        raise
    except Exception as error:  # transformers checks types in several ways
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from error
    if config.model_type == "llama":
        require_sizes(folder / CONFIG, vars(config), _LLAMA_SIZES)
    return config


_LLAMA_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def read_llama(source: str, config: Any, dtype: torch.dtype | None) -> Any:
    """A Llama from a folder or by its name on the hub, all of whose weights are in its files.

    `config` is the one there. Raises ValueError naming each tensor that is missing, misshapen, no part
    of the model, not floating-point or not finite. transformers itself would fill in random numbers.
    """
    from transformers import LlamaForCausalLM

    files = _weight_files(source)
    if not files and Path(source).is_dir() and not any(Path(source).glob("pytorch_model*")):
        raise FileNotFoundError(f"{source} is not a Hugging Face model: it has no {WEIGHTS}")
    if files:
        _require_whole(source, files, config)
    try:
        llama, report = LlamaForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", output_loading_info=True
        )
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise ValueError(f"the weights in {source} cannot be read: {error}") from error
    if problems := sorted(report["missing_keys"]):
        raise ValueError(
            f"{source} lacks weights that its {CONFIG} asks for: {', '.join(problems)}"
        )
    require_numbers(source, llama.state_dict())
    return llama


def load_llama(folder: str | PathLike[str]) -> Any:
    """A Llama with any gate from a folder, whole, in its own dtype. Raises as the two above."""
    return read_llama(str(folder), read_llama_config(str(folder)), None)


def _weight_files(source: str) -> list[Path]:
    """The safetensors files of a model; none for one that is stored in another way."""
    place = Source(Path(source) if Path(source).exists() else source, kind="Hugging Face model")
    whole = place.find(WEIGHTS)
    if whole is not None:
        return [whole]
    index = place.find(f"{WEIGHTS}.index.json")
    if index is None:
        return []
    names = read_table(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} has no 'weight_map' that says which file holds which weight")
    return [place.require(name) for name in sorted(set(map(str, names.values())))]


def _require_whole(source: str, files: Sequence[Path], config: Any) -> None:
    """Compare the names, shapes and dtypes in a model's files with its config, reading no weight."""
    from transformers import LlamaForCausalLM

    found: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = list(part.get_shape())
                    if not part.get_dtype().startswith(("F", "BF")):
                        raise ValueError(
                            f"{path}: {name} is {part.get_dtype()}; expected floating-point weights"
                        )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated, or not a safetensors file: {error}") from error
    if found and not any(name.startswith("model.") for name in found):
        found = {f"model.{name}": shape for name, shape in found.items()}  # saved without its head
    layers = {int(m[1]) for name in found if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) < config.num_hidden_layers:
        raise ValueError(
            f"{files[0]} does not fit its {CONFIG}: there are weights of the layers {sorted(layers)}, "
            f"where num_hidden_layers is {config.num_hidden_layers}"
        )
    with torch.device("meta"):
        expected = {
            name: list(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    known = {
        name: torch.empty(shape, device="meta")
        for name, shape in found.items()
        if "rotary_emb" not in name
        and not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    require_shapes(files[0] if len(files) == 1 else source, known, expected)


def load_tokenizer(source: str) -> Any:
    """A model's tokenizer; None for a folder without one.

    Raises ValueError, naming the folder, for one that cannot be read.
    """
    from transformers import AutoTokenizer

    if not Path(source).is_dir():
        return AutoTokenizer.from_pretrained(source)
    files = [Path(source) / name for name in ("tokenizer_config.json", "tokenizer.json")]
    return read_tokenizer(Path(source)) if any(file.is_file() for file in files) else None


def _require_hf_folder(folder: Path) -> None:
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model: it has no {CONFIG}")
    if is_ours(read_table(config)):
        raise ValueError(
            f"{folder} is in tl_bilinear's own format: load it with "
            "HookedBilinearTransformer.from_pretrained"
        )


def _require_bilinear(llama: Any) -> None:
    from transformers import LlamaForCausalLM

    if not isinstance(llama, LlamaForCausalLM):
        raise TypeError(
            "from_hf takes a LlamaForCausalLM, a folder with one, or its name on the hub, not "
            f"{type(llama).__module__}.{type(llama).__qualname__}"
        )
    if not all(p.is_floating_point() for p in llama.parameters()):
        raise ValueError("the model is quantised: load it in float32 or in a 16-bit type")
    for layer in llama.model.layers:
        refuse_nonlinear(layer.mlp, llama.config.name_or_path or "this Llama")
        read_mlp(layer.mlp)  # refuses a forward that is not that of its weights


def _state_from_hf(llama: Any, model: Any) -> dict[str, Tensor]:
    """A whole state dict for `model`; what the Llama does not have (biases) is zero."""
    given, state = llama.state_dict(), dict(model.state_dict())
    for tl_name, hf_name, tl_layout, hf_layout in _pairs(model.cfg):
        if hf_name in given:
            sizes = {"h": model.cfg.d_head} if "h" in tl_layout.split() else {}
            state[tl_name] = rearrange(given[hf_name], f"{hf_layout} -> {tl_layout}", **sizes)
        elif hf_name.endswith(".bias"):
            state[tl_name] = torch.zeros_like(state[tl_name])
        else:
            raise ValueError(f"the Llama has no {hf_name}: merge adapters before converting")
    state["unembed.b_U"] = torch.zeros_like(state["unembed.b_U"])
    return state


def _pairs(cfg: Any) -> Iterator[tuple[str, str, str, str]]:
    return weight_pairs("llama", cfg.n_layers, grouped=cfg.n_key_value_heads is not None)


# ---------------------------------------------------------------------- to Hugging Face


def to_hf(model: Any, directory: str | PathLike[str] | None) -> Any:
    """See HookedBilinearTransformer.to_hf."""
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg, state = model.cfg, model.state_dict()
    fields = _llama_fields(cfg, state)
    if model.tokenizer is not None:
        # Not pad_token_id: Llama would give that token's embedding no gradient, and it often is [EOS].
        fields |= {n: getattr(model.tokenizer, n) for n in ("bos_token_id", "eos_token_id")}
    config = LlamaConfig(**fields)
    _require_llama(cfg, config, state)
    with torch.random.fork_rng(devices=[]):  # its initial weights are replaced
        llama: Any = LlamaForCausalLM(config)
    llama.to(dtype=cfg.dtype, device=state["embed.W_E"].device)
    # HF divides attention scores by sqrt(d_head).
    scale = math.sqrt(cfg.d_head) / (cfg.attn_scale if cfg.use_attn_scale else 1.0)
    converted = {}
    for tl_name, hf_name, tl_layout, hf_layout in _pairs(cfg):
        if tl_name not in state:  # a norm without a weight
            continue
        values = state[tl_name]
        if tl_name.endswith(("attn.W_Q", "attn.b_Q")) and scale != 1.0:
            values = values * scale
        converted[hf_name] = rearrange(values, f"{tl_layout} -> {hf_layout}")
    wanted = llama.state_dict().keys()
    llama.load_state_dict({k: v for k, v in converted.items() if k in wanted}, strict=False)
    llama.eval()
    if directory is not None:
        save_llama(llama, model.tokenizer, directory)
    return llama


def _llama_fields(cfg: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    def any_of(part: str) -> bool:
        return any(
            bool(values.any())
            for name, values in state.items()
            if f".{part}." in name and name.rpartition(".")[2].lstrip("_").startswith("b_")
        )

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(cfg.rotary_base)}
    if cfg.use_NTK_by_parts_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.NTK_by_parts_factor,
            "low_freq_factor": cfg.NTK_by_parts_low_freq_factor,
            "high_freq_factor": cfg.NTK_by_parts_high_freq_factor,
            "original_max_position_embeddings": cfg.NTK_original_ctx_len,
        }
    elif cfg.rotary_scaling_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": cfg.rotary_scaling_factor}
    W_E, W_U = state["embed.W_E"], state["unembed.W_U"]
    return {
        "hidden_act": "linear",
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "head_dim": cfg.d_head,
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.eps,
        "rope_parameters": rope,
        "mlp_bias": cfg.bilinear_bias or any_of("mlp"),
        "attention_bias": any_of("attn"),
        "tie_word_embeddings": W_E.shape == W_U.T.shape and torch.equal(W_E, W_U.T),
    }


def _require_llama(cfg: Any, config: Any, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming each setting that a LlamaForCausalLM cannot express."""
    from tl_bilinear.models.component import BilinearTransformerConfig

    problems = []
    if cfg.normalization_type not in ("RMS", "RMSPre"):
        problems.append(f"normalization_type={cfg.normalization_type!r} (there: 'RMS')")
    if cfg.original_architecture not in (None, ARCHITECTURE):
        problems.append(f"original_architecture={cfg.original_architecture!r} (there: Llama's)")
    as_llama = BilinearTransformerConfig(**transformer_lens_config(config), device="cpu")
    for field in dataclasses.fields(as_llama):
        given, there = getattr(cfg, field.name), getattr(as_llama, field.name)
        if field.name not in _NEUTRAL and given != there:
            problems.append(f"{field.name}={given!r} (there: {there!r})")
    if state["unembed.b_U"].any():
        problems.append("a bias b_U of the unembedding that is not zero (there: none)")
    if problems:
        raise ValueError(f"LlamaForCausalLM cannot express this model: {'; '.join(problems)}")


def save_llama(llama: Any, tokenizer: Any, directory: str | PathLike[str]) -> None:
    """Write a Hugging Face checkpoint with its tokenizer, whole or not at all.

    A checkpoint that this function wrote there before is replaced; FileExistsError for anything else.
    """
    with whole_directory(directory, "llama") as staging:
        llama.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


@contextmanager
def no_file_bars() -> Iterator[None]:
    """Leave out the progress bars that transformers draws for each file it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
