"""Optimizer states in host memory (`offload_optimizer`): who can have them there."""

from __future__ import annotations

from typing import Any

import torch
from transformers.training_args import OptimizerNames

from steep.errors import UserError
from steep.model.embeddings import embedding_parameter_names
from steep.ops.host_states import state_bytes
from steep.training.adamw8bit import ADAMW_8BIT, AdamW8bit
from steep.training.arguments import TrainingArguments

FIELD = "offload_optimizer"


def check_offload(args: TrainingArguments, section: str = "") -> None:
    """Check that the optimizer is one whose states can live there.

    Args:
        section: stands before the fields' names in errors, such as ``training.``.

    Raises:
        UserError: it is not.
    """
    if args.offload_optimizer != "none" and args.optim not in ADAMW_8BIT:
        name = OptimizerNames(args.optim).value
        raise UserError(
            f"{section}{FIELD}",
            f"{name} keeps its states on the card",
            f"Set {section}optim: adamw_8bit, or {section}{FIELD}: none.",
        )


def bytes_on_host(model: Any, args: TrainingArguments) -> int:
    """Bytes of host memory that a trainer takes for a long time: states that live there, and the copy of a checkpoint
    that is written while training goes on, which has weights and states of all that trains."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_8_bit = args.optim in ADAMW_8BIT
    states = {name: state_bytes(parameter.numel(), of_8_bit) for name, parameter in trained.items()}
    there = {"none": (), "embeddings": embedding_parameter_names(model), "all": trained}[args.offload_optimizer]
    on_host = sum(states[name] for name in there)
    copied = sum(states.values()) + sum(parameter.nbytes for parameter in trained.values())
    return on_host + (copied if args.save_strategy != "no" else 0)


def check_embeddings_train(offload: str, trains: bool, section: str = "") -> None:
    """Check that there are states of embeddings, where those are to be in host memory.

    Raises:
        UserError: no embedding trains.
    """
    if offload == "embeddings" and not trains:
        raise UserError(
            f"{section}{FIELD}", "it is embeddings, and none is trained", f"Set {section}{FIELD}: all, or none."
        )


def check_trainer(trainer: Any) -> None:
    """The same of what a trainer was given: its own optimizer, and the tensors that train.

    Raises:
        UserError: their states cannot live in host memory.
    """
    args = trainer.args
    check_offload(args)
    if args.offload_optimizer == "none":
        return
    given, (made, _) = trainer.optimizer, trainer.optimizer_cls_and_kwargs or (AdamW8bit, {})
    if given is not None and getattr(given, "offload", None) != args.offload_optimizer:
        raise UserError(
            "optimizers",
            f"{FIELD} is {args.offload_optimizer}, and the optimizer that is given does not do that",
            f'Give AdamW8bit(..., offload="{args.offload_optimizer}"), or leave {FIELD} out.',
        )
    if not issubclass(made, AdamW8bit):
        raise UserError(FIELD, f"{made.__name__} keeps its states on the card", f"Give AdamW8bit, or {FIELD}: none.")
    check_embeddings_train(args.offload_optimizer, bool(embedding_parameter_names(trainer.model)))
    half = next((n for n, p in trainer.model.named_parameters() if p.requires_grad and p.dtype == torch.float16), None)
    if half is not None:
        raise UserError(FIELD, f"{half} is in torch.float16", f"Train in bf16 or fp32, or set {FIELD}: none.")
