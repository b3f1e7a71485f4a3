"""One look at all gradients a step: their norms, clipping, and what must not be applied.

The norm of each tensor is computed once and serves three ends: exact global-norm clipping, finding a gradient that is
not finite (a step that has one is not applied), and the proof that every trained tensor had a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steep.ops.row_gradient import coalesced, values_of


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


def sum_up_rows(parameters: Iterable[torch.Tensor]) -> None:
    """Coalesce the gradients that are sparse: those of a table's rows (`steep.ops.row_gradient`)."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)


def norms_of(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """L2 norm of each, one fp32 on its device: in the own dtype the sum of squares of a bf16 tensor would be rounded to
    8 bits. Sparse ones are coalesced."""
    return list(torch._foreach_norm([values_of(gradient) for gradient in gradients], 2, dtype=torch.float32))


def all_norms(of_each: Sequence[torch.Tensor]) -> torch.Tensor:
    """`norms_of` all gradients and last their global norm, fp64 [len(of_each) + 1], on their device."""
    each = torch.stack(list(of_each)).double()
    return torch.cat([each, torch.linalg.vector_norm(each)[None]])


def read_norms(parameters: Mapping[str, nn.Parameter], there: Sequence[str], norms: torch.Tensor) -> GradientReport:
    """The report on the gradients of `parameters`: one transfer to the host.

    Args:
        there: names of those that have one.
        norms: their `all_norms`.
    """
    *known, total = norms.tolist()
    of = dict(zip(there, known, strict=True))
    return GradientReport(list(parameters), torch.tensor([of.get(name, 0.0) for name in parameters]), total)


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
    there = {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}
    if not there:
        return GradientReport(list(parameters), torch.zeros(len(parameters)), 0.0)
    sum_up_rows(there.values())
    norms = all_norms(norms_of([parameter.grad for parameter in there.values() if parameter.grad is not None]))
    factor = None if max_norm is None else (max_norm / (norms[-1] + 1e-6)).clamp(max=1.0).float()
    meanwhile()
    report = read_norms(parameters, list(there), norms)
    if max_norm is not None and report.finite:
        if hasattr(optimizer, "gradient_factor"):
            optimizer.gradient_factor = factor
        else:
            torch.nn.utils.clip_grads_with_norm_(there.values(), max_norm, norms[-1].float())
    return report
