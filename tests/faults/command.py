"""The real command in a process of its own: start it, read its log as it comes, kill it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.fork_server import TORCHRUN, Forked, Requests

_ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.0005
_HANGS_SECONDS = 240.0  # no command here takes a tenth of it


class Command:
    """A `steep` that was started.

    Args:
        pid: leads a session of its own, so that all of it can be killed.
        poll: gives the exit code, or None while it runs; -9 after SIGKILL.
        out, err: the files that its streams go to.
    """

    def __init__(self, pid: int, poll: Callable[[], int | None], out: Path, err: Path) -> None:
        self.pid, self.out, self.err = pid, out, err
        self._poll = poll
        self._code: int | None = None
        self._read = 0
        self._lines: list[str] = []
        self.started = time.monotonic()

    @property
    def code(self) -> int | None:
        if self._code is None:
            self._code = self._poll()
        return self._code

    @property
    def running(self) -> bool:
        return self.code is None

    def lines(self) -> list[str]:
        """The whole lines of its log so far: what it said on stderr."""
        with self.err.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        if (end := new.rfind(b"\n") + 1) > 0:
            self._lines += new[:end].decode().splitlines()
            self._read += end
        return self._lines

    @property
    def log(self) -> str:
        """What it said on stderr."""
        return self.err.read_text(encoding="utf-8")

    def text(self) -> str:
        return self.err.read_text(encoding="utf-8") + self.out.read_text(encoding="utf-8")

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to all of it; back when it is dead."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = _HANGS_SECONDS) -> int:
        """The exit code.

        Raises:
            TimeoutError: it still runs after so many seconds; it is killed.
        """
        self.until(lambda: False, seconds)
        if self.code is None:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"it still runs after {seconds:.0f} s; it said:\n{self.text()}")
        return self.code

    def until(self, holds: Callable[[], Any], seconds: float = _HANGS_SECONDS, *, asleep: bool = True) -> bool:
        """Wait until something holds: True; False where the command ends before, or the time.

        Args:
            asleep: look about once a millisecond; else all the time.
        """
        end = time.monotonic() + seconds
        number = 0
        while time.monotonic() < end:
            if holds():
                return True
            number += 1
            if number % 8 == 0 and not self.running:
                return bool(holds())
            if asleep:
                time.sleep(POLL_SECONDS)
        return False


Start = Callable[[Sequence[str], Path, Mapping[str, str]], Command]
"""Starts the command with words, in a folder that its streams go to as well, with further environment variables."""


def environment(further: Mapping[str, str]) -> dict[str, str]:
    """That of a run on one core, without a network."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    return {**os.environ, **offline, **own, **further}


def _streams(folder: Path) -> tuple[Path, Path]:
    number = len(list(folder.glob("*.err")))
    files = folder / f"{number:03}.out", folder / f"{number:03}.err"
    for file in files:
        file.touch()
    return files


def start_real(words: Sequence[str], folder: Path, further: Mapping[str, str]) -> Command:
    """`python -m steep ...`."""
    return start_wrapped([], words, folder, further)


def start_wrapped(before: Sequence[str], words: Sequence[str], folder: Path, further: Mapping[str, str]) -> Command:
    """`python -m steep ...` behind another command, such as ``strace -f -o FILE``."""
    out, err = _streams(folder)
    with out.open("ab") as stdout, err.open("ab") as stderr:
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "steep", *words],
            cwd=folder,
            env=environment(further),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    return Command(process.pid, process.poll, out, err)


class ForkServer:
    """Starts programs as `fork_server` does. One at a time may use it.

    Args:
        before: a command that the server runs behind, such as ``unshare -m``; it has to become the server.
    """

    def __init__(self, before: Sequence[str] = ()) -> None:
        self._server = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.faults.fork_server"],
            cwd=_ROOT,
            env=environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdin is not None and self._server.stdout is not None
        self._asked = Requests(self._server.stdin, self._server.stdout)  # pyright: ignore[reportArgumentType]

    def __call__(self, words: Sequence[str], folder: Path, further: Mapping[str, str]) -> Command:
        return self.python(["-m", "steep", *words], folder, further)

    def python(self, words: Sequence[str], folder: Path, further: Mapping[str, str] | None = None) -> Command:
        """``python WORDS``: a module after ``-m``, else a script. In a folder that its streams go to as well."""
        out, err = _streams(folder)
        request = {"start": list(words), "cwd": str(folder), "out": str(out), "err": str(err)}
        pid = self._asked.ask(**request, env=environment(further or {}))["pid"]
        return Command(pid, lambda: self._asked.ask(poll=pid)["code"], out, err)

    def start(
        self, words: Sequence[str], folder: str, given: Mapping[str, str], streams: Mapping[str, str]
    ) -> Callable[[], int | None]:
        """``python WORDS`` with this environment and these streams, ``out`` and ``err``.

        Returns:
            What gives its exit code, or None while it runs.
        """
        pid = self._asked.ask(start=list(words), cwd=folder, env=dict(given), **streams)["pid"]
        return lambda: self._asked.ask(poll=pid)["code"]

    def process(self, words: Sequence[str], err: str) -> Forked:
        """``python WORDS`` in this folder, and what it says on stderr in a file: for what starts processes itself."""
        return Forked(self._asked, words, environment({}), out=os.devnull, err=err)

    def run(
        self, command: Sequence[str], folder: Path, given: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command that begins with this Python, as `subprocess.run` would do it, in a folder for its streams."""
        python, *words = command
        assert python == sys.executable, command
        done = self.python(words, folder, given)
        return subprocess.CompletedProcess(command, done.wait(), done.out.read_text(encoding="utf-8"), done.log)

    @property
    def pid(self) -> int:
        return self._server.pid

    def close(self) -> None:
        self._asked.close()
        self._server.wait()


def torchrun(*words: str | Path, processes: int = 2) -> list[str]:
    """Words for `ForkServer.python`, or behind ``python``: so many processes of the program that `words` name."""
    return ["-m", TORCHRUN, "--standalone", "--nproc-per-node", str(processes), *map(str, words)]


def assert_one_error(command: Command, *parts: str) -> None:
    """Its last line is its only error and holds `parts`; the exit code is 2, and there is no traceback."""
    assert command.wait() == 2, command.text()
    errors = [line for line in command.lines() if line.startswith("error: ")]
    assert len(errors) == 1 and command.lines()[-1] == errors[0], command.text()
    assert "Traceback" not in command.text()
    for part in parts:
        assert part in errors[0], errors[0]
