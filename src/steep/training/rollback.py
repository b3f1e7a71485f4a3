"""The part of the Trainer that goes back to the last checkpoint for a spike, and passes over its rows from there on.

Weights, optimizer, schedule, random generators, ledger, proof and log go back with the checkpoint; the rows between it
and the spike are trained again. A run that may go back saves a checkpoint before its first step.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from steep.errors import RunError
from steep.training.branching import Branching
from steep.training.checkpoint import Checkpoint, found_by_main, newest_valid, step_of
from steep.training.guard import GoBack

logger = logging.getLogger("steep")


class Rollback(Branching):
    """`Branching` that may go back."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        begin = self._where_to_begin(resume_from_checkpoint)
        while True:
            try:
                return super().train(begin, *args, **kwargs)
            except GoBack as back:
                step = back.step
            # Out here the exception is gone, and with it the frames that hold the step's tensors.
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.update()  # ends the step for it; its own state comes from the checkpoint
            self.current_flos = 0.0  # transformers' count of what it has not stored yet
            begin = self._where_to_begin(found_by_main(partial(self._last_checkpoint, step, begin)))
            logger.info("going back to %s", begin)

    def _last_checkpoint(self, step: int, begin: str | None) -> Checkpoint:
        """The newest valid checkpoint that this run has saved or begun at.

        Raises:
            RunError: there is none any more.
        """
        run_dir = Path(self.args.output_dir)
        last = self._saved_at if self._saved_at is not None else step_of(Path(begin or ""))  # others may lie there too
        choice = newest_valid(run_dir, up_to=last)
        choice.say_passed_over()
        if choice.checkpoint is None:
            raise RunError(
                f"step {step} is a spike, and {run_dir} holds no whole checkpoint any more to go back to. Put one "
                "back, or begin the run anew"
            )
        return choice.checkpoint

    @property
    def is_new(self) -> bool:
        """Whether `train` begins this run, and does not go on with it."""
        return self.resumed_state is None or self._begins_branch

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.args.spike_action == "rollback" and self.is_new and self.state.global_step == self.first_step:
            if self.branch is not None:  # transformers takes up its random generators only within
                self._load_rng_state(self.branch.checkpoint)
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        super()._run_epoch(*args, **kwargs)
