"""One look at all gradients a step: their norms, clipping, and what must not be applied.

The norm of each tensor is computed once and serves three ends: exact global-norm clipping, finding a gradient that is
not finite (a step that has one is not applied), and the proof that every trained tensor had a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def measure_and_clip(
    parameters: Mapping[str, nn.Parameter], max_norm: float | None, optimizer: Any = None
) -> GradientReport:
    """Measure every gradient, then scale all to a global norm of at most `max_norm` (None: leave them).

    Non-finite gradients are reported and left as they are. One transfer to the host.

    Args:
        parameters: the trainable ones by name.
        optimizer: `AdamW8bit` works its step out while the norms are awaited, and multiplies gradients as it reads
            them, so that they stay as they are; for any other they are scaled here.
    """
    with_gradient = [parameter for parameter in parameters.values() if parameter.grad is not None]
    norms = torch.zeros(len(parameters))
    if with_gradient:
        gradients = [parameter.grad for parameter in with_gradient]
        # fp32 per tensor whatever its own dtype: the sum of squares of a bf16 tensor would be rounded to 8 bits.
        measured = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))  # pyright: ignore
        if hasattr(optimizer, "prepare"):
            optimizer.prepare()  # while the GPU still works on what the next line waits for
        norms[[parameter.grad is not None for parameter in parameters.values()]] = measured.cpu()
    total = float(torch.linalg.vector_norm(norms.double()))
    if max_norm is not None and with_gradient and math.isfinite(total):
        device = with_gradient[0].device
        if hasattr(optimizer, "gradient_factor"):
            optimizer.gradient_factor = torch.tensor(min(1.0, max_norm / (total + 1e-6)), device=device)
            return GradientReport(list(parameters), norms, total)
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, torch.tensor(total, device=device))
    return GradientReport(list(parameters), norms, total)
