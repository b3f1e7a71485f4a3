"""A frozen weight in bitsandbytes' NF4 storage: 4-bit codes, an absmax a block, the absmax itself in 8 bit or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from steep.ops.backend import uses_kernels
from steep.ops.base_weight import BaseWeight

if TYPE_CHECKING:
    from steep.kernels.nf4 import Stored
    from steep.kernels.variants import Prepared

HEIGHT = 3  # weights of a stack, at most: those of q, k and v


@dataclass(frozen=True)
class Nf4Weight:
    """W = table[code] · absmax of the code's block, in fp32, over the weight read row by row (a block may run across
    rows). With double quantisation absmax = code_book[absmax] · nested_absmax[block // nested_block_size] + offset.

    One buffer that `write` filled serves both products: y = x @ buffer.T, and dx = dy @ buffer, which reads it as the
    operand that is not transposed. No second copy is made.

    Attributes:
        codes: uint8, two codes a byte, the high half first; ceil(elements / 2) of them, contiguous, in any shape.
        absmax: [blocks], fp32, or uint8 with the three tensors of double quantisation.
        table: fp32 [16].
        shape: (out_features, in_features).
        code_book: fp32 [256]; nested_absmax: fp32 [ceil(blocks / nested_block_size)]; offset: fp32, one element.

    Raises:
        ValueError: the parts are not of such a storage.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor
    shape: tuple[int, int]
    block_size: int = 64
    code_book: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_block_size: int = 256

    def __post_init__(self) -> None:
        elements = self.shape[0] * self.shape[1]
        blocks = -(-elements // self.block_size)
        double = (self.code_book, self.nested_absmax, self.offset)
        _check("codes", self.codes, torch.uint8, -(-elements // 2))
        _check("table", self.table, torch.float32, 16)
        if self.block_size < 8 or self.block_size & (self.block_size - 1):
            raise ValueError(f"NF4 blocks of {self.block_size} elements: a power of two from 8 on is read here.")
        if all(part is None for part in double):
            _check("absmax", self.absmax, torch.float32, blocks)
            return
        _check("absmax", self.absmax, torch.uint8, blocks)
        _check("code_book", self.code_book, torch.float32, 256)
        _check("nested_absmax", self.nested_absmax, torch.float32, -(-blocks // self.nested_block_size))
        _check("offset", self.offset, torch.float32, 1)

    def write(self, out: torch.Tensor) -> None:
        """Write the weight into `out` [out_features, in_features] of bf16, fp16 or fp32, rounded once from fp32. Its
        rows may be apart."""
        Nf4Stack((self,)).write(out)

    @cached_property
    def has_kernel(self) -> bool:
        """Whether the kernels can read it, 64 codes of one row and one block at a time. Else the reference runs on a
        GPU too; no known model's rows are so."""
        return self.shape[1] % 64 == 0 and self.block_size % 64 == 0 and self.codes.data_ptr() % 4 == 0

    @cached_property
    def stored(self) -> Stored:
        """Its tensors as the kernels read them."""
        stored = (self.codes.flatten().view(torch.int32), self.table, self.absmax)
        if self.code_book is None or self.nested_absmax is None or self.offset is None:
            return stored
        return (*stored, self.code_book, self.nested_absmax, self.offset)

    @property
    def kind(self) -> tuple[object, ...]:
        """What is the same of weights that one launch can write."""
        return self.has_kernel, self.shape[1], self.block_size, self.nested_block_size, self.absmax.dtype


class Nf4Stack:
    """Weights of one kind that stand one below the other: written by one launch."""

    def __init__(self, weights: Sequence[Nf4Weight]) -> None:
        self._weights = weights
        self._rows = [weight.shape[0] for weight in weights]
        self.shape = (sum(self._rows), weights[0].shape[1])

    def write(self, out: torch.Tensor) -> None:
        """As that of `Nf4Weight`, into `out` [out_features of all, in_features]."""
        assert tuple(out.shape) == self.shape and out.stride(1) == 1, (out.shape, out.stride(), self.shape)
        first = self._weights[0]
        if not (uses_kernels(out) and first.has_kernel):
            for weight, rows in zip(self._weights, out.split(self._rows), strict=True):
                rows.copy_(nf4_reference(weight))
            return
        from steep.kernels import nf4

        nf4.write(self._stored, self._rows, first.block_size, first.nested_block_size, out, self._prepared)

    @cached_property
    def _prepared(self) -> Prepared:
        from steep.kernels.variants import Prepared

        return Prepared()

    @cached_property
    def _stored(self) -> tuple[Stored, ...]:
        return tuple([weight.stored for weight in self._weights])


def stacked(weights: Sequence[BaseWeight]) -> list[BaseWeight]:
    """The same weights from top to bottom, neighbours that one launch can write as one."""
    stacks: list[BaseWeight] = []
    for kind, run in groupby(weights, lambda weight: weight.kind if isinstance(weight, Nf4Weight) else None):
        alike: list[Any] = list(run)
        stacks += alike if kind is None else [Nf4Stack(alike[at : at + HEIGHT]) for at in range(0, len(alike), HEIGHT)]
    return stacks


def nf4_reference(weight: Nf4Weight) -> torch.Tensor:
    """The weight in fp32 [out_features, in_features]: bitsandbytes' `dequantize_4bit` to the bit."""
    elements = weight.shape[0] * weight.shape[1]
    packed = weight.codes.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:elements]
    absmax = weight.absmax
    if weight.code_book is not None and weight.nested_absmax is not None and weight.offset is not None:
        nested = weight.nested_absmax.repeat_interleave(weight.nested_block_size)[: absmax.numel()]
        absmax = weight.code_book[absmax.int()] * nested + weight.offset
    scale = absmax.repeat_interleave(weight.block_size)[:elements]
    return (weight.table[codes.int()] * scale).view(weight.shape)


def _check(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, elements: int) -> None:
    found = "none" if tensor is None else f"{tensor.numel()} of {tensor.dtype}"
    if tensor is None or tensor.dtype != dtype or tensor.numel() != elements or not tensor.is_contiguous():
        raise ValueError(f"NF4 storage: `{name}` is {found}; {elements} of {dtype}, contiguous, are expected.")
