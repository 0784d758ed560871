"""A finished run of a language model, read from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tl_bilinear.io import read_table
from tl_bilinear.models.files import CONFIG
from tl_bilinear.models.huggingface import no_file_bars
from tl_bilinear.models.tensor_format import is_tensor_format
from tl_bilinear.recipes.language.config import LanguageConfig, LoopConfig
from tl_bilinear.recipes.language.llama import load_language_model
from tl_bilinear.recipes.language.run_folder import SETTINGS, require_finished

if TYPE_CHECKING:
    import pandas as pd

MODEL = "model"
Run = TypeVar("Run", bound="LanguageRun")


@dataclass(frozen=True, eq=False)
class LanguageRun:
    """A finished run: `loss` is the validation loss in nats a token, [BOS] not counted.

    `history` holds what was logged: step, epoch, loss, eval_loss, learning_rate, grad_norm. `seconds`
    is the time of the steps alone. `sample` continues "once upon a time".
    """

    folder: Path
    config: LanguageConfig
    loss: float
    parameters: int
    steps: int
    tokens: int
    seconds: float
    sample: str
    history: tuple[Mapping[str, float], ...]

    config_type: ClassVar[type[LoopConfig]] = LanguageConfig
    command: ClassVar[str] = "tl-bilinear train lm"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def model_folder(self) -> Path:
        """A Hugging Face checkpoint with its tokenizer: a Llama's, or that of a tensor transformer."""
        return self.folder / MODEL

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self._kind}, {self.parameters:,} parameters, "
            f"{self.tokens:,} tokens in {self.seconds:.0f} s ({self.tokens_per_second:,.0f} a second)\n"
            f"validation loss {self.loss:.3f} nats a token\n"
            f"{self.sample}"
        )

    @property
    def _kind(self) -> str:
        if self.config.attention == "softmax":
            return self.config.activation
        norms = "" if self.config.norm else " without norms"
        return f"{self.config.activation}, {self.config.attention} attention{norms}"

    def llama(self) -> Any:
        """The trained LlamaForCausalLM, or TensorLanguageModel."""
        with no_file_bars():
            return load_language_model(self.model_folder)

    def hooked(self, **options: Any) -> Any:
        """The trained model hooked; `options` are those of the way it is loaded.

        A Llama as a `HookedBilinearTransformer` (`from_hf`), a tensor transformer as a
        `TensorTransformer` (`from_pretrained`).
        """
        if is_tensor_format(read_table(self.model_folder / CONFIG)):
            from tl_bilinear.models import TensorTransformer

            return TensorTransformer.from_pretrained(self.model_folder, **options)
        from tl_bilinear.models import HookedBilinearTransformer

        with no_file_bars():
            return HookedBilinearTransformer.from_hf(self.model_folder, **options)

    def to_pandas(self) -> pd.DataFrame:
        """The curve, one row for each step that was logged."""
        import pandas as pd

        return pd.DataFrame(self.history).groupby("step", as_index=False).first()

    @classmethod
    def load(cls: type[Run], folder: str | PathLike[str]) -> Run:
        """Read a finished run.

        Raises FileNotFoundError for a folder without one, ValueError for a damaged one.
        """
        folder = Path(folder).expanduser()
        stored = require_finished(folder, cls.command)
        try:
            config: Any = cls.config_type(**read_table(folder / SETTINGS)["config"])
            run = cls(folder, config, **{**stored, "history": tuple(stored["history"])})
            for name in ("loss", "seconds", "parameters", "steps", "tokens"):
                if not math.isfinite(getattr(run, name)):
                    raise ValueError(f"its {name} is {getattr(run, name)}")
            if not all(isinstance(entry, dict) for entry in run.history):
                raise ValueError("its history is no list of tables")
            return run
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} was not written by this version of `{cls.command}`: {error}"
            ) from error
