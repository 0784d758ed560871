"""The loss of language models by the activation of their MLPs (Pearce et al. 2025, Table 4).

Every activation is trained for the same epochs. A slower one sees fewer tokens in the same time: its
second run has as many steps as fit in the seconds that the first activation took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_bilinear.io import read_table, write_json
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.train import (
    ACTIVATIONS,
    CONFIGS,
    LanguageConfig,
    LanguageRun,
    train_language_model,
)

if TYPE_CHECKING:
    import pandas as pd

_TABLE = "comparison.json"


@dataclass(frozen=True)
class ActivationComparison:
    """Validation losses in nats a token, by activation; steps and speed of the runs behind them."""

    activations: tuple[str, ...]
    constant_epochs: tuple[float, ...]
    constant_time: tuple[float, ...]
    steps: tuple[int, ...]
    steps_in_equal_time: tuple[int, ...]
    tokens_per_second: tuple[float, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row for each activation."""
        import pandas as pd

        return pd.DataFrame(dataclasses.asdict(self)).set_index("activations")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> ActivationComparison:
        """Read the table that `compare_activations` left in its folder.

        Raises FileNotFoundError, or ValueError for a damaged one.
        """
        path = Path(folder).expanduser() / _TABLE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no comparison: `tl-bilinear train compare` makes it"
            )
        stored = read_table(path)
        try:
            return cls(**{name: tuple(values) for name, values in stored.items()})
        except TypeError as error:
            raise ValueError(f"{path} is not a table of this version: {error}") from error

    def __str__(self) -> str:
        return str(self.to_pandas().to_string(float_format="{:.3f}".format))


def compare_activations(
    data: LanguageData | str | PathLike[str],
    config: LanguageConfig = CONFIGS["paper"],
    *,
    folder: str | PathLike[str],
    activations: Sequence[str] = tuple(ACTIVATIONS),
    **options: Any,
) -> ActivationComparison:
    """Train a model with each activation twice: for equal epochs, and for equal time.

    Each run has a folder of its own in `folder`, and one that is there is read or continued, so an
    interrupted comparison goes on where it was. Time is that of the training steps on this machine;
    options are those of `train_language_model`.

    Raises ValueError for an unknown activation, before anything is trained.
    """
    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    folder = Path(folder).expanduser()
    configs = {a: dataclasses.replace(config, activation=a) for a in activations}
    if not configs:
        raise ValueError(f"no activation to compare; there are {', '.join(ACTIVATIONS)}")
    equal_epochs = {
        activation: train_language_model(data, wanted, folder=folder / activation, **options)
        for activation, wanted in configs.items()
    }
    reference = equal_epochs[activations[0]]
    equal_time: Mapping[str, LanguageRun] = {
        activation: _in_the_same_time(run, reference, data, folder, options)
        for activation, run in equal_epochs.items()
    }
    compared = ActivationComparison(
        tuple(equal_epochs),
        tuple(run.loss for run in equal_epochs.values()),
        tuple(run.loss for run in equal_time.values()),
        tuple(run.steps for run in equal_epochs.values()),
        tuple(run.steps for run in equal_time.values()),
        tuple(run.tokens_per_second for run in equal_epochs.values()),
    )
    write_json(folder / _TABLE, dataclasses.asdict(compared))
    return compared


def _in_the_same_time(
    run: LanguageRun,
    reference: LanguageRun,
    data: LanguageData,
    folder: Path,
    options: Mapping[str, Any],
) -> LanguageRun:
    steps = max(1, round(run.steps * reference.seconds / run.seconds))
    if steps == run.steps:
        return run
    config = dataclasses.replace(run.config, steps=steps)
    return train_language_model(
        data, config, folder=folder / f"{run.config.activation}-in-equal-time", **options
    )
