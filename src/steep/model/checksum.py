"""A checksum of a tensor's bytes that is as fast as reading them."""

from __future__ import annotations

import torch

_CHUNK = 2**25  # bytes that one pass reads
_MIX = 0x1E3779B97F4A7C15  # odd: spreads a word over all 64 bits (multiplicative hashing)


def checksum(tensor: torch.Tensor, device: torch.device | None = None) -> str:
    """Digest of a tensor's bytes, computed where it lives, or on `device`, piece by piece: 8 GB take a moment on a GPU,
    and minutes through a hash.

    A sum modulo 2^64 of its 64-bit words, each mixed with its position (xor, multiply, shift, multiply, as splitmix64
    does): any single change alters it, and changes of the same bit in several words do not cancel.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=device or raw.device)
    for start in range(0, raw.numel(), _CHUNK):
        piece = raw[start : start + _CHUNK].to(total.device)
        words = torch.nn.functional.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        position = torch.arange(start // 8, start // 8 + words.numel(), device=total.device)
        words = (words ^ (position * _MIX)) * _MIX
        total += ((words ^ (words >> 31)) * _MIX).sum()
    return f"{int(total) & (2**64 - 1):016x} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
