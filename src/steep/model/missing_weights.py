"""What transformers fills with random numbers, and only warns of: parameters that a checkpoint lacks."""

from __future__ import annotations

from collections.abc import Collection

from steep.errors import UserError

_NAMED = 3


def refuse_missing(names: Collection[str], what: str, field: str, remedy: str) -> None:
    """
    Args:
        names: what is missing.
        what: the checkpoint that lacks it, such as ``model.gguf``.

    Raises:
        UserError: something is.
    """
    if names:
        raise UserError(field, f"{what} lacks {first_of(names)}, which the model has", remedy)


def first_of(names: Collection[str]) -> str:
    """The first names in order, and how many more there are."""
    more = f" (and {len(names) - _NAMED} more)" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more
