"""Component activations as hook points of the model, while a context is open.

>>> with recording(model, parts) as names:                     # ["blocks.3.mlp.hook_eigen"]
...     logits, cache = model.run_with_cache(tokens, names_filter=names)
>>> cache["blocks.3.mlp.hook_eigen"]                           # [batch, pos, components]

They are hook points like the model's own, in `hook_dict` and in every cache, with gradients under
`incl_bwd`: activation times gradient attributes a loss to eigencomponents. A hook that returns other
activations changes what the layer writes, along the components' write directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_bilinear.hooks.components import Components
from tl_bilinear.hooks.points import LayerPoints


@contextmanager
def recording(model: Any, *components: Components, name: str | None = None) -> Iterator[list[str]]:
    """Add a hook point for each of `components` to its layer's MLP; gives their full names.

    Parameters
    ----------
    model: a model with TransformerLens hooks, SAEs attached or not, before or while this is open
    components: EigenComponents or HOSVDComponents
    name: what to call the hook points instead of "hook_eigen" and "hook_hosvd"

    A hook point's activation is [batch, pos, components], with the grid of components flattened:
    reshape it to ``(*batch_pos, *components.shape)`` to separate directions and pairs. It is computed
    from what the layer reads, after every other hook on `mlp.hook_in`. Hooks on `mlp.hook_out` (caches
    and interventions among them) come later, and see what an edited activation has changed.

    The model is left as it was, also after an exception.

    Raises ValueError for a name that the layer has already, and where components do not fit the layer.
    """
    names: list[str] = []
    with ExitStack() as stack:
        for each in components:
            names.append(stack.enter_context(_hung(model, each, name or each.hook_name)))
        yield names


@contextmanager
def _hung(model: Any, components: Components, name: str) -> Iterator[str]:
    from transformer_lens.hook_points import HookPoint

    points = LayerPoints.of(model, components.layer)
    components.check(model, points)
    mlp = model.blocks[points.layer].mlp
    full_name = f"blocks.{points.layer}.mlp.{name}"
    if hasattr(mlp, name):
        raise ValueError(
            f"{full_name} exists already; record under another name: recording(model, ..., "
            f"name='hook_...')"
        )
    if not name.isidentifier():
        raise ValueError(f"name must be that of an attribute ('hook_eigen'), got {name!r}")
    index = components.index().flatten()
    point = HookPoint()
    during: list[Any] = []  # hooks of the forward that is running
    read: list[Tensor] = []

    def clear() -> None:
        while during:
            during.pop().remove()
        read.clear()

    def before(module: nn.Module, args: Any) -> None:
        # Again in every forward: SAELens may have replaced the hook point, and this hook must be last.
        clear()
        during.append(points.reads.find(model).register_forward_hook(catch))
        during.append(points.writes.find(model).register_forward_hook(write, prepend=True))

    def catch(module: nn.Module, args: Any, x: Tensor) -> None:
        read.append(x)

    def write(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        activations = components.at(read[-1], index)
        given = activations.view_as(activations)
        edited = point(given)
        if edited is given and not (torch.is_grad_enabled() and edited.requires_grad):
            return None
        # Unedited, this adds exact zeros; it also connects the tensor that hooks saw to the gradient.
        return out + components.written(edited - activations, index).to(out.dtype)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        clear()

    handles = []
    try:
        setattr(mlp, name, point)
        point.name = full_name  # as the model's setup would call it; a bridge's setattr does not
        for names in _registries(model):
            names[full_name] = point
        handles.append(mlp.register_forward_pre_hook(before))
        # A layer that writes at the block's hook_mlp_out does so after its MLP has returned.
        handles.append(model.blocks[points.layer].register_forward_hook(after, always_call=True))
        yield full_name
    finally:
        for handle in handles:
            handle.remove()
        clear()
        delattr(mlp, name)
        for names in _registries(model):
            names.pop(full_name, None)
        for names in _registries(mlp):
            names.pop(name, None)


def _registries(module: Any) -> list[dict[str, Any]]:
    """The dictionaries in which a model, or a bridge's component, looks for hook points by name."""
    found = (getattr(module, name, None) for name in ("hook_dict", "mod_dict", "_hook_registry"))
    return [each for each in found if isinstance(each, dict)]
