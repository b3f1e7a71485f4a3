"""Updates inside backward: a trained tensor is updated as soon as its gradient is whole, and the gradient is freed.

So no full set of gradients ever exists: what lives of them at a time is those of a layer's adapters, or of an embedding
(Lv et al. 2023, LOMO). Each tensor's update depends on nothing of the others, so it is that of the end, to the bit. Two
things cannot be: clipping, since the global norm is known at the end, and taking back what is applied.

A weight that autograd uses in several places, such as a tied table, is updated when the sum of its gradients is whole:
its hook runs once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from steep import ranks
from steep.errors import RunError, UserError
from steep.training.adamw8bit import ADAMW_8BIT, AdamW8bit
from steep.training.gradients import GradientReport, all_norms, norms_of, read_norms, sum_up_rows

FIELD = "optimizer_in_backward"
PARTLY = "The weights are partly updated, and nothing of that step is saved: go on from the last checkpoint (--resume)"

_LAYER = re.compile(r"(.*?\.\d+)\.")  # finds "model.layers.0" in "model.layers.0.mlp.up_proj.weight"


def check_in_backward(args: Any, section: str = "") -> None:
    """Check that nothing is asked for which needs all gradients at once, or a step that can be taken back.

    Args:
        args: with fields of `TrainingArguments`, by name.
        section: stands before the fields' names in errors, such as ``training.``.

    Raises:
        UserError: something is.
    """
    if not args.optimizer_in_backward:
        return
    batch, processes = args.gradient_accumulation_steps, ranks.world_size()
    for field, is_wrong, problem, remedy in (
        (
            "max_grad_norm",
            (args.max_grad_norm or 0) > 0,
            f"clipping at {args.max_grad_norm or 0:g} needs the norm of all gradients before any is applied",
            "Set it to 0",
        ),
        (
            "gradient_accumulation_steps",
            batch > 1,
            f"the gradients of {batch} forwards are added up before any is applied",
            "Set it to 1",
        ),
        (
            "optim",
            args.optim not in ADAMW_8BIT,
            f"{OptimizerNames(args.optim).value} applies all gradients at once",
            "Set it to adamw_8bit",
        ),
        (
            "spike_action",
            args.spike_action == "skip",
            "that a step is a spike is known when its gradients are, and then they are applied already",
            "Set it to warn or rollback",
        ),
        (
            "auto_find_batch_size",
            args.auto_find_batch_size,
            "a step that ran out of memory is tried again, and a part of its gradients is applied already",
            "Leave it out",
        ),
        (FIELD, args.fp16, "a loss scaler has to see all gradients before any is applied", "Compute in bf16 or fp32"),
        (FIELD, processes > 1, f"{processes} processes average many gradients at a time", "Train in one process"),
    ):
        if is_wrong:
            raise UserError(f"{section}{field}", problem, f"{remedy}, or set {section}{FIELD}: false.")


def check_trainer(trainer: Any) -> None:
    """`check_in_backward`, and the same of what a trainer was given: its own optimizer, and the dtypes of what trains.

    Raises:
        UserError: it cannot be updated inside backward.
    """
    check_in_backward(trainer.args)
    if not trainer.args.optimizer_in_backward:
        return
    given, (made, _) = trainer.optimizer, trainer.optimizer_cls_and_kwargs or (AdamW8bit, {})
    kind = made if given is None else type(given)
    if not issubclass(kind, AdamW8bit):
        raise UserError(
            "optimizers",
            f"{kind.__name__} applies all gradients at once",
            f"Give steep's AdamW8bit, which optim: adamw_8bit is, or set {FIELD}: false.",
        )
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    other = next((name for name, dtype in trained.items() if dtype not in (torch.bfloat16, torch.float32)), None)
    if other is not None or trainer.accelerator.scaler is not None:
        problem = f"{other} is in {trained[other]}" if other else "a loss scaler has to see all gradients first"
        raise UserError(FIELD, problem, f"Train in bf16 or fp32, or set {FIELD}: false.")


@dataclass
class _Layer:
    """Tensors that are updated in one go.

    Attributes:
        outside: it is no layer: see `_is_outside`.
        members: by name.
        arrived: names of those whose gradients have come in this step.
    """

    outside: bool
    members: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    arrived: set[str] = dataclasses.field(default_factory=set)


class UpdatesInBackward:
    """Updates tensors by an optimizer while gradients come, the trained tensors of a layer in one go.

    What is left of a step (a layer of which not all tensors have a gradient, a gradient that did not come by autograd)
    keeps it, for the optimizer's own `step`.

    Args:
        parameters: the trainable ones by name; all are the optimizer's.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: AdamW8bit) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._layers: dict[str, _Layer] = {}
        self._of: dict[nn.Parameter, tuple[str, _Layer]] = {}  # by what autograd calls with, hundreds of times a step
        for name, parameter in parameters.items():
            layer = _layer_of(name)
            there = self._layers.setdefault(layer, _Layer(_is_outside(layer)))
            there.members[name] = parameter
            self._of[parameter] = name, there
        self._norms: dict[str, torch.Tensor] = {}

    @property
    def begun(self) -> bool:
        """Whether weights are updated by the step that is under way."""
        return bool(self._norms)

    def arrived(self, parameter: nn.Parameter) -> None:
        """Take the whole gradient of a tensor: autograd calls it.

        Raises:
            RunError: it was not whole, and a part of it is applied already.
        """
        name, layer = self._of[parameter]
        if name in self._norms:
            raise RunError(
                f"the gradient of {name} came in two parts, and the first is applied already. Leave {FIELD} out for "
                "this model"
            )
        layer.arrived.add(name)
        if len(layer.arrived) < len(layer.members):
            return
        layer.arrived.clear()
        members = list(layer.members.values())
        sum_up_rows(members)
        gradients = [member.grad for member in members if member.grad is not None]
        self._norms |= zip(layer.members, norms_of(gradients), strict=True)
        self._optimizer.update(members)
        if layer.outside and len(self._norms) < len(self._parameters):  # what comes is to find it gone
            self._optimizer.finish_updates()
        for member in members:
            member.grad = None

    def report(self, meanwhile: Callable[[], object] = lambda: None) -> GradientReport:
        """What all gradients of a step were, those that are left among them. The last updates may still be under way,
        so that the host need not wait for them: `finish` ends the step.

        Args:
            meanwhile: called while the GPU still works.
        """
        sum_up_rows(self._parameters.values())
        left = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        found = dict(self._norms)
        for layer in self._layers.values():
            layer.arrived.clear()
        if left:
            found |= zip(left, norms_of(list(left.values())), strict=True)
        there = [name for name in self._parameters if name in found]
        if not there:
            return GradientReport(list(self._parameters), torch.zeros(len(self._parameters)), 0.0)
        norms = all_norms([found[name] for name in there])
        meanwhile()
        told = read_norms(self._parameters, there, norms)
        self._norms = {}  # not before: an error of the card's comes up where the host first waits for it
        return told

    def finish(self) -> None:
        """Let whatever reads a weight from now on find it updated. The host does not wait."""
        self._optimizer.finish_updates()


@contextmanager
def updates_in_backward(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> Iterator[UpdatesInBackward]:
    """Within, every backward pass updates `parameters`. An error in the midst of one says so in a note."""
    assert isinstance(optimizer, AdamW8bit), type(optimizer)
    updates = UpdatesInBackward(parameters, optimizer)
    hooks = [parameter.register_post_accumulate_grad_hook(updates.arrived) for parameter in parameters.values()]
    try:
        yield updates
    except BaseException as error:  # Ctrl-C in a notebook too
        if updates.begun:
            error.add_note(PARTLY)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        optimizer.finish_updates()


def _layer_of(name: str) -> str:
    """The layer that a tensor is of; one outside of all layers stands for itself."""
    found = _LAYER.match(name)
    return found[1] if found else name


def _is_outside(layer: str) -> bool:
    """Whether that is no layer but a tensor outside of all, so an embedding: its gradient is as large as those of some
    25 layers' adapters, and the layers' backward passes, where a step needs most, are to find it gone."""
    return _LAYER.match(layer + ".") is None
