from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from steep.errors import UserError
from steep.evaluation.board import board
from steep.evaluation.score import DomainScore

ROLES = {"ko": "train", "en": "replay", "code [py]": "heldout", "same": "heldout"}


def score(domain: str, bits: float) -> DomainScore:
    return DomainScore(0, domain, bits, math.exp(5 * bits), bits, tokens=123456, bytes=9, documents=2)


BEFORE = [score("en", 0.8), score("ko", 1.5), score("code [py]", 0.7), score("same", 0.5)]
AFTER = [score("ko", 1.1), score("code [py]", 0.7213), score("en", 0.78), score("same", 0.50004)]


def shown(before: list[DomainScore], after: list[DomainScore], color: bool = False) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=80, color_system="standard" if color else None, force_terminal=color)
    console.print(board(before, after, ROLES))
    return file.getvalue().splitlines()


def line(lines: list[str], start: str) -> str:
    [found] = [line for line in lines if line.strip().startswith(start)]
    return " ".join(found.split())


def test_reads_without_colour_in_80_columns() -> None:
    lines = shown(BEFORE, AFTER)
    assert line(lines, "ko") == "ko 1.500 → 1.100 -0.400 ↓ better 1,808 → 245 123,456"
    assert line(lines, "en") == "en (replay) 0.800 → 0.780 -0.020 ↓ better 54.60 → 49.40 123,456"
    assert line(lines, "same") == "same (heldout) 0.500 → 0.500 0.000 = same 12.18 → 12.18 123,456"
    assert "0.700 → 0.721 +0.021 ↑ worse" in line(lines, "code [py]")
    order = [next(i for i, text in enumerate(lines) if text.strip().startswith(start)) for start in
             ("learned", "ko", "kept or forgotten", "en", "code [py]")]  # fmt: skip
    assert order == sorted(order)


def test_colour_repeats_the_words() -> None:
    text = "\n".join(shown(BEFORE, AFTER, color=True))
    assert "\x1b[32m-0.400 ↓ better" in text
    assert "\x1b[31m +0.021 ↑ worse" in text


def test_nan_is_shown() -> None:
    lines = shown(BEFORE[1:2], [replace(AFTER[0], bits_per_byte=math.nan, perplexity=math.nan)])
    assert "1.500 → nan not a number 1,808 → nan" in line(lines, "ko")


def test_scores_of_other_documents_are_refused() -> None:
    with pytest.raises(UserError, match="not of the documents"):
        board(BEFORE, AFTER[1:], ROLES)
    with pytest.raises(UserError, match="not of the documents"):
        board(BEFORE[1:2], [replace(AFTER[0], bytes=1)], ROLES)
    with pytest.raises(UserError, match="'test' is not a role"):
        board(BEFORE, AFTER, {**ROLES, "ko": "test"})
