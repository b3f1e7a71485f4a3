"""Names and texts that are not ours, put into Markdown so that they are shown and never acted on."""

from __future__ import annotations

import json
import re
import shlex

_MARKS = re.compile(r"([\\`*\[\]|~])")


def inline(text: str) -> str:
    """As a part of a paragraph or a cell: no link, picture, HTML or line of its own."""
    text = _MARKS.sub(r"\\\1", _one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """Between backticks: one more than it holds in a row."""
    text = _one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def python(text: str) -> str:
    """As a string of Python, on one line."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def shell(text: str) -> str:
    """As a word of a shell's line."""
    return shlex.quote(_one_line(text))


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
