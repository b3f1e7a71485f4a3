"""How a command ends early: by a user's mistake, a run that had to stop, one asked to. All else is a bug of ours."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from unicodedata import category


class UserError(Exception):
    """A wrong input, named by its field, with what to do about it.

    Args:
        field: the run-file field (``data.sources[0].path``) or the argument at fault.
        problem: what is wrong, in plain words, with the offending value.
        remedy: what the user should do.
    """

    exit_code = 2

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        self.field = field
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {problem.rstrip('.')}. {remedy}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        return UserError, (self.field, self.problem, self.remedy)  # on its way out of another process


class RunError(Exception):
    """A run that had to stop although its input was valid (a tensor that did not train, a loss that is not finite)."""

    exit_code = 1


class Stopped(Exception):
    """A run that ended before its last step because it was asked to, with a checkpoint to go on from.

    Args:
        step: the last one that was finished.
        checkpoint: where it was saved.
    """

    exit_code = 3

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step = step
        self.checkpoint = checkpoint
        super().__init__(f"stopped after step {step}, which is saved as {checkpoint}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: ``Did you mean 'max_length'?``, or nothing where no known one is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def one_line(text: str) -> str:
    """`text` with its control characters escaped: a file's name may hold line ends and a terminal's commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def without_controls(text: str) -> str:
    """`text` of several lines with its control characters escaped, but for line ends and tabs."""
    return "".join(c if c in "\n\t" or category(c) not in ("Cc", "Cs") else one_line(c) for c in text)


def shown(value: object) -> str:
    """`value` as a message shows it: cut where it is long, since aliases make a small YAML file an endless list."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    short.maxlevel = 3
    return short.repr(value)
