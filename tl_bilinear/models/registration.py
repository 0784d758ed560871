"""What this package adds to TransformerLens's own classes, without importing TransformerLens.

TransformerLens takes seconds to import, so a post-import hook waits for it. `from_config` and
`boot_bilinear` appear whether TransformerLens was imported before or after `tl_bilinear`. Every subclass
of HookedTransformer and TransformerBridge has them too, SAELens's among them.

Our modules that import TransformerLens at their top are imported inside the functions that need them.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

import wrapt

if TYPE_CHECKING:
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.HookedTransformer import HookedTransformer as _HookedTransformer

    from tl_bilinear.models.component import BilinearTransformerConfig
    from tl_bilinear.models.transformer import HookedBilinearTransformer

_MODULE = "transformer_lens.HookedTransformer"
_BRIDGE_MODULE = "transformer_lens.model_bridge.bridge"
_FACTORY_MODULE = "transformer_lens.factories.architecture_adapter_factory"
_LLAMA = "LlamaForCausalLM"
_INSTALL_TL = "pip install 'transformer-lens>=3.9,<4'"
_INSTALL_SAE = "pip install 'sae-lens>=6.54'"

_registered = False


def register() -> None:
    """Tell TransformerLens of bilinear models, now or when it is imported. Idempotent.

    HookedTransformer gets `from_config` and a `from_pretrained` that loads our folders too,
    TransformerBridge `boot_bilinear`, and the factory of bridges an adapter of Llama that keeps a
    linear gate linear.
    """
    global _registered
    if not _registered:
        _registered = True
        wrapt.register_post_import_hook(_attach, _MODULE)
        wrapt.register_post_import_hook(_attach_to_bridge, _BRIDGE_MODULE)
        wrapt.register_post_import_hook(_register_adapter, _FACTORY_MODULE)


if TYPE_CHECKING:

    class HookedTransformer(_HookedTransformer):
        """TransformerLens's own class, as type checkers see it after `import tl_bilinear`."""

        @overload
        @classmethod
        def from_config(
            cls,
            cfg: HookedTransformerConfig | Mapping[str, Any] | None = None,
            *,
            bilinear: Literal[True],
            bilinear_bias: bool = False,
            tokenizer: Any = None,
            move_to_device: bool = True,
            **cfg_kwargs: Any,
        ) -> HookedBilinearTransformer: ...

        @overload
        @classmethod
        def from_config(
            cls, cfg: BilinearTransformerConfig, **options: Any
        ) -> HookedBilinearTransformer: ...

        @overload
        @classmethod
        def from_config(
            cls,
            cfg: HookedTransformerConfig | Mapping[str, Any] | None = None,
            *,
            bilinear: bool | None = None,
            tokenizer: Any = None,
            move_to_device: bool = True,
            **cfg_kwargs: Any,
        ) -> HookedTransformer: ...

        @classmethod
        def from_config(cls, *args: Any, **options: Any) -> Any:
            """See `_from_config`."""


def _attach(module: ModuleType) -> None:
    # This may run in the middle of TransformerLens's own import, so it must not import any more of
    # it. If TransformerLens ever has a from_config of its own, that one stays.
    hooked_transformer = getattr(module, "HookedTransformer", None)
    if hooked_transformer is None:
        return
    if not hasattr(hooked_transformer, "from_config"):
        hooked_transformer.from_config = classmethod(_from_config)
    if hasattr(hooked_transformer, "from_pretrained"):
        wrapt.wrap_function_wrapper(hooked_transformer, "from_pretrained", _load_saved)


_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "refactor_factored_attn_matrices",
    "fold_value_biases",
)


def _load_saved(stock: Any, cls: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """HookedTransformer.from_pretrained, which also loads a folder that save_pretrained wrote.

    As it was saved, weights processed or not; the model is a HookedBilinearTransformer. What else
    from_pretrained takes has no meaning there, and is refused, but for flags of processing that are off.
    """
    name = arguments[0] if arguments else options.get("model_name")
    if not isinstance(name, str | os.PathLike) or not os.path.isdir(os.path.expanduser(name)):
        return stock(*arguments, **options)
    import torch

    from tl_bilinear.models import folders

    if not folders.is_saved(name):
        return stock(*arguments, **options)
    from tl_bilinear.models.transformer import bilinear_class

    given = {n: value for n, value in options.items() if n != "model_name" and value is not None}
    known = ("device", "dtype", "tokenizer", "move_to_device")
    wanted = sorted(n for n in given if n not in known and not (n in _PROCESSING and not given[n]))
    if wanted or len(arguments) > 1:
        raise TypeError(
            f"{name} holds a bilinear model, which is loaded as it was saved: from_pretrained takes "
            f"{', '.join(known)} for it, by name, got {', '.join(wanted) or 'others by place'}. "
            "process_weights_() of the loaded model processes its weights"
        )
    if isinstance(given.get("dtype"), str):  # TransformerLens takes "float32"
        given["dtype"] = getattr(torch, given["dtype"])
    loads: Any = bilinear_class(cls)
    return loads.from_pretrained(name, **{n: given[n] for n in known if n in given})


def _from_config(
    cls: type,
    cfg: Any = None,
    *,
    bilinear: bool | None = None,
    tokenizer: Any = None,
    move_to_device: bool = True,
    **cfg_kwargs: Any,
) -> Any:
    """A new model of this class, from keyword arguments, a dict or a config object.

    >>> import tl_bilinear
    >>> from transformer_lens import HookedTransformer
    >>> model = HookedTransformer.from_config(
    ...     bilinear=True, n_layers=2, d_model=64, d_head=16, n_ctx=32, d_vocab=100,
    ...     normalization_type="RMS",
    ... )

    Parameters
    ----------
    cfg: HookedTransformerConfig, BilinearTransformerConfig or dict, optional
        Where to start from. It is copied, never changed.
    bilinear:
        True: every MLP is a `tl_bilinear.BilinearMLP` and the model a
        `tl_bilinear.HookedBilinearTransformer` (a subclass of this class).
        False, the default: the ordinary model.
        A BilinearTransformerConfig says so by itself.
    tokenizer, move_to_device:
        As for HookedTransformer.
    **cfg_kwargs:
        Fields of HookedTransformerConfig, over those of `cfg`; with ``bilinear=True`` also
        ``bilinear_bias=True`` for trainable b_gate, b_in and b_out (default False).

    Raises TypeError for an unknown field (naming the nearest valid one) or a missing one, and
    ValueError for settings that contradict each other, such as ``bilinear=True, act_fn="gelu"``.
    """
    from tl_bilinear.models.transformer import model_from_config

    return model_from_config(
        cls,
        cfg,
        bilinear=bilinear,
        tokenizer=tokenizer,
        move_to_device=move_to_device,
        overrides=cfg_kwargs,
    )


_from_config.__name__ = "from_config"
_from_config.__qualname__ = "HookedTransformer.from_config"


def _attach_to_bridge(module: ModuleType) -> None:
    bridge = getattr(module, "TransformerBridge", None)
    if bridge is not None and not hasattr(bridge, "boot_bilinear"):
        bridge.boot_bilinear = classmethod(_boot_bilinear)


def _boot_bilinear(
    cls: type,
    source: Any = None,
    *,
    bilinear_bias: bool = False,
    tokenizer: Any = None,
    device: Any = None,
    dtype: Any = None,
    **fields: Any,
) -> Any:
    """A bridge with bilinear MLPs, on TransformerLens 3.9 and on 4.

    >>> import tl_bilinear
    >>> from transformer_lens.model_bridge import TransformerBridge
    >>> bridge = TransformerBridge.boot_bilinear(
    ...     n_layers=2, d_model=64, d_head=16, n_ctx=32, d_vocab=100,
    ...     normalization_type="RMS", positional_embedding_type="rotary",
    ... )

    Parameters
    ----------
    source:
        - None, a dict or a TransformerBridgeConfig: a new native model.
        - a HookedBilinearTransformer, or a folder that its `save_pretrained` wrote: its weights in a
          native model, the same logits. `tl_bilinear.models.save_bridge` leads back.
        - a LlamaForCausalLM with ``hidden_act="linear"``: a bridge around this very object.
          TransformerLens's own `boot_transformers` boots one from a folder or by its hub name.
    bilinear_bias:
        For a new model: trainable biases on the three maps (appendix J), zero at first.
    tokenizer, device, dtype:
        Default: the source's, and TransformerLens's choice of device for a new model.
    **fields:
        Fields of TransformerBridgeConfig for a new model, over those of a dict.

    The result is of the class that this is called on: on SAELens's SAETransformerBridge it takes SAEs.

    Raises TypeError for an unknown field (naming the nearest), a missing one and another kind of
    source, FileNotFoundError for a folder that does not exist, ValueError for settings that contradict
    a bilinear model and for those of a HookedBilinearTransformer that the native model does not compute.
    """
    from tl_bilinear.models import bridge

    return bridge.boot_bilinear(
        cls,
        source,
        bilinear_bias=bilinear_bias,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        fields=fields,
    )


_boot_bilinear.__name__ = "boot_bilinear"
_boot_bilinear.__qualname__ = "TransformerBridge.boot_bilinear"


def _register_adapter(module: ModuleType) -> None:
    try:
        stock = module.SUPPORTED_ARCHITECTURES[_LLAMA]
        register_adapter = module.ArchitectureAdapterFactory.register_adapter
    except (AttributeError, KeyError) as error:
        # `import transformer_lens` has to work, even if a new version has renamed these.
        warnings.warn(
            f"TransformerLens {_version()} does not take tl_bilinear's adapter ({error!r}): in "
            "compatibility mode its bridge of a Llama with hidden_act='linear' may compute SiLU. "
            "pip install 'transformer-lens>=3.9,<5'",
            stacklevel=2,
        )
        return

    def adapter(cfg: Any) -> Any:
        from tl_bilinear.models import bridge

        return bridge.llama_adapter(stock, cfg)

    # The factory calls what it holds with the config, so our import waits for the first Llama.
    register_adapter(_LLAMA, adapter)


def explain_missing(name: str, error: ImportError) -> ImportError | None:
    """The error for a public name whose framework is absent, saying what to install.

    None where `error` has another reason, such as a broken installation.
    """
    missing = error.name or ""
    if missing == "transformer_lens":
        return ImportError(
            f"{name} needs TransformerLens, which is not installed. {_INSTALL_TL}", name=missing
        )
    if missing.startswith("transformer_lens."):
        return ImportError(
            f"{name} needs HookedTransformer as TransformerLens 3.9 has it. TransformerLens "
            f"{_version()} is installed and does not have it (4 has only TransformerBridge: "
            f"TransformerBridge.boot_bilinear). "
            f"{_INSTALL_TL}",
            name=missing,
        )
    if missing.partition(".")[0] == "sae_lens":
        return ImportError(
            f"{name} needs SAELens, which is not installed. {_INSTALL_SAE}", name=missing
        )
    return None


def _version() -> str:
    imported = getattr(sys.modules.get("transformer_lens"), "__version__", None)
    if isinstance(imported, str):
        return imported
    try:
        return importlib.metadata.version("transformer-lens")
    except importlib.metadata.PackageNotFoundError:
        return "as installed"
