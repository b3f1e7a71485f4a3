"""The one exception for mistakes that a user can mend; everything else is a bug of ours and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class RunError(Exception):
    """A run that had to stop although its input was valid (a tensor that did not train, a loss that is not finite)."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: ``Did you mean 'max_length'?``, or nothing where no known one is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""
