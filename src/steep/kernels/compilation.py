"""What the kernels are compiled for: the configurations that are launched.

`kernels/x.py` names its own in `compilations(dtype)`, from the constants that its launchers use.
`tests/kernels/test_machine_code.py` builds each for every card that can run it, without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from steep.kernels import OLDEST_CARD

if TYPE_CHECKING:
    from triton import JITFunction

Type: TypeAlias = "str | tuple[Type, ...]"


@dataclass(frozen=True)
class Compilation:
    """One way in which a kernel is launched.

    Attributes:
        kernel: the function under @triton.jit.
        signature: Triton's type of each argument that is not a constant: "*bf16", "*u8", "i32", "i64", "fp32" ...; of
            a tuple, those of its members.
        constants: the value of each `tl.constexpr` argument.
        num_warps: as launched; the default is Triton's.
        oldest: compute capability of the oldest card on which it is launched: OLDEST_FP8_CARD of kernels with e4m3.
        until: of the first card on which it is launched no longer.
        num_stages: as launched; None: Triton's.
        multiples: arguments that are multiples of 16, for which a launch specialises the kernel.
    """

    kernel: JITFunction
    signature: Mapping[str, Type]
    constants: Mapping[str, object]
    num_warps: int = 4
    oldest: tuple[int, int] = OLDEST_CARD
    until: tuple[int, int] | None = None
    num_stages: int | None = None
    multiples: tuple[str, ...] = ()


def triton_type(dtype: torch.dtype) -> str:
    """The type of a pointer to elements of `dtype`, in a signature."""
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv"}
    return names[dtype]
