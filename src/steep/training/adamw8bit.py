"""AdamW with 8-bit states (bitsandbytes' blockwise update) that does not lose small updates of bf16 weights.

A bf16 weight keeps 8 bits of mantissa: near 1.0 its neighbours are 0.4 % apart, so at a rate of 5e-6 nearly every
update rounds back to the old value. Stochastic rounding keeps the update in expectation (Gupta et al. 2015; Zamirai et
al. 2020): the update runs in fp32, and the result is rounded up or down with the probability of its distance.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW

BLOCK = 256  # elements that share one scale in bitsandbytes' 8-bit states
SLICE = 2**24  # elements updated at once: bounds the fp32 copies to 128 MiB whatever the size of a tensor


def stochastic_round_(target: torch.Tensor, values: torch.Tensor, generator: torch.Generator) -> None:
    """Round fp32 `values` (overwritten) into bf16 `target` of the same size, up or down by chance, unbiased.

    bf16 is the upper half of fp32's bits: adding 16 random bits below it carries into it as often as it should.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(0, 2**16, generator=generator)
    bits = values.view(torch.int32).add_(noise)
    # Little-endian: of each pair of 16-bit halves, the second is the upper one.
    target.view(torch.int16).copy_(bits.view(torch.int16)[1::2])


class AdamW8bit(AdamW):
    """bitsandbytes' AdamW with 8-bit states; bf16 parameters are updated in fp32 and rounded stochastically.

    fp32 and fp16 parameters take bitsandbytes' own path unchanged. The rounding noise is drawn from a generator seeded
    by (seed, step, position of the tensor): a resumed run draws what an uninterrupted one would have drawn.

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

        bitsandbytes' own loop waits for the GPU after each tensor, which leaves it idle between the 448 adapter tensors
        of an 8B. Nothing here is paged, and on one stream the order is kept without waiting.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if len(self.state[parameter]) == 0:
                    self.init_state(group, parameter, gindex, pindex)
                self.update_step(group, parameter, gindex, pindex)
        return loss

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        if p.dtype != torch.bfloat16:
            super().update_step(group, p, gindex, pindex)
            return
        assert p.grad is not None
        state, config = self.state[p], self.get_config(gindex, pindex, group)
        state["step"] += 1
        noise_seed = hash((self.seed, state["step"], gindex, pindex)) & (2**63 - 1)
        generator = torch.Generator(p.device).manual_seed(noise_seed)
        weights, gradient = p.detach().view(-1), p.grad.contiguous().view(-1)
        for start in range(0, weights.numel(), SLICE):
            piece = slice(start, start + SLICE)
            values = weights[piece].float()
            self._update_slice(config, state, values, gradient[piece].float(), piece)
            stochastic_round_(weights[piece], values, generator)

    def _update_slice(
        self, config: dict[str, Any], state: dict[str, Any], values: torch.Tensor, gradient: torch.Tensor, piece: slice
    ) -> None:
        # The states of one slice of the flattened parameter: SLICE is a multiple of BLOCK, so scales divide evenly.
        state1, state2 = state["state1"].view(-1)[piece], state["state2"].view(-1)[piece]
        (beta1, beta2), eps, step, lr = config["betas"], config["eps"], state["step"], config["lr"]
        if state1.dtype == torch.float32:  # a tensor below 4,096 elements keeps fp32 states
            functional.optimizer_update_32bit(
                "adam", gradient, values, state1, beta1, eps, step, lr, state2, beta2,
                weight_decay=config["weight_decay"],
            )  # fmt: skip
            return
        blocks = slice(piece.start // BLOCK, -(-min(piece.stop, state["state1"].numel()) // BLOCK))
        functional.optimizer_update_8bit_blockwise(
            "adam", gradient, values, state1, state2, beta1, beta2, 0.0, 0.0, eps, step, lr,
            state["qmap1"], state["qmap2"], state["absmax1"][blocks], state["absmax2"][blocks],
            weight_decay=config["weight_decay"],
        )  # fmt: skip
