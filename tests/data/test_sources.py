"""Sources: the fields a user writes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from steep.data.sources import Source


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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "test"}, "split: test belongs to a hub data set"),
        ({"role": "heldout", "weight": 2}, "weight and repeat are of text that is trained"),
        ({"role": "heldout", "repeat": True}, "weight and repeat are of text that is trained"),
        ({"repeat": True}, "repeat needs weights"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(fields: dict[str, object], said: str):
    with pytest.raises(ValidationError, match=said):
        Source.model_validate({"path": "x", **fields})


def test_settings_that_do_something_are_not():
    Source(hub="x", split="test")
    Source(path="x", weight=1, repeat=True)
    Source(path="x", role="replay", repeat=True)
    for source in (Source(path="x"), Source(path="x", role="heldout")):
        assert Source.model_validate(source.model_dump()) == source  # every field, as in the run.yaml of a run


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
