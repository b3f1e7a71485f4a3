"""Attention by the flash kernels that torch brings (FlashAttention 2): packed documents, grouped heads, windows.

Under `torch.use_deterministic_algorithms` torch asks for the deterministic backward; otherwise dq is added by atomics.
"""

from __future__ import annotations

import torch

from steep.ops.copy_rows import contiguous
from steep.ops.packing import Packing


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this card cannot run it; None if it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if head_dim % 8:
        return "head_dim is not a multiple of 8"
    with torch.cuda.device(device):
        probe = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device, requires_grad=True)
        params = torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, True, False)
        if torch.backends.cuda.can_use_flash_attention(params):
            return None
    return f"torch has no flash attention for head_dim {head_dim} in {dtype} on this card"


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
    ends = packing.cu_seqlens if packing.uniform is None else None
    length = packing.max_length
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        *(_shaped(x, packing) for x in (q, k, v)), ends, ends, length, length, 0.0, True, False,
        scale=scale, **_window(window),
    )  # fmt: skip
    return out.reshape(q.shape), (logsumexp,)


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
    ends = packing.cu_seqlens if packing.uniform is None else None
    length = packing.max_length
    (logsumexp,) = saved
    # torch would make them contiguous itself
    shaped = (_shaped(x, packing) for x in (contiguous(dout), q, k, v, contiguous(out)))
    seed, unused = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in (2, 0))  # dropout's
    gradients = torch.ops.aten._flash_attention_backward(
        *shaped, logsumexp, ends, ends, length, length, 0.0, True, seed, unused,
        scale=scale, **_window(window),
    )  # fmt: skip
    return tuple(gradient.reshape(x.shape) for gradient, x in zip(gradients, (q, k, v), strict=True))


def of_heads(logsumexp: torch.Tensor, heads: slice, packing: Packing) -> torch.Tensor:
    """What the forward of these heads alone would have saved, of what that of all did: [heads, T] where documents are
    packed, else [documents, heads, L]."""
    return (logsumexp[heads] if packing.uniform is None else logsumexp[:, heads]).contiguous()


def _shaped(x_THD: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Packed as it is; [documents, length, heads, head_dim] where all are equally long, which is a little faster."""
    return x_THD if packing.uniform is None else x_THD.unflatten(0, (len(packing.lengths), packing.max_length))


def _window(window: int | None) -> dict[str, int]:
    """How many tokens before and after its own a token sees."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
