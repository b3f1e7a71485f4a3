"""Attention in plain torch, one document at a time, in fp32: what the other backends have to agree with."""

from __future__ import annotations

import torch

from steep.ops.backend import vjp
from steep.ops.packing import Packing


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """It runs everywhere."""


def lacks(uniform: int | None, window: int | None, softcap: float | None) -> None:
    """It knows every form."""


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention within each document; shapes as in `steep.ops.attention.attention`. Differentiable.

    Computed in fp32 (fp64 for fp64), rounded once. Scores of [heads, length, length] exist for one document at a time,
    in the forward; autograd keeps those of all.
    """
    return torch.cat([_document(q[at], k[at], v[at], scale, window, softcap) for at in packing.slices])


def _document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Attention of the L tokens of one document: q [L, NH, D], k and v [L, NK, D]."""
    exact = torch.promote_types(q.dtype, torch.float32)
    length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_KGLD = q.to(exact).view(length, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
    k_K1LD, v_K1LD = (x.to(exact).transpose(0, 1).unsqueeze(1) for x in (k, v))
    scores = q_KGLD @ k_K1LD.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(length, window, q.device), float("-inf"))
    out_KGLD = torch.softmax(scores, -1) @ v_K1LD
    return out_KGLD.permute(2, 0, 1, 3).reshape(length, num_heads, head_dim).to(q.dtype)


def visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [length, length]: token i sees token j if j <= i and, with a window, i - j < window (as transformers has
    it: a window counts the token itself)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


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
        return attention_reference(q, k, v, packing, scale=scale, window=window, softcap=softcap), ()


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
    """One document at a time, so that the scores of one exist, not of all."""
    parts = [
        vjp(lambda q, k, v: _document(q, k, v, scale, window, softcap), (q[at], k[at], v[at]), dout[at])
        for at in packing.slices
    ]
    return tuple(torch.cat(gradients) for gradients in zip(*parts, strict=True))
