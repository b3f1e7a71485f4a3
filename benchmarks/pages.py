"""Parts of pages that commands write, between two marks, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def with_part(text: str, begin: str, end: str, made: str) -> str:
    """The page's text with `made` between its marks, and nothing there if that is empty.

    Args:
        begin, end: the marks, each once in `text`.
    """
    before, rest = text.split(begin)
    _, after = rest.split(end)
    lines = f"{made}\n" if made else ""
    return f"{before}{begin}\n{lines}{end}{after}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
