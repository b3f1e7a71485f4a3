"""Starts the command in forks of a process that has imported the libraries: a start takes milliseconds, not seconds.

Each fork runs `steep.cli.main` with words, environment, folder and streams of its own, in a session of its own. Nothing
but imports happens before the fork; that no thread stands there then is checked before each. Requests and answers are
lines of JSON: ``{"start": [words], "env": {}, "cwd": "", "out": "", "err": ""}`` → ``{"pid": 1}`` and ``{"poll": 1}`` →
``{"code": null}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_IMPORTS = (
    "steep.run", "steep.hand_over", "steep.config", "steep.terminal", "bitsandbytes", "transformers.models.llama",
    "transformers.models.llama.modeling_llama", "transformers.trainer", "torch.optim.adamw", "transformers.generation",
)  # fmt: skip
_HARMLESS_THREADS = {"jemalloc_bg_thd"}  # pyarrow's allocator's; it knows what a fork is


def _refuse_threads() -> None:
    """A lock that another thread holds at a fork stays locked in the fork for ever."""
    own = str(os.getpid())
    names = {
        Path(f"/proc/self/task/{task}/comm").read_text().strip()
        for task in os.listdir("/proc/self/task")
        if task != own
    }
    if names - _HARMLESS_THREADS:
        raise RuntimeError(f"threads stand at the fork: {sorted(names)}")


def _start(request: dict[str, Any]) -> int:
    _refuse_threads()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        for stream, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            opened = os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(opened, stream)
            os.close(opened)
        sys.argv = ["steep", *request["start"]]
        from steep.cli import main

        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def serve() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = {"pid": _start(request)}
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
