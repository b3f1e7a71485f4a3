"""The part of the Trainer that goes back to the last checkpoint for a spike, and passes over its rows from there on.

Weights, optimizer, schedule, random generators, ledger, proof and log go back with the checkpoint; the rows between it
and the spike are trained again. A run that may go back saves a checkpoint before its first step.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from steep import ranks
from steep.data.sampler import rows_of_step
from steep.errors import RunError
from steep.training.branching import Branching
from steep.training.checkpoint import Checkpoint, found_by_main, given, newest_valid, step_of
from steep.training.guard import GoBack
from steep.training.skip_list import Skipped, from_json, steps_behind

logger = logging.getLogger("steep")


class Rollback(Branching):
    """`Branching` that may go back."""

    _has_gone_back = False
    _origin: Path | None = None  # the checkpoint that `train` began at

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        begin = self._where_to_begin(resume_from_checkpoint)
        self._origin, self._has_gone_back = None if begin is None else Path(begin), False
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
            self._has_gone_back = True
            logger.info("going back to %s", begin)

    def _last_checkpoint(self, step: int, begin: str | None) -> Checkpoint:
        """The newest valid checkpoint that this run has saved or begun at.

        Raises:
            RunError: there is none any more.
        """
        run_dir = Path(self.args.output_dir)
        # A script's run may have begun at a checkpoint that lies elsewhere; and others may lie here too.
        elsewhere = self._origin if self._origin is not None and not self._is_here(self._origin) else None
        last = self._saved_at if self._saved_at is not None else step_of(Path(begin or ""))
        choice = newest_valid(run_dir, up_to=last)
        choice.say_passed_over()
        found = choice.checkpoint
        if elsewhere is not None and self.branch is None and (found is None or found.step <= step_of(elsewhere)):
            return given(elsewhere, "resume_from_checkpoint")
        if found is None:
            raise RunError(
                f"step {step} is a spike, and {run_dir} holds no whole checkpoint any more to go back to. Put one "
                "back, or begin the run anew"
            )
        return found

    def _is_here(self, checkpoint: Path) -> bool:
        return checkpoint.parent.resolve() == Path(self.args.output_dir).resolve()

    def taken_over(self) -> dict[int, Skipped] | None:
        """The steps to come that the run passes over because the one did that it begins from; None where it goes on
        with a list of its own. A step that has other rows here is trained: the run looks for spikes itself."""
        if self._has_gone_back:
            return None
        if self._origin is None:
            return {}
        if self._begins_branch:
            assert self.branch is not None
            listed = from_json(self.branch.passed_over)
        elif self._is_here(self._origin):
            return None
        else:
            listed = steps_behind(self._origin)
        assert self.resumed_state is not None
        is_same = self.corpus is not None and self.resumed_state["fingerprint"] == self.fingerprint
        kept = {step: at for step, at in listed.items() if is_same and sorted(at.rows) == self._rows_in(step)}
        if others := listed.keys() - kept.keys():
            logger.warning(
                "%s passed over %d steps that have other rows here: they are trained", self._origin.parent, len(others)
            )
        return kept

    def _rows_in(self, step: int) -> list[int]:
        """Numbers of the rows of a step, in their own order."""
        assert self.corpus is not None
        args, num_rows = self.args, len(self.corpus.train)
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size()
        seed = args.seed if args.data_seed is None else args.data_seed
        return sorted(rows_of_step(num_rows, seed, per_step, step - 1 - self.data_start).tolist())

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
