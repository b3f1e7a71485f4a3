"""The three ways that an op runs, for tests that hold each of them to one body: its reference on a CPU, its kernel in
Triton's interpreter, its kernel compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from steep.ops.backend import interpreted
from tests.ops.closeness import assert_as_good


def cases(small: Sequence[tuple], large: Sequence[tuple] = (), real: Sequence[tuple] = ()) -> list[Any]:
    """Parameters (route, *case): small cases on each route, large ones not in the interpreter, which is slow, and those
    of real size on a GPU only."""
    runs = [(route, case) for case in small for route in ("reference", "interpreter", "gpu")]
    runs += [(route, case) for case in large for route in ("reference", "gpu")]
    runs += [("gpu", case) for case in real]
    return [
        pytest.param(
            route, *case, marks=[pytest.mark.gpu] if route == "gpu" else [], id="-".join(map(str, (route, *case)))
        )
        for route, case in runs
    ]


@contextmanager
def along(route: str, kernels: ModuleType, **calls: int) -> Iterator[str]:
    """Yield the device of the route. At the end, each launcher of `kernels` named in `calls` must have been called that
    often, or never on the reference's route."""
    with ExitStack() as stack:
        spies = {
            name: stack.enter_context(mock.patch.object(kernels, name, wraps=getattr(kernels, name))) for name in calls
        }
        if route == "interpreter":
            stack.enter_context(interpreted())
        yield "cuda" if route == "gpu" else "cpu"
        counted = {name: spy.call_count for name, spy in spies.items()}
    assert counted == (dict.fromkeys(calls, 0) if route == "reference" else calls)


def columns(values: torch.Tensor, before: int = 16, after: int = 32) -> torch.Tensor:
    """`values` as columns of a wider buffer that is NaN elsewhere: rows apart, and a read beside them shows."""
    buffer = values.new_full((values.shape[0], before + values.shape[1] + after), float("nan"))
    view = buffer[:, before : before + values.shape[1]]
    view.copy_(values)
    return view


def unwritten(tokens: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """NaN columns of a wider NaN buffer, to write into."""
    return columns(torch.full((tokens, width), float("nan"), dtype=dtype, device=device))


def assert_nothing_beside(view: torch.Tensor) -> None:
    """The buffer behind `columns` is still NaN beside them."""
    buffer = view._base
    assert buffer is not None
    assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The rows of `values` so far apart in one buffer that the third begins beyond 2^31 elements."""
    stride = 2**30 + 16
    buffer = torch.empty((values.shape[0] - 1) * stride + values.shape[1], dtype=values.dtype, device=values.device)
    view = buffer.as_strided(values.shape, (stride, 1))
    view.copy_(values)
    return view


def slack(dtype: torch.dtype) -> float:
    """For `assert_as_good`: what a result of this dtype may be worse than the reference of that dtype."""
    return 2e-6 if dtype == torch.float32 else 1e-4


def assert_unchanged(route: str, beside: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """What a launch writes `beside` rows in e4m3 is what it writes without them: to the bit, but on a card only as
    good, where either is compiled by itself and may contract and add up in an order of its own."""
    if route == "gpu":
        assert_as_good(beside, plain, truth, slack(plain.dtype))
    else:
        assert torch.equal(beside, plain)


def assert_refused(faulty: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> None:
    """`assert_as_good` does not let a planted fault pass."""
    with pytest.raises(AssertionError):
        assert_as_good(faulty, reference, truth, slack(reference.dtype))
