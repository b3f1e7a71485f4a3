"""Page-locked host memory: its size, its life, and a system that locks none."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steep.ops import pinned
from steep.ops.packing import Packing
from steep.ops.pinned import pinned_zeros, upload

CUDA = torch.device("cuda")


class Runtime:
    """torch's `cudart`, which locks what it is asked to unless it has a `refusal`; notes what is locked now."""

    def __init__(self, refusal: int = 0) -> None:
        self.refusal, self.locked, self.waited = refusal, dict[int, int](), 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.refusal:
            self.locked[address] = size
        return self.refusal

    def cudaHostUnregister(self, address: int) -> int:
        assert self.waited, "a copy may be under way"
        self.waited -= 1
        (ctypes.c_ubyte * self.locked.pop(address)).from_address(address)[:]
        return 0

    def wait(self, device: torch.device) -> None:
        self.waited += 1


def use(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(torch.cuda, "synchronize", runtime.wait)


def test_an_upload_is_from_locked_memory_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a few numbers for the card sends them so. For a CPU nothing is copied."""
    locked: list[torch.Tensor] = []
    sent: list[dict[str, Any]] = []

    def to(self: torch.Tensor, device: torch.device, **how: Any) -> torch.Tensor:
        assert device == CUDA and any(self is one for one in locked)
        sent.append(how)
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self.clone()) or locked[-1])
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert Packing.from_lengths([3, 1], "cuda").cu_seqlens.tolist() == [0, 3, 4]
    assert sent == [{"non_blocking": True}]
    table = torch.arange(3)
    assert upload(table, torch.device("cpu")) is table and len(locked) == 1


def test_it_is_locked_at_its_size_until_the_last_view_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And unlocked while its pages are still there: the runtime above reads them all."""
    runtime = Runtime()
    use(runtime, monkeypatch)
    one, other = (pinned_zeros((5, 1001), torch.bfloat16, CUDA, "") for _ in range(2))
    assert one.shape == (5, 1001) and one.dtype == torch.bfloat16 and not one.any()
    assert runtime.locked == {one.data_ptr(): 10_010, other.data_ptr(): 10_010}
    assert one.data_ptr() % 4096 == other.data_ptr() % 4096 == 0  # no page is of both
    view = one[3:].view(torch.int16)
    del one, other
    gc.collect()
    assert list(runtime.locked) == [view.data_ptr() - 3 * 1001 * 2]
    view.fill_(7)
    del view
    gc.collect()
    assert runtime.locked == {}


def test_a_cpu_has_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("no card is asked"))
    assert torch.equal(pinned_zeros((3, 2), torch.uint8, torch.device("cpu"), ""), torch.zeros(3, 2, dtype=torch.uint8))
    assert pinned_zeros((0, 4), torch.float32, CUDA, "").shape == (0, 4)


def test_memory_that_cannot_be_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(Runtime(refusal=2), monkeypatch)
    monkeypatch.setattr(pinned, "_take_error_back", lambda device: None)  # it asks the card
    memory = pinned_zeros((2**20,), torch.uint8, CUDA, "each step waits for copies")
    memory.fill_(3)
    assert [record.getMessage() for record in caplog.records] == [
        "1.0 MiB of host memory cannot be page-locked (CUDA error 2): each step waits for copies"
    ]


@pytest.mark.gpu
def test_a_gpu_copies_from_and_to_it() -> None:
    given = torch.randn(1000, 777, device=CUDA)
    memory = pinned_zeros((1000, 777), torch.float32, CUDA, "")
    assert memory.is_pinned()
    memory.copy_(given, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(memory, given.cpu())


@pytest.mark.gpu
def test_a_gpu_goes_on_without_locked_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And the error of that is none of a kernel that comes after it."""
    runtime: Any = torch.cuda.cudart()
    refusing = SimpleNamespace(cudaHostRegister=lambda address, size, flags: runtime.cudaHostRegister(0, 4096, 0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    given = torch.randn(1000, 777, device=CUDA)
    memory = pinned_zeros((1000, 777), torch.float32, CUDA, "copies wait")
    memory.copy_(given, non_blocking=True)
    assert "cannot be page-locked" in caplog.text and not memory.is_pinned()
    expected = given.cpu()
    given.add_(1)
    torch.cuda.synchronize()
    assert torch.equal(memory, expected)
