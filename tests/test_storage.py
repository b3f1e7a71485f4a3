"""Folders that are either whole or not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steep import storage
from steep.storage import is_temporary, published, remove, remove_leftovers, remove_stale, write_file


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


def test_a_name_is_never_without_its_folder(tmp_path: Path) -> None:
    """One thread looks all the time while another replaces."""
    with published(tmp_path / "out") as staging:
        (staging / "a").write_text("0")
    done, missing = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            try:
                os.stat(tmp_path / "out")
            except FileNotFoundError as error:
                missing.append(error)

    looker = threading.Thread(target=look)
    looker.start()
    for number in range(200):
        with published(tmp_path / "out") as staging:
            (staging / "a").write_text(str(number))
    done.set()
    looker.join()
    assert missing == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_names_cannot_be_swapped_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RENAME_EXCHANGE", 1 << 30)  # the kernel knows no such flag
    for text in ("one", "two"):
        with published(tmp_path / "out") as staging:
            (staging / text).write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "link", "link to nowhere"])
def test_what_is_no_folder_is_replaced_too(kind: str, tmp_path: Path) -> None:
    place, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    place.write_text("x") if kind == "file" else place.symlink_to(other if kind == "link" else tmp_path / "none")
    with published(place) as staging:
        (staging / "a").write_text("x")
    assert not place.is_symlink() and [path.name for path in place.iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert list(other.iterdir()) == []


def test_a_folder_goes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name first: what a kill leaves of it is a leftover."""
    (tmp_path / "out").mkdir()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "_delete", killed)
        remove(tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert is_temporary(left)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_whoever_holds_the_lock_clears_more(tmp_path: Path) -> None:
    """What bears the number of a process that started again, and what another host left; not another process's."""
    host = socket.gethostname()
    names = {
        "own": f".writing-{host}-{os.getpid()}-0",
        "other host": ".writing-another.host-1-0",
        "ended": f".writing-{host}-999999999-0",
        "running": f".writing-{host}-1-0",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    (tmp_path / "kept").touch()
    remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kept", *names.values()} - {names["ended"]}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kept", names["running"]}


def test_a_file_is_replaced_whole_or_not(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", "one")
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "a.json", "two\ud800")
    assert (tmp_path / "a.json").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
