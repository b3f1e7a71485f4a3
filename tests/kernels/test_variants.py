"""A compiled kernel is found by what differs, and launched with the same arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from steep.kernels import copy_rows as kernels
from steep.kernels import variants
from steep.kernels.variants import Grid, Prepared, launch

Call = tuple[str, Grid, tuple[Any, ...], dict[str, Any]]


class Compiled:
    def __init__(self, calls: list[Call], name: str) -> None:
        self.calls, self.name = calls, name

    def __getitem__(self, grid: Grid) -> Any:
        return lambda *args, **options: self.calls.append((self.name, grid, args, options))


class Kernel:
    """As Triton's: a launch gives what it compiled, or nothing in the interpreter."""

    def __init__(self, interpreted: bool = False) -> None:
        self.calls: list[Call] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: Grid) -> Any:
        def run(*args: Any, **options: Any) -> Compiled | None:
            self.calls.append(("kernel", grid, args, options))
            return None if self.interpreted else Compiled(self.calls, f"compiled at call {len(self.calls)}")

        return run


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(variants, "_known", {})
    yield


TENSOR = torch.zeros(64, dtype=torch.bfloat16)
ONE, TWO = (1, 1, 1), (2, 1, 1)


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_variant_is_compiled_once(interpreted: bool) -> None:
    kernel, other = Kernel(interpreted), torch.ones(8, dtype=torch.bfloat16)
    launch(kernel, ONE, (TENSOR, None), (16, 0.5), free=(7,), num_warps=4)
    launch(kernel, TWO, (other, None), (16, 0.5), free=(8,), num_warps=4)
    (_, *first), (name, grid, args, options) = kernel.calls
    assert first == [ONE, (TENSOR, None, 7, 16, 0.5), {"num_warps": 4}]
    assert (name, options) == (("kernel", {"num_warps": 4}) if interpreted else ("compiled at call 1", {}))
    assert grid == TWO and args[0] is other and args[1:] == (None, 8, 16, 0.5)


@pytest.mark.parametrize(
    ("tensors", "numbers"),
    [
        ((TENSOR.float(), TENSOR), (16, False)),
        ((TENSOR, TENSOR.float()), (16, False)),
        ((TENSOR, None), (16, False)),
        ((TENSOR[1:], TENSOR), (16, False)),
        ((TENSOR, TENSOR[1:]), (16, False)),
        ((TENSOR.to("meta"), TENSOR), (16, False)),
        ((TENSOR, TENSOR), (17, False)),
        ((TENSOR, TENSOR), (16, True)),
    ],
)
def test_another_dtype_alignment_device_or_number_is_another_variant(tensors: Any, numbers: Any) -> None:
    kernel = Kernel()
    launch(kernel, ONE, (TENSOR, TENSOR), (16, False))
    launch(kernel, ONE, tensors, numbers)
    launch(kernel, ONE, (TENSOR, TENSOR), (16, False))
    launch(kernel, ONE, tensors, numbers)
    assert [name for name, *_ in kernel.calls] == ["kernel", "kernel", "compiled at call 1", "compiled at call 2"]


@pytest.mark.parametrize("other", [{"num_warps": 8, "num_stages": 3}, {"num_warps": 4, "num_stages": 2}, {}])
def test_another_option_is_another_variant(other: dict[str, Any]) -> None:
    """As where tiles are timed that differ in nothing else."""
    kernel = Kernel()
    first: dict[str, Any] = {"num_warps": 4, "num_stages": 3}
    for options in (first, other) * 2:
        launch(kernel, ONE, (TENSOR,), (16,), **options)
    assert [name for name, *_ in kernel.calls] == ["kernel", "kernel", "compiled at call 1", "compiled at call 2"]


def test_kernels_have_variants_of_their_own() -> None:
    first, second = Kernel(), Kernel()
    for kernel in (first, second):
        launch(kernel, ONE, (TENSOR,), ())
    assert [len(kernel.calls) for kernel in (first, second)] == [1, 1]


@pytest.mark.parametrize("interpreted", [False, True])
def test_arguments_are_put_together_once_for_each_kind_of_output(interpreted: bool) -> None:
    kernel, prepared, made = Kernel(interpreted), Prepared(), []
    wide = torch.zeros(4, 16)
    kinds = [wide, wide.clone(), wide[:, 4:8], wide[:, 1:5], wide[:, :8].contiguous(), wide.double(), wide.to("meta")]

    def arguments() -> tuple[Grid, tuple[Any, ...]]:
        made.append(len(made))
        return ONE, (made[-1], "rest")

    for _ in range(2):
        for out in kinds:
            prepared.launch(kernel, out, arguments, num_warps=4)
    if interpreted:
        assert len(made) == len(kernel.calls) == 2 * len(kinds)
        return
    # The second and the third are as the first: the stride of rows, not their number, counts.
    assert [args[1] for _, _, args, _ in kernel.calls] == 2 * [0, 0, 0, 1, 2, 3, 4]
    assert all(args[0] is out for (_, _, args, _), out in zip(kernel.calls, 2 * kinds, strict=True))
    assert all(options == ({"num_warps": 4} if name == "kernel" else {}) for name, *_, options in kernel.calls)
    assert len(made) == 5


def test_launches_of_one_caller_are_told_apart_by_number() -> None:
    kernel, prepared = Kernel(), Prepared()
    for _ in range(2):
        for number in (0, 1):
            prepared.launch(kernel, TENSOR, lambda number=number: (ONE, (number,)), number=number)
    assert [args[1] for _, _, args, _ in kernel.calls] == [0, 1, 0, 1]


@pytest.mark.gpu
def test_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself is asked once for each variant, and every launch does its work: aligned or not, whatever the number
    of rows, from fp32 and from bf16."""
    kernel, asked = kernels.copy_rows_kernel, []
    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args, **options: asked.append(1) or run(*args, **options))
    for _ in range(3):
        for rows in (1, 16, 37):
            for first in (0, 1):
                for dtype in (torch.bfloat16, torch.float32):
                    source = torch.randn(rows, 80, device="cuda").to(dtype)[:, first : first + 64]
                    target = torch.full((rows, 64), torch.nan, dtype=torch.bfloat16, device="cuda")
                    kernels.copy_rows(source, target)
                    assert torch.equal(target, source.bfloat16())
    assert len(asked) == 4
