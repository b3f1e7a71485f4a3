"""`deterministic: true`: a training on a GPU that gives the same bits each time.

Without it some kernels of a backward pass add with atomics, in the order in which blocks of threads happen to finish:
attention's, and the embedding's where a token stands in a row more than once. fp addition is not associative, so two
equal runs drift apart from the first step on, and so do a run and its resumption. On a CPU nothing of that happens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from steep.errors import RunError, UserError

_CUBLAS, _FLASH = "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"
_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS is deterministic (its documentation); the second is slow
_NO_FORM = re.compile(r"(\S+) does not have a deterministic implementation")


def prepare_cublas(field: str) -> None:
    """Give cuBLAS workspaces of its own before it starts, which is when it reads of them. They stay: taken back, the
    next training of this process could not be sure of them.

    cuBLAS starts with the first product. Nobody tells of that, but there is none without memory on the card. CUDA
    itself is started by the import of bitsandbytes.

    Args:
        field: named in the error.

    Raises:
        UserError: the process has computed on a card already, without them.
    """
    if not torch.cuda.is_available() or os.environ.get(_CUBLAS) in _WORKSPACES:
        return
    if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
        raise UserError(
            field,
            f"it needs {_CUBLAS} before anything is computed on the card, and this process has done so",
            f"Begin Python with {_CUBLAS}={_WORKSPACES[0]}, or make the TrainingArguments before anything else.",
        )
    os.environ[_CUBLAS] = _WORKSPACES[0]


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let torch, cuDNN and flash attention take deterministic kernels only, and be as before afterwards.

    Args:
        on: False does nothing.

    Raises:
        RunError: an operation has no deterministic form.
    """
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warns, fills = torch.is_deterministic_algorithms_warn_only_enabled(), _fills_memory()
    flash = os.environ.get(_FLASH)
    torch.use_deterministic_algorithms(True)
    _fill_memory(False)  # with NaN, whatever is allocated: it finds faults and costs a pass over memory
    os.environ[_FLASH] = "1"  # transformers hands it to flash attention
    unchanged: dict[str, Any] = dict.fromkeys(("enabled", "benchmark_limit", "allow_tf32", "fp32_precision"))
    try:
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False, **unchanged):
            yield
    except RuntimeError as error:
        if found := _NO_FORM.search(str(error)):
            raise RunError(
                f"{found[1]} has no deterministic form in torch, and training.deterministic is true. Set it to false, "
                "or give another model.attn_implementation if that is attention's"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        _fill_memory(fills)
        if flash is None:
            del os.environ[_FLASH]
        else:
            os.environ[_FLASH] = flash


def _fills_memory() -> bool:
    return torch._C._get_deterministic_fill_uninitialized_memory()


def _fill_memory(on: bool) -> None:
    torch._C._set_deterministic_fill_uninitialized_memory(on)
