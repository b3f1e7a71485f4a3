"""Which optimizer states a run has, and where they live (`optimizer_states`, `master_weights`, `offload_optimizer`):
who can have them so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.training_args import OptimizerNames

from steep.errors import UserError
from steep.model.embeddings import embedding_parameter_names
from steep.ops.host_states import state_bytes
from steep.training.adamw8bit import ADAMW_8BIT, AdamW8bit
from steep.training.arguments import TrainingArguments


class _Option(NamedTuple):
    """A field that nobody but `AdamW8bit` heeds: its keyword there, the value that it has by itself, and what other
    optimizers do."""

    field: str
    keyword: str
    usual: str
    others: str


_OPTIONS = (
    _Option("offload_optimizer", "offload", "none", "keeps its states on the card"),
    _Option("optimizer_states", "states", "8bit", "has states of its own kind"),
    _Option("master_weights", "masters", "none", "keeps no masters beside bf16 weights"),
)
# What transformers gives to other optimizers alone, and what to set in its place.
_OF_OTHERS = {
    "optim_args": "adam_beta1, adam_beta2, adam_epsilon and weight_decay are arguments of their own",
    "optim_target_modules": "what requires a gradient trains",
}
_BY_TENSOR = ("offload_optimizer", "master_weights")  # they say whose


def keywords(args: TrainingArguments) -> dict[str, str]:
    """What `AdamW8bit` is given."""
    return {option.keyword: getattr(args, option.field) for option in _OPTIONS}


def _asked_for(args: TrainingArguments) -> Iterator[tuple[_Option, str]]:
    for option in _OPTIONS:
        if (value := getattr(args, option.field)) != option.usual:
            yield option, value


def check_states(args: TrainingArguments, section: str = "") -> None:
    """Check that the optimizer is one that can do what is asked for.

    Args:
        section: stands before the fields' names in errors, such as ``training.``.

    Raises:
        UserError: it is not.
    """
    for (field, _, usual, others), _ in _asked_for(args):
        if args.optim not in ADAMW_8BIT:
            raise UserError(
                f"{section}{field}",
                f"{OptimizerNames(args.optim).value} {others}",
                f"Set {section}optim: adamw_8bit, or {section}{field}: {usual}.",
            )
    for field, instead in _OF_OTHERS.items():
        if args.optim in ADAMW_8BIT and getattr(args, field, None):
            raise UserError(f"{section}{field}", "adamw_8bit does not heed it", f"Leave it out: {instead}.")


def bytes_of_value(args: TrainingArguments) -> int:
    """Bytes of a value's states, at most, where they may be more than two moments in the parameter's dtype; else 0."""
    return 8 + 2 * (args.master_weights != "none") if args.optimizer_states == "fp32" else 0


def bytes_on_host(model: Any, args: TrainingArguments) -> int:
    """Bytes of host memory that a trainer takes for a long time: states that live there, and the copy of a checkpoint
    that is written while training goes on, which has weights and states of all that trains."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    whose = {"none": set[str](), "embeddings": set(embedding_parameter_names(model)), "all": set(trained)}
    coded = args.optim in ADAMW_8BIT and args.optimizer_states == "8bit"
    with_master = {name for name in whose[args.master_weights] if trained[name].dtype == torch.bfloat16}
    states = {name: state_bytes(p.numel(), coded, name in with_master) for name, p in trained.items()}
    on_host = sum(states[name] for name in whose[args.offload_optimizer])
    copied = sum(states.values()) + sum(parameter.nbytes for parameter in trained.values())
    return on_host + (copied if args.save_strategy != "no" else 0)


def check_embeddings_train(args: TrainingArguments, trains: bool, section: str = "") -> None:
    """Check that there are embeddings that train, where something is asked of those alone.

    Raises:
        UserError: none trains.
    """
    for field in _BY_TENSOR:
        if getattr(args, field) == "embeddings" and not trains:
            raise UserError(
                f"{section}{field}", "it is embeddings, and none is trained", f"Set {section}{field}: all, or none."
            )


def check_trainer(trainer: Any) -> None:
    """The same of what a trainer was given: its own optimizer, and the tensors that train.

    Raises:
        UserError: they cannot have such states.
    """
    args = trainer.args
    check_states(args)
    given, (made, _) = trainer.optimizer, trainer.optimizer_cls_and_kwargs or (AdamW8bit, {})
    half = next((n for n, p in trainer.model.named_parameters() if p.requires_grad and p.dtype == torch.float16), None)
    for (field, keyword, usual, others), value in _asked_for(args):
        if given is not None and getattr(given, keyword, None) != value:
            raise UserError(
                "optimizers",
                f"{field} is {value}, and the optimizer that is given does not do that",
                f'Give AdamW8bit(..., {keyword}="{value}"), or leave {field} out.',
            )
        if not issubclass(made, AdamW8bit):
            raise UserError(field, f"{made.__name__} {others}", f"Give AdamW8bit, or {field}: {usual}.")
        if half is not None and field in _BY_TENSOR:
            raise UserError(field, f"{half} is in torch.float16", f"Train in bf16 or fp32, or set {field}: {usual}.")
    check_embeddings_train(args, bool(embedding_parameter_names(trainer.model)))
