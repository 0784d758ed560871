"""Where factored tensors come from: a registry of readers.

The tensor package knows no framework. A reader is a function that recognises one kind of module
and returns its :class:`~tl_bilinear.BilinearTensor`; `tl_bilinear.models` registers readers for
TransformerLens and for plain modules, and a user registers one for a class of their own:

>>> from tl_bilinear import BilinearTensor, register_mlp_reader
>>> def read_my_layer(module):
...     if type(module).__name__ != "MyLayer":
...         return None  # not mine: the next reader is asked
...     return BilinearTensor(module.w, module.v, module.p)
>>> register_mlp_reader("my-layer", read_my_layer)

The reader registered last is asked first, so that yours goes before those that ship. It returns
None for a module that is not its kind, and raises ValueError for one that is its kind but
not bilinear, saying what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_bilinear.tensor.bilinear import BilinearTensor
    from tl_bilinear.tensor.gated import GatedLayer

MLPReader = Callable[[Any], "BilinearTensor | None"]
ModelReader = Callable[[Any, "int | None"], "BilinearTensor | None"]
GatedReader = Callable[[Any], "GatedLayer | None"]

_mlp_readers: dict[str, MLPReader] = {}
_model_readers: dict[str, ModelReader] = {}
_gated_readers: dict[str, GatedReader] = {}
_waiting: list[Callable[[], None]] = []


def when_first_used(register: Callable[[], None]) -> None:
    """Call `register` before a module is first read, or a reader registered by anybody else."""
    _waiting.append(register)


def _use() -> None:
    while _waiting:
        _waiting.pop(0)()


def register_mlp_reader(name: str, reader: MLPReader) -> None:
    """Let `BilinearTensor.from_mlp(module)` read another kind of module.

    Raises ValueError if the name is taken.
    """
    _register(_mlp_readers, name, reader)


def register_model_reader(name: str, reader: ModelReader) -> None:
    """Let `BilinearTensor.from_model(model, layer)` read another kind of model.

    The reader is called with the model and the layer number (None where the caller gave none).
    Raises ValueError if the name is taken.
    """
    _register(_model_readers, name, reader)


def register_gated_reader(name: str, reader: GatedReader) -> None:
    """Let `approximate(mlp, inputs)` read another kind of gated module.

    Raises ValueError if the name is taken.
    """
    _register(_gated_readers, name, reader)


@dataclass(frozen=True)
class NamedMaps:
    """A module whose maps the caller has named: what readers meet for ``from_mlp(module, maps)``."""

    module: Any
    maps: Sequence[str]


def read_mlp(module: Any) -> BilinearTensor:
    """The BilinearTensor of a module, by the first reader that recognises it; TypeError for none."""
    _use()
    for reader in reversed(_mlp_readers.values()):
        tensor = reader(module)
        if tensor is not None:
            return tensor
    raise TypeError(_unknown("MLP", module, _mlp_readers, "register_mlp_reader"))


def read_model(model: Any, layer: int | None) -> BilinearTensor:
    """The BilinearTensor of a layer of a model; TypeError where no reader recognises the model."""
    _use()
    for reader in reversed(_model_readers.values()):
        tensor = reader(model, layer)
        if tensor is not None:
            return tensor
    raise TypeError(_unknown("model", model, _model_readers, "register_model_reader"))


def read_gated(module: Any) -> GatedLayer:
    """The GatedLayer of a module; TypeError where no reader recognises it."""
    _use()
    for reader in reversed(_gated_readers.values()):
        layer = reader(module)
        if layer is not None:
            return layer
    raise TypeError(
        f"no reader recognises this gated MLP: {type(module).__module__}."
        f"{type(module).__qualname__}. Readers asked: {', '.join(sorted(_gated_readers)) or 'none'}. "
        "Build GatedLayer(gate, up, out, activation) from its weights and pass that"
    )


def _register(registry: dict[str, Any], name: str, reader: Any) -> None:
    _use()
    if name in registry:
        raise ValueError(
            f"a reader named {name!r} is registered already; names taken: {sorted(registry)}"
        )
    registry[name] = reader


def _unknown(kind: str, value: Any, registry: dict[str, Any], register: str) -> str:
    return (
        f"no reader recognises this {kind}: {type(value).__module__}.{type(value).__qualname__}. "
        f"Readers asked: {', '.join(sorted(registry)) or 'none'}. "
        f"Build BilinearTensor(left, right, out) from its weights, or add a reader with {register}."
    )
