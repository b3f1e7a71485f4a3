"""Folders that are either whole or not there."""

from __future__ import annotations

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
