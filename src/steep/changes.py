"""What a resumed run may change of its run file.

Each field is one of three kinds. A harmless one changes neither what is computed nor which rows come when. A changeable
one is a setting that a run can have another value of from some step on, if `--allow` names it. All others decide what
the weights, the rows or the optimizer's states are: they stay. A length is harmless as long as the rates so far are the
same with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any

from steep.errors import UserError, did_you_mean
from steep.schema import FORWARDS, RunConfig
from steep.settings import planned_steps, training_arguments
from steep.training.arguments import TrainingArguments
from steep.training.branching import PLACE
from steep.training.passed_through import HONOURED
from steep.training.schedules import factor_of

HARMLESS = {
    "data.cache_dir", "evaluation.prompts", "evaluation.max_new_tokens",
    *(f"training.{name}" for name in (
        "output_dir", "save_steps", "save_total_limit", "save_strategy", "metric_for_best_model", "logging_steps",
        "logging_first_step", "logging_strategy", "eval_steps", "eval_strategy", "eval_delay", "report_to", "run_name",
        "project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "log_level",
        "max_nonfinite_steps", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context", "torch_empty_cache_steps", "optimizer_in_backward",
        "host_memory", "offload_optimizer",
    )),
}  # fmt: skip

SAME_RATES = "the rates so far are the same with both"

# Numbers of steps, or shares of them.
LENGTHS = {
    *(f"training.{name}" for name in (
        "max_steps", "num_train_epochs", "warmup_steps", "cooldown_steps", "decay_steps",
    )),
}  # fmt: skip

_SCHEDULE = {
    *LENGTHS,
    *(f"training.{name}" for name in (
        "learning_rate", "embedding_learning_rate", "loraplus_lr_ratio", "lr_scheduler_type", "lr_scheduler_kwargs",
        "warmup_lr_rate", "min_lr_rate", "decay_type", "stable_lr_rate",
    )),
}  # fmt: skip

_SPIKES = ("spike_action", "spike_threshold", "spike_window")

CHANGEABLE = {
    *_SCHEDULE,
    "model.name",  # where the base lies: that it is the same one is seen by its checksums
    "model.revision",
    "adapter.lora_dropout",
    "model.attn_implementation",  # the same attention in another order of sums
    "model.fused",  # and so are all others
    "model.fp8_products",  # the same weights, multiplied with another rounding
    *(f"training.{name}" for name in (
        "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing",
        "grad_accum_dtype", "master_weights", "deterministic", "full_determinism", "tf32", *_SPIKES,
    )),
}  # fmt: skip

# What a branch may change: the rates and their schedule, how long it is, and the text.
BATCH = tuple(f"training.{name}" for name in FORWARDS)
OWN_OF_A_BRANCH = {
    *_SCHEDULE, *BATCH, "training.rows_per_step",
    *(f"training.{name}" for name in ("grad_accum_dtype", "master_weights", "deterministic", *_SPIKES)),
}  # fmt: skip

# Why a field stays, by its beginning; the longest one that fits.
_STAYS = {
    "model.": "the weights are trained over that base",
    "model.rope_scaling": "the weights are trained for those positions",
    "adapter.": "it decides which weights there are and what they mean",
    "data.": "the place in the text is counted in those rows",
    "evaluation.": "its scores are compared with those before",
    "training.rows_per_step": "the place in the text is counted in steps of so many",
    **{f"training.{name}": reason for name, reason in PLACE.items()},
    "training.average_tokens_across_devices": "each step's mean is taken in that way",
    "training.optim": "the states in the checkpoint are that optimizer's",
    "training.optimizer_states": "the states in the checkpoint are of that kind",
    "training.vram": "what layers keep was chosen by it at the beginning; gradient_checkpointing may change",
    "training.": "the steps before were trained with it",
}


@dataclass(frozen=True)
class Change:
    """A field that differs between two run files.

    Attributes:
        field: as on the command line, such as ``data.sources.0.path``.
        harmless: whether nothing that was done so far would have been done otherwise.
        note: what follows from it, if that is known.
    """

    field: str
    old: Any
    new: Any
    harmless: bool = False
    note: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} → {self.new!r}" + (f" ({self.note})" if self.note else "")


def changes_between(
    before: RunConfig, now: RunConfig, free: Callable[[str], bool] = lambda field: False
) -> list[Change]:
    """The fields that differ, but those that are harmless or `free` to."""
    shared = min(len(before.data.sources), len(now.data.sources))
    old, new = _flat(before, shared), _flat(now, shared)
    return [
        Change(field, old.get(field), new.get(field))
        for field in old | new
        if old.get(field) != new.get(field) and field not in HARMLESS and not free(field)
    ]


def values_of(config: RunConfig) -> dict[str, Any]:
    """Every field by its name on the command line."""
    return _flat(config, len(config.data.sources))


def changeable(field: str) -> bool:
    """Whether a run can have another value of a field from some step on."""
    is_place = field.startswith("data.sources.") and field.endswith(".path")  # the text itself is compared
    return field in CHANGEABLE or is_place


def why_it_stays(field: str) -> str:
    """The reason that `changeable` is false for `field`."""
    fitting = [beginning for beginning in _STAYS if field.startswith(beginning)]
    return _STAYS[max(fitting, key=len)]


def check_allowed(allow: Collection[str], config: RunConfig) -> None:
    """Check the fields that `--allow` names.

    Raises:
        UserError: one that the run file does not have, or that a run cannot change.
    """
    known = values_of(config).keys()
    for field in allow:
        if field not in known:
            remedy = did_you_mean(field, known) or "Name a field as in an override, such as training.learning_rate."
            raise UserError("--allow", f"{field} is not a field of the run file", remedy)
        if not changeable(field) and field not in HARMLESS:
            raise UserError("--allow", f"{field} cannot change within a run: {why_it_stays(field)}", way_out([field]))


def way_out(stay: Collection[str]) -> str:
    """What to do about fields that differ and have to stay."""
    if all(field.startswith("data.") for field in stay):
        return "Put it back, or begin a branch, which may have other text: --branch checkpoint-N."
    return "Put it back, or start a new run."


def judge_length(before: RunConfig, now: RunConfig, *, rows: int, done: int, start: float | None) -> str | None:
    """What another length means for the steps that are done: None if their rates are the same with it.

    Args:
        rows: of an epoch.
        done: steps of this run so far, at least 1.
        start: the factor that a branch began at, else None.

    Returns:
        A rate that was, and what it would be now.

    Raises:
        UserError: a schedule that cannot be.
    """
    was, would = (_rates_of(config, rows, start) for config in (before, now))
    if was is None or would is None:
        return "its rates follow from more than the step"
    other = next((step for step in reversed(range(done)) if was(step) != would(step)), None)
    if other is None:
        return None
    rates = before.training.learning_rate * was(other), now.training.learning_rate * would(other)
    return f"at step {other + 1} the rate was {rates[0]:.4g} and would be {rates[1]:.4g}"


def _rates_of(config: RunConfig, rows: int, start: float | None) -> Callable[[int], float] | None:
    quiet = config.model_copy(deep=True)
    quiet.training.report_to = "none"  # the old run file's trackers need not be installed here
    arguments = training_arguments(quiet, None, branch=start is not None)  # no rate follows from the precision
    return factor_of(arguments, planned_steps(quiet, rows), start=start, section="training.")


def _flat(config: RunConfig, sources: int) -> dict[str, Any]:
    """Every field by its name on the command line; of the sources beyond so many only where they lie."""
    flat: dict[str, Any] = {}
    for section in type(config).model_fields:
        flat |= {f"{section}.{name}": value for name, value in getattr(config, section).model_dump().items()}
    del flat["data.sources"]
    for index, source in enumerate(config.data.sources):
        own = {**source.model_dump(), "domain": source.domain_name} if index < sources else {}
        flat |= {f"data.sources.{index}.{name}": value for name, value in own.items()} or {
            f"data.sources.{index}": source.location
        }
    # What is left out of the run file has transformers' default.
    defaults = {field.name: field.default for field in fields(TrainingArguments) if field.default is not MISSING}
    return flat | {
        f"training.{name}": defaults[name]
        for name in sorted(HONOURED & defaults.keys())
        if name not in config.training.further
    }
