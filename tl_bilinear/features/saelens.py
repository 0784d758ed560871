"""SAELens learns of the published SAEs when it is imported, before or after `tl_bilinear`.

SAELens takes seconds to import, so a post-import hook waits for it.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import wrapt

_registered = False


def register() -> None:
    """Register the published SAEs with SAELens, now or when it is imported. Idempotent."""
    global _registered
    if not _registered:
        _registered = True
        wrapt.register_post_import_hook(_attach, "sae_lens")


def _attach(module: ModuleType) -> None:
    try:
        importlib.import_module("tl_bilinear.features.published_saes")  # registers itself
    except (ImportError, AttributeError, TypeError) as error:
        # `import sae_lens` has to work whatever a version of it has renamed.
        warnings.warn(
            f"SAELens {getattr(module, '__version__', '')} does not take tl_bilinear's SAEs, so the "
            f"published ones do not load ({error}). pip install 'sae-lens>=6.54,<7'",
            stacklevel=2,
        )
