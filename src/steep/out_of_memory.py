"""Memory that ran out, in one line: what was planned, what there was, and what to lower."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from steep.amounts import human_bytes
from steep.changes import HARMLESS, changeable
from steep.errors import RunError
from steep.machine_faults import PINNED, place_that_ran_out
from steep.model.block import LEVELS
from steep.model.machine import available_on_host
from steep.plan import Plan
from steep.planning.memory import masters_kept
from steep.schema import TrainingSection
from steep.settings import could_be_lean, uses_checkpointing, why_not_summed_in_fp32
from steep.training.adamw8bit import ADAMW_8BIT


@contextmanager
def memory_told(plan: Plan | None, *, loading: bool = False) -> Iterator[None]:
    """Turn what is raised where memory runs out into an error that says what to do.

    Args:
        plan: of the run; None for a finished one, whose settings stay.
        loading: the model is being loaded: what only a step needs is then not to blame.

    Raises:
        RunError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        place = place_that_ran_out(error)
        if place is None:
            raise
        if place == PINNED:
            said, remedy = "", _lock_less(plan)
        elif plan is None:
            said, remedy = "", "Free some of it, or take a machine that has more"
        else:
            said = f"{human_bytes(sum(plan.memory.values()))} were planned for a step, and "
            lower = what_to_lower(plan, loading=loading, place=place)
            remedy = f"Lower, in this order: {', '.join(field + note for field, note in lower.items())}"
            remedy += "" if loading else ". The last checkpoint is as it was"
            remedy += f". A run that goes on may change {_within_a_run(lower)}"
        notes = "".join(f". {note}" for note in getattr(error, "__notes__", ()))
        raise RunError(f"{place} memory ran out: {said}{_there_was(place, str(error))}. {remedy}{notes}") from error


def what_to_lower(plan: Plan, *, loading: bool = False, place: str = "GPU") -> dict[str, str]:
    """The settings that take memory there, each with what is said of it, those first that change the result least."""
    config, found = plan.config, dict[str, str]()
    training = config.training

    def lower(name: str, note: str | None = None) -> None:
        section, field = name.split(".")
        found[name] = f" (now {getattr(getattr(config, section), field)})" if note is None else note

    of_step = place == "GPU" or plan.card is None  # a step's memory is of the card, if there is one
    if not loading:
        if of_step and could_be_lean(config, plan.compute):
            lower("training.optimizer_in_backward", ": true (now false; nothing else changes)")
        found |= _of_the_host(plan, place)
        if training.per_device_train_batch_size > 1:
            found |= _fewer_rows(training)
        if plan.fused and of_step and any(level < LEVELS[-1] for level in plan.choices.levels or ()):
            lower("training.vram")
            lower("training.gradient_checkpointing", f": true (now {json.dumps(training.gradient_checkpointing)})")
        elif of_step and not plan.fused and not uses_checkpointing(config, plan.card is not None):
            lower("training.gradient_checkpointing", ": true (now false)")
        in_fp32 = why_not_summed_in_fp32(config, plan.trained_dtype, plan.fused) is None
        if in_fp32 and of_step and training.grad_accum_dtype == "fp32":
            lower("training.grad_accum_dtype", ": bf16 (now fp32)")
        on_host = training.offload_optimizer if place == "GPU" else "none"  # whose states take nothing of what ran out
        masters = masters_kept(training, plan.trained_dtype)
        if masters != "none" and on_host not in ("all", masters):
            lower("training.master_weights", f": none (now {masters})")
        if training.optimizer_states != "8bit" and on_host != "all":
            lower("training.optimizer_states", f": 8bit (now {training.optimizer_states})")
        if of_step and training.optim not in ADAMW_8BIT:
            lower("training.optim", f": adamw_8bit (now {training.optim})")
        lower("data.max_length")
    if plan.trained_dtype != "bf16" and plan.compute == "bf16":
        lower("model.trained_dtype", f": bf16 (now {plan.trained_dtype})")
    if of_step and plan.base != "nf4":
        lower("model.base", f": nf4 (now {plan.base})")
    lower("adapter.r")
    if config.adapter.modules_to_save:
        lower("adapter.modules_to_save", f" (now {', '.join(config.adapter.modules_to_save)})")
    return found


def _fewer_rows(training: TrainingSection) -> dict[str, str]:
    """A forward of fewer rows; of updates inside backward the whole step is one."""
    rows, batch = training.rows_per_step, training.per_device_train_batch_size
    if training.optimizer_in_backward:
        name, now = ("per_device_train_batch_size", batch) if rows is None else ("rows_per_step", rows)
        return {f"training.{name}": f" (now {now})"}
    instead = "" if rows is None else ": give the two in place of rows_per_step"
    more = f"with more gradient_accumulation_steps, now {training.gradient_accumulation_steps}, a step stays what it is"
    return {"training.per_device_train_batch_size": f" (now {batch}; {more}{instead})"}


def _within_a_run(fields: Collection[str]) -> str:
    """Those of the fields that need no new run."""
    ways = {field: f" with --allow {field}" for field in fields if changeable(field)}
    ways |= {field: "" for field in fields if field in HARMLESS}
    return ", ".join(field + ways[field] for field in fields if field in ways) or "none of these"


def _of_the_host(plan: Plan, place: str) -> dict[str, str]:
    """What could move from the card to host memory, or back; it changes nothing else."""
    training, choices = plan.config.training, plan.choices
    if plan.card is None:
        return {}
    if place != "GPU":
        names = ("offload_optimizer", "host_memory")
        there = training.offload_optimizer != "none", any(where != "gpu" for where in choices.places or ())
        return {
            f"training.{name}": f" (now {getattr(training, name)})"
            for name, uses in zip(names, there, strict=True)
            if uses
        }
    found = dict[str, str]()
    if training.offload_optimizer != "all" and training.optim in ADAMW_8BIT:
        found["training.offload_optimizer"] = f": all (now {training.offload_optimizer}; nothing else changes)"
    levels, places = choices.levels or [], choices.places or ["gpu"] * len(choices.levels or ())
    if plan.fused and min(levels, default=0) == LEVELS[-1] and "gpu" in places:
        found["training.host_memory"] = f": more than was planned with (now {training.host_memory})"
    return found


def _lock_less(plan: Plan | None) -> str:
    """Checkpoints and batches go through page-locked memory; how much a process may lock can be less than there is."""
    found = "Free some of it, or let the process lock more (ulimit -l, the container's memory limit)"
    if plan is None:
        return found
    smaller = f"adapter.r (now {plan.config.adapter.r})"
    if plan.config.adapter.modules_to_save:
        smaller += f" or adapter.modules_to_save (now {', '.join(plan.config.adapter.modules_to_save)})"
    return (
        f"{found}; training.dataloader_pin_memory: false needs less, and so does a smaller checkpoint: lower "
        f"{smaller}. The last checkpoint is as it was"
    )


def _there_was(place: str, error: str) -> str:
    if place != "GPU" or not torch.cuda.is_available():
        return f"{human_bytes(available_on_host())} are available to this process"
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    asked = re.search(r"Tried to allocate (\S+ \wi?B)", error)  # as torch says it
    return (
        f"the card has {human_bytes(total)}, of which {human_bytes(free + own)} were free for this run "
        f"(it had {human_bytes(torch.cuda.max_memory_allocated())} in use at its peak, and {human_bytes(own)} reserved"
        f"{f'; it asked for {asked[1]}' if asked else ''})"
    )
