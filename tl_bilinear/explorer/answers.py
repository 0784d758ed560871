"""What a page asks of the model behind it: text of one's own, interventions.

Asked by the server (`server`) and by a notebook's widget (`notebook`) alike.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from tl_bilinear.explorer.documents import Document, packed
from tl_bilinear.explorer.language_documents import activations_document, sparse_document
from tl_bilinear.explorer.whatif import Change, WhatIf
from tl_bilinear.features import FeatureRun
from tl_bilinear.features.labels import pieces

MOST_TOKENS = 512


class Refused(ValueError):
    """A request that cannot be answered, and why."""


class Answers:
    """What the model says; one request at a time, for a model is not safe to run from two threads."""

    def __init__(self, run: FeatureRun) -> None:
        self.run, self.lock = run, threading.Lock()
        self.what = WhatIf(run)

    def answer(self, question: str, asked: Any) -> Document | None:
        """The answer, ``{"error": why}`` where there is none, or None for no question of ours."""
        made = {"text": self.text, "effect": self.effect}.get(question)
        if made is None:
            return None
        try:
            if not isinstance(asked, dict):
                raise Refused("a request is a table of values")
            return made(asked)
        except (ValueError, IndexError, TypeError) as error:
            return {"error": str(error)}

    @torch.no_grad()
    def text(self, asked: Document) -> Document:
        """Own text as a row: its tokens, active features, activations, the model's values."""
        text = asked.get("text")
        if not isinstance(text, str) or not text.strip():
            raise Refused("type some text first")
        with self.lock:
            one = self._run_on(text)
            length = one.tokens.shape[1]
            words = pieces(self.run.features.model.tokenizer, one.tokens[0].tolist())
            return {
                "text": {
                    "words": words,
                    "tokens": packed(torch.arange(length)),
                    "length": length,
                    "counted": packed(one.mask[0].to(torch.uint8)),
                    "input": sparse_document(one.activations(side="input")[0]),
                    "output": sparse_document(one.activations()[0]),
                },
                "activations": activations_document(one, 0),
                "measured": packed(one.preactivations()[0]),
            }

    def _run_on(self, text: str) -> FeatureRun:
        """A run on a text that the model reads whole: a longer one would be cut silently."""
        model = self.run.features.model
        length, most = len(model.tokenizer(text)["input_ids"]), min(MOST_TOKENS, model.cfg.n_ctx)
        if length > most:
            raise Refused(f"the text has {length} tokens; the page takes {most}")
        return self.run.features.run(text, progress=False)

    def effect(self, asked: Document) -> Document:
        """What a change at a token (`whatif.Change`) does to the next one, beside random changes."""
        try:
            row, position, feature = (int(asked[n]) for n in ("row", "position", "feature"))
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("row, position and feature are numbers") from error
        change = Change.of(asked)
        with self.lock:
            if text := asked.get("text"):
                what, row = WhatIf(self._run_on(text)), 0
            else:
                what = self.what
            if not 0 <= row < len(what.run):
                raise Refused(f"there is no row {row}")
            if not 0 <= position < what.run.tokens.shape[1]:
                raise Refused(f"there is no token {position}")
            return what.effects(feature, row, position, [change])[0]
