"""What a run takes by item: on the card, on the host beside the model, and on the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping

from steep import ranks
from steep.model.choices import Choices
from steep.planning.fused_memory import FusedStep
from steep.planning.memory import WORKSPACES, Shape, masters_kept, memory_by_item, states_bytes
from steep.schema import RunConfig
from steep.settings import uses_checkpointing


def memory_of(
    config: RunConfig,
    shape: Shape,
    step: FusedStep | None,
    choices: Choices,
    *,
    base: str,
    compute: str,
    on_card: bool,
) -> dict[str, int]:
    """Bytes by item at the peak of a step, on the card (the host without one).

    Args:
        step: where the run is fused.
        on_card: it is planned for a card.
    """
    training = config.training
    of_libraries = {"libraries' workspaces": WORKSPACES} if on_card else {}
    if step is not None:
        assert choices.levels is not None and choices.loss_way is not None and choices.tile is not None
        return step.by_item(choices.levels, choices.loss_way, choices.tile, choices.places) | of_libraries
    of_step = memory_by_item(
        shape,
        base=base,
        compute=compute,
        trained=choices.trained_dtype,
        optim=training.optim,
        tokens=training.per_device_train_batch_size * config.data.max_length,
        checkpointing=uses_checkpointing(config, on_card),
        accumulates=training.gradient_accumulation_steps > 1 or ranks.world_size() > 1,  # in DDP's buckets
        on_card=on_card,
        in_backward=training.optimizer_in_backward,
        offload=training.offload_optimizer if on_card else "none",
        states=training.optimizer_states,
        masters=masters_kept(training, choices.trained_dtype),
    )
    return of_step | of_libraries


def result_bytes(memory: Mapping[str, int], *, tied: bool) -> int:
    """Bytes of `final/`, which is also part of a checkpoint.

    Args:
        memory: with what `steep.planning.memory.standing` gives.
    """
    return (2 if tied else 1) * memory["trained embeddings"] + memory["adapters"]  # PEFT's format holds both names


def host_bytes(
    config: RunConfig, shape: Shape, memory: Mapping[str, int], trained: str, kept: int = 0
) -> dict[str, int]:
    """Bytes by item on the host beside the model.

    Args:
        memory: of a step, by item.
        trained: dtype of what trains.
        kept: bytes that layers keep there, of each process.
    """
    # A copy of a checkpoint is written while training goes on. States are on the card or here.
    training, masters = config.training, masters_kept(config.training, trained)
    states = states_bytes(shape, training.optim, states=training.optimizer_states, masters=masters)
    checkpoint = result_bytes(memory, tied=shape.tied) + states
    on_host = (states - memory["optimizer states"]) * ranks.processes_here()  # each has its own
    of_layers = {"kept for the backward pass": kept * ranks.processes_here()} if kept else {}
    return {"copy of a checkpoint": checkpoint, "optimizer states": on_host, **of_layers}


def disk_bytes(
    config: RunConfig,
    shape: Shape,
    memory: Mapping[str, int],
    trained: str,
    steps: int,
    *,
    rolls_back: bool,
    keeps_best: bool,
) -> dict[str, int]:
    """Bytes by item on the disk.

    Args:
        memory: of `memory_of`.
        trained: dtype of what trains.
        rolls_back: the run saves its start too, to go back to.
    """
    training = config.training
    interval = training.save_steps if training.save_steps >= 1 else training.save_steps * steps
    written = math.ceil(steps / max(interval, 1)) + rolls_back
    kept = min(written, training.save_total_limit or written) + 1  # one more while the next is written
    of_each = host_bytes(config, shape, memory, trained)["copy of a checkpoint"]
    return {"checkpoints": (kept + keeps_best) * of_each, "final": result_bytes(memory, tied=shape.tied)}
