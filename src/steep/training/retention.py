"""Which checkpoints of a run stay: the newest ones, and the best by a held-out domain."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from steep.errors import UserError, did_you_mean
from steep.manifest import Damaged
from steep.storage import remove
from steep.training.checkpoint import checkpoints, inspect, step_of


class Retention:
    """Deletes the checkpoints of a run that are not kept.

    Only whole checkpoints up to the present step are counted, and deleted. One that is damaged, or cannot be read,
    stays where it is until its step is saved again: what is left of it may still be of use to its owner. So do those of
    later steps, in a run that went on from an earlier one. Each is looked at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._whole: dict[Path, bool] = {}

    def saved(self, path: Path) -> None:
        """Note that a checkpoint was just written."""
        self._whole[path] = True

    def apply(self, limit: int | None, step: int, best: int | None) -> None:
        """Delete the oldest beyond `limit`; the newest, and that of the step `best`, always stay."""
        if limit is None:
            return
        there = [path for path in checkpoints(self._run_dir) if step_of(path) <= step]
        if all(step_of(path) == best for path in there[: -max(1, limit)]):  # then none has to be hashed
            return
        whole = [path for path in there if self._is_whole(path)]
        for path in whole[: -max(1, limit)]:
            if step_of(path) != best:
                remove(path)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            try:
                inspect(path)
                self._whole[path] = True
            except (Damaged, OSError):
                self._whole[path] = False
        return self._whole[path]


def check_best_metric(arguments: Any, domains: Collection[str], *, section: str = "") -> None:
    """Check that `metric_for_best_model`, if it is set, is one that an evaluation of these held-out domains gives.

    Raises:
        UserError: it is not, or nothing is evaluated during training.
    """
    metric, field = arguments.metric_for_best_model, f"{section}metric_for_best_model"
    if metric is None:
        return
    if arguments.eval_strategy == "no":
        raise UserError(
            field, "nothing is scored during training, so nothing can be the best", f"Set {section}eval_steps."
        )
    known = ["eval_loss", *(f"eval_{domain}_{kind}" for domain in domains for kind in ("bits_per_byte", "loss"))]
    if metric.removeprefix("eval_") not in [name.removeprefix("eval_") for name in known]:
        remedy = f"{did_you_mean(metric, known)} Known are: {', '.join(known)}.".lstrip()
        raise UserError(field, f"no held-out domain has {metric!r}", remedy)
