"""Memory that ran out, in one line: what was planned, what there was, and what to lower."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steep.amounts import human_bytes
from steep.errors import RunError
from steep.machine_faults import PINNED, place_that_ran_out
from steep.memory import masters_kept
from steep.model.block import LEVELS
from steep.plan import Plan
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
            remedy = f"Lower, in this order: {', '.join(what_to_lower(plan, loading=loading, place=place))}"
            remedy += "" if loading else ". The last checkpoint is as it was"
        notes = "".join(f". {note}" for note in getattr(error, "__notes__", ()))
        raise RunError(f"{place} memory ran out: {said}{_there_was(place, str(error))}. {remedy}{notes}") from error


def what_to_lower(plan: Plan, *, loading: bool = False, place: str = "GPU") -> list[str]:
    """The settings that take memory there, with their values, those first that change the result least."""
    config, found = plan.config, []
    training = config.training
    if not loading:
        batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
        lean = training.optimizer_in_backward
        if could_be_lean(config, plan.compute):
            found.append("training.optimizer_in_backward: true (now false; nothing else changes)")
        found += _of_the_host(plan, place)
        if batch > 1 and training.rows_per_step is not None and not lean:
            found.append(
                f"training.per_device_train_batch_size (now {batch}, with gradient_accumulation_steps {accumulation}: "
                "give the two in place of rows_per_step)"
            )
        elif batch > 1 and training.rows_per_step is not None:
            found.append(f"training.rows_per_step (now {training.rows_per_step})")
        elif batch > 1 and lean:
            found.append(f"training.per_device_train_batch_size (now {batch})")
        elif batch > 1:
            found.append(
                f"training.per_device_train_batch_size (now {batch}; with more gradient_accumulation_steps, now "
                f"{accumulation}, a step stays what it is)"
            )
        if plan.fused and any(level < LEVELS[-1] for level in plan.choices.levels or ()):
            found.append(f"training.vram (now {training.vram}), or training.gradient_checkpointing: true")
        elif not plan.fused and not uses_checkpointing(config, plan.card is not None):
            found.append("training.gradient_checkpointing: true (now false)")
        in_fp32 = why_not_summed_in_fp32(config, plan.trained_dtype, plan.fused) is None
        if in_fp32 and training.grad_accum_dtype == "fp32":
            found.append("training.grad_accum_dtype: bf16 (now fp32)")
        on_host = training.offload_optimizer if place == "GPU" else "none"  # whose states take nothing of what ran out
        masters = masters_kept(training, plan.trained_dtype)
        if masters != "none" and on_host not in ("all", masters):
            found.append(f"training.master_weights: none (now {masters})")
        if training.optimizer_states != "8bit" and on_host != "all":
            found.append(f"training.optimizer_states: 8bit (now {training.optimizer_states})")
        if training.optim not in ADAMW_8BIT:
            found.append(f"training.optim: adamw_8bit (now {training.optim})")
        found.append(f"data.max_length (now {config.data.max_length})")
    if plan.trained_dtype != "bf16" and plan.compute == "bf16":
        found.append(f"model.trained_dtype: bf16 (now {plan.trained_dtype})")
    if plan.base != "nf4":
        found.append(f"model.base: nf4 (now {plan.base})")
    found.append(f"adapter.r (now {config.adapter.r})")
    if config.adapter.modules_to_save:
        found.append(f"adapter.modules_to_save (now {', '.join(config.adapter.modules_to_save)})")
    return found


def _of_the_host(plan: Plan, place: str) -> list[str]:
    """What could move from the card to host memory, or back; it changes nothing else."""
    training, choices = plan.config.training, plan.choices
    if plan.card is None:
        return []
    if place != "GPU":
        names = ("offload_optimizer", "host_memory")
        there = training.offload_optimizer != "none", any(where != "gpu" for where in choices.places or ())
        return [
            f"training.{name} (now {getattr(training, name)})" for name, uses in zip(names, there, strict=True) if uses
        ]
    found = []
    if training.offload_optimizer != "all" and training.optim in ADAMW_8BIT:
        found.append(f"training.offload_optimizer: all (now {training.offload_optimizer}; nothing else changes)")
    levels, places = choices.levels or [], choices.places or ["gpu"] * len(choices.levels or ())
    if plan.fused and min(levels, default=0) == LEVELS[-1] and "gpu" in places:
        found.append(f"training.host_memory: more than was planned with (now {training.host_memory})")
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
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
        return f"this machine has {human_bytes(total)}, of which {human_bytes(free)} are free"
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    asked = re.search(r"Tried to allocate (\S+ \wi?B)", error)  # as torch says it
    return (
        f"the card has {human_bytes(total)}, of which {human_bytes(free + own)} were free for this run "
        f"(it had {human_bytes(torch.cuda.max_memory_allocated())} in use at its peak, and {human_bytes(own)} reserved"
        f"{f'; it asked for {asked[1]}' if asked else ''})"
    )
