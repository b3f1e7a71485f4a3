"""A long document is encoded in parts: a tokenizer's own objects take about 100 bytes a token, 8 GB for one of 50 MB.

A text may be cut where the two halves of the cut's neighbourhood, encoded alone, give the ids of the whole. So the ids
are those of the text in one go, as far as a tokenizer looks no further than that.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

PART = 200_000  # characters
_NEIGHBOURHOOD = 200  # characters on each side of a cut
_TRIES = 100  # places of each kind that are tried
# From where text most often divides to where it seldom does (Chinese has few spaces, base64 has none).
_KINDS = (re.compile(r"\n"), re.compile(r"\s"), re.compile(r"\W"), re.compile(r"", re.S))


def parts(text: str, encode: Callable[[str], list[int]]) -> Iterator[str]:
    """`text` in parts of about `PART` characters, whose ids one after the other are those of `text`.

    A space at a cut is left out where `encode` puts one in front of every text. Where no place to cut is found, a part
    is longer.

    Args:
        encode: the ids of a text, without special tokens.
    """
    start, end = 0, PART
    while end < len(text):
        cut = _cut(text, start, end, encode)
        if cut is None:
            end += PART
            continue
        yield text[start : cut[0]]
        start, end = cut[1], cut[1] + PART
    yield text[start:]


def _cut(text: str, start: int, end: int, encode: Callable[[str], list[int]]) -> tuple[int, int] | None:
    """Where a part may end, in the second half of [start, end), and where the next one begins."""
    lowest = max(start, end - PART) + PART // 2
    for kind in _KINDS:
        for match in itertools.islice(kind.finditer(text, lowest, end), _TRIES):
            place = match.start()
            left, right = text[place - _NEIGHBOURHOOD : place], text[place : place + _NEIGHBOURHOOD]
            whole, before = encode(left + right), encode(left)
            if before + encode(right) == whole:
                return place, place
            if right.startswith(" ") and before + encode(right[1:]) == whole:
                return place, place + 1
    return None
