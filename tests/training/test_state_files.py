from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steep.errors import UserError
from steep.training import state_files
from steep.training.checkpoint import rng_state, set_rng_state
from steep.training.state_files import from_bytes, load_state, putting_back, to_bytes
from tests.training.helpers import save_state


def test_nested_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "state": {0: {"step": 3, "m": shared, "same": shared}, 1: {"view": shared.view(2, 3).t()}},
        ("a", 1): [None, True, 1, 1.5, "text", (), [], {}],
        "bits": torch.tensor([1, 255], dtype=torch.uint8),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0),
        "nan": float("nan"),
        "inf": float("inf"),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save_state(state, tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.safetensors"]
    back = load_state(tmp_path, "x")
    assert list(back) == list(state)
    assert list(back["state"]) == [0, 1]
    assert back["state"][0]["step"] == 3
    assert torch.equal(back["state"][0]["m"], shared) and torch.equal(back["state"][0]["same"], shared)
    assert torch.equal(back["state"][1]["view"], shared.view(2, 3).t())
    assert back["a", 1] == [None, True, 1, 1.5, "text", (), [], {}]
    assert [type(value) for value in back["a", 1]] == [type(value) for value in state["a", 1]]
    assert back["half"].dtype == torch.bfloat16 and torch.equal(back["bits"], state["bits"])
    assert back["scalar"].shape == () and back["nan"] != back["nan"] and back["inf"] == float("inf")
    assert torch.equal(back["parameter"], torch.ones(2))


@pytest.mark.parametrize("value", [{1, 2}, object(), np.float32(1), b"bytes"])
def test_an_unknown_type_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="without pickle"):
        save_state({"x": [value]}, tmp_path, "x")
    assert not list(tmp_path.iterdir())


def test_random_state_goes_on_where_it_was(tmp_path: Path) -> None:
    import random

    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            float(np.random.rand()),
            float(np.random.randn()),
            float(torch.rand(())),
        ]

    draw()
    save_state(rng_state(), tmp_path, "random")
    first = draw()
    assert draw() != first
    set_rng_state(load_state(tmp_path, "random"))
    assert draw() == first


def test_only_the_card_in_use_has_a_random_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run may go on where fewer are visible, or others before it."""
    cards = [torch.full((16,), number, dtype=torch.uint8) for number in range(4)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: cards[2].clone())
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: cards)
    save_state(rng_state(), tmp_path, "random")
    put: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", put.append)
    monkeypatch.delattr(torch.cuda, "set_rng_state_all")
    set_rng_state(load_state(tmp_path, "random"))
    assert [state.tolist() for state in put] == [cards[2].tolist()]


def test_a_state_travels_between_processes() -> None:
    state = {"random": rng_state(), "nested": [(1, 2.5, None), {"dtype": torch.bfloat16, 3: torch.arange(4)}]}
    copy = from_bytes(to_bytes(state))
    assert repr(copy) == repr(state)
    assert torch.equal(copy["random"]["torch"], state["random"]["torch"])


class Packed(torch.Tensor):
    """Shaped as torchao's optimizer states are: parts, and a context that holds a dtype."""

    codes: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # pyright: ignore

    def __init__(self, codes: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[object, ...]]:
        return ["codes"], (tuple(self.shape), self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], context: list[Any], *rest: object) -> Packed:
        return cls(parts["codes"], *context)


def test_a_tensor_subclass_keeps_its_parts_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {0: {"exp_avg": Packed(torch.arange(6, dtype=torch.uint8), (2, 3), torch.bfloat16)}}
    with pytest.raises(TypeError, match="of type Packed cannot be stored"):
        save_state(state, tmp_path, "optimizer")
    monkeypatch.setitem(state_files._SUBCLASSES, "Packed", __name__)
    save_state(state, tmp_path, "optimizer")
    found = load_state(tmp_path, "optimizer")[0]["exp_avg"]
    assert type(found) is Packed
    assert (found.shape, found.dtype) == ((2, 3), torch.bfloat16)
    assert torch.equal(found.codes, torch.arange(6, dtype=torch.uint8))


@pytest.mark.parametrize("ending", ["json", "safetensors"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ENOMEM])
def test_a_disk_that_fails_damages_nothing(
    number: int, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint may be the only one; the file is named, and nobody is told to delete it."""
    save_state({"a": torch.ones(2)}, tmp_path, "optimizer")
    file, opened = tmp_path / f"optimizer.{ending}", Path.open

    def refused(self: Path, *given: Any, **named: Any) -> Any:
        if self == file:
            raise OSError(number, os.strerror(number))
        return opened(self, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(OSError, match=os.strerror(number)) as raised, putting_back(tmp_path, "optimizer"):
        load_state(tmp_path, "optimizer")
    assert raised.value.filename == str(file)


def test_a_file_that_is_not_there_is_damage(tmp_path: Path) -> None:
    for ending in ("json", "safetensors"):
        save_state({"a": torch.ones(2)}, tmp_path, "optimizer")
        (tmp_path / f"optimizer.{ending}").unlink()
        with pytest.raises(UserError, match=r"is damaged: optimizer cannot be read .* Delete that checkpoint"):
            load_state(tmp_path, "optimizer")


@pytest.mark.parametrize(
    "fault",
    [
        lambda: torch.empty(2**50),
        lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas`")),
        lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access was encountered")),
    ],
)
def test_the_machines_faults_are_none_of_a_checkpoint(fault: Callable[[], object], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"allocate memory|CUDA error"), putting_back(tmp_path, "optimizer"):
        fault()


def test_a_state_of_another_run_is_a_fault_of_the_checkpoint(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"does not fit this run: optimizer cannot be put back"),
        putting_back(tmp_path, "optimizer"),
    ):
        torch.ones(2).copy_(torch.ones(3))
