"""Sources: the fields a user writes, and which files they stand for."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from steep.data.sources import Source, list_files, read_documents
from steep.errors import UserError


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_weight_must_be_positive_and_finite(weight: float):
    with pytest.raises(ValidationError, match="weight"):
        Source(path="x", weight=weight)


@pytest.mark.parametrize(("fields", "found"), [({}, "neither"), ({"path": "x", "hub": "y"}, "both")])
def test_exactly_one_of_path_and_hub(fields: dict[str, str], found: str):
    with pytest.raises(ValidationError, match=f"exactly one of path and hub, and has {found}"):
        Source(**fields)  # pyright: ignore[reportArgumentType]


def test_unknown_and_changed_fields_are_refused():
    with pytest.raises(ValidationError, match="pth"):
        Source.model_validate({"pth": "x"})
    with pytest.raises(ValidationError, match="subset and revision belong to a hub"):
        Source(path="x", subset="ko")
    with pytest.raises(ValidationError, match="frozen"):
        Source(path="x").path = "y"  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_is_described():
    assert [name for name, field in Source.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("fields", "domain"),
    [
        ({"path": "data/ko-law.train.jsonl.gz"}, "ko-law"),
        ({"path": "data/ko-law.heldout.jsonl.zst"}, "ko-law"),
        ({"path": "wiki.2024.parquet"}, "wiki.2024"),
        ({"path": "corpora/law/"}, "law"),
        ({"path": "data/ko-*.jsonl"}, "ko"),
        ({"path": "books/*.txt"}, "books"),
        ({"path": "books/**/*"}, "books"),
        ({"hub": "wikimedia/wikipedia", "subset": "20231101.ko"}, "wikipedia-20231101.ko"),
        ({"hub": "allenai/c4"}, "c4"),
        ({"path": "x.txt", "domain": "mine"}, "mine"),
    ],
)
def test_domain_name(fields: dict[str, str], domain: str):
    assert Source(**fields).domain_name == domain  # pyright: ignore[reportArgumentType]


def test_import_stays_light():
    heavy = ("torch", "transformers", "datasets", "pyarrow", "numpy")
    code = f"import sys, steep.data.sources; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "sub/c.TXT", "sub/d.json", ".hidden/e.txt", ".f.txt", "g.jsonl.zst", "h.txt.bz2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_folder_is_read_recursively_sorted_and_without_hidden_files(folder: Path):
    names = [str(file.relative_to(folder)) for file in list_files(Source(path=str(folder)), "s")]
    assert names == ["a.md", "b.txt", "g.jsonl.zst", "sub/c.TXT"]


def test_glob_and_single_file(folder: Path):
    assert [file.name for file in list_files(Source(path=f"{folder}/*.t*"), "s")] == ["b.txt"]
    assert [file.name for file in list_files(Source(path=f"{folder}/**/*.[tT][xX][tT]"), "s")] == ["b.txt", "c.TXT"]
    assert list_files(Source(path=str(folder / "b.txt")), "s") == [folder / "b.txt"]


def test_a_file_with_wildcards_in_its_name_is_that_file(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("x")
    assert list_files(Source(path=str(tmp_path / "a[1].txt")), "s") == [tmp_path / "a[1].txt"]


@pytest.mark.parametrize(
    ("path", "problem", "remedy"),
    [
        ("nowhere", "nowhere does not exist", "relative paths start at the working folder"),
        ("*.parquet", "no file matches", "Check the pattern"),
        ("sub/d.json", "no file that steep reads", ".jsonl.gz"),
        ("sub/*.json", "no file that steep reads", ".parquet"),
    ],
)
def test_nothing_to_read(folder: Path, path: str, problem: str, remedy: str):
    with pytest.raises(UserError) as caught:
        list_files(Source(path=str(folder / path)), "data.sources[3]")
    assert caught.value.field == "data.sources[3].path"
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


def test_hub_name_of_a_local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
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


def test_hub_offline(tmp_path: Path):
    code = (
        "from steep.data.sources import Source, read_documents\n"
        "from steep.errors import UserError\n"
        "try:\n    next(read_documents(Source(hub='nobody/nothing'), 'data.sources[0]'))\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("data.sources[0].hub: nobody/nothing cannot be loaded")
    assert "unset HF_HUB_OFFLINE" in done.stdout
    assert "local path" in done.stdout
