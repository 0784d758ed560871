"""The paper's tokenizer: lower-case WordPiece on words, punctuation marks and single digits.

Text is decomposed (NFD), stripped of accents and lower-cased; words are split at whitespace and
punctuation, numbers into digits. ``[UNK]`` is 0, ``[BOS]`` 1 and ``[EOS]`` 2; a text becomes
``[BOS]`` and its tokens; padding is ``[EOS]``, on the right. (Appendix F.2 calls it BPE, but the code
that trained the published models is WordPiece.)
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_bilinear.io import refuse_foreign, whole_directory
from tl_bilinear.recipes.language.config import TINYSTORIES, TokenizerConfig
from tl_bilinear.recipes.language.text import Cleaner, CleaningReport, read_stories

UNKNOWN, BOS, EOS = "[UNK]", "[BOS]", "[EOS]"

_SPECIAL = (UNKNOWN, BOS, EOS)


def train_tokenizer(stories: Iterable[str], size: int = TokenizerConfig.size) -> Any:
    """A ``PreTrainedTokenizerFast`` of at most `size` entries, trained on a stream of stories.

    The same stories give the same tokenizer. Every letter, digit and punctuation mark of ASCII has an
    entry, so no ASCII text becomes ``[UNK]``. It prepends ``[BOS]``. TransformerLens takes it as it is,
    from memory or from a folder.

    Raises ValueError for a size too small for the characters of the text, and for no text at all.
    """
    from tokenizers import models, trainers

    # Letters inside of words come first. Left to itself, the trainer numbers them in an order that
    # differs from run to run, and breaks ties by these numbers.
    pieces = [f"##{letter}" for letter in string.ascii_lowercase]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*_SPECIAL, *pieces],
        initial_alphabet=[*string.ascii_lowercase, *string.digits, *string.punctuation],
        show_progress=False,
    )
    tokens = _tokenizer(models.WordPiece(unk_token=UNKNOWN))
    seen = itertools.count(1)
    tokens.train_from_iterator((story for story, _ in zip(stories, seen, strict=False)), trainer)
    if next(seen) == 1:
        raise ValueError("no text to train a tokenizer on: the source has no stories")
    found = tokens.get_vocab_size()
    if found > size:
        raise ValueError(
            f"a vocabulary of {size} does not hold this text: its characters alone, at the start and "
            f"inside of words, and the special tokens take {found} entries; choose size >= {found}"
        )
    return _wrap(_tokenizer(models.WordPiece(vocab=tokens.get_vocab(), unk_token=UNKNOWN)))


def _tokenizer(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    tokens = Tokenizer(model)
    tokens.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokens.decoder = decoders.WordPiece()
    return tokens


def _wrap(tokens: Any) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokens.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokens.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="right",
        # Without these, TransformerLens would load it a second time, by a name that may not exist.
        add_bos_token=True,
        name_or_path="",
    )


def make_tokenizer(
    source: str | PathLike[str] = TINYSTORIES,
    config: TokenizerConfig = TokenizerConfig(),
    *,
    out: str | PathLike[str],
    progress: bool = True,
) -> tuple[Any, CleaningReport]:
    """Clean a source (see `read_stories`), train a tokenizer on it and write it to the folder `out`."""
    refuse_foreign(Path(out).expanduser(), "tokenizer")  # before the work, not after it
    cleaner = Cleaner()
    stories = cleaner(itertools.islice(read_stories(source), config.limit))
    tokenizer = train_tokenizer(
        iter(tqdm(stories, unit=" stories", disable=not progress, desc="reading")), config.size
    )
    save_tokenizer(tokenizer, out)
    return tokenizer, cleaner.report()


def save_tokenizer(tokenizer: Any, out: str | PathLike[str]) -> None:
    """Write a tokenizer as transformers does, whole or not at all, replacing one that is there."""
    with whole_directory(out, "tokenizer") as staging:
        tokenizer.save_pretrained(staging)


def load_tokenizer(folder: str | PathLike[str]) -> Any:
    """The tokenizer in a folder of `save_tokenizer`, or any other fast one with [BOS] and [EOS].

    Raises FileNotFoundError or ValueError, saying what is missing.
    """
    from transformers import AutoTokenizer

    folder = Path(folder).expanduser()
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: make one with `tl-bilinear tokenizer --out {folder}`"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for a broken file
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} does not mark where text begins or ends: it needs a bos_token "
            "and an eos_token"
        )
    return tokenizer
