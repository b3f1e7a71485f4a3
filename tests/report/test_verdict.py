"""The verdict's words follow the figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from steep.report.figures import percent, rate, short, signed
from steep.report.read import read_run
from steep.report.verdict import changes, headline
from tests.report.runs import write_run


def test_what_a_run_should_learn_comes_first(tmp_path: Path) -> None:
    domains = {"english": ("replay", 1.0, 1.1), "korean": ("train", 2.5, 1.5)}
    korean, english = changes(read_run(write_run(tmp_path / "ko", domains=domains)))
    assert (korean.domain, korean.sign, korean.word, korean.arrow) == ("korean", "better", "learned", "▼")
    assert (korean.difference, korean.share) == (pytest.approx(-1.0), pytest.approx(-0.4))
    assert (english.domain, english.sign, english.word, english.arrow) == ("english", "worse", "forgotten", "▲")


@pytest.mark.parametrize(
    ("role", "end", "sign", "word"),
    [
        ("train", 0.9994, "better", "learned"),
        ("train", 0.9996, "same", "not learned"),
        ("train", 1.0006, "worse", "got worse"),
        ("replay", 0.9, "better", "kept, and better"),
        ("replay", 1.0004, "same", "kept"),
        ("heldout", 1.0006, "worse", "forgotten"),
    ],
)
def test_words_change_where_the_shown_figure_does(role: str, end: float, sign: str, word: str, tmp_path: Path) -> None:
    (change,) = changes(read_run(write_run(tmp_path / "ko", domains={"korean": (role, 1.0, end)})))
    assert (change.sign, change.word) == (sign, word)


@pytest.mark.parametrize(
    ("domains", "text"),
    [
        (
            {"korean": ("train", 2.5, 1.5), "english": ("replay", 1.0, 1.0)},
            "Learned korean. Forgot nothing that was measured.",
        ),
        ({"korean": ("train", 2.5, 1.5), "english": ("replay", 1.0, 1.1)}, "Learned korean. Forgot some of english."),
        ({"korean": ("train", 2.5, 2.5), "law": ("train", 2.0, 1.5)}, "Learned law. Did not learn korean."),
        ({"korean": ("train", 2.5, 2.6), "english": ("heldout", 1.0, 0.9)}, "Got worse at korean. Forgot nothing"),
        ({"korean": ("train", 2.5, 1.5)}, "Learned korean. What it forgot was not measured."),
        (
            {name: ("train", 2.5, 1.5) for name in "abcd"} | {"e": ("train", 2.5, 2.6), "f": ("heldout", 1.0, 1.0)},
            "Learned 4 of 5 domains. Got worse at e. Forgot nothing",
        ),
        ({name: ("train", 2.5, 1.5) for name in "abc"}, "Learned a, b and c."),
    ],
)
def test_the_headline(domains: dict[str, tuple[str, float, float]], text: str, tmp_path: Path) -> None:
    assert headline(read_run(write_run(tmp_path / "ko", domains=domains))).startswith(text)


def test_the_headline_of_a_run_that_goes_on(tmp_path: Path) -> None:
    assert headline(read_run(tmp_path / "ko")) == "Waiting for the run to begin."
    folder = write_run(tmp_path / "ko", steps=100, done=10)
    assert headline(read_run(folder)).startswith("The base model is measured, the trained one not yet.")
    write_run(folder, steps=100, done=50)
    assert headline(read_run(folder)) == "So far: learned korean. Forgot some of english."


def test_the_headline_without_held_out_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", domains={})
    assert headline(read_run(folder)).startswith("Trained. Nothing was held out")


def test_a_score_that_is_not_a_number(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", domains={"korean": ("train", 2.5, 1.5)})
    file = folder / "evaluation.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[-1] = lines[-1].replace('"bits_per_byte": 1.5', '"bits_per_byte": null')
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (change,) = changes(read_run(folder))
    assert math.isnan(change.difference) and change.word == "not a number"
    assert headline(read_run(folder)).endswith("Some scores are not a number.")


def test_figures() -> None:
    assert [signed(value) for value in (-0.88384, 0.0204, 0.0004, -0.0004, None, math.nan)] == [
        "−0.884", "+0.020", "0.000", "0.000", "–", "–",
    ]  # fmt: skip
    assert [short(value) for value in (7_240_000_000, 39_168_000, 11_800, 9_999, 999_999, 3, None)] == [
        "7.24 G", "39.2 M", "11.8 k", "9,999", "1 M", "3", "–",
    ]  # fmt: skip
    assert [percent(value) for value in (0.345, 0.0001, 0.9999, 0.0, 1.0)] == ["34 %", "<1 %", ">99 %", "0 %", "100 %"]
    assert [rate(value) for value in (5e-5, 1.25e-4, 0.002, 0.5, 0.0)] == ["5e-5", "1.25e-4", "2e-3", "0.5", "0"]
