"""What others wrote, read by the library that knows its format: whatever that raises there is a fault of the input.

tokenizers raises plain `Exception`, and where it panics something that is no `Exception` at all; transformers and PEFT
raise whatever their code meets in a field that holds another type than it expected.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from steep.errors import RunError, UserError, shown


@contextmanager
def told_by(explain: Callable[[BaseException], UserError]) -> Iterator[None]:
    """Within, what a library raises is an error of the input; `--debug` shows where it came from.

    Raises:
        UserError: what `explain` makes of the library's error, unless that says that memory ran out or a card failed.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        from steep.machine_faults import is_the_machines  # with torch, which not every process has loaded

        if is_the_machines(error):
            raise
        raise explain(error) from error


def told_as_input(field: str, what: str, remedy: str) -> AbstractContextManager[None]:
    """The same with one sentence: `what`, such as ``x cannot be read``, and behind it the library's reason."""
    return told_by(lambda error: UserError(field, f"{what}: {reason(error)}", remedy))


@contextmanager
def panics_held() -> Iterator[None]:
    """Drops what tokenizers, in Rust, writes to this process's stderr where it panics: the error will say it.

    What else is written there meanwhile comes out at the end. Around `told_by`: what fails here is no file's fault.
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]  # it was closed from the start
        yield
        return
    _flush()
    with _file_in_memory() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error) or _is_panic(error.__cause__)
            raise
        finally:
            _flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            if not panicked:
                with suppress(OSError), open(2, "wb", closefd=False) as out:  # it may be full, or its reader gone
                    shutil.copyfileobj(held, out)


def _file_in_memory() -> IO[bytes]:
    """A file without a name; on disk where the system has none in memory."""
    if sys.platform == "linux":
        return open(os.memfd_create("stderr"), "w+b")  # a read-only container has no place on disk for it
    return tempfile.TemporaryFile()


def _flush() -> None:
    with suppress(OSError):
        sys.stderr.flush()


def reason(error: BaseException) -> str:
    """What an error says, in one line that is not too long; its type where it says nothing but a name."""
    text = " ".join(" ".join(str(error).strip().splitlines()[:2]).split()).rstrip(". ")
    if isinstance(error, RecursionError):
        text = "it is nested too deeply"
    elif isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= 400 else f"{text[:400]} ..."


def fault_of_json(file: Path) -> str | None:
    """Why `file` is not the JSON object that it has to be, if it is not."""
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"it is no JSON: {reason(error)}"
    return None if isinstance(tree, dict) else f"it holds no JSON object, but {shown(tree)}"


def _is_panic(error: BaseException | None) -> bool:
    """Whether a library in Rust gave up; the class cannot be imported."""
    return type(error).__name__ == "PanicException"
