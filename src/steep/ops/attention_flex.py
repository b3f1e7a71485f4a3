"""Attention by torch's FlexAttention, compiled: all forms, the soft cap too.

The backward needs nothing but q, k and v: it computes the forward once more and differentiates it, for autograd's own
graph would keep q, k and v alive, whatever the step has decided to keep. No atomics, so it is deterministic.
The first call of a shape compiles for some seconds; documents and windows change nothing of the shape.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from steep.ops.backend import vjp
from steep.ops.packing import Packing

OLDEST_CARD = (8, 0)  # compute capability
_BLOCK = 128  # tokens of a block of the mask: FlexAttention's default, which its tile sizes divide
# Of one form: lengths take five or more (one token, one block, ...), and torch's own limit of eight is an error.
_COMPILATIONS = 64
# Below 128 tokens torch would take its kernel for decoding, which has no tiles for some numbers of heads.
_KERNEL: FlexKernelOptions = {"BACKEND": "TRITON"}


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this card cannot run it; None if it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < OLDEST_CARD:
        return "the compiler that it needs has no code for this card"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it is for 16 bit, not {dtype}"
    return None if head_dim >= 16 else "head_dim is below 16"


def lacks(uniform: int | None, window: int | None, softcap: float | None) -> None:
    """It knows every form."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    with torch.enable_grad():  # as in the backward, since torch compiles once for each; the graph goes when this ends
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return _attend(q, k, v, packing, scale, window, softcap).detach().contiguous(), ()


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
    return vjp(lambda q, k, v: _attend(q, k, v, packing, scale, window, softcap), (q, k, v), dout)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    mask = packing.derived(("flex", window), lambda: block_mask(packing, window))
    run = _compiled(q.shape[1:], k.shape[1], q.dtype, q.device, scale, softcap)
    with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
        return run(q, k, v, None if softcap is None else soft_cap(softcap), mask, scale)


@cache
def _compiled(*form: Any) -> Any:
    """One graph or an error: uncompiled, FlexAttention would make the whole matrix of scores.

    A function for each form, of which only lengths vary: torch counts by code what it compiles, and takes a number that
    differs from one call to the next for one that varies, of which FlexAttention allows neither heads nor a soft cap.
    """
    code = packed_flex.__code__.replace(co_name=f"{packed_flex.__name__}{form}")
    return torch.compile(FunctionType(code, packed_flex.__globals__), fullgraph=True)


def packed_flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score_mod: Any, mask: BlockMask, scale: float
) -> torch.Tensor:
    """FlexAttention over [T, heads, head_dim]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = flex_attention(
        q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=_KERNEL
    )
    return cast(torch.Tensor, out).squeeze(0).transpose(0, 1)


@lru_cache
def soft_cap(cap: float) -> Any:
    """cap * tanh(score / cap), of the scaled score."""

    def capped(score, batch, head, query, key):
        return cap * torch.tanh(score / cap)

    return capped


def block_mask(packing: Packing, window: int | None) -> BlockMask:
    """Which blocks of keys each block of queries sees, from the first key that each token sees.

    That number never falls from one token to the next, so a block of queries sees one run of blocks of keys, and this
    takes memory for blocks only; torch's own `create_block_mask` goes through [T, T] booleans.
    It also holds documents and window in one tensor: one compiled kernel serves all windows.
    """
    first, tokens = first_keys(packing, window), packing.num_tokens
    keys = torch.arange(-(-tokens // _BLOCK), device=first.device)
    queries = keys.unsqueeze(1)
    begins, ends = queries * _BLOCK, (queries + 1) * _BLOCK
    seen = (keys >= first[begins] // _BLOCK) & (keys <= queries)
    # each query of the block sees each key; as in torch, a last block that is cut short counts as one that is not whole
    whole = (keys * _BLOCK >= first[(ends - 1).clamp(max=tokens - 1)]) & (keys < queries) & (ends <= tokens)

    def mask_mod(batch, head, query, key):
        return (key <= query) & (key >= first[query])

    partial, full = _indices(seen & ~whole), _indices(whole)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(tokens, tokens))


def first_keys(packing: Packing, window: int | None) -> torch.Tensor:
    """int32 [T]: the first token that each token sees: of its document, and of its window."""
    positions = torch.arange(packing.num_tokens, dtype=torch.int32, device=packing.cu_seqlens.device)
    document = torch.searchsorted(packing.cu_seqlens, positions, right=True) - 1
    starts = packing.cu_seqlens[document]
    return starts if window is None else torch.maximum(starts, positions - (window - 1))


def _indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [queries, keys] as FlexAttention has it: how many each row has, and which, those first."""
    counts = blocks.sum(1, dtype=torch.int32)
    which = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], which[None, None]
