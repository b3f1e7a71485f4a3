"""The source of steep, read for the tests that check it without running it."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def sources() -> dict[str, str]:
    """Every module of steep by its dotted name; a package's `__init__` ends in `.__init__`."""
    files = sorted((SOURCE / "steep").rglob("*.py"))
    assert files, f"no source under {SOURCE}"
    return {".".join(file.relative_to(SOURCE).with_suffix("").parts): file.read_text("utf-8") for file in files}


def called_name(call: ast.Call) -> str:
    """The last part of what is called: "getsource" in `inspect.getsource(f)`."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
