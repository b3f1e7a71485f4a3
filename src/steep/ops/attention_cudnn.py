"""Attention by cuDNN: the fastest on Hopper and data-centre Blackwell, for batches whose documents are equally long.

Packed documents of uneven lengths are not for it. torch's raw op has a form with cu_seqlens, but its backward takes
head_dim for the longest document and so writes past its workspace (pytorch/pytorch#186142), its forward builds a new
execution plan in each call, and the strides of q, k, v are not looked at. Dense calls per document would need a plan
for each length.

Its backward adds with atomics, and torch hands it no deterministic form.
"""

from __future__ import annotations

import torch

from steep.ops.copy_rows import contiguous
from steep.ops.packing import Packing

_ODD_LENGTHS_SINCE = 91501  # before, reads past the end of lengths that 128 does not divide (pytorch/pytorch#169849)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this card cannot run it; None if it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    with torch.cuda.device(device):
        probe = torch.empty(1, 128, 1, head_dim, dtype=dtype, device=device, requires_grad=True).transpose(1, 2)
        params = torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, True, False)
        if torch.backends.cuda.can_use_cudnn_attention(params):
            return None
    return f"torch has no cuDNN attention for head_dim {head_dim} in {dtype} on this card, or not in this mode"


def lacks(uniform: int | None, window: int | None, softcap: float | None) -> str | None:
    """What of this it cannot do; None if it can all."""
    if uniform is None:
        return "documents of uneven lengths"
    if window is not None:
        return "a sliding window"
    if softcap is not None:
        return "a soft cap"
    if uniform == 1:
        return "documents of one token"
    if uniform % 128 and (torch.backends.cudnn.version() or 0) < _ODD_LENGTHS_SINCE:
        return "lengths that 128 does not divide, in this version of cuDNN"
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    dense = (_dense(x, packing) for x in (q, k, v))
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *dense, None, True, 0.0, True, False, scale=scale
    )
    return _packed(out), (logsumexp,)


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
    # torch keys its execution plans by the strides of q, k, v, not by those of dout and out: keep these contiguous
    dense = (_dense(x, packing) for x in (contiguous(dout), q, k, v, contiguous(out)))
    (logsumexp,) = saved
    unused_seed = torch.empty(0, dtype=torch.int64, device=q.device)
    length = packing.max_length
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *dense, logsumexp, unused_seed, unused_seed, None, None, None, length, length, 0.0, True, scale=scale
    )
    return tuple(_packed(gradient) for gradient in gradients)


def of_heads(logsumexp: torch.Tensor, heads: slice, packing: Packing) -> torch.Tensor:
    """What the forward of these heads alone would have saved, of what that of all did: [documents, heads, L, 1]."""
    return logsumexp[:, heads].contiguous()


def _dense(x_THD: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[T, heads, head_dim] as [documents, heads, length, head_dim], a view."""
    return x_THD.view(len(packing.lengths), packing.max_length, *x_THD.shape[1:]).transpose(1, 2)


def _packed(x_BHLD: torch.Tensor) -> torch.Tensor:
    """The way back. cuDNN keeps the order of q's layout, so that this too is a view."""
    return x_BHLD.transpose(1, 2).flatten(0, 1)
