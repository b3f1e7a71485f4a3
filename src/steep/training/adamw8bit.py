"""AdamW with 8-bit states (bitsandbytes' blockwise update) that does not lose small updates of bf16 weights.

A bf16 weight keeps 8 bits of mantissa: near 1.0 its neighbours are 0.4 % apart, so at a rate of 5e-6 nearly every
update rounds back to the old value. Stochastic rounding keeps the update in expectation (Gupta et al. 2015; Zamirai et
al. 2020): the update runs in fp32, and the result is rounded up or down with the probability of its distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW

BLOCK = 256  # elements that share one scale in bitsandbytes' 8-bit states
SLICE = 2**24  # elements updated at once: bounds the copies to 0.4 GiB whatever the size of a tensor


def stochastic_round_(target: torch.Tensor, values: torch.Tensor, generator: torch.Generator) -> None:
    """Round fp32 `values` (overwritten) into bf16 `target` of the same size, up or down by chance, unbiased.

    bf16 is the upper half of fp32's bits: adding 16 random bits below it carries into it as often as it should.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(0, 2**16, generator=generator)
    bits = values.view(torch.int32).add_(noise)
    # Little-endian: of each pair of 16-bit halves, the second is the upper one.
    target.view(torch.int16).copy_(bits.view(torch.int16)[1::2])


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter, with its share of everything that one update reads and writes; all are flat views.

    Attributes:
        weights, gradient: bf16 [N], N ≤ SLICE.
        moments: both moments, 8-bit codes or (a tensor below 4,096 elements) fp32 [N], then the codes' scales, fp32
            [ceil(N / BLOCK)].
        step: updates of this parameter, this one included.
        state: the whole parameter's, for its code tables.
        config: bitsandbytes' settings of this parameter.
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    moments: list[torch.Tensor]
    step: int
    state: dict[str, Any]
    config: dict[str, Any]

    def joins(self, other: _Piece) -> bool:
        """Whether `other` can follow this one in a single update: same settings, same kind, whole blocks so far.

        A tensor that once had no gradient is at a step of its own, and Adam's bias correction depends on it.
        """
        same_place = self.weights.device == other.weights.device and self.step == other.step
        same_kind = self.moments[0].dtype == other.moments[0].dtype and self.config == other.config
        return same_place and same_kind and len(self.weights) % BLOCK == 0


class AdamW8bit(AdamW):
    """bitsandbytes' AdamW with 8-bit states; bf16 parameters are updated in fp32 and rounded stochastically.

    fp32 and fp16 parameters take bitsandbytes' own path unchanged. Many small bf16 tensors share one update: the 448
    adapter tensors of an 8B one by one are bound by launches. The rounding noise is drawn from a generator seeded by
    (seed, step, group): a resumed run draws what an uninterrupted one would have drawn.

    Args:
        params: parameters or groups, as for every optimizer.
        seed: of the rounding noise.
        **kwargs: `bitsandbytes.optim.AdamW`'s own.
    """

    def __init__(self, params: Any, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(params, **{**kwargs, "optim_bits": 8})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every tensor that has a gradient.

        bitsandbytes' own loop waits for the GPU after each tensor; nothing here is paged, and on one stream the order
        is kept without waiting.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for gindex in range(len(self.param_groups)):
            generators: dict[tuple[torch.device, int], torch.Generator] = {}
            # One batch after the other: the GPU works on it while the next one's pieces are cut.
            for batch in _batches(self._pieces(gindex)):
                key = batch[0].weights.device, batch[0].step
                if key not in generators:
                    noise_seed = hash((self.seed, key[1], gindex)) & (2**63 - 1)
                    generators[key] = torch.Generator(key[0]).manual_seed(noise_seed)
                _update(batch, generators[key])
        return loss

    def _pieces(self, gindex: int) -> Iterator[_Piece]:
        """The bf16 tensors of a group in pieces; those of other dtypes are updated on the way, as bitsandbytes does."""
        group = self.param_groups[gindex]
        for pindex, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if len(self.state[parameter]) == 0:
                self.init_state(group, parameter, gindex, pindex)
            if parameter.dtype != torch.bfloat16:
                self.update_step(group, parameter, gindex, pindex)
                continue
            self.state[parameter]["step"] += 1
            yield from _cut(parameter, self.state[parameter], self.get_config(gindex, pindex, group))


def _cut(parameter: torch.Tensor, state: dict[str, Any], config: dict[str, Any]) -> Iterator[_Piece]:
    """A parameter in pieces of at most SLICE elements. SLICE is a multiple of BLOCK, so scales divide evenly."""
    assert parameter.grad is not None
    weights, gradient = parameter.detach().view(-1), parameter.grad.contiguous().view(-1)
    scales = [state[name] for name in ("absmax1", "absmax2") if state["state1"].dtype == torch.uint8]
    for start in range(0, len(weights), SLICE):
        stop = min(start + SLICE, len(weights))
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        moments = [state[name].view(-1)[start:stop] for name in ("state1", "state2")]
        moments += [scale[blocks] for scale in scales]
        yield _Piece(weights[start:stop], gradient[start:stop], moments, state["step"], state, config)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in order, in runs that one update can take: at most SLICE elements."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        if batch and (size + len(piece.weights) > SLICE or not batch[-1].joins(piece)):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.weights)
    if batch:
        yield batch


def _update(pieces: list[_Piece], generator: torch.Generator) -> None:
    """bitsandbytes' update of all `pieces` as one tensor, rounded stochastically into their weights."""
    weights = _joined([piece.weights for piece in pieces])
    gradient = _joined([piece.gradient for piece in pieces]).float()
    moments = [_joined(list(parts)) for parts in zip(*(piece.moments for piece in pieces), strict=True)]
    values, step, state, config = weights.float(), pieces[0].step, pieces[0].state, pieces[0].config
    (beta1, beta2), eps, lr, decay = config["betas"], config["eps"], config["lr"], config["weight_decay"]
    if len(moments) == 2:
        functional.optimizer_update_32bit(
            "adam", gradient, values, moments[0], beta1, eps, step, lr, moments[1], beta2, weight_decay=decay
        )
    else:
        functional.optimizer_update_8bit_blockwise(
            "adam", gradient, values, moments[0], moments[1], beta1, beta2, 0.0, 0.0, eps, step, lr,
            state["qmap1"], state["qmap2"], moments[2], moments[3], weight_decay=decay,
        )  # fmt: skip
    stochastic_round_(weights, values, generator)
    if len(pieces) > 1:  # a single piece was updated in place
        for joined, parts in zip(
            (weights, *moments),
            ([p.weights for p in pieces], *zip(*(p.moments for p in pieces), strict=True)),
            strict=True,
        ):
            torch._foreach_copy_(list(parts), list(joined.split([len(part) for part in parts])))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
