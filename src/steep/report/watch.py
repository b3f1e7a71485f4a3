"""The page of runs that go on, served on the loopback address and kept fresh."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from steep.errors import UserError
from steep.report.page import as_json, page_data, plot_library, render_page
from steep.report.read import Run, labels, read_runs, stamps
from steep.stopping import Interrupted

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")  # what the browser may call this machine; any other name is somebody else's page
_REST = 10  # after a reading that took n seconds the files are left alone for so many times n


class LivePage:
    """The runs as they are now; read again only when their files have changed.

    Args:
        paths: run folders, which need not be there yet.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._labels, self._lock = paths, labels(paths), threading.Lock()
        self._seen: Any = None
        self._next = 0.0
        self._runs: list[Run] = []
        self._data: dict[str, Any] = {}

    def data(self) -> dict[str, Any]:
        """The newest `page_data`, with ``version``, which changes with it. A damaged file is told in ``problem``."""
        with self._lock:
            self._refresh()
            return self._data

    def page(self) -> str:
        """The whole page."""
        with self._lock:
            self._refresh()
            return render_page(self._runs, live=True)

    def _refresh(self) -> None:
        seen = [stamps(path) for path in self._paths]
        if self._data and (seen == self._seen or time.monotonic() < self._next):
            return
        started, problem = time.monotonic(), None
        try:
            self._runs = read_runs(self._paths)
        except (UserError, OSError, UnicodeDecodeError) as error:  # a file may be replaced while it is read
            problem = str(error)
            self._runs = self._runs or [Run(path, label) for path, label in zip(self._paths, self._labels, strict=True)]
        data = page_data(self._runs) | {"problem": problem}
        data["version"] = hashlib.sha256(as_json(data).encode()).hexdigest()[:16]
        self._seen, self._data = seen, data
        self._next = time.monotonic() + _REST * (time.monotonic() - started)


def watch(paths: Sequence[Path], port: int = 0, said: Callable[[str], None] = print) -> None:
    """Serve the page until Ctrl-C.

    Args:
        port: 0 takes a free one.
        said: gets the address, once it is open.

    Raises:
        UserError: the port is taken, a folder is given twice, or the extra is missing.
    """
    plot_library()  # before the address is told, so that a missing package is
    server = make_server(paths, port)
    try:
        said(f"http://{ADDRESS}:{server.server_port}/")  # from here on Ctrl-C is the way to end it
        server.serve_forever()
    except (KeyboardInterrupt, Interrupted):
        pass
    finally:
        server.server_close()


def make_server(paths: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """The server, bound and not yet serving.

    Raises:
        UserError: the port is taken, or may not be used.
    """
    live = LivePage(paths)

    class Handler(_Handler):
        page = live

    try:
        return _Server((ADDRESS, port), Handler)
    except OSError as error:
        raise UserError("--port", f"{port} cannot be used: {error.strerror}", "Give another, or none.") from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


class _Handler(BaseHTTPRequestHandler):
    """Gives the page and its data, to a browser that was asked for this machine by name; nothing else."""

    page: LivePage
    server_version, sys_version = "steep", ""

    def do_GET(self) -> None:
        # A page of another site whose name was made to point here would send its own name (DNS rebinding).
        if _host_name(self.headers.get("Host", "")) not in _NAMES:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "This page is served to this machine only.\n")
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._answer(HTTPStatus.OK, "text/html", self.page.page())
        elif address.path == "/data.json":
            data = self.page.data()
            if parse_qs(address.query).get("have") == [data["version"]]:
                self._answer(HTTPStatus.NO_CONTENT, "application/json", "")
            else:
                self._answer(HTTPStatus.OK, "application/json", as_json(data))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is only one page here: /\n")

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        try:
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the browser went away
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each request would bury everything else."""


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
