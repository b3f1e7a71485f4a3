"""AdamW with bitsandbytes' 8-bit states, over a list of tensors at once.

Of every tensor, with its gradient g (times `factor`), moments m and v, and t the number of its updates:

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    w = (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

m and v are kept as 8-bit codes, a scale to each block of 256 elements (Dettmers et al. 2022): a code stands for its
entry of bitsandbytes' dynamic map, times the scale. Or they are kept in fp32, of small tensors always. All arithmetic
is in fp32. A bf16 weight is rounded up or down with the probability of its distance, by random bits of its key and
place alone. Where it has an fp32 master (`steep.ops.master_weights`), that is updated, and the weight is the bf16
nearest to it.

Each moment becomes the nearest code, as in bitsandbytes' CUDA kernel but for one exception of that: a negative m whose
nearest code is zero becomes the smallest negative code there, 5.5e-7 of the scale. (On a CPU bitsandbytes looks a code
up by 16 bits of the value, right to 2e-5 of the scale.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from steep.ops import master_weights
from steep.ops.backend import uses_kernels
from steep.ops.pinned import upload

BLOCK = 256  # elements that share one scale; the kernel's too
_WORD = 2**32 - 1


@dataclass(eq=False)  # not frozen: each layer's tensors have new ones at each step, made in a third of the time
class Update:
    """What one update of a tensor of N elements reads and writes; all are contiguous.

    Attributes:
        parameter: bf16 (rounded stochastically, or to the nearest with `low`) or fp32, N elements; written.
        gradient: bf16, fp16 or fp32, N elements; with `rows` that of some rows of a table, [R, width].
        moments: m and v, uint8 codes or fp32, N elements each; written.
        scales: of codes, fp32 [ceil(N / 256)] each; written. None with fp32 moments.
        step: of this tensor, from 1 on.
        lr, betas, eps, weight_decay: as in AdamW.
        key: of the rounding noise, 64 bits: `noise_key`.
        rows: int32, where in `gradient` each row of the table is; -1: its gradient is zero.
        first: where in the table the N elements begin, if they are a part of it.
        low: int16, N elements: with a bf16 parameter its fp32 master, as `steep.ops.master_weights` says; written.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor] | None
    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    key: int = 0
    rows: torch.Tensor | None = None
    first: int = 0
    low: torch.Tensor | None = None

    @property
    def settings(self) -> tuple[float, ...]:
        """As `kernel.SETTINGS` names them."""
        return _settings(self.step, self.lr, self.betas, self.eps, self.weight_decay)

    def dense_gradient(self) -> torch.Tensor:
        """Of all N elements, flat."""
        if self.rows is None:
            return self.gradient.view(-1)
        width = self.gradient.shape[1]
        element = torch.arange(self.first, self.first + self.parameter.numel(), device=self.gradient.device)
        place = self.rows[element // width].long()
        return self.gradient.view(-1)[place.clamp(min=0) * width + element % width].masked_fill(place < 0, 0)

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """As `kernel.ADDRESSES` names them, from the parameter to the second scale."""
        found: list[int] = []
        for tensor in (self.parameter, self.gradient, *self.moments, *(self.scales or ())):
            assert tensor.is_contiguous()
            found.append(tensor.data_ptr())
        return (*found, 0, 0) if self.scales is None else tuple(found)

    @cached_property
    def low_address(self) -> int:
        assert self.low is None or self.low.is_contiguous()
        return 0 if self.low is None else self.low.data_ptr()

    def kind(self, alignment: int) -> tuple[torch.device, torch.dtype, torch.dtype, bool, bool, bool, bool]:
        """What all tensors of one launch have in common; the last are whether they begin at multiples of `alignment`,
        whether their gradients are of rows, and whether they have masters."""
        parameter, gradient, moment1, moment2, *_ = self.addresses
        aligned = (parameter | gradient | moment1 | moment2 | self.low_address) % alignment == 0
        return (
            self.parameter.device, self.parameter.dtype, self.gradient.dtype, self.scales is not None, aligned,
            self.rows is not None, self.low is not None,
        )  # fmt: skip


@lru_cache(maxsize=256)  # many tensors, few groups
def _settings(step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> tuple[float, ...]:
    (beta1, beta2), root = betas, math.sqrt(1 - betas[1] ** step)
    return 1 - lr * weight_decay, lr * root / (1 - beta1**step), eps * root, beta1, 1 - beta1, beta2, 1 - beta2


def noise_key(seed: int, step: int, index: int) -> int:
    """The key of the noise with which tensor `index` is rounded at `step`: 64 well-mixed bits, signed."""
    state = _mixed(_of_step(seed, step), index)
    return state - 2**64 if state >= 2**63 else state


@lru_cache(maxsize=64)  # of few steps at a time
def _of_step(seed: int, step: int) -> int:
    return _mixed(_mixed(0, seed), step)


def _mixed(state: int, part: int) -> int:
    """splitmix64's finaliser (Stafford's mix 13)."""
    state = (state ^ part) + 0x9E3779B97F4A7C15 & (2**64 - 1)
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
    return state ^ state >> 31


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The kernel's hash of 32 bits, in int64."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def rounding_noise(key: int, numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """16 random bits for each of `numel` elements, int32, as the kernel draws them."""
    block = torch.arange(-(-numel // BLOCK), device=device)
    seed = _mix((block ^ key) & _WORD) ^ (key >> 32 & _WORD)
    pair = torch.arange(BLOCK // 2, device=device) * 0x9E3779B9
    drawn = _mix(seed[:, None] + pair & _WORD)
    return torch.stack([drawn & 0xFFFF, drawn >> 16], -1).view(-1)[:numel].int()


def _decode(codes: torch.Tensor, code_map: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return code_map[codes.long()] * scales.repeat_interleave(BLOCK)[: codes.numel()]


def _encode(values: torch.Tensor, code_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes and the scale of each block."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1)
    parts = (padded / scales.clamp(min=1e-37)[:, None]).view(-1)[: values.numel()]
    midpoints = (code_map[1:].double() + code_map[:-1].double()) / 2
    return torch.searchsorted(midpoints, parts.double()).to(torch.uint8), scales


def adamw8bit_reference(
    updates: Sequence[Update], maps: tuple[torch.Tensor, torch.Tensor], factor: torch.Tensor | None = None
) -> None:
    """`adamw8bit` in plain torch."""
    for update in updates:
        decay, step_size, epsilon, beta1, rest1, beta2, rest2 = update.settings
        gradient = update.dense_gradient().float() * (1 if factor is None else factor)
        first, second = (moment.view(-1) for moment in update.moments)
        if update.scales is not None:
            first, second = map(_decode, (first, second), maps, update.scales)
        first = first * beta1 + gradient * rest1
        second = second * beta2 + gradient.square() * rest2
        weights = update.parameter.view(-1)
        value = weights.float() if update.low is None else master_weights.join(weights, update.low.view(-1))
        value = value * decay - step_size * (first / (second.sqrt() + epsilon))
        if update.low is not None:
            value, low = master_weights.split(value)
            update.low.view(-1).copy_(low)
        elif update.parameter.dtype == torch.bfloat16:
            noise = rounding_noise(update.key, value.numel(), value.device)
            bits = value.view(torch.int32) + noise.masked_fill(value.isnan(), 0)  # a carry could make a NaN -0
            value = (bits & ~0xFFFF).view(torch.float32)
        weights.copy_(value)
        moments = [first, second]
        if update.scales is not None:
            for index in range(2):
                moments[index], scales = _encode(moments[index], maps[index])
                update.scales[index].copy_(scales)
        for kept, moment in zip(update.moments, moments, strict=True):
            kept.view(-1).copy_(moment)


@dataclass(frozen=True)
class Launch:
    """The update of all tensors of a kind, up to the one call that is left. It holds their addresses, and so the
    tensors themselves: they stay where they are until then."""

    updates: Sequence[Update]
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    maps: tuple[torch.Tensor, torch.Tensor]
    parameter: torch.dtype
    gradient: torch.dtype
    coded: bool
    aligned: bool
    rows: bool
    masters: bool

    def run(self, factor: torch.Tensor | None = None) -> None:
        from steep.kernels import adamw8bit as kernel

        with torch.cuda.device_of(self.tables[0]):  # Triton launches on the current device
            kernel.launch(
                *self.tables, self.maps, factor,
                parameter=self.parameter, gradient=self.gradient, coded=self.coded, aligned=self.aligned,
                rows=self.rows, masters=self.masters,
            )  # fmt: skip


def launches(updates: Sequence[Update], maps: tuple[torch.Tensor, torch.Tensor]) -> list[Launch]:
    """`adamw8bit` on a GPU without its launches: what is to be worked out on the host before."""
    from steep.kernels import adamw8bit as kernel

    assert kernel.BLOCK == BLOCK
    kinds: dict[tuple[torch.device, torch.dtype, torch.dtype, bool, bool, bool, bool], list[Update]] = {}
    for update in updates:
        kinds.setdefault(update.kind(kernel.ALIGNMENT), []).append(update)
    found: list[Launch] = []
    for (device, parameter, gradient, coded, aligned, by_rows, masters), members in kinds.items():
        chunks = [-(-update.parameter.numel() // kernel.CHUNK) for update in members]
        rows: list[tuple[int, ...]] = []
        first = 0
        for update, count in zip(members, chunks, strict=True):
            table_of_rows = (0, 0) if update.rows is None else (update.rows.data_ptr(), update.gradient.shape[1])
            place = (update.parameter.numel(), first, update.key, *table_of_rows, update.first, count)
            rows.append((*update.addresses, *place, update.low_address))
            first += count
        if first == 0:
            continue
        addresses, settings = tables(np.array(rows, np.int64), np.array([one.settings for one in members]), device)
        owners = torch.repeat_interleave(addresses[:, kernel.ADDRESSES.index("chunks")], output_size=first)
        there = (addresses, settings, owners)
        found.append(Launch(members, there, maps, parameter, gradient, coded, aligned, by_rows, masters))
    return found


def tables(addresses: np.ndarray, settings: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's two tables on the device, by one copy.

    Args:
        addresses: int64 [N, len(kernel.ADDRESSES)].
        settings: [N, len(kernel.SETTINGS)].
    """
    from steep.kernels import adamw8bit as kernel

    count = len(addresses)
    both = np.zeros(count * (kernel.ROW + kernel.SETTINGS_ROW // 2), np.int64)
    both[: count * kernel.ROW].reshape(count, -1)[:, : addresses.shape[1]] = addresses
    both[count * kernel.ROW :].view(np.float32).reshape(count, -1)[:, : settings.shape[1]] = settings
    there, of_settings = upload(torch.from_numpy(both), device).split(
        [count * kernel.ROW, len(both) - count * kernel.ROW]
    )
    return there.view(count, -1), of_settings.view(torch.float32).view(count, -1)


def adamw8bit(
    updates: Sequence[Update], maps: tuple[torch.Tensor, torch.Tensor], factor: torch.Tensor | None = None
) -> None:
    """One AdamW update of every tensor, in place; on a GPU one launch for all tensors of a kind.

    The host does not wait. Whether tensors are updated together or one by one, each gets the same bits.

    Args:
        updates: tensors of one device.
        maps: bitsandbytes' dynamic maps, signed and unsigned, fp32 [256] each, on that device.
        factor: fp32, one element on that device: multiplies every gradient (clipping, and one over a loss scale).
    """
    if not updates:
        return
    if not uses_kernels(updates[0].parameter):
        return adamw8bit_reference(updates, maps, factor)
    for launch in launches(updates, maps):
        launch.run(factor)
