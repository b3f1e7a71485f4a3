"""Whether a step of an optimizer that was worked out ahead is still the one to take."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.optim import Optimizer

from steep.ops.row_gradient import values_of


class Dependencies:
    """What a step that was worked out depends on, to be compared with the GPU waiting."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer_state, self._rates = optimizer.state, _rates(optimizer)
        self._gradients = _gradients(optimizer)
        self._parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        self._places = self._addresses()

    def hold(self, optimizer: Optimizer) -> bool:
        return (
            optimizer.state is self._optimizer_state
            and _rates(optimizer) == self._rates
            and all(map(operator.is_, _gradients(optimizer), self._gradients))
            and self._addresses() == self._places
        )

    def _addresses(self) -> list[int]:
        gradients = [values_of(gradient).data_ptr() for gradient in self._gradients if gradient is not None]
        return [parameter.data_ptr() for parameter in self._parameters] + gradients


def _rates(optimizer: Optimizer) -> list[Any]:
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def _gradients(optimizer: Optimizer) -> list[torch.Tensor | None]:
    return [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
