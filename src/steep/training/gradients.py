"""One look at all gradients a step: their norms, clipping, and what must not be applied.

The norm of each tensor is computed once and serves three ends: exact global-norm clipping, finding a gradient that is
not finite (a step that has one is not applied), and the proof that every trained tensor had a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    parameters: Mapping[str, nn.Parameter],
    max_norm: float | None,
    optimizer: Any = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> GradientReport:
    """Measure every gradient, then scale all to a global norm of at most `max_norm` (None: leave them).

    Non-finite gradients are reported and left as they are. One transfer to the host.

    Args:
        parameters: the trainable ones by name.
        optimizer: `AdamW8bit` multiplies gradients as it reads them, so that they stay as they are; for any other they
            are scaled here.
        meanwhile: called while the GPU still works on what the norms are of; not where nothing has a gradient.
    """
    names, norms = list(parameters), torch.zeros(len(parameters))
    with_gradient = [parameter for parameter in parameters.values() if parameter.grad is not None]
    if not with_gradient:
        return GradientReport(names, norms, 0.0)
    gradients = [parameter.grad for parameter in with_gradient]
    # fp32 per tensor whatever its own dtype: the sum of squares of a bf16 tensor would be rounded to 8 bits.
    of_each = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double()  # pyright: ignore
    of_all = torch.linalg.vector_norm(of_each)
    measured = torch.cat([of_each, of_all[None]])
    factor = None if max_norm is None else (max_norm / (of_all + 1e-6)).clamp(max=1.0).float()
    there = torch.tensor([parameter.grad is not None for parameter in parameters.values()])
    meanwhile()
    *known, total = measured.tolist()
    norms.masked_scatter_(there, torch.tensor(known))
    if max_norm is not None and math.isfinite(total):
        if hasattr(optimizer, "gradient_factor"):
            optimizer.gradient_factor = factor
        else:
            torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, of_all.float())
    return GradientReport(names, norms, total)
