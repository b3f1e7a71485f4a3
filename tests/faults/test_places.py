"""Tests that need what a machine may lack are counted where they are left out, and under CI=true that is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.places import has_strace

_TESTS = Path(__file__).parents[1]


def collect(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Collect a test of the trace where no program can be found."""
    assert "@pytest.mark.strace\n" in (_TESTS / "faults" / "test_sync_order.py").read_text(encoding="utf-8")
    file = tmp_path / "test_traced.py"  # without what that file imports
    file.write_text(
        "import pytest\n\ndef test_another(): pass\n\n@pytest.mark.strace\ndef test_it(): pass\n", encoding="utf-8"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CI", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "tests.conftest",
         "-c", "pyproject.toml", file],
        cwd=_TESTS.parent,
        env={**environment, "PATH": str(tmp_path), **variables},
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    said = collect(tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "1 tests marked 'strace' were left out: they need strace" in said.stdout
    assert "1 deselected" in said.stdout


def test_in_ci_nothing_may_be_left_out(tmp_path: Path) -> None:
    said = collect(tmp_path, CI="true")
    assert said.returncode == pytest.ExitCode.USAGE_ERROR
    assert "tests marked 'strace' cannot be left out under CI=true: they need strace" in said.stdout + said.stderr


def test_a_program_that_is_missing_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    has_strace.cache_clear()
    assert not has_strace()
    has_strace.cache_clear()
