"""Attention by `torch.nn.functional.scaled_dot_product_attention`: for cards that have none of the others (a T4).

Documents of uneven lengths are taken one at a time; key and value heads are repeated, since its memory-efficient
kernels take no grouped heads. The backward computes the forward once more.
"""

from __future__ import annotations

import torch

from steep.ops.attention_reference import visible
from steep.ops.backend import vjp
from steep.ops.packing import Packing


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this card cannot run it; None if it can."""
    return None if device.type == "cuda" else "it is for CUDA devices"


def lacks(uniform: int | None, window: int | None, softcap: float | None) -> str | None:
    """What of this it cannot do; None if it can all."""
    return None if softcap is None else "a soft cap"


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    with torch.no_grad():
        parts = [_attend(q, k, v, scale, window) for q, k, v in _parts(packing, q, k, v)]
        return torch.cat([part.flatten(0, 1) for part in parts]), ()


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, ...]:
    parts = [
        vjp(lambda q, k, v: _attend(q, k, v, scale, window), inputs, dout)
        for dout, *inputs in _parts(packing, dout, q, k, v)
    ]
    return tuple(torch.cat([part.flatten(0, 1) for part in gradients]) for gradients in zip(*parts, strict=True))


def _parts(packing: Packing, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The tensors [T, heads, head_dim] as [documents, length, heads, head_dim], as few as lengths allow: views."""
    if packing.uniform is not None:
        return [tuple(x.unflatten(0, (len(packing.lengths), packing.max_length)) for x in tensors)]
    return [tuple(x[at].unsqueeze(0) for x in tensors) for at in packing.slices]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    mask = None if window is None or window >= length else visible(length, window, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)
