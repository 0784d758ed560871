"""Modules of other packages: recognise them by name, copy their weights, run them once to compare.

Nothing here imports a framework. An object of TransformerLens exists only where TransformerLens is
loaded already, so the names of its classes are enough to recognise it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATION_NAMES = ("act_fn", "act", "activation", "activation_fn", "nonlinearity")
_IDENTITY_NAMES = ("identity", "linear")


# ---------------------------------------------------------------------- recognise


def is_a(value: Any, package: str, class_name: str) -> bool:
    """isinstance by name, for classes of a package that may not be importable."""
    return any(
        cls.__name__ == class_name and cls.__module__.partition(".")[0] == package
        for cls in type(value).__mro__
    )


def runs_as(module: Any, package: str, class_name: str) -> bool:
    """Whether a module is of a class, recognised by name, and has the forward of that class."""
    owner = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), object)
    return owner.__name__ == class_name and owner.__module__.partition(".")[0] == package


def is_identity(activation: Any) -> bool:
    """Whether an activation leaves every number as it is, found by trying."""
    if isinstance(activation, str):
        return activation in _IDENTITY_NAMES
    magnitudes = torch.logspace(-4, 4, 65)
    probe = torch.cat([-magnitudes, torch.zeros(1), magnitudes])[None, None]
    try:
        with torch.no_grad():
            return torch.equal(activation(probe), probe)
    except Exception:  # an activation with another signature is not the identity
        return False


# ---------------------------------------------------------------------- copy


def copied(weight: Tensor) -> Tensor:
    """A detached copy."""
    return weight.detach().clone(memory_format=torch.contiguous_format)


def transposed(weight: Tensor) -> Tensor:
    """A detached copy of the transpose."""
    return copied(weight.T)


def copied_bias(bias: Tensor | None) -> Tensor | None:
    """A detached copy. None for zeros that cannot train, which are no bias."""
    if bias is None or (not isinstance(bias, nn.Parameter) and not bias.any()):
        return None
    return copied(bias)


# ---------------------------------------------------------------------- compare


def require_same_forward(
    module: Any,
    layer: Callable[[Tensor], Tensor],
    weight: Tensor,
    *,
    kind: str,
    remedy: str,
) -> None:
    """Raise ValueError for a module whose forward is not that of the layer read from its weights.

    Both run on a few random inputs.

    Parameters
    ----------
    weight: [d_hidden, d_in], one of the weights read: gives width, dtype and device of the inputs
    kind, remedy: what the names promised ("a gated MLP") and what to do instead, for the error
    """
    if not callable(module) or weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    # Inputs of several lengths: a forward that normalises first would pass at length sqrt(d) alone.
    lengths = torch.linspace(0.5, 4, 8)[:, None]
    x = (lengths * torch.randn(1, 8, weight.shape[-1], generator=generator)).to(weight)
    name = type(module).__name__
    try:
        with torch.no_grad(), evaluating(module):
            given = module(x)
    except NotImplementedError:  # a container without a forward has nothing to compare with
        return
    except Exception as error:
        raise ValueError(
            f"this {name} has the names of {kind}, but it could not be run on an input of shape "
            f"{list(x.shape)} to compare; {remedy}"
        ) from error
    if not isinstance(given, Tensor):
        raise ValueError(f"this {name} returns a {type(given).__name__}, not a tensor; {remedy}")
    with torch.no_grad():
        expected = layer(x)
    if given.shape != expected.shape:
        raise ValueError(
            f"this {name} returns shape {list(given.shape)}, but {kind} with its weights returns "
            f"{list(expected.shape)}; {remedy}"
        )
    difference = (given.to(expected) - expected).abs().max().item()
    scale = expected.abs().max().item()
    # Another function differs by its own size; 16-bit and TF32 products by a few per cent at most.
    if not difference <= (0.1 if weight.dtype.itemsize < 4 else 0.01) * scale:
        raise ValueError(
            f"this {name} has the names of {kind}, but its forward computes something else: outputs "
            f"up to {scale:.3g} differ by {difference:.3g}; {remedy}"
        )


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards each submodule is in the mode it was in."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    training = [one.training for one in modules]
    try:
        for one in modules:
            one.training = False
        yield
    finally:
        for one, was in zip(modules, training, strict=True):
            one.training = was
