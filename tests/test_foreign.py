"""What a library raises over a file of others is the file's fault, and what the machine lacks is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steep.errors import RunError, UserError
from steep.foreign import told_as_input
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
