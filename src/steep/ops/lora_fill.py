"""The weight buffer of a group of LoRA projections, but for W: s·B, A, biases and the zeros around them, in one launch.

s·B is multiplied in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from steep.ops.backend import uses_kernels
from steep.ops.lora_layout import ALIGNMENT, Piece, Pieces

if TYPE_CHECKING:
    from steep.kernels.lora_fill import Launch


class LoraFill:
    """What stands beside W in the weight buffers of a group.

    Args:
        matrices: a and b of each adapter in turn, and scales their factors.
        biases: of each projection.
    """

    def __init__(
        self,
        layout: Pieces,
        matrices: Sequence[torch.Tensor],
        scales: Sequence[float],
        biases: Sequence[torch.Tensor | None],
    ) -> None:
        self._layout, self._matrices, self._scales, self._biases = layout, matrices, scales, biases
        self._tensors = [*matrices, *(bias for bias in biases if bias is not None)]
        self._addresses: list[int] | None = None
        self._kept: tuple[Any, ...] = ()
        self._of_pieces = [None if piece.source is None else matrices[piece.source] for piece in layout.matrices]
        self._scales_of_pieces = [1.0 if piece.source is None else scales[piece.source] for piece in layout.matrices]
        self._biases_of_pieces = [None if piece.source is None else biases[piece.source] for piece in layout.biases]

    def write(self, buffer: torch.Tensor) -> None:
        """Write all pieces into the `buffer` in which they stand, of bf16, fp16 or fp32, whose rows may be apart;
        nothing else is touched, W neither."""
        assert buffer.stride(1) == 1, buffer.stride()
        layout = self._layout
        if not uses_kernels(buffer):
            columns = [None if bias is None else bias[:, None] for bias in self._biases]
            lora_fill_reference(buffer, layout.matrices, self._matrices, self._scales)
            lora_fill_reference(buffer, layout.biases, columns, [1.0] * len(columns))
            return
        from steep.kernels import lora_fill

        lora_fill.fill(buffer, *self._arguments(buffer))

    def _arguments(self, like: torch.Tensor) -> tuple[Any, ...]:
        """Those of the launch beside the buffer: kept while the adapters and biases stay in their memory, unless what
        is read is a copy of them. They may not change their dtype or shape there."""
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            from steep.kernels.variants import Prepared

            matrices, biases = _as_read(self._of_pieces, like), _as_read(self._biases_of_pieces, like)
            arguments = _launches(self._layout, like.device), matrices, self._scales_of_pieces, biases, Prepared()
            if not {tensor.data_ptr() for tensor in (*matrices, *biases)} <= {*addresses}:
                return arguments
            self._addresses, self._kept = addresses, arguments
        return self._kept


def lora_fill_reference(
    buffer: torch.Tensor, pieces: Sequence[Piece], tensors: Sequence[torch.Tensor | None], scales: Sequence[float]
) -> None:
    """Write `pieces`, whose sources are `tensors`, each [height, width] and multiplied by its scale."""
    for piece in pieces:
        buffer[piece.rows, piece.columns].zero_()
        tensor = None if piece.source is None else tensors[piece.source]
        if piece.source is not None and tensor is not None:
            torch.mul(tensor.detach().float(), scales[piece.source], out=buffer[piece.own_rows, piece.own_columns])


@cache
def _launches(layout: Pieces, device: torch.device) -> tuple[Launch, ...]:
    from steep.kernels import lora_fill

    matrices, biases = ([piece.numbers() for piece in pieces] for pieces in (layout.matrices, layout.biases))
    return lora_fill.launches(matrices, biases, device)


def _as_read(tensors: Sequence[torch.Tensor | None], some: torch.Tensor) -> list[torch.Tensor]:
    """Tensors as the kernel reads them: contiguous, all in one dtype. Where there is none, one of them, or one like
    `some`, which itself would stay alive with the arguments."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.dtype for tensor in given}) > 1:
        tensors = [None if tensor is None else tensor.float() for tensor in tensors]
        given = [tensor for tensor in tensors if tensor is not None]
    some = given[0] if given else some.new_empty(ALIGNMENT)
    return [(some if tensor is None else tensor).contiguous() for tensor in tensors]
