"""Whether an op runs its Triton kernel or its plain-torch reference; and what autograd wants of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

_interpreting: ContextVar[bool] = ContextVar("interpreting", default=False)


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Kernels run on a GPU. On a CPU the references do, unless `interpreted` says otherwise."""
    return tensor.is_cuda or _interpreting.get()


@contextmanager
def interpreted() -> Iterator[None]:
    """Run kernels on CPU tensors too, in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported): slow,
    and how kernels are tested where no GPU is."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def gradient_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What autograd keeps of the gradient of `tensor`: its own dtype, or the `grad_dtype` that a leaf was given."""
    return (tensor.grad_dtype if tensor.is_leaf else None) or tensor.dtype


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off inside. Where it is off already there is nothing to do, and torch's own context takes the host as
    long as three launches."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """Let torch.compile call `function` as it is: what is fused gains nothing, and changes settings that a trace may
    not."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


def vjp(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], cotangent: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of `function(*inputs)` in the direction `cotangent`, by autograd: the backward of a reference."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)
