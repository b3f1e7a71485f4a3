"""The weight buffer of a group of LoRA projections, but for W: s·B, A, biases and the zeros around them, in one launch.

s·B is multiplied in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from steep.ops.backend import uses_kernels
from steep.ops.lora_layout import Layout, Piece

if TYPE_CHECKING:
    from steep.kernels.lora_fill import Launch


def lora_fill(
    buffer: torch.Tensor,
    layout: Layout,
    matrices: Sequence[torch.Tensor],
    scales: Sequence[float],
    biases: Sequence[torch.Tensor | None],
) -> None:
    """Write all pieces of `layout` into `buffer` [gradient_width, input_width] of bf16, fp16 or fp32, whose rows may be
    apart; nothing else is touched, W neither.

    Args:
        matrices: a and b of each adapter in turn, and scales their factors.
        biases: of each projection.
    """
    assert buffer.stride(1) == 1, buffer.stride()
    columns = [None if bias is None else bias[:, None] for bias in biases]
    if not uses_kernels(buffer):
        lora_fill_reference(buffer, layout.matrices, matrices, scales)
        lora_fill_reference(buffer, layout.biases, columns, [1.0] * len(biases))
        return
    from steep.kernels import lora_fill

    lora_fill.fill(
        buffer,
        _launches(layout, buffer.device),
        _of_pieces(layout.matrices, matrices, buffer),
        [1.0 if piece.source is None else scales[piece.source] for piece in layout.matrices],
        _of_pieces(layout.biases, columns, buffer),
    )


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
def _launches(layout: Layout, device: torch.device) -> tuple[Launch, ...]:
    from steep.kernels import lora_fill

    matrices, biases = ([piece.numbers() for piece in pieces] for pieces in (layout.matrices, layout.biases))
    return lora_fill.launches(matrices, biases, device)


def _of_pieces(
    pieces: Sequence[Piece], tensors: Sequence[torch.Tensor | None], buffer: torch.Tensor
) -> list[torch.Tensor]:
    """The tensor of each piece as the kernel reads it: contiguous, all in one dtype; some other where it has none."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.dtype for tensor in given}) > 1:
        tensors = [None if tensor is None else tensor.float() for tensor in tensors]
    some = next((tensor for tensor in tensors if tensor is not None), buffer)
    own = [None if piece.source is None else tensors[piece.source] for piece in pieces]
    return [some if tensor is None else tensor.contiguous() for tensor in own]
