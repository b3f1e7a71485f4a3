"""Places are shown as one names them where the command was started."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from steep.terminal import Terminal, _is_real_terminal


def test_places_below_the_working_folder_are_said_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    (here / "below").mkdir(parents=True)
    monkeypatch.chdir(here)
    for text, said in {
        f"loading {here}/models/a": "loading models/a",
        f"'{here}/a' and {here}/b": "'a' and b",
        f"loading {tmp_path}/a": f"loading {tmp_path}/a",  # beside it
        f"loading {here}-2/a": f"loading {here}-2/a",
        f"loading /elsewhere{here}/a": f"loading /elsewhere{here}/a",
        f"in {here}": f"in {here}",
    }.items():
        Terminal().say(text)
        Terminal().warn(text)
        assert capsys.readouterr().err.splitlines() == [said, f"warning: {said}"]
    monkeypatch.chdir("/")
    Terminal().say("loading /models/a")
    assert capsys.readouterr().err == "loading /models/a\n"


def test_a_folder_that_was_deleted_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    Terminal().say("loading /models/a")
    assert capsys.readouterr().err == "loading /models/a\n"
    monkeypatch.chdir(tmp_path)


def test_a_pipe_that_is_to_be_coloured_gets_lines_and_no_moving_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # ipykernel sets it for what a notebook starts
    row = {"step": 1, "loss": 2.0, "tokens_per_second": 10, "learning_rate": 1e-4, "embedding_learning_rate": None}
    with Terminal().training(1, 0) as progress:
        progress({**row, "peak_memory_bytes": 1})
    said = capsys.readouterr().err
    assert said.startswith("step 1/1 · loss 2.0000") and said.count("\n") == 1 and "\r" not in said


def test_bars_move_in_a_real_terminal_alone() -> None:
    closed = io.StringIO()
    closed.close()
    assert not any(map(_is_real_terminal, (object(), closed, io.StringIO())))
    leader, follower = os.openpty()
    with open(leader, "wb", 0), open(follower, "w") as terminal:
        assert _is_real_terminal(terminal)
