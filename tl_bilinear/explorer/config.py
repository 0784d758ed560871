"""Settings of `tl-bilinear explore`; importing them loads nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExploreConfig:
    """What the page shows, and where it is written."""

    out: Path = Path("explorer.html")
    """The page to write: one HTML file, or with --folder a folder with index.html."""
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
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie between 0 and 65535, got {self.port}")
