"""Data sets of the hub, here local ones, and what is said where one cannot be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import config

from steep.data.hub import load_hub
from steep.data.readers import read_documents
from steep.data.sources import Source
from steep.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_a_local_data_set(tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
    source = Source(hub=str(tmp_path / "set"))
    assert list(read_documents(source, "data.sources[0]")) == ["one", "two"]
    with pytest.raises(UserError, match=r"no field 'body'; the fields there are 'text', 'n'"):
        list(read_documents(source.model_copy(update={"text_field": "body"}), "data.sources[0]"))
    with pytest.raises(UserError, match=r"row 1: 'n' is int and not a string"):
        list(read_documents(source.model_copy(update={"text_field": "n"}), "data.sources[0]"))
    with pytest.raises(UserError, match=r'Unknown split "test"'):
        list(read_documents(source.model_copy(update={"split": "test"}), "data.sources[0]"))


def test_a_data_set_with_a_script(tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("")
    with pytest.raises(UserError, match="Dataset scripts are no longer supported") as caught:
        load_hub(Source(hub=str(tmp_path / "set")), "data.sources[0]")
    assert caught.value.field == "data.sources[0].hub"
    assert "local path" in caught.value.remedy


@pytest.mark.parametrize(("name", "problem"), [("x.parquet", "Parquet file"), ("x.jsonl", "generating the data")])
def test_a_data_set_with_broken_files(tmp_path: Path, name: str, problem: str):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text("{broken")
    with pytest.raises(UserError, match=problem) as caught:
        load_hub(Source(hub=str(tmp_path / "set")), "data.sources[0]")
    assert caught.value.field == "data.sources[0].hub"
    assert "local path" in caught.value.remedy


def test_hub_offline(tmp_path: Path):
    code = (
        "from steep.data.readers import read_documents\n"
        "from steep.data.sources import Source\n"
        "from steep.errors import UserError\n"
        "try:\n    next(read_documents(Source(hub='nobody/nothing'), 'data.sources[0]'))\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("data.sources[0].hub: nobody/nothing cannot be loaded")
    assert "unset HF_HUB_OFFLINE" in done.stdout
    assert "local path" in done.stdout
