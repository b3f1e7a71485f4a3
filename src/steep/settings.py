"""A run file's settings in the terms of this machine and of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from steep import ranks
from steep.data.packing import Corpus
from steep.errors import UserError, did_you_mean
from steep.model.load import DTYPES
from steep.schema import RunConfig
from steep.trackers import check_trackers
from steep.training.adamw8bit import ADAMW_8BIT
from steep.training.arguments import TrainingArguments
from steep.training.in_backward import check_in_backward
from steep.training.retention import check_best_metric
from steep.training.schedules import check_schedule, kind_of_schedule
from steep.training.state_options import check_embeddings_train, check_states
from steep.training.trainer import Trainer

MIN_LR_RATE = {"cosine": 0.1, "linear": 0.1}  # Ibrahim et al. 2024 end at a tenth of the peak rate
WARMUP_STEPS = 0.05
_OF_THE_PLAN = {"rows_per_step", "gradient_checkpointing", "vram", "host_memory"}  # what transformers does not know
MOST_TOKENS = 2**25  # in one forward: of an 8B a byte a token and layer would be a GiB


def planned_steps(config: RunConfig, rows: int) -> int:
    """Optimizer steps of the run, as transformers counts them (the last step of an epoch may be smaller)."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.num_train_epochs * _per_epoch(config, rows))


def planned_epochs(config: RunConfig, rows: int) -> float:
    """Passes over the rows."""
    training = config.training
    return training.max_steps / _per_epoch(config, rows) if training.max_steps > 0 else training.num_train_epochs


def _per_epoch(config: RunConfig, rows: int) -> int:
    return math.ceil(rows / rows_per_step(config))


def rows_per_step(config: RunConfig) -> int:
    """Rows that all processes train in an optimizer step."""
    training = config.training
    if training.rows_per_step is not None:
        return training.rows_per_step
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks.world_size()


def check_batch(config: RunConfig) -> None:
    """That a forward has no more tokens than any card could hold, before anything is worked out for it; and that the
    processes can share the rows of a step.

    Raises:
        UserError: it has, or they cannot.
    """
    rows, length = config.training.per_device_train_batch_size, config.data.max_length
    of_step, processes = config.training.rows_per_step, ranks.world_size()
    if length > MOST_TOKENS:
        raise UserError(
            "data.max_length", f"{length:,} tokens are more than a card holds", f"Give {MOST_TOKENS:,} at most."
        )
    if of_step is not None and of_step % processes:
        raise UserError(
            "training.rows_per_step",
            f"{processes} processes cannot share {of_step:,} rows evenly",
            f"Give a multiple of {processes}, such as {math.ceil(of_step / processes) * processes:,}.",
        )
    if of_step is None and rows * length > MOST_TOKENS:
        raise UserError(
            "training.per_device_train_batch_size",
            f"{rows:,} rows of {length:,} tokens are {rows * length:,} in one forward, more than a card holds",
            f"Give {MOST_TOKENS // length:,} at most; training.gradient_accumulation_steps adds up more of them.",
        )


def check_evaluation(config: RunConfig) -> None:
    """That what is said of when held-out text is scored says one thing.

    Raises:
        UserError: it does not.
    """
    steps, strategy = config.training.eval_steps, config.training.further.get("eval_strategy")
    if strategy == "steps" and steps is None:
        raise UserError(
            "training.eval_steps",
            "eval_strategy is steps, and after how many is not said: transformers would take logging_steps",
            "Give it; eval_strategy may then be left out.",
        )
    if strategy in ("no", "epoch") and steps is not None:
        raise UserError(
            "training.eval_steps",
            f"eval_strategy is {strategy}, with which nothing is scored after so many steps",
            "Leave one of the two out.",
        )


def check_stride(config: RunConfig) -> None:
    """That a window of scored text has a context.

    Raises:
        UserError: it has none.
    """
    stride, length = config.evaluation.stride, config.data.max_length
    if stride is not None and stride >= length:
        raise UserError(
            "evaluation.stride",
            f"{stride} leaves a window no context: it has to be below data.max_length, {length}",
            "Leave it out (half a row), or lower it.",
        )


def uses_checkpointing(config: RunConfig, on_card: bool) -> bool:
    """Whether transformers' forward recomputes activations: as asked, by default on a GPU."""
    given = config.training.gradient_checkpointing
    return on_card if given is None else given


def embedding_rate(config: RunConfig) -> float:
    """The peak rate of the embeddings: as asked, by default a tenth of the adapters'."""
    rate = config.training.embedding_learning_rate
    return config.training.learning_rate / 10 if rate is None else rate


def mixed_precision(base: str, compute: str, trained: str) -> torch.dtype | None:
    """The dtype that autocast runs products in, or None where all tensors have one dtype already.

    Trained tensors in fp32 over products in 16 bit need it; a run wholly in bf16, or wholly in fp32, does not.

    Args:
        base, compute, trained: what the frozen weights are kept in, products run in, and adapters are trained in.
    """
    uniform = trained == compute and base in ("auto", "nf4", "int8", "fp8", compute)
    return None if uniform or compute == "fp32" else DTYPES[compute]


def could_be_lean(config: RunConfig, compute: str) -> bool:
    """Whether updates inside backward, which the run does without, would change nothing but the memory.

    Args:
        compute: dtype of products.
    """
    if config.training.optimizer_in_backward:
        return False
    try:
        check_in_backward(_of_the_update(config, compute, optimizer_in_backward=True))
    except UserError:
        return False
    return True


def check_update(config: RunConfig, compute: str) -> None:
    """Check that the weights can be updated as asked, as `training_arguments` does among the rest.

    Args:
        compute: dtype of products.

    Raises:
        UserError: they cannot.
    """
    asked = _of_the_update(config, compute)
    check_in_backward(asked, section="training.")
    check_states(asked, section="training.")
    check_embeddings_train(asked, bool(config.adapter.modules_to_save), section="training.")


def _of_the_update(config: RunConfig, compute: str, **given: Any) -> Any:
    """What is asked for, by the names of `TrainingArguments`."""
    others = {"auto_find_batch_size": False, "fp16": compute == "fp16"}  # the first is refused in run files
    return SimpleNamespace(**{**config.training.model_dump(), **others, **given})


def why_not_summed_in_fp32(config: RunConfig, trained: str, fused: bool) -> str | None:
    """Why gradients are not added up in fp32 whatever `grad_accum_dtype` is; None: it says so.

    Args:
        trained: dtype of what trains.
    """
    training = config.training
    if training.gradient_accumulation_steps == 1:
        return "a step is a single forward (gradient_accumulation_steps: 1)"
    if trained != "bf16":
        return f"weights train in {trained}, and so their gradients are added up"
    if not fused or training.optim not in ADAMW_8BIT or ranks.world_size() > 1:
        return "elsewhere than in a fused run in one process with adamw_8bit, gradients are in their weights' dtype"
    return None


def training_arguments(
    config: RunConfig, precision: torch.dtype | None, *, fused: bool = False, branch: bool = False
) -> TrainingArguments:
    """The run file's `training` section as `steep.TrainingArguments`.

    Args:
        precision: of `mixed_precision`.
        fused: the layers compute again what they do not keep, so that transformers does not.
        branch: the run goes on from another's checkpoint, at the rate that it had.

    Raises:
        UserError: a value that transformers does not know or cannot use; a schedule that contradicts itself.
    """
    training = config.training
    # Those two follow the scores of transformers' evaluation, and are no function of the step.
    schedules = {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    _check_choice("lr_scheduler_type", training.lr_scheduler_type, schedules)
    _check_choice("optim", training.optim, {name.value for name in OptimizerNames})
    check_trackers(training.report_to)
    given = training.model_dump(exclude={*_OF_THE_PLAN, *training.further})
    names = TrainingArguments.__dataclass_fields__
    # transformers 5.23 renames gradient to activation checkpointing; 5.17 knows only the old name.
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    checkpointing = uses_checkpointing(config, torch.cuda.is_available()) and not fused
    settings = {
        f"{prefix}_checkpointing": checkpointing,
        f"{prefix}_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "embedding_learning_rate": embedding_rate(config) if config.adapter.modules_to_save else None,
        "warmup_steps": (0 if branch else WARMUP_STEPS) if training.warmup_steps is None else training.warmup_steps,
        "min_lr_rate": (
            MIN_LR_RATE.get(training.lr_scheduler_type, 0.0) if training.min_lr_rate is None else training.min_lr_rate
        ),
        "eval_strategy": "no" if training.eval_steps is None else "steps",
        "eval_stride": config.evaluation.stride,
        "eval_max_tokens": config.evaluation.max_tokens,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    if training.lr_scheduler_type == "constant" and training.warmup_steps:
        raise UserError(
            "training.warmup_steps",
            "the schedule constant has no warm-up",
            "Leave it out, or set lr_scheduler_type: constant_with_warmup.",
        )
    try:
        arguments = TrainingArguments(**{**given, **settings, **training.further})
    except (ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "See transformers.TrainingArguments for what the field takes."
        raise UserError("training", f"transformers refuses it: {reason}", remedy) from error
    check_schedule(arguments, branch=branch, section="training.")
    check_in_backward(arguments, section="training.")
    check_states(arguments, section="training.")
    check_embeddings_train(arguments, bool(config.adapter.modules_to_save), section="training.")
    _check_rates(config)
    if arguments.dataloader_multiprocessing_context and not arguments.dataloader_num_workers:
        raise UserError(
            "training.dataloader_multiprocessing_context",
            "it is how worker processes start, and there are none",
            "Set dataloader_num_workers too, or leave it out.",
        )
    return arguments


def check_optimizer(arguments: TrainingArguments, model: Any, field: str = "training.optim") -> None:
    """Check that what the optimizer needs is installed. `model` may be on the meta device.

    Raises:
        UserError: it is not, or the optimizer needs further settings.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError, RuntimeError) as error:
        name, reason = OptimizerNames(arguments.optim).value, str(error).splitlines()[0]
        raise UserError(field, f"{name} cannot be used: {reason}", "Do what it says, or give adamw_8bit.") from error


def choose_best_metric(arguments: TrainingArguments, corpus: Corpus) -> None:
    """Set what the best checkpoint is the best by, if scores are taken during training.

    Raises:
        UserError: the one asked for is none that an evaluation gives.
    """
    trained = [domain for domain in corpus.heldout if corpus.roles[domain] == "train"]
    if arguments.metric_for_best_model is None and arguments.eval_strategy != "no" and trained:
        arguments.metric_for_best_model = f"eval_{trained[0]}_bits_per_byte"
    arguments.greater_is_better = False
    check_best_metric(arguments, corpus.heldout, section="training.")


def check_warmup(arguments: TrainingArguments, steps: int, of_step: int, rows: int) -> None:
    """Check that the run outlasts its warm-up, which begins with a step that trains nothing.

    Raises:
        UserError: it does not.
    """
    if kind_of_schedule(arguments) == "constant":
        return
    warmup = arguments.get_warmup_steps(steps)
    if warmup > steps:
        raise UserError(
            "training.warmup_steps",
            f"a warm-up of {warmup} steps is longer than the {steps} that the run has",
            "Shorten it (below 1 it is a share of all steps), or train more steps.",
        )
    if steps == warmup == 1 and not arguments.warmup_lr_rate:
        raise UserError(
            "training.warmup_steps",
            f"the run has one step, of {of_step:,} rows where the text has {rows:,}, and a warm-up begins at a rate of "
            "0: nothing would train",
            "Take fewer rows a step, train more steps, or set warmup_steps: 0.",
        )


def _check_rates(config: RunConfig) -> None:
    """A weight is a float32, and so is what is added to it."""
    training = config.training
    for name, rate in (
        ("learning_rate", training.learning_rate),
        ("embedding_learning_rate", embedding_rate(config)),
        ("loraplus_lr_ratio", training.loraplus_lr_ratio * training.learning_rate),
    ):
        if rate > torch.finfo(torch.float32).max:
            given = getattr(training, name)
            raise UserError(f"training.{name}", f"{given} makes a rate beyond float32's range", "Give e.g. 5e-5.")


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    choices = sorted(known)
    if value not in choices:
        remedy = f"{did_you_mean(value, choices)} Known are: {', '.join(choices)}.".lstrip()
        raise UserError(f"training.{name}", f"{value!r} is unknown", remedy)
