"""Several runs: what was set differently, and who is ahead."""

from __future__ import annotations

from pathlib import Path

from steep.report.comparison import differing_settings, flattened, headline, scores
from steep.report.read import read_runs
from tests.report.runs import write_run


def test_only_what_differs_is_shown_and_the_folder_is_not(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=1e-4, steps=80)])
    assert differing_settings(runs) == {
        "training.max_steps": ["60", "80"],
        "training.learning_rate": ["5e-05", "0.0001"],
    }


def test_a_field_that_one_run_lacks(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with (b / "run.yaml").open("a", encoding="utf-8") as stream:
        stream.write("adapter:\n  use_dora: true\n")
    assert differing_settings(read_runs([a, b])) == {"adapter.use_dora": ["–", "true"]}


def test_flattened() -> None:
    tree = {"a": {"b": 1, "c": []}, "d": [{"e": None}, 2]}
    assert flattened(tree) == {"a.b": 1, "a.c": [], "d[0].e": None, "d[1]": 2}


def test_the_best_of_each_domain(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", domains={"korean": ("train", 2.5, 1.5), "english": ("replay", 1.0, 1.1)})
    b = write_run(tmp_path / "b", domains={"korean": ("train", 2.5, 1.6), "english": ("replay", 1.0, 1.0)})
    runs = read_runs([a, b])
    korean, english = scores(runs)
    assert (korean.best, english.best, korean.comparable) == (0, 1, True)
    assert headline(runs, [korean, english]) == "a learned korean best. b kept english best."


def test_a_tie_has_no_best(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    assert [score.best for score in scores(runs)] == [None, None, None]
    assert headline(runs, scores(runs)) == "No run is ahead of the others."


def test_runs_that_scored_different_text_are_not_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", domains={"korean": ("train", 2.5, 1.5)})
    b = write_run(tmp_path / "b", domains={"korean": ("train", 2.5, 1.6)})
    file = b / "evaluation.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("120000", "90000"), encoding="utf-8")
    (korean,) = scores(read_runs([a, b]))
    assert (korean.comparable, korean.best) == (False, None)


def test_a_domain_of_one_run_only(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", domains={"korean": ("train", 2.5, 1.5)})
    b = write_run(tmp_path / "b", domains={"law": ("train", 2.5, 1.6)})
    found = {score.domain: score for score in scores(read_runs([a, b]))}
    assert found["law"].changes[0] is None and found["law"].best is None
