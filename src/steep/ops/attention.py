"""Causal attention over packed documents: one signature, several backends.

out_i = sum_j softmax_j(cap(scale q_i . k_j)) v_j over the tokens j that i sees: those of its own document up to
itself, and of these the last `window` where there is a window. cap(s) = softcap tanh(s / softcap), or s. Query heads
share key and value heads in groups.

T tokens of the batch, NH query heads, NK key and value heads, D = head_dim. Nothing of [T, T] is kept: `saved` is the
logarithm of each row's sum (cudnn, flash), or nothing (flex, sdpa and reference, whose backward computes the forward
once more). Which backend is fit or fastest says `steep.ops.attention_backends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.ops import attention_cudnn as cudnn
from steep.ops import attention_flash as flash
from steep.ops import attention_flex as flex
from steep.ops import attention_reference as reference
from steep.ops import attention_sdpa as sdpa
from steep.ops.attention_reference import attention_reference
from steep.ops.copy_rows import join_rows
from steep.ops.packing import Packing

__all__ = ["BACKENDS", "attention", "attention_backward", "attention_forward", "attention_reference"]

GROUP_BYTES = 2**28  # of the gradients of some heads, where they are written over q, k and v

# In the order of preference.
BACKENDS: dict[str, Any] = {
    "cudnn": cudnn,
    "flash": flash,
    "flex": flex,
    "sdpa": sdpa,
    "reference": reference,
}


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The output [T, NH, D], contiguous, and what `attention_backward` wants back.

    Args:
        q: [T, NH, D].
        k, v: [T, NK, D]; all three may be columns of one buffer.
        packing: the documents.
        window: how many tokens a token sees, itself included.
        backend: a name of `BACKENDS`.

    Raises:
        ValueError: the backend cannot do what is asked.
    """
    window = _effective(window, packing)
    _check(q, k, v, packing, window, softcap, backend)
    out, saved = BACKENDS[backend].forward(q, k, v, packing, scale, window, softcap)
    assert out.is_contiguous()
    return out, saved


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: Sequence[torch.Tensor],
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v.

    Args:
        dout: [T, NH, D].
        out, saved: what `attention_forward` gave, with the same arguments.
        into: [T, (NH + 2 NK) D], where to write the gradients side by side; q, k and v themselves may be its columns.
    """
    window = _effective(window, packing)
    _check(q, k, v, packing, window, softcap, backend)
    assert dout.shape == out.shape == q.shape, (dout.shape, out.shape, q.shape)
    gradients = BACKENDS[backend].backward(dout, q, k, v, out, tuple(saved), packing, scale, window, softcap)
    if into is not None:
        join_heads(gradients, into)
    return gradients


def attention_backward_in_place(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: Sequence[torch.Tensor],
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str,
    group_bytes: int = GROUP_BYTES,
) -> None:
    """`attention_backward`, its gradients written over q, k and v, of some heads at a time (`heads_at_once`). Where
    query heads that share a key and value head are done one after the other, its gradients are summed in fp32."""
    window = _effective(window, packing)
    _check(q, k, v, packing, window, softcap, backend)
    assert dout.shape == out.shape == q.shape, (dout.shape, out.shape, q.shape)
    (tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    one, shared = BACKENDS[backend], num_heads // num_kv_heads
    at_once, kv_at_once = heads_at_once(tokens, num_heads, num_kv_heads, head_dim, q.element_size(), group_bytes)
    for kv_heads in _parts(0, num_kv_heads, kv_at_once):
        of_k, of_v = k[:, kv_heads], v[:, kv_heads]
        sum_k, sum_v = of_k, of_v
        if at_once < shared:
            sum_k, sum_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (of_k, of_v))
        for heads in _parts(kv_heads.start * shared, kv_heads.stop * shared, at_once):
            kept = tuple(one.of_heads(each, heads, packing) for each in saved)
            part = dout[:, heads], q[:, heads], of_k, of_v, out[:, heads]
            dq, dk, dv = one.backward(*part, kept, packing, scale, window, softcap)
            q[:, heads].copy_(dq)
            if at_once < shared:
                sum_k.add_(dk)
                sum_v.add_(dv)
            else:
                of_k.copy_(dk)
                of_v.copy_(dv)
            del dq, dk, dv  # else they stay beside those of the next heads
        if at_once < shared:
            of_k.copy_(sum_k)
            of_v.copy_(sum_v)


def heads_at_once(
    tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, width: int, group_bytes: int = GROUP_BYTES
) -> tuple[int, int]:
    """Query heads, and key and value heads, whose gradients `attention_backward_in_place` holds beside q, k and v: as
    many as make no more than `group_bytes`; those of one key and value head; or a single query head, where it shares
    that with others and all of theirs would be more.

    Args:
        width: bytes of a value.
    """
    shared = num_heads // num_kv_heads
    of_one = width * tokens * head_dim * (shared + 2)
    if of_one > group_bytes:
        return 1, 1
    at_once = min(group_bytes // max(of_one, 1), num_kv_heads)
    return at_once * shared, at_once


def _parts(first: int, end: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, end)) for start in range(first, end, length)]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str,
) -> torch.Tensor:
    """`attention_forward`, differentiable."""
    return _Attention.apply(
        q, k, v, packing, {"scale": scale, "window": window, "softcap": softcap, "backend": backend}
    )


def join_heads(sources: Sequence[torch.Tensor], target: torch.Tensor) -> None:
    """Write q, k and v, each [T, heads, D], side by side into `target` [T, (NH + 2 NK) D], whose rows may be apart."""
    q, k, v = ((x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()).flatten(1) for x in sources)
    join_rows((q, k, v), target)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: dict[str, Any]
    ) -> torch.Tensor:
        out, saved = attention_forward(q, k, v, packing, **options)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.packing, ctx.options = packing, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        gradients = attention_backward(grad_outputs[0], q, k, v, out, saved, ctx.packing, **ctx.options)
        return *gradients, None, None


def _effective(window: int | None, packing: Packing) -> int | None:
    """A window that no document outgrows is none: more backends are fit, and they are faster."""
    return None if window is None or window >= packing.max_length else window


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend '{backend}'; there are {', '.join(BACKENDS)}")
    if lack := BACKENDS[backend].lacks(packing.uniform, window, softcap):
        raise ValueError(f"attention backend '{backend}' cannot do {lack}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it has to be above 0, or None")
    assert window is None or window >= 1, window
    # tokens beyond the last document would silently get no output, and NaN gradients
    assert len(q) == len(k) == len(v) == packing.num_tokens, (q.shape, k.shape, v.shape, packing.num_tokens)
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0, (q.shape, k.shape, v.shape)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, (q.stride(), k.stride(), v.stride())
