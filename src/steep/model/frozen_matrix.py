"""A frozen embedding that is read from the base's own file where it is asked for, and lies nowhere else."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from steep.errors import RunError, UserError
from steep.model.base_tensors import BaseTensors
from steep.model.checksum import checksum

_AT_ONCE = 2**26  # bytes that are read and cast at a time
logger = logging.getLogger("steep")


class FrozenMatrix:
    """The values that a frozen matrix had when `read_from` was called, to the bit, in its dtype.

    They are read from the checkpoint's file, memory-mapped, at each access. Rows that the file does not hold as they
    are (new tokens') are kept in host memory, and so is the whole of a matrix that it does not hold.

    Attributes:
        shape: (V, H).
        dtype: of the values; the file's may be another.
        recorded: `steep.model.checksum.checksum` of the values.
        file: where they are read from; None where they are in host memory.
    """

    def __init__(self, weight: torch.Tensor, tensors: BaseTensors | None, name: str) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.recorded = checksum(weight)
        self.file: Path | None = None
        self._seen: tuple[int, int, int, int] | None = None
        self._parameter: weakref.ref[nn.Parameter] | None = None
        self._tensors, self._name = tensors, name
        self._own_ids = torch.empty(0, dtype=torch.int64)
        if tensors is not None:
            self.file = tensors.file(name)
            self._seen = _identity(self.file)  # before it is read
            self._own_ids = _other_rows(weight, tensors[name])
        if tensors is None or 2 * len(self._own_ids) > self.shape[0]:
            self.file = self._tensors = None
            self._stored = weight.detach().to("cpu", copy=True)
            self._own_ids = self._own_ids[:0]
        # New tokens' rows, mostly.
        self._own_rows = weight.detach()[self._own_ids.to(weight.device)].cpu()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` (int64 [n], on the CPU), on the CPU.

        Raises:
            IndexError: there is no such row.
            RunError: the file is another than it was.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise IndexError(f"token ids from {int(ids.min())} to {int(ids.max())}, and {self.shape[0]} rows")
        stored = self._read()
        rows = stored[ids.clamp(max=stored.shape[0] - 1)].to(self.dtype)
        if len(self._own_ids):
            place = torch.searchsorted(self._own_ids, ids).clamp(max=len(self._own_ids) - 1)
            own = self._own_ids[place] == ids
            rows[own] = self._own_rows[place[own]]
        return rows

    def check(self) -> None:
        """
        Raises:
            RunError: the file is another than it was.
        """
        self._read()

    def whole(self, device: torch.device, rows: int | None = None) -> torch.Tensor:
        """A copy of the first `rows` rows, of all by default, on `device`.

        Raises:
            RunError: the file is another than it was.
        """
        return self._assembled(self._read(), device, self.shape[0] if rows is None else rows)

    def parameter(self, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        """The values as a frozen parameter; as long as it is alive the next one is the same, as in a tied pair."""
        parameter = self._parameter() if self._parameter is not None else None
        if parameter is None or (parameter.device, parameter.dtype) != (device, dtype):
            parameter = nn.Parameter(self.whole(device).to(dtype), requires_grad=False)
            self._parameter = weakref.ref(parameter)
        return parameter

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_parameter": None}  # a weak reference cannot be pickled

    def checksum(self, device: torch.device | None = None) -> str:
        """That of the values as the file holds them now, computed on `device`; says so where it cannot be read."""
        try:
            return self._checksum_of(self._open(), device)
        except (RunError, UserError) as error:
            return str(error)

    def _assembled(self, stored: torch.Tensor, device: torch.device, rows: int) -> torch.Tensor:
        out = torch.empty(rows, self.shape[1], dtype=self.dtype, device=device)
        step = max(1, _AT_ONCE // (4 * self.shape[1]))
        for start in range(0, min(rows, stored.shape[0]), step):
            piece = stored[start : min(start + step, rows)]
            out[start : start + len(piece)] = piece.to(device)
        own = self._own_ids < rows
        out[self._own_ids[own].to(device)] = self._own_rows[own].to(device)
        return out

    def _checksum_of(self, stored: torch.Tensor, device: torch.device | None = None) -> str:
        if stored.dtype == self.dtype and not len(self._own_ids):
            return checksum(stored[: self.shape[0]], device)  # without a copy
        return checksum(self._assembled(stored, torch.device("cpu"), self.shape[0]), device)

    def _read(self) -> torch.Tensor:
        """[at least 1, H] as it is stored. A file that was written to since it was last looked at is compared whole."""
        if self.file is None:
            return self._stored
        seen = _identity(self.file)
        stored = self._open()
        if seen != self._seen:
            if self._checksum_of(stored) != self.recorded:
                raise RunError(f"{self.file} was changed while it is in use: {self._name} is another. Put it back")
            self._seen = seen
        return stored

    def _open(self) -> torch.Tensor:
        if self._tensors is None:
            return self._stored
        try:
            return self._tensors[self._name]
        except (UserError, SafetensorError, OSError) as error:
            raise RunError(f"{self.file}, which is in use, cannot be read any more: {error}. Put it back") from error


def read_from(weight: torch.Tensor, tensors: BaseTensors | None, name: str) -> FrozenMatrix:
    """The matrix `weight` [V, H], from the tensor of `tensors` that holds it.

    Args:
        name: of the module with the weight: a tensor so called is tried first, then every embedding of the checkpoint,
            since a head may be its table and names may have a prefix.
    """
    candidates = [
        stored
        for stored in tensors or ()
        if stored.endswith(("embed_tokens.weight", "lm_head.weight"))
        and len(shape := tensors.shape(stored)) == 2  # pyright: ignore[reportOptionalMemberAccess]
        and shape[1] == weight.shape[1]
    ]
    for stored in sorted(candidates, key=lambda stored: stored != f"{name}.weight"):
        matrix = FrozenMatrix(weight, tensors, stored)
        if matrix.file is not None:
            return matrix
    size = weight.numel() * weight.element_size() / 2**30
    logger.info("no file holds the frozen original of %s: it is kept in host memory (%.2f GiB)", name, size)
    return FrozenMatrix(weight, None, name)


def _other_rows(weight: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Ids of the rows of `weight` whose bytes `stored`, in the same dtype, does not hold: int64 [n] on the CPU."""
    weight = weight.detach()
    step = max(1, _AT_ONCE // (4 * weight.shape[1]))
    shared = min(len(weight), len(stored))
    other = torch.ones(len(weight), dtype=torch.bool)
    for start in range(0, shared, step):
        piece = weight[start : min(start + step, shared)].contiguous()
        there = stored[start : start + len(piece)].to(weight.device).to(weight.dtype).contiguous()
        same = (piece.view(torch.uint8) == there.view(torch.uint8)).all(dim=1)
        other[start : start + len(piece)] = ~same.cpu()
    return other.nonzero().flatten()


def _identity(file: Path) -> tuple[int, int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None  # opening it says why
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
