"""The command line in one process, as a user meets it: an exit code, two streams, one line for an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Said(NamedTuple):
    code: int
    out: str
    err: str


Steep = Callable[..., Said]


def assert_one_error_line(said: Said, *parts: str, code: int = 2) -> None:
    """The last line is the only error, holds every one of `parts`, and no traceback came before it."""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.code == code, said
    assert len(errors) == 1 and said.err.rstrip().splitlines()[-1] == errors[0], said.err
    assert "Traceback" not in said.err + said.out and "panicked" not in said.err  # the last is Rust's
    for part in parts:
        assert part in errors[0], errors[0]
