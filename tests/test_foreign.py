"""What a library raises over a file of others is the file's fault, and what the machine lacks is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from steep.errors import RunError, UserError
from steep.foreign import panics_held, told_as_input
from steep.model import adapters
from steep.model.adapters import open_adapter, save_adapter
from tests.tiny import tiny_model
from tests.training.helpers import adapted


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        MemoryError(),
        RunError("a peer is gone"),
        KeyboardInterrupt(),
    ],
)
def test_what_no_file_is_to_blame_for(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, told_as_input("model.name", "x cannot be read", "Put it back."):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), Exception("no entry"), RecursionError(), OSError("?")]
)
def test_what_a_library_says_of_a_file(error: Exception) -> None:
    told = told_as_input("model.name", "x cannot be read", "Put it back.")
    with pytest.raises(UserError, match=r"^model\.name: x cannot be read: .*\. Put it back\."), told:
        raise error


def test_a_card_too_small_for_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapted(), tmp_path, None)

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB")

    monkeypatch.setattr(adapters, "_wrapped", full)
    with pytest.raises(torch.OutOfMemoryError):
        open_adapter(tiny_model("llama"), tmp_path)


# --- what is written to stderr meanwhile ------------------------------------------------------------------------

PanicException = type("PanicException", (BaseException,), {})  # as pyo3 calls it


def test_a_panic_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    told = told_as_input("model.name", "x cannot be read", "Put it back.")
    with pytest.raises(UserError, match="no entry found"), panics_held(), told:
        os.write(2, b"thread '<unnamed>' panicked")
        raise PanicException("no entry found for key")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [None, ValueError("odd")])
def test_all_else_comes_out(error: Exception | None, capfd: pytest.CaptureFixture[str]) -> None:
    long = "x" * 100_000
    with pytest.raises(ValueError, match="odd") if error else nullcontext(), panics_held():
        os.write(2, long.encode())
        assert capfd.readouterr().err == ""
        if error:
            raise error
    assert capfd.readouterr().err == long


def test_no_disk_is_needed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=FileNotFoundError("No usable temporary directory")))
    with panics_held():
        os.write(2, b"something")


@pytest.mark.parametrize("closed", [True, False])
def test_a_stderr_that_takes_nothing_blames_no_tokenizer(closed: bool, llama_folder: Path) -> None:
    """Closed at the start, or on a disk without room: /dev/full is one."""
    program = (
        "import os, sys\n"
        "from steep.foreign import panics_held\n"
        "from steep.model.resolve import read_tokenizer, resolve\n"
        "with panics_held():\n"
        "    os.write(2, b'a warning') if sys.stderr else None\n"
        f"print(len(read_tokenizer(resolve({str(llama_folder)!r}))))\n"
    )
    way = "exec 2>&-" if closed else "exec 2>/dev/full"
    done = subprocess.run(
        ["bash", "-c", f'{way}; exec "$0" -c "$1"', sys.executable, program],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "384")
