"""Folders that are either whole or not there."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steep.storage import published


def test_a_folder_appears_whole_and_readable(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("x")
    with published(tmp_path / "out") as staging:
        save_file({"a": torch.zeros(1)}, staging / "a.safetensors")
        (staging / "inner").mkdir()
        (staging / "inner" / "b.txt").write_text("x")
        assert not (tmp_path / "out").exists()
    for name in ("a.safetensors", "inner/b.txt"):
        assert (tmp_path / "out" / name).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), published(tmp_path / "out") as staging:
        (staging / "a").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_that_stood_there_is_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with published(tmp_path / "out") as staging:
            (staging / text).write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_that_is_there_stays_in_the_cache_and_is_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with published(tmp_path / "empty", existing="refuse") as staging:
        (staging / "one").touch()
    with published(tmp_path / "empty", existing="keep") as staging:
        (staging / "two").touch()
    with pytest.raises(OSError, match="not empty"), published(tmp_path / "empty", existing="refuse") as staging:
        (staging / "three").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "one"]


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    both_write = threading.Barrier(2)

    def write(name: str) -> None:
        with published(tmp_path / "out", existing="keep") as staging:
            for part in range(20):
                both_write.wait(10)
                (staging / f"{part}").write_text(name)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write, name) for name in "ab"]:
            done.result()
    parts = {path.read_text() for path in (tmp_path / "out").iterdir()}
    assert len(parts) == 1 and len(list((tmp_path / "out").iterdir())) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_cleared_and_no_other(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from steep.storage import published\n"
        "with published(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        with published(tmp_path / "other"):
            pass
        assert len(list(tmp_path.glob(".writing-*"))) == 1  # it runs
        process.kill()
        process.wait()
    with published(tmp_path / "other"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
