"""Names and texts that are not ours, put into Markdown so that they are shown and never acted on."""

from __future__ import annotations

import json
import re
import shlex

_MARKS = re.compile(r"([\\`*\[\]|~])")
# Words that GitHub and the hub make a link of although nothing marks them as one. No escape keeps them from it: the
# hub's reader looks for them when all escapes are undone.
_ADDRESS = re.compile(r"(?<![^\s|])[^\s|]*(?:://|www\.|[^\s|]@[^\s|]|mailto:|xmpp:)[^\s|]*", re.IGNORECASE)


def inline(text: str) -> str:
    """As a part of a paragraph or a cell: no link, picture, HTML or line of its own. Addresses stand as code."""
    text, shown, end = _one_line(text), [], 0
    for address in _ADDRESS.finditer(text):
        shown += [_plain(text[end : address.start()]), code(address[0])]
        end = address.end()
    return "".join([*shown, _plain(text[end:])])


def _plain(text: str) -> str:
    text = _MARKS.sub(r"\\\1", text)
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
