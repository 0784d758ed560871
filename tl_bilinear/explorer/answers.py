"""What a page asks of the model behind it: text of one's own, interventions.

Asked by the server (`server`) and by a notebook's widget (`notebook`) alike.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_bilinear.explorer.documents import Document, packed
from tl_bilinear.explorer.language_documents import activations_document, sparse_document
from tl_bilinear.features import FeatureRun
from tl_bilinear.features.labels import pieces
from tl_bilinear.features.passage import fires_as
from tl_bilinear.features.unembedding import token_names

MOST_TOKENS = 512
CHANGED = 8  # tokens whose probability an intervention changes most
CONTROLS = 8


class Refused(ValueError):
    """A request that cannot be answered, and why."""


class Answers:
    """What the model says; one request at a time, for a model is not safe to run from two threads."""

    def __init__(self, run: FeatureRun) -> None:
        self.run, self.lock = run, threading.Lock()
        self._output = fires_as(run.features.model, run.features.output_hook)

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

    @torch.no_grad()
    def effect(self, asked: Document) -> Document:
        """What scaling the k leading eigenvectors of an output feature at a token does to the next one.

        Beside it, random changes of the layer's output of the same length.
        """
        known, model = self.run.features, self.run.features.model
        try:
            row, position, feature, k = (int(asked[n]) for n in ("row", "position", "feature", "k"))
            factor = float(asked["factor"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("row, position, feature, k and factor are numbers") from error
        with self.lock:
            if text := asked.get("text"):
                tokens = self._run_on(text).tokens
            elif 0 <= row < len(self.run):
                tokens = self.run.tokens[row][None]
            else:
                raise Refused(f"there is no row {row}")
            if not 0 <= position < tokens.shape[1]:
                raise Refused(f"there is no token {position}")
            tokens = tokens[:, : position + 1]
            held: list[Tensor] = []

            def keep(value: Tensor, hook: Any) -> None:
                held.append(value[0, -1])

            def predicted(*hooks: Any) -> Tensor:
                watched = [*hooks, (self._output, keep)]
                logits = model.run_with_hooks(tokens, fwd_hooks=watched)
                return logits[0, -1].log_softmax(-1)

            before = predicted()
            edit = known.components(feature, k).scale(factor, positions=-1)
            after = predicted(*edit.fwd_hooks(model))
            moved = held[1] - held[0]
            controls = [
                _divergence(before, predicted((self._output, partial(_add, row))))
                for row in _alike(moved, CONTROLS)
            ]
        change = after.exp() - before.exp()
        order = change.abs().topk(min(CHANGED, len(change))).indices.tolist()
        names = token_names(model, len(change)) or [str(i) for i in range(len(change))]
        return {
            "tokens": [
                {
                    "word": names[token],
                    "before": float(before[token].exp()),
                    "after": float(after[token].exp()),
                }
                for token in order
            ],
            "divergence": _divergence(before, after),
            "controls": controls,
        }


def _divergence(before: Tensor, after: Tensor) -> float:
    """KL divergence, in nats, of two log-probabilities."""
    return float((before.exp() * (before - after)).sum())


def _alike(moved: Tensor, count: int) -> Tensor:
    """Random directions of a change's length [count, d]."""
    drawn = torch.randn(count, len(moved), generator=torch.Generator().manual_seed(0)).to(moved)
    return drawn * (moved.norm() / drawn.norm(dim=1, keepdim=True))


def _add(row: Tensor, value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[:, -1] += row
    return value
