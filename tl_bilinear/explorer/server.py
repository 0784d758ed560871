"""A page with the model behind it, on this machine only: text of your own, interventions.

The server listens on 127.0.0.1 and answers only requests that name it so: a page of another site that
points a name at this address is refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_bilinear.explorer.documents import Document, packed
from tl_bilinear.explorer.language_documents import activations_document, sparse_document
from tl_bilinear.features import FeatureRun
from tl_bilinear.features.labels import pieces
from tl_bilinear.features.passage import fires_as
from tl_bilinear.features.unembedding import token_names

HOST = "127.0.0.1"
MOST_BYTES, MOST_TOKENS = 100_000, 512
CHANGED = 8  # tokens whose probability an intervention changes most
CONTROLS = 8

_KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


class Refused(ValueError):
    """A request that cannot be answered, and why."""


@contextmanager
def serving(page: Path, run: FeatureRun, *, port: int = 0) -> Iterator[str]:
    """Serve a page while the block runs; its address.

    Raises OSError where the port is taken.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), _handler(page, _Answers(run)))
    except OSError as error:
        raise OSError(
            f"cannot listen on {HOST}:{port}: {error.strerror}; choose another port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers:
    """What the model says; one request at a time, for a model is not safe to run from two threads."""

    def __init__(self, run: FeatureRun) -> None:
        self.run, self.lock = run, threading.Lock()
        self._output = fires_as(run.features.model, run.features.output_hook)

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


def _handler(page: Path, answers: _Answers) -> type[BaseHTTPRequestHandler]:
    root = page.resolve().parent

    class Handler(BaseHTTPRequestHandler):
        server_version = "tl_bilinear"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            if not self._is_ours():
                return
            path = self.path.partition("?")[0]
            if path == "/":
                self._send(_served(page), ".html")
                return
            target = (root / path.lstrip("/")).resolve()
            if target.parent == root / "data" and target.suffix == ".js" and target.is_file():
                self._send(target.read_bytes(), ".js")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            if not self._is_ours():
                return
            made = {"/api/text": answers.text, "/api/effect": answers.effect}.get(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            json_sent = self.headers.get("Content-Type", "").startswith("application/json")
            if made is None or not json_sent or length > MOST_BYTES:
                self.send_error(HTTPStatus.BAD_REQUEST)
                return
            try:
                asked = json.loads(self.rfile.read(length))
                if not isinstance(asked, dict):
                    raise Refused("a request is a table of values")
                answer, status = made(asked), HTTPStatus.OK
            except (ValueError, IndexError, TypeError) as error:
                answer, status = {"error": str(error)}, HTTPStatus.BAD_REQUEST
            self._send(json.dumps(answer).encode(), ".json", status)

        def _is_ours(self) -> bool:
            port = self.server.server_port  # type: ignore[attr-defined]
            names = {f"{HOST}:{port}", f"localhost:{port}"}
            origin = self.headers.get("Origin")
            ours = self.headers.get("Host") in names and (
                origin is None or origin.removeprefix("http://") in names
            )
            if not ours:
                self.send_error(HTTPStatus.FORBIDDEN)
            return ours

        def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
            self.send_response(status)
            self.send_header("Content-Type", _KINDS.get(kind, "application/json"))
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _served(page: Path) -> bytes:
    """The page, told that a server stands behind it."""
    mark, told = b'<div id="explorer">', b'<div id="explorer" data-served>'
    return page.read_bytes().replace(mark, told, 1)
