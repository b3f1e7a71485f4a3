"""A compiled kernel is found by what differs, and launched with the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steep.kernels.variants import Variants, place

Call = tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


class Compiled:
    def __init__(self, calls: list[Call], name: str) -> None:
        self.calls, self.name = calls, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.calls.append((self.name, grid, args, options))


class Kernel:
    """As Triton's: a launch gives what it compiled, or nothing in the interpreter."""

    def __init__(self, interpreted: bool) -> None:
        self.calls: list[Call] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Compiled | None:
            self.calls.append(("kernel", grid, args, options))
            return None if self.interpreted else Compiled(self.calls, f"compiled for {args}")

        return launch


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_variant_is_compiled_once(interpreted: bool) -> None:
    kernel, variants = Kernel(interpreted), Variants()
    for number, (key, argument) in enumerate([("a", 1), ("b", 2), ("a", 3), ("b", 4)]):
        variants.launch(kernel, key, (number, 1, 1), argument, num_warps=4)
    told = {"num_warps": 4}
    again = ["kernel", "kernel"] if interpreted else ["compiled for (1,)", "compiled for (2,)"]
    assert kernel.calls == [
        ("kernel", (0, 1, 1), (1,), told),
        ("kernel", (1, 1, 1), (2,), told),
        (again[0], (2, 1, 1), (3,), told if interpreted else {}),
        (again[1], (3, 1, 1), (4,), told if interpreted else {}),
    ]


def test_a_place_is_device_dtype_and_alignment() -> None:
    tensor = torch.zeros(64, dtype=torch.bfloat16)
    assert place(tensor) == place(tensor[8:]) == place(torch.ones(3, dtype=torch.bfloat16))
    assert len({place(tensor), place(tensor[1:]), place(tensor.float()), place(tensor.to("meta"))}) == 4
