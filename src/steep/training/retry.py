"""A step that runs out of the card's memory is computed again, with less kept: the same rows, from the same state.

Until the optimizer has its gradients a step has changed nothing but those, and they are dropped. What it drew at random
is drawn again; the noise of the update's rounding is keyed by the step, and comes after. So the step that follows from
the second try is the one that a leaner run would have made, to the bit.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch

from steep import ranks
from steep.amounts import human_bytes
from steep.machine_faults import place_that_ran_out
from steep.model.install import is_installed
from steep.model.leaner import make_leaner
from steep.training.ahead import forget_ahead

logger = logging.getLogger("steep")

Compute = Callable[..., torch.Tensor]


class Retry:
    """Computes the micro-batches of a step, and where memory runs out all of them again.

    Args:
        model: an installed one.
        compute: forward and backward pass of a micro-batch, to its loss.
        drop_gradients: of all micro-batches of the step, and what was made ready for its update.
        tell: what is said of it.
    """

    def __init__(
        self, model: Any, compute: Compute, drop_gradients: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        self._model, self._compute, self._drop_gradients, self._tell = model, compute, drop_gradients, tell
        self._micro_batches: list[tuple[Any, ...]] = []
        self._random: list[torch.Tensor] = []

    def forget(self) -> None:
        """The step is over."""
        self._micro_batches.clear()

    def losses(self, before: list[torch.Tensor], *micro_batch: Any) -> list[torch.Tensor]:
        """The losses of the step's micro-batches so far, with this one's as the last.

        Args:
            before: those of the earlier ones.
            micro_batch: what `compute` takes.

        Raises:
            RuntimeError: memory ran out, and no less can be kept.
        """
        if not self._micro_batches:
            self._random = _random_states()
        self._micro_batches.append(micro_batch)
        to_do, losses = [micro_batch], list(before)
        while True:
            try:
                return losses + [self._compute(*each) for each in to_do]
            except RuntimeError as error:
                kept = make_leaner(self._model) if place_that_ran_out(error) == "GPU" else None
                if kept is None:
                    raise
            # Not before: the error holds the frames that it went through, and they the tensors.
            self._tell(kept)
            to_do, losses = self._micro_batches, []
            self._drop_gradients()
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # a copy to the host may still read what is given back
                torch.cuda.empty_cache()
            _set_random_states(self._random)


def retry_of(trainer: Any, compute: Compute) -> Retry | None:
    """That of a trainer whose model is fused; None: memory that runs out ends the run. One of several processes cannot
    begin a step again alone, since the others wait for its gradients.

    Args:
        compute: of `Retry`.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not is_installed(trainer.model) or ranks.world_size() > 1 or sharded:
        return None

    def drop_gradients() -> None:
        forget_ahead(trainer._own_optimizer, trainer.model)
        trainer.model.zero_grad(set_to_none=True)

    def tell(kept: str) -> None:
        step, missed = trainer.state.global_step + 1, _missed(trainer.planned_bytes)
        logger.warning(
            "step %d: GPU memory ran out: %s. The step is computed again, and the run goes on, with less kept for the "
            "backward pass: %s", step, missed, kept,
        )  # fmt: skip
        trainer.guard.note_memory(step, f"GPU memory ran out: {missed}", trainer._rows_of_all())

    return Retry(trainer.model, compute, drop_gradients, tell)


def _missed(planned: int | None) -> str:
    """The plan beside what was found."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    found = "the peak is not known" if used is None else f"{human_bytes(used)} were in use at the peak"
    return found if planned is None else f"{human_bytes(planned)} were planned for a step, and {found}"


def _random_states() -> list[torch.Tensor]:
    """Of torch on the CPU, and on the card that computes."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def _set_random_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
