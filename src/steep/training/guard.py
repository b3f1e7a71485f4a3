"""What becomes of a step: it is applied, or refused since it is not finite, or treated as a spike.

The guard is asked once a step, when its loss and gradients are known and before the optimizer has them. Whatever is out
of the ordinary is said, written into `incidents.jsonl`, and counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steep.errors import RunError
from steep.training.arguments import TrainingArguments
from steep.training.gradients import GradientReport
from steep.training.incidents import FILE, Incidents
from steep.training.skip_list import SkipList, Skipped
from steep.training.spikes import A_KIND, Spike, SpikeDetector

logger = logging.getLogger("steep")

_SAID_IN_A_ROW = 3  # where the loss jumps and stays, each step stands out until the median has followed
_SEVERAL = 3  # alike before it: what is skipped may be a kind of text that seldom comes


class Outcome(Enum):
    """What became of a step."""

    APPLIED = auto()
    REFUSED = auto()  # the loss or a gradient was not finite
    OVERFLOWED = auto()  # fp16's loss scale was too high, as is usual now and then
    SKIPPED = auto()  # a spike, not applied
    PASSED_OVER = auto()  # a spike that the run went back before; this time not even computed


class GoBack(Exception):
    """The run is to go back to its last checkpoint; the step that it came from is on the skip list by now."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"back to before step {step}")


class Guard:
    """Judges the steps of one run.

    Args:
        args: `max_nonfinite_steps`, the `spike_*` settings and `output_dir` are looked at.
        describe: makes the text of rows for `incidents.jsonl`.

    Attributes:
        steps_not_finite, steps_overflowed, steps_skipped: steps so far that were refused, that the loss scaler passed
            over, and that were not applied since they were spikes.
        skip_list: the steps that are passed over.
        failure: set when the run has to end after this step.
    """

    def __init__(self, args: TrainingArguments, describe: Callable[[np.ndarray], list[dict[str, Any]]]) -> None:
        folder = Path(str(args.output_dir))
        self._args, self._describe = args, describe
        self._incidents, self.skip_list = Incidents(folder), SkipList(folder)
        self._detector = SpikeDetector(args.spike_threshold, args.spike_window)
        self.steps_not_finite = self.steps_overflowed = self.steps_skipped = 0
        self._not_finite_in_a_row = 0
        self._skipped: list[int] = []  # steps, as far back as spikes are looked for
        self.failure: RunError | None = None

    def begin(self, step: int, state: dict[str, Any] | None, passed_over: Mapping[int, Skipped] | None = None) -> None:
        """Get ready to train from `step` on.

        Args:
            state: what a checkpoint kept; None where the run begins.
            passed_over: where the run begins at a checkpoint of another one, the later steps that it passed over, and
                this one does too. None: those of the run's own list.
        """
        self.failure = None
        if state is not None:
            self._load_state(state)
        if passed_over is None:
            self.skip_list.read()
            self._incidents.rewind(step, self.skip_list)
            return
        self._incidents.rewind(step, ())
        self.skip_list.take(passed_over)
        for number, skipped in sorted(passed_over.items()):
            self._incidents.add(
                {
                    "step": number,
                    "kind": "spike in the run that this one began from",
                    "action": "rollback",
                    "loss": skipped.loss,
                    "grad_norm": skipped.grad_norm,
                    "median": None,
                    "z": None,
                    "rows": self._describe(np.array(skipped.rows, np.int64)),
                }
            )

    def judge(
        self, step: int, loss: float, gradients: GradientReport, overflowed: bool, rows: np.ndarray, is_short: bool
    ) -> Outcome:
        """What becomes of a step whose loss and gradients are known.

        Args:
            overflowed: a gradient is not finite, and too high a loss scale explains it.
            rows: numbers of its rows, where they are known.
            is_short: it has fewer rows than others. Its loss and norm scatter more than theirs, so that it is held
                against none of them, nor any against it.

        Raises:
            GoBack: it is a spike, and the run goes back for it.
            RunError: nothing of it may stay, and it is applied already (`optimizer_in_backward`).
        """
        if not math.isfinite(loss) or not (gradients.finite or overflowed):
            self._refuse(step, loss, gradients, rows)
            return Outcome.REFUSED
        if overflowed:
            self.steps_overflowed += 1
            return Outcome.OVERFLOWED
        self._not_finite_in_a_row = 0
        if self._args.spike_action == "off" or is_short:
            return Outcome.APPLIED
        spike = self._detector.judge(loss, gradients.total)
        if spike is None or spike.recurs:
            if spike is not None and spike.recurs_first:
                self._tell_of_kind(step, spike, loss, gradients, rows)
            outcome = Outcome.APPLIED
        else:
            outcome = self._treat(step, spike, loss, gradients, rows)
        self._detector.remember(loss, gradients.total)
        return outcome

    def pass_over(self, step: int, rows: np.ndarray, is_short: bool) -> None:
        """Count a step of the skip list.

        Args:
            rows, is_short: see `judge`.

        Raises:
            RunError: the list names other rows for it.
        """
        skipped = self.skip_list.steps[step]
        if not set(rows.tolist()) <= set(skipped.rows):
            raise RunError(
                f"{self.skip_list.path} names other rows for step {step} than this run trains in it. Delete it if it "
                "is not of this run"
            )
        self._count_skipped(step)
        if not is_short:
            self._detector.remember(skipped.loss, skipped.grad_norm)  # nothing is computed now

    def _refuse(self, step: int, loss: float, gradients: GradientReport, rows: np.ndarray) -> None:
        is_loss = not math.isfinite(loss)
        what = "loss" if is_loss else f"gradient of {', '.join(gradients.offenders[:3])}"
        if self._args.optimizer_in_backward:
            self._write(step, f"{'loss' if is_loss else 'gradient'} not finite", "ended", loss, gradients, rows)
            raise RunError(
                f"step {step}: the {what} is not finite, and the weights are partly updated by it "
                "(training.optimizer_in_backward). Nothing of that step is saved: go on from the last checkpoint "
                "(--resume), with training.optimizer_in_backward: false, which leaves such a step out, or a lower "
                f"training.learning_rate (now {self._args.learning_rate:g}). Its text is in {self._incidents.path}"
            )
        self.steps_not_finite += 1
        self._not_finite_in_a_row += 1
        logger.warning("step %d: the %s is not finite; the step is not applied", step, what)
        self._write(step, f"{'loss' if is_loss else 'gradient'} not finite", "refused", loss, gradients, rows)
        if self._not_finite_in_a_row >= self._args.max_nonfinite_steps:
            self.failure = RunError(
                f"the loss or its gradient was not finite in {self._not_finite_in_a_row} steps in a row, the last of "
                f"them step {step}. None was applied, and the run is saved as it was before. Lower "
                f"training.learning_rate (now {self._args.learning_rate:g}) or look at the text of these steps in "
                f"{self._incidents.path}; `--resume` goes on behind them"
            )
            self._not_finite_in_a_row = 0

    def note_memory(self, step: int, told: str, rows: np.ndarray) -> None:
        """Write down that a step was computed again, since memory ran out."""
        self._write(step, told, "leaner", math.nan, GradientReport([], torch.zeros(0), math.nan), rows)

    def _treat(self, step: int, spike: Spike, loss: float, gradients: GradientReport, rows: np.ndarray) -> Outcome:
        action = self._args.spike_action
        window, most = self._args.spike_window, max(3, self._args.spike_window // 10)
        recent = {*self._skipped, *self.skip_list.steps, step}
        count = sum(step - window < other <= step for other in recent)
        if action != "warn" and count > most:
            action = "ended" if self._args.optimizer_in_backward else "skip"
            self.failure = RunError(
                f"{count} of the last {window} steps were spikes and were not trained, more than {most}: this is not a "
                f"few bad rows. Lower training.learning_rate (now {self._args.learning_rate:g}), raise "
                f"training.spike_threshold (now {self._args.spike_threshold:g}), or look at {self._incidents.path}"
            )
        if action == "warn" and spike.in_a_row > _SAID_IN_A_ROW:
            return Outcome.APPLIED
        done = {
            "warn": "the step is applied",
            "skip": "the step is not applied",
            "ended": "the run ends, and goes on from its last checkpoint",
            "rollback": "the run goes back to its last checkpoint, and will pass over the rows of this step",
        }
        hint = self._hint(spike, rows) if action != "warn" and spike.alike >= _SEVERAL else ""
        logger.warning(
            "step %d: %s: %.4g, %.1f robust deviations above the median %.4g; %s. Its text is in %s%s",
            step, spike.kind, spike.value, spike.z, spike.median, done[action], FILE, hint,
        )  # fmt: skip
        self._write(step, spike.kind, action, loss, gradients, rows, spike)
        if action == "ended":
            assert self.failure is not None
            raise self.failure  # at once and not behind a checkpoint: the step is applied already
        if action == "rollback":
            self.skip_list.add(step, Skipped(rows.tolist(), loss, gradients.total))
            raise GoBack(step)
        if action == "skip":
            self._count_skipped(step)
            return Outcome.SKIPPED
        return Outcome.APPLIED

    def _hint(self, spike: Spike, rows: np.ndarray) -> str:
        return (
            f". {spike.alike} steps before it stood out as far{self._domains(rows)}. If this is a kind of text, and "
            f"no bad rows, train it: raise training.spike_window (now {self._args.spike_window}) until {A_KIND} of its "
            "steps lie within four windows, or set training.spike_action: warn"
        )

    def _domains(self, rows: np.ndarray) -> str:
        domains = sorted({piece["domain"] for row in self._describe(rows) for piece in row["pieces"]})
        return f" (this one is of {', '.join(domains)})" if domains else ""

    def _tell_of_kind(self, step: int, spike: Spike, loss: float, gradients: GradientReport, rows: np.ndarray) -> None:
        logger.warning(
            "step %d: %s: %.4g, where the median is %.4g, as in %d steps before%s: this is no single bad row but a "
            "kind of text. The step is applied, and so is what is alike while it comes as often. Its text is in %s",
            step, spike.kind, spike.value, spike.median, spike.lately, self._domains(rows), FILE,
        )  # fmt: skip
        self._write(step, spike.kind, "recurs", loss, gradients, rows, spike)

    def _count_skipped(self, step: int) -> None:
        self.steps_skipped += 1
        self._skipped = [other for other in self._skipped if step - self._args.spike_window < other] + [step]

    def _write(
        self,
        step: int,
        kind: str,
        action: str,
        loss: float,
        gradients: GradientReport,
        rows: np.ndarray,
        spike: Spike | None = None,
    ) -> None:
        self._incidents.add(
            {
                "step": step,
                "kind": kind,
                "action": action,
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": gradients.total if gradients.finite else None,
                "median": spike.median if spike else None,
                "z": spike.z if spike else None,
                "rows": self._describe(rows),
            }
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "steps_not_finite": self.steps_not_finite,
            "steps_overflowed": self.steps_overflowed,
            "steps_skipped": self.steps_skipped,
            "not_finite_in_a_row": self._not_finite_in_a_row,
            "skipped": self._skipped,
            "detector": self._detector.state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.steps_not_finite, self.steps_overflowed = state["steps_not_finite"], state["steps_overflowed"]
        self.steps_skipped, self._skipped = state["steps_skipped"], list(state["skipped"])
        self._not_finite_in_a_row = state["not_finite_in_a_row"]
        self._detector.load_state(state["detector"])
