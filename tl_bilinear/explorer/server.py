"""A page with the model behind it, on this machine only: text of your own, interventions.

The server listens on 127.0.0.1 and answers only requests that name it so: a page of another site that
points a name at this address is refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tl_bilinear.explorer.answers import Answers
from tl_bilinear.explorer.documents import Document, told
from tl_bilinear.features import FeatureRun

HOST = "127.0.0.1"
MOST_BYTES = 100_000

_KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


@contextmanager
def serving(page: Path, run: FeatureRun, *, port: int = 0) -> Iterator[str]:
    """Serve a page while the block runs; its address.

    Raises OSError where the port is taken.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), _handler(page, Answers(run)))
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


def _handler(page: Path, answers: Answers) -> type[BaseHTTPRequestHandler]:
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
                self._send(told(page, "server"), ".html")
                return
            target = (root / path.lstrip("/")).resolve()
            if target.parent == root / "data" and target.suffix == ".js" and target.is_file():
                self._send(target.read_bytes(), ".js")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            if not self._is_ours():
                return
            length = int(self.headers.get("Content-Length") or 0)
            json_sent = self.headers.get("Content-Type", "").startswith("application/json")
            if not json_sent or length > MOST_BYTES or not self.path.startswith("/api/"):
                self.send_error(HTTPStatus.BAD_REQUEST)
                return
            answer: Document | None
            try:
                asked = json.loads(self.rfile.read(length))
            except ValueError as error:
                answer = {"error": str(error)}
            else:
                answer = answers.answer(self.path.removeprefix("/api/"), asked)
            if answer is None:
                self.send_error(HTTPStatus.BAD_REQUEST)
                return
            status = HTTPStatus.BAD_REQUEST if "error" in answer else HTTPStatus.OK
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
