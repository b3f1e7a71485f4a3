"""Which of transformers' TrainingArguments a run file may set beyond the listed ones, and which not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from steep.errors import UserError, did_you_mean, shown
from steep.training.arguments import TrainingArguments

# Honoured as they are: transformers' own code does what they say, and nothing of steep stands in its way.
HONOURED = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "average_tokens_across_devices", "data_seed",
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "eval_delay", "eval_strategy", "full_determinism", "log_level",
    "logging_first_step", "logging_strategy", "lr_scheduler_kwargs", "optim_args", "optim_target_modules",
    "project", "run_name", "save_strategy", "tf32", "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id",
}  # fmt: skip

# What they do not check themselves, or only when the model is loaded.
_Share = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=0)]
BOUNDED: dict[str, Any] = {
    "adam_beta1": _Share,
    "adam_beta2": _Share,
    "adam_epsilon": Annotated[float, Field(ge=0, allow_inf_nan=False)],
    "data_seed": Annotated[int | None, Field(ge=0, lt=2**32)],
    "dataloader_num_workers": _Count,
    "dataloader_prefetch_factor": Annotated[int | None, Field(gt=0)],
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "log_level": Literal["passive", "detail", "debug", "info", "warning", "error", "critical"],
    "eval_delay": Annotated[float, Field(ge=0, allow_inf_nan=False)],
    "torch_empty_cache_steps": Annotated[int | None, Field(gt=0)],
}

_PRECISION = "precision is one choice: set model.base, model.trained_dtype and model.compute_dtype"
_SEVERAL = "how processes share a run is steep's own: start one for each GPU with torchrun"
_EVALUATION = "held-out text is scored by steep: see the section evaluation"
_HUB = "nothing is uploaded while training"
_LOSS = "the loss that is reported is the model's own, a token each"
_DATA = "rows come packed, already shuffled, and each is trained once an epoch"
_CHECKPOINTING = "one field turns it on: training.gradient_checkpointing"
_COMPILE = "the step is not compiled"
REFUSED = {
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), _PRECISION),
    **dict.fromkeys(
        ("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
         "ddp_timeout", "deepspeed", "fsdp", "fsdp_config", "local_rank", "parallelism_config", "accelerator_config",
         "log_on_each_node", "log_level_replica", "save_on_each_node"), _SEVERAL,
    ),
    **dict.fromkeys(
        ("batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches", "eval_on_start",
         "eval_use_gather_object", "include_for_metrics", "per_device_eval_batch_size", "prediction_loss_only",
         "eval_stride", "eval_max_tokens"), _EVALUATION,
    ),
    "load_best_model_at_end": "the result is the last step; the best checkpoint stays too (metric_for_best_model)",
    "greater_is_better": "of every score that a held-out domain has, less is better",
    **dict.fromkeys(
        ("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy",
         "push_to_hub"), _HUB,
    ),
    "hub_token": "whoever gets the file would have the token; set HF_TOKEN, or log in with hf auth login",
    **dict.fromkeys(("label_smoothing_factor", "label_names", "neftune_noise_alpha"), _LOSS),
    **dict.fromkeys(
        ("dataloader_drop_last", "length_column_name", "remove_unused_columns", "train_sampling_strategy",
         "ignore_data_skip", "auto_find_batch_size"), _DATA,
    ),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILE),
    **dict.fromkeys(
        ("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), _CHECKPOINTING
    ),
    "dataloader_persistent_workers": "torch draws a number where workers start: a resumed run would draw others",
    "dataloader_in_order": "a resumed run finds its rows by their order, and workers would hand them over as they come",
    "use_cpu": "a GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES=",
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "it patches classes for the whole process"),
    "use_cache": "packed documents would see each other through a cache",
    "include_num_input_tokens_seen": "tokens are always counted (metrics.jsonl)",
    "logging_nan_inf_filter": "a NaN is never shown as a number",
    "disable_tqdm": "progress is shown on a terminal and left out of a pipe",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed",
    "enable_jit_checkpoint": "a stopped run goes on from its newest checkpoint with --resume",
    "restore_callback_states_from_checkpoint": "a resumed run always restores what it needs",
    "resume_from_checkpoint": "use `steep train FILE --resume`",
    "skip_memory_metrics": "peak memory is always measured",
    "debug": "use torch's own anomaly detection in a script",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command says what is done"),
}  # fmt: skip


def check_further(given: Mapping[str, Any], listed: Sequence[str]) -> dict[str, Any]:
    """Check the names and types of TrainingArguments given beyond the `listed` fields of the run file.

    Returns:
        The values in their own types (YAML reads ``1e-4`` as text).

    Raises:
        UserError: an unknown name (with the nearest known one), one that steep cannot honour (with the reason), a
            wrong type.
    """
    known = {field.name for field in fields(TrainingArguments) if field.init}
    hints = get_type_hints(TrainingArguments)
    checked = {}
    for name, value in given.items():
        field = f"training.{name}"
        if name in REFUSED:
            raise UserError(field, f"steep cannot honour it: {REFUSED[name]}", "Leave it out.")
        if name not in known or name not in HONOURED:
            hint = did_you_mean(name, [*listed, *sorted(HONOURED & known)])
            hint = hint or "See transformers.TrainingArguments for the names."
            raise UserError(field, "it is not a field of the run file", hint)
        if value is False and name.endswith("_strategy"):  # YAML reads a bare no as false
            value = "no"
        if (name, value) == ("save_strategy", "best"):
            raise UserError(
                field,
                "steep cannot honour best: a run saves by steps, and keeps the best of them",
                "Give steps, epoch or no.",
            )
        try:
            checked[name] = TypeAdapter(BOUNDED.get(name, hints[name])).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(field, f"{shown(value)} is not valid: {message}", "Give a value of that kind.") from error
    return checked
