"""docs/run-file.md is what docs/make_reference.py writes from the schema, and names every field."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from steep.data.sources import Source
from steep.schema import RunConfig
from steep.training.passed_through import HONOURED, REFUSED

SCRIPT = Path(__file__).parents[1] / "docs" / "make_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_disk_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.PAGE.read_text("utf-8") == script.render(), "run: python docs/make_reference.py"


def test_the_page_names_every_field_and_setting(script: ModuleType) -> None:
    page = script.render()
    names = {*RunConfig.model_fields, *Source.model_fields, *HONOURED, *REFUSED}
    for info in RunConfig.model_fields.values():
        names |= set(info.annotation.model_fields)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert sorted(name for name in names if f"`{name}`" not in page) == []


def test_a_changed_schema_changes_the_page(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(script.REFUSED, "a_new_setting", "it is new")
    assert "| `a_new_setting` | it is new |" in script.render()
    assert script.PAGE.read_text("utf-8") != script.render()
