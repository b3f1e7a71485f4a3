"""Which attention backend: those that are fit, by capability; the fastest, by measuring; or one from a table.

A choice holds for batches like the one it was made for: packed or uniform, windowed or not.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import torch

from steep.ops.attention import BACKENDS, attention_backward, attention_forward
from steep.ops.packing import Packing

_NOT_DETERMINISTIC = ("cudnn",)  # its backward, for which torch asks no deterministic form
_SLOW = ("sdpa", "reference")  # never timed where another one is fit: they may not even fit into memory
_COMPILED = ("flex",)  # timing it costs many seconds of compiling
# Tokens, and so those of a document, up to which a batch is timed whole: of a longer one what is timed would take more
# memory than its step does. Which backend is faster is settled by then.
TIMED = 2**14
_CUDNN_FIRST = (9, 10)  # major compute capabilities where cuDNN is ahead: half the time of flash on an H200

_measured: dict[tuple[object, ...], dict[str, float]] = {}


def refusals(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    uniform: int | None,
    window: int | None = None,
    softcap: float | None = None,
) -> dict[str, str | None]:
    """Every backend, the preferred first, with why it is not fit, or None.

    Under `torch.use_deterministic_algorithms` the backends without a deterministic backward are not.

    Args:
        uniform: the length of all documents, or None where they are of uneven lengths (`Packing.uniform`).
    """
    device = torch.device(device)
    if uniform is not None and window is not None and window >= uniform:
        window = None
    found: dict[str, str | None] = {}
    for name in _order(device):
        lack = BACKENDS[name].lacks(uniform, window, softcap)
        found[name] = f"it cannot do {lack}" if lack else BACKENDS[name].refusal(device, dtype, head_dim)
        if name in _NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            found[name] = found[name] or "it has no deterministic backward"
    return found


def usable_backends(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    uniform: int | None,
    window: int | None = None,
    softcap: float | None = None,
) -> list[str]:
    """The backends that are fit, the preferred first; never empty, since the reference always is."""
    found = refusals(device, dtype, head_dim, uniform, window, softcap)
    return [name for name, refusal in found.items() if refusal is None]


def table_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    uniform: int | None,
    window: int | None = None,
    softcap: float | None = None,
    *,
    deterministic: bool,
) -> str:
    """A choice that no timer has a part in.

    Args:
        deterministic: leave out backends whose backward adds in any order. The flash backend also needs
            `torch.use_deterministic_algorithms` to be on when its backward runs.
    """
    usable = usable_backends(device, dtype, head_dim, uniform, window, softcap)
    return next(name for name in usable if not (deterministic and name in _NOT_DETERMINISTIC))


def fastest_backend(
    packing: Packing,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> str:
    """The one whose forward and backward took the least time on this card, for batches of this shape.

    Measured once a process, a long batch by a part of it; batches of uneven lengths count as one shape if they have as
    many tokens.
    """
    timings = measured_backends(packing, num_heads, num_kv_heads, head_dim, dtype, window=window, softcap=softcap)
    return min(timings, key=lambda name: timings[name])


def measured_backends(
    packing: Packing,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> dict[str, float]:
    """Milliseconds of a forward and a backward, by backend, the preferred first; a single fit one is not timed: 0.

    The compiled backend is timed only where nothing but slow ones would be left.
    """
    packing = _part(packing)
    device = packing.cu_seqlens.device
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = (
        device, deterministic, packing.num_tokens, packing.uniform, num_heads, num_kv_heads, head_dim, dtype, window,
        softcap,
    )  # fmt: skip
    if key in _measured:
        return _measured[key]
    usable = usable_backends(device, dtype, head_dim, packing.uniform, window, softcap)
    candidates = [name for name in usable if name not in _SLOW + _COMPILED] or usable[:1]
    if len(candidates) == 1:
        timings = {candidates[0]: 0.0}
    else:
        # noise, not zeros, on which a card under its power limit is faster; from a generator of its own: a choice draws
        # no random number of the training
        noise = torch.Generator(device).manual_seed(0)
        q, k, v, dout = (
            torch.empty(packing.num_tokens, heads, head_dim, dtype=dtype, device=device).normal_(generator=noise)
            for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
        )
        timings = {name: _milliseconds(q, k, v, dout, packing, window, softcap, name) for name in candidates}
    _measured[key] = timings
    return timings


def _part(packing: Packing) -> Packing:
    """The first documents of the batch, of about TIMED tokens at most, the last of them cut: of one length or of
    several as in the batch. What 128 leaves of a length stays, since some backends go by it."""
    if packing.num_tokens <= TIMED:
        return packing
    ends = list(accumulate(packing.lengths))
    whole = bisect_right(ends, TIMED)
    lengths, left = packing.lengths[:whole], TIMED - (ends[whole - 1] if whole else 0)
    cut = left - (left - packing.lengths[whole]) % 128
    if cut > 0 and (packing.uniform is None or not whole):
        lengths = (*lengths, cut)
    if packing.uniform is None and len(set(lengths)) == 1:
        lengths = (*lengths, 1 if lengths[0] > 1 else 2)
    return Packing.from_lengths(lengths, packing.cu_seqlens.device)


def _order(device: torch.device) -> list[str]:
    names = list(BACKENDS)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in _CUDNN_FIRST:
        names.remove("cudnn")
        names.insert(names.index("flash") + 1, "cudnn")
    return names


def _milliseconds(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    packing: Packing,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> float:
    """The median of a few rounds, after two that build plans and warm up."""
    options = {"scale": q.shape[-1] ** -0.5, "window": window, "softcap": softcap, "backend": backend}
    rounds: list[float] = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out, saved = attention_forward(q, k, v, packing, **options)
        attention_backward(dout, q, k, v, out, saved, packing, **options)
        stop.record()
        stop.synchronize()
        rounds.append(start.elapsed_time(stop))
    return sorted(rounds[2:])[len(rounds[2:]) // 2]
