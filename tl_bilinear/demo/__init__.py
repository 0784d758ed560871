"""A small bilinear language model with SAEs that comes with the package: everything works offline.

>>> model = load_demo_model()                  # a HookedTransformer that writes TinyStories
>>> saes = load_demo_saes(demo_layers()[-1])   # {"mlp_in": SAE, "resid_mid": SAE, "mlp_out": SAE}
>>> features = FeatureInteractions(model, 3, saes["resid_mid"], saes["mlp_out"])
>>> features.run(load_demo_tokens()).low_rank_correlation()

Trained by this package's recipes (`tl-bilinear tokenizer`, `data`, `train lm`, `train saes`) and packed
by `python -m tl_bilinear.demo.pack`. ``files/MODEL_CARD.md`` has data, settings, losses, limits
and the commands. The stories are the model's own.
"""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from tl_bilinear import models
from tl_bilinear.io import read_table
from tl_bilinear.tensor import InputMoments

if TYPE_CHECKING:
    import sae_lens
    import torch

__all__ = [
    "demo_layers",
    "load_demo_model",
    "load_demo_moments",
    "load_demo_saes",
    "load_demo_stories",
    "load_demo_tokens",
]

FOLDER = Path(__file__).parent / "files"
MODEL, SAES, STORIES, CARD = "model", "saes", "stories.txt.gz", "card.json"
MOMENTS = "moments"
NAME = "tl-bilinear-demo"
SEPARATOR = "\n<|endoftext|>\n"


def load_demo_model(
    device: str | torch.device | None = None,
) -> models.HookedBilinearSAETransformer:
    """The model that comes with the package: float32, tokenizer attached, ready for SAEs.

    2.7 million parameters in 4 layers, a context of 256 tokens, a lower-case vocabulary of 2,048
    entries. `device` defaults to TransformerLens's choice.
    """
    import torch

    from tl_bilinear.models.huggingface import no_file_bars

    with no_file_bars():
        model = models.HookedBilinearSAETransformer.from_hf(
            FOLDER / MODEL, device=device, dtype=torch.float32
        )
    model.cfg.model_name = NAME
    return model.eval()


def demo_layers() -> tuple[int, ...]:
    """The layers that have SAEs."""
    return tuple(sorted({int(place.name.split("-")[0]) for place in (FOLDER / SAES).iterdir()}))


def load_demo_saes(
    layer: int, device: str | torch.device | None = None
) -> dict[str, sae_lens.SAE[Any]]:
    """The SAELens SAEs of one layer, by point: "mlp_in", "resid_mid" and "mlp_out".

    `device` defaults to the processor. Raises ValueError for a layer without SAEs, naming those with.
    """
    from sae_lens import SAE

    if layer not in demo_layers():
        raise ValueError(f"layer {layer!r} of the demo model has no SAEs; {_some_layers()} do")
    places = sorted((FOLDER / SAES).glob(f"{int(layer)}-*"))
    return {
        place.name.partition("-")[2]: SAE.load_from_disk(place, device=str(device or "cpu"))
        for place in places
    }


def load_demo_moments(layer: int) -> InputMoments:
    """The moments of what a layer's MLP reads on `load_demo_tokens`, [BOS] and first tokens left out.

    Kept in float32. Raises ValueError for a layer that the model does not have.
    """
    import torch

    path = FOLDER / MOMENTS / f"{layer}.safetensors"
    if not path.is_file():
        layers = sorted(int(place.stem) for place in (FOLDER / MOMENTS).iterdir())
        raise ValueError(f"the demo model has no layer {layer}; its layers are {layers}")
    return InputMoments.load(path).to(torch.float64)


def load_demo_stories() -> list[str]:
    """Stories that the model wrote itself, sampled at temperature 0.8."""
    text = gzip.decompress((FOLDER / STORIES).read_bytes()).decode()
    return text.split(SEPARATOR)


def load_demo_tokens() -> Int[Tensor, "rows 256"]:
    """The stories as rows of tokens, packed as in training: ``[BOS] story [EOS] [BOS] story ...``."""
    from tl_bilinear.recipes.language import load_tokenizer, pack_stories

    tokenizer = load_tokenizer(FOLDER / MODEL)
    return pack_stories(load_demo_stories(), tokenizer, n_ctx=demo_card()["model"]["n_ctx"])


@functools.cache
def demo_card() -> dict[str, Any]:
    """Settings and measured numbers of the model and its SAEs, as in ``MODEL_CARD.md``."""
    return read_table(FOLDER / CARD)


def _some_layers() -> str:
    return " and ".join(str(layer) for layer in demo_layers())
