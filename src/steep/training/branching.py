"""The half of the Trainer that lets a run begin at another one's checkpoint.

A branch counts its steps on from the parent's, so the logs of the two lie side by side on one axis. Weights, optimizer
states and random generators go on. Schedule, log, ledger and proof are the branch's own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from steep.data.packing import Corpus
from steep.errors import UserError
from steep.model.choices import take_over
from steep.recorded import parsed
from steep.training.branch import Branch
from steep.training.checkpoint import Checkpoint, choose, given, read_choices
from steep.training.ending import Ending
from steep.training.exact_checkpoints import load_optimizer
from steep.training.observations import load_observations, refuse_other_counts
from steep.training.state_files import load_state, putting_back

# What a place in the text follows from, and why. How many processes there are is compared with the random states.
_IN_STEPS = "the place in the text is counted in steps of that batch"
_IN_ORDER = "the order of the rows follows from it"
PLACE = {
    "per_device_train_batch_size": _IN_STEPS,
    "gradient_accumulation_steps": _IN_STEPS,
    "seed": _IN_ORDER,
    "data_seed": _IN_ORDER,
}


class Branching(Ending):
    """`Ending` that may begin at a `Branch`.

    Attributes:
        branch: where the run leaves its parent; None in a run of its own.
        corpus: the packed text that it trains on, if it is that.
        first_step: steps before the first one of this run.
        data_start: the step at which the epochs of this run's text began. Text that is the parent's goes on with the
            rows that the parent has not had; other text begins at its first row.
    """

    corpus: Corpus | None
    branch: Branch | None
    _begins_branch = False

    @property
    def first_step(self) -> int:
        return self.branch.step if self.branch else 0

    @property
    def fingerprint(self) -> str | None:
        return self.corpus.fingerprint if self.corpus else None

    @property
    def goes_on_with_rows(self) -> bool:
        """Whether this is a branch over its parent's text."""
        return self.branch is not None and self.fingerprint is not None and self.branch.fingerprint == self.fingerprint

    @property
    def data_start(self) -> int:
        if self.branch is None:
            return 0
        return self.branch.data_start if self.goes_on_with_rows else self.branch.step

    def _where_to_begin(self, checkpoint: Checkpoint | str | Path | bool | None) -> str | None:
        """The checkpoint that `train` begins at, verified: the one asked for (True: the newest valid one of the run),
        or else the parent's. Reads what was observed. A `Checkpoint` was verified when it was found.

        Raises:
            UserError: it is damaged, or not there, or its place in the text is another one here.
        """
        field, begin = "resume_from_checkpoint", None
        if checkpoint is True:
            run_dir = Path(self.args.output_dir)
            begin = choose(run_dir, field)
            if begin is None and self.branch is None:
                raise UserError(field, f"{run_dir} has no checkpoint", "Leave it out, or give the run's output_dir.")
        elif isinstance(checkpoint, Checkpoint):
            begin = checkpoint
        elif checkpoint:
            begin = given(checkpoint, field)
        self._begins_branch = self.branch is not None and begin is None
        if self._begins_branch:
            assert self.branch is not None
            begin = self.branch.verify("branch")
        self.resumed_state = None if begin is None else load_observations(begin.path)
        if begin is not None and not self._begins_branch:
            self._refuse_other_rows(begin.path)
        if begin is not None:
            take_over(self.model, read_choices(begin.path, field))
        return None if begin is None else str(begin.path)

    def _refuse_other_rows(self, checkpoint: Path) -> None:
        """Check that the steps of a run that goes on have the rows that they would have had: of the corpus, which is
        gone through in an order and in steps that follow from a few arguments.

        Raises:
            UserError: they have others.
        """
        assert self.resumed_state is not None
        if self.corpus is None:
            return
        before = parsed(checkpoint / "training_args.json", nan=True)
        for name, reason in PLACE.items():
            here = getattr(self.args, name)
            if name in before and before[name] != here:
                raise UserError(
                    name,
                    f"it was {before[name]} up to {checkpoint}, and is {here} here: {reason}",
                    f"Give {name}={before[name]}, or begin a new run.",
                )
        if (there := self.resumed_state["fingerprint"]) != self.fingerprint:
            raise UserError(
                "train_dataset",
                f"its fingerprint is {self.fingerprint}, and that of the text of {checkpoint} is {there}: other tokens "
                "stand in its rows",
                "Pack the same text in the same way, or begin a new run, or a branch.",
            )

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        epochs, per_epoch, *rest, max_steps = super().set_initial_training_values(*args, **kwargs)
        max_steps += self.first_step
        if self.branch is not None:
            epochs = math.ceil((max_steps - self.data_start) / per_epoch)
        return epochs, per_epoch, *rest, max_steps

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *args: Any) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args)
        # transformers goes on with the intervals of the checkpoint, though the run may ask for others.
        self.state.compute_steps(self.args, max_steps - self.first_step)
        if self._begins_branch:
            self.state.log_history = []
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        if self.branch is None:
            return begun
        epochs, steps = divmod(self.state.global_step - self.data_start, num_update_steps_per_epoch)
        return epochs, steps * self.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._begins_branch:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert checkpoint is not None
        with putting_back(Path(checkpoint), "optimizer"):
            load_optimizer(self.optimizer, load_state(Path(checkpoint), "optimizer"), own=("lr", "initial_lr"))

    def rate_factor(self) -> float | None:
        """What multiplies the peak rate of every group in the step to come; None where it is not one number."""
        lambdas = getattr(self.lr_scheduler, "lr_lambdas", None) or []
        factors = {float(factor(self.lr_scheduler.last_epoch)) for factor in lambdas}
        return factors.pop() if len(factors) == 1 else None

    def rows_before(self) -> torch.Tensor:
        """How often the parent, and its own parents, handed out each row of this text: int64 [rows]."""
        state = self.resumed_state
        assert state is not None and self.corpus is not None
        if not self.goes_on_with_rows:
            return torch.zeros(len(self.corpus.train), dtype=torch.int64)
        for name in ("times_seen", "times_seen_before"):
            refuse_other_counts(state[name], len(self.corpus.train), "--branch")
        return state["times_seen"] + state["times_seen_before"]
