"""Safetensors files whose write errors are the system's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    with system_errors(file):
        save_file(dict(tensors), file, metadata)


@contextmanager
def system_errors(place: Path) -> Iterator[None]:
    """Let a write error be the system's where a library writes safetensors, which has an error of its own for that.

    Args:
        place: what the error names.
    """
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"(?:os error|code:) (\d+)", str(error))  # so in its newer and older versions
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(place)) from error
