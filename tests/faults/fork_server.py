"""Starts Python in forks of a process that has imported the libraries: a start takes milliseconds, not seconds.

Each fork runs ``python WORDS`` for words such as ``-m steep train run.yaml``, with environment, folder and streams of
its own, in a session of its own. Nothing but imports happens before the fork; that no thread stands there then is
checked before each. Requests and answers are lines of JSON: ``{"start": [words], "env": {}, "cwd": "", "out": "",
"err": ""}`` → ``{"pid": 1}`` and ``{"poll": 1}`` → ``{"code": null}``; streams that are not named stay its parent's.

torchrun starts the processes of a run in the same way, by a server of its own, which is forked before it has threads.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

TORCHRUN = "torch.distributed.run"
_IMPORTS = (
    "steep.cli", "steep.run", "steep.hand_over", "steep.config", "steep.terminal", "bitsandbytes",
    "transformers.models.llama", "transformers.models.llama.modeling_llama", "transformers.trainer",
    "transformers.generation", "torch.optim.adamw", "peft.utils.transformers_weight_conversion", TORCHRUN,
    "wandb",  # transformers imports it where it looks for trackers
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
        for stream, name in ((0, os.devnull), (1, request.get("out")), (2, request.get("err"))):
            if name is not None:
                opened = os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(opened, stream)
                os.close(opened)
        if "RANK" in os.environ:
            Path("/proc/self/comm").write_text(f"rank {os.environ['RANK']}")
        try:
            _python(request["start"])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _python(words: Sequence[str]) -> None:
    """As ``python WORDS`` does it: a module after -m, else a script."""
    if words[0] != "-m":
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
    elif words[1] == TORCHRUN:
        _torchrun(words[2:])
    else:
        sys.argv = [*words[1:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


class Requests:
    """The asking end of a server's two streams."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._requests, self._answers = requests, answers

    def ask(self, **request: Any) -> dict[str, Any]:
        print(json.dumps(request), file=self._requests, flush=True)
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError("the fork server has ended")
        return json.loads(answer)

    def close(self) -> None:
        self._requests.close()
        self._answers.close()


class Forked:
    """``python WORDS`` in a fork of a server, as `subprocess.Popen` would have it.

    Args:
        streams: ``out`` and ``err``, the names of files; without, those of the server.
    """

    def __init__(self, server: Requests, words: Sequence[str], environment: Mapping[str, str], **streams: str) -> None:
        self.args = list(words)
        self._server = server
        self.returncode: int | None = None
        self.pid: int = server.ask(start=self.args, env=dict(environment), cwd=os.getcwd(), **streams)["pid"]

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _torchrun(words: Sequence[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    (asked, requests), (answered, answers) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(requests)
        os.close(answered)
        with os.fdopen(asked) as reads, os.fdopen(answers, "w") as writes:
            answer(reads, writes)
        os._exit(0)
    os.close(asked)
    os.close(answers)
    server = Requests(os.fdopen(requests, "w"), os.fdopen(answered))

    def start(handler: SubprocessHandler, command: Sequence[str], environment: Mapping[str, str]) -> Forked:
        python, unbuffered, *rest = command
        assert (python, unbuffered) == (sys.executable, "-u"), command
        return Forked(server, rest, environment)

    SubprocessHandler._popen = start  # pyright: ignore[reportAttributeAccessIssue]
    run.main(list(words))


def answer(requests: TextIO, answers: TextIO) -> None:
    """Do what is asked until nothing more can be."""
    for line in requests:
        request = json.loads(line)
        if "start" in request:
            told = {"pid": _start(request)}
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            told = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        print(json.dumps(told), file=answers, flush=True)


def serve() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork leaves alone, and uncopied, what all of them share
    answer(sys.stdin, sys.stdout)
    os._exit(0)  # to take all of that down would last for seconds


if __name__ == "__main__":
    serve()
