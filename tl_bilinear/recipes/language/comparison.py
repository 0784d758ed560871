"""Runs beside each other: activations of the gate, and ways of making a model bilinear.

**Activations** (Pearce et al. 2025, Table 4). Every activation is trained for the same epochs. A slower
one sees fewer tokens in the same time: its second run has as many steps as fit in the seconds that the
first activation took.

**Finetuning** (Fig. 22). Every run that makes a model bilinear is set beside the same finetuning of the
model as it was.

>>> compared = compare_finetuning("MODEL", "data", {"affine": FinetuneConfig()}, folder="runs/finetune")
>>> compared.gaps, compared.runs["affine"].hooked()   # a HookedBilinearTransformer
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_bilinear.io import read_table, whole_file, write_json
from tl_bilinear.recipes.language.config import (
    ACTIVATIONS,
    CONFIGS,
    FinetuneConfig,
    LanguageConfig,
)
from tl_bilinear.recipes.language.data import LanguageData
from tl_bilinear.recipes.language.finetune_run import FinetuneRun, finetune, load_gated_llama
from tl_bilinear.recipes.language.language_run import LanguageRun
from tl_bilinear.recipes.language.llama import language_loss
from tl_bilinear.recipes.language.run_folder import is_first_process
from tl_bilinear.recipes.language.train import train_language_model

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "baseline"
_TABLE = "comparison.json"
_NAME = re.compile(r"[\w-][\w.-]*")


# ---------------------------------------------------------------------- activations


@dataclass(frozen=True)
class ActivationComparison:
    """Validation losses in nats a token, by activation, with the steps and speed of their runs."""

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
            found = cls(**{name: tuple(values) for name, values in stored.items()})
            if len({len(values) for values in vars(found).values()}) != 1:
                raise ValueError("its columns have different lengths")
            return found
        except (TypeError, ValueError) as error:
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

    Each run has a folder of its own in `folder`; a run that is there is read or continued, so an
    interrupted comparison goes on where it stopped. Time is that of the training steps on this machine.
    `options` are those of `train_language_model`.

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


# ---------------------------------------------------------------------- finetuning


@dataclass(frozen=True, eq=False)
class FinetuneComparison:
    """Runs that make a model bilinear, beside the same finetuning of the model as it was (Fig. 22).

    `start_loss` is the model's validation loss before any of it, in nats a token.
    """

    start_loss: float
    baseline: FinetuneRun
    runs: Mapping[str, FinetuneRun]

    @property
    def gaps(self) -> dict[str, float]:
        """How far each run's loss lies above the baseline's, in nats a token."""
        return {name: run.loss - self.baseline.loss for name, run in self.runs.items()}

    def to_pandas(self) -> pd.DataFrame:
        """One row for each run: its settings, loss, gap and tokens."""
        import pandas as pd

        runs = {BASELINE: self.baseline, **self.runs}
        rows = [
            {
                "run": name,
                **{
                    f: getattr(run.config, f)
                    for f in ("path", "schedule", "anneal", "extra", "distill")
                },
                "loss": run.loss,
                "gap": run.loss - self.baseline.loss,
                "tokens": run.tokens,
                "seconds": run.seconds,
            }
            for name, run in runs.items()
        ]
        return pd.DataFrame(rows).set_index("run")

    def curves(self) -> pd.DataFrame:
        """One row for each run and validation: run, step, loss, gap to the baseline at that step.

        Step 0 is the model before finetuning, which a run in closed form does not start from.
        """
        import pandas as pd

        rows: list[tuple[str, int, float, float | None]] = []
        at_baseline = _validation(self.baseline)
        for name, run in {BASELINE: self.baseline, **self.runs}.items():
            if run.config.path != "closed":
                rows.append((name, 0, self.start_loss, None))
            for step, loss in _validation(run).items():
                known = step in at_baseline
                rows.append((name, step, loss, loss - at_baseline[step] if known else None))
        return pd.DataFrame(rows, columns=["run", "step", "loss", "gap"]).astype({"gap": float})

    def write_curves(self, path: str | PathLike[str]) -> None:
        """Write the losses over the steps (Fig. 22) as one HTML page that opens offline."""
        from tl_bilinear.plots import finetune_figure  # plotly takes a second to import

        with whole_file(path) as temporary:
            finetune_figure(self).write_html(temporary, include_plotlyjs=True)

    def __str__(self) -> str:
        table = self.to_pandas().to_string(float_format="{:.4f}".format)
        return f"loss before finetuning {self.start_loss:.4f} nats a token\n{table}"


def compare_finetuning(
    model: str | PathLike[str],
    data: LanguageData | str | PathLike[str],
    configs: Mapping[str, FinetuneConfig],
    *,
    folder: str | PathLike[str],
    **options: Any,
) -> FinetuneComparison:
    """Finetune with each config, and once with the gates as they were: equal tokens, equal order.

    The baseline has the settings of the first config, learns from the text alone, and then teaches the
    runs that distil. Each run has a folder of its own in `folder`; a run that is there is read or
    continued. `options` are those of `finetune`.

    Raises ValueError for configs whose tokens differ, before anything is trained.
    """
    data = data if isinstance(data, LanguageData) else LanguageData.load(data)
    folder = Path(folder).expanduser()
    if not configs or BASELINE in configs:
        raise ValueError(
            f"give one config or more, none of them named {BASELINE!r}, got {list(configs)}"
        )
    if outside := [name for name in configs if not _NAME.fullmatch(name)]:
        raise ValueError(
            f"a run's name is also its folder's, so {outside[0]!r} cannot be one: choose letters, "
            "digits, - and _"
        )
    tokens = {n: (c.total_steps(len(data.train)) * c.batch, c.seed) for n, c in configs.items()}
    if len(set(tokens.values())) > 1:
        raise ValueError(f"these configs do not see the same text: (rows, seed) are {tokens}")
    first = dataclasses.replace(
        next(iter(configs.values())), path="none", schedule="linear", distill=0.0, extra=0
    )
    baseline = finetune(model, data, first, folder=folder / BASELINE, **options)
    options = {"teacher": baseline.model_folder, **options}
    runs = {
        name: finetune(model, data, config, folder=folder / name, **options)
        for name, config in configs.items()
    }
    before = load_gated_llama(model, data)
    start = language_loss(before, data.validation, data.tokenizer.bos_token_id)
    compared = FinetuneComparison(start, baseline, runs)
    if is_first_process():
        write_json(
            folder / _TABLE,
            {"start_loss": start, "runs": compared.to_pandas().to_dict(orient="index")},
        )
    return compared


def _validation(run: FinetuneRun) -> dict[int, float]:
    return {int(e["step"]): e["eval_loss"] for e in run.history if "eval_loss" in e}
