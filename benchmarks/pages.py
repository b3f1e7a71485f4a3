"""A part of a page that a command writes, between two marks."""

from __future__ import annotations


def with_part(text: str, begin: str, end: str, made: str) -> str:
    """The page's text with `made` between its marks, and nothing there if that is empty.

    Args:
        begin, end: the marks, each once in `text`.
    """
    before, rest = text.split(begin)
    _, after = rest.split(end)
    lines = f"{made}\n" if made else ""
    return f"{before}{begin}\n{lines}{end}{after}"
