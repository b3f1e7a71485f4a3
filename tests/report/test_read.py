"""A run folder is read whatever there is of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from steep.errors import UserError
from steep.report.read import labels, read_run, stamps
from tests.report.runs import edit, write_run


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "ko", steps=40))
    assert (run.label, run.begun, run.finished, run.step, run.steps) == ("ko", True, True, 40, 40)
    assert (len(run.metrics), len(run.samples), run.last["tokens"]) == (40, 4, 40 * 32_640)
    assert [row["step"] for row in run.domains["korean"]] == [0, 20, 40]
    assert run.written == pytest.approx(max(file.stat().st_mtime for file in run.path.iterdir()))


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "ko", steps=100, done=30))
    assert (run.finished, run.step, run.steps, run.ledger, run.proof) == (False, 30, 100, {}, {})


def test_a_run_that_only_scored_its_base(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", steps=100, done=30)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert (run.metrics, run.last, run.logged) == ([], {}, ([], []))


def test_no_folder_is_a_run_without_anything(tmp_path: Path) -> None:
    run = read_run(tmp_path / "ko")
    assert (run.begun, run.finished, run.step, run.steps, run.written) == (False, False, 0, None, None)


def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 61, "lo')
    assert read_run(folder).step == 60


@pytest.mark.parametrize("name", ["plan.json", "ledger.json", "metrics.jsonl", "run.yaml"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    (folder / name).write_text("{[\n\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read_run(folder)


def test_a_run_file_without_sections_is_damaged(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    (folder / "run.yaml").write_text("- a list\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no sections"):
        read_run(folder)


def test_runs_are_called_by_their_folders_while_that_tells_them_apart(tmp_path: Path) -> None:
    a, b, other = tmp_path / "a" / "ko", tmp_path / "b" / "ko", tmp_path / "b" / "en"
    assert labels([a, other]) == ["ko", "en"]
    assert labels([a, b, other]) == [str(a), str(b), "en"]
    with pytest.raises(UserError, match="given twice"):
        labels([a, tmp_path / "a" / "ko"])


def test_stamps_move_with_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "ko"
    seen = [stamps(folder)]
    write_run(folder, done=30)
    seen.append(stamps(folder))
    edit(folder / "plan.json", steps=70)
    seen.append(stamps(folder))
    (folder / "final").mkdir()
    seen.append(stamps(folder))
    assert all(one != other for one, other in pairwise(seen))
    assert stamps(folder) == seen[-1]
