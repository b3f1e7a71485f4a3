"""One look at all gradients a step: their norms, clipping, and what must not be applied.

The norm of each tensor is computed once and serves three ends: exact global-norm clipping, finding a gradient that is
not finite (a step that has one is not applied), and the proof that every trained tensor had a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class GradientReport:
    """Gradients of one step before clipping.

    Attributes:
        names: of the trainable parameters, in order.
        norms: L2 norm of each one's gradient, fp32 on the CPU [len(names)]; 0 where there was no gradient.
        total: their global norm.
    """

    names: list[str]
    norms: torch.Tensor
    total: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total)

    @property
    def offenders(self) -> list[str]:
        """Names of the tensors whose gradient is not finite."""
        return [name for name, norm in zip(self.names, self.norms.tolist(), strict=True) if not math.isfinite(norm)]


def measure_and_clip(model: nn.Module, max_norm: float | None) -> GradientReport:
    """Measure every trainable gradient, then scale all to a global norm of at most `max_norm` (None: leave them).

    Non-finite gradients are reported and left as they are. One transfer to the host.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with_gradient = [i for i, (_, parameter) in enumerate(named) if parameter.grad is not None]
    norms = torch.zeros(len(named))
    if with_gradient:
        gradients = [named[i][1].grad for i in with_gradient]
        assert all(gradient is not None for gradient in gradients)
        # fp32 per tensor whatever its own dtype: the sum of squares of a bf16 tensor would be rounded to 8 bits.
        stacked = torch.stack(
            [norm.float() for norm in torch._foreach_norm(gradients, 2, dtype=torch.float32)]  # pyright: ignore
        )
        norms[with_gradient] = stacked.cpu()
    total = float(torch.linalg.vector_norm(norms.double()))
    if max_norm is not None and with_gradient and math.isfinite(total):
        parameters = [named[i][1] for i in with_gradient]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(total, device=parameters[0].device))
    return GradientReport([name for name, _ in named], norms, total)
