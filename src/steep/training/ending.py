"""The part of the Trainer that ends a run early: the step is finished, a checkpoint saved, and the reason raised."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from steep import ranks
from steep.errors import RunError, Stopped
from steep.stopping import Stop
from steep.training.checkpoint_writer import CheckpointCallback
from steep.training.exact_checkpoints import ExactCheckpoints
from steep.training.workers import leave_signals_to_parent


class Ending(ExactCheckpoints):
    """`ExactCheckpoints` that may end early.

    Attributes:
        stop: looked at after each step.
        ending: why the run ends after the step that is under way.
    """

    stop: Stop | None
    ending: RunError | Stopped | None
    _saved_at: int | None
    _epoch_ended: bool

    def let_end(self, stop: Stop | None) -> None:
        """Look at `stop` after each step, from now on."""
        self.stop = stop
        self.add_callback(_Observer(self))

    def finishing_steps(self) -> AbstractContextManager[None]:
        """Within, a signal is a wish that is granted after a step."""
        return nullcontext() if self.stop is None else self.stop.finishing_steps()

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._for_the_end(super()._get_dataloader(*args, **kwargs))

    def _for_the_end(self, loader: Any) -> Any:
        """A data loader whose workers outlive the signal that asks for an end."""
        if self.stop is not None:
            leave_signals_to_parent(loader)
        return loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.ending = self._saved_at = None
        self._epoch_ended = False
        output = super().train(*args, **kwargs)
        if self.ending is not None:
            raise self.ending
        return output

    @property
    def epoch_end_follows(self) -> bool:
        """Whether transformers asks for log, evaluation and checkpoint of a step, and will once more at the epoch's end
        before another step. All is done then, in one go, so that the checkpoint holds what was logged and scored."""
        return not self._epoch_ended and (self.state.epoch % 1 == 0 or self.state.global_step >= self.state.max_steps)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step = self.state.global_step
        if self.ending is None and step < self.state.max_steps:  # after the last one there is more to do at its end
            self._end_if(self.stop is not None and self.stop.asked)
        if self.ending is None:
            return
        self.control.should_training_stop = True
        self._save_once()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.ending is None:
            self.finish_saving()  # before the last look, after which a signal would break it off
            self._end_if(self.stop is not None and self.stop.last_look())
            if self.ending is not None:
                self._save_once()
        return super()._finalize_training(*args, **kwargs)

    def _end_if(self, asked: bool) -> None:
        """End here if any process was asked to."""
        if ranks.agreed(asked):
            step = self.state.global_step
            self.ending = Stopped(step, Path(self.args.output_dir) / f"checkpoint-{step}")

    def _save_once(self) -> None:
        if self._saved_at != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)


class _Observer(CheckpointCallback):
    """Sees what transformers tells callbacks only."""

    def __init__(self, trainer: Ending) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.resumed_state is not None:
            self._trainer._saved_at = state.global_step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._epoch_ended = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._saved_at = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._epoch_ended = True
        is_left = state.epoch % 1 and state.global_step < state.max_steps
        if self._trainer.ending is not None and is_left:  # the epoch is left, and does not end here
            control.should_log = control.should_evaluate = control.should_save = False
