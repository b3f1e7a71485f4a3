"""The part of the Trainer that tells: what held-out text scores, and what was measured between two log lines."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from steep import ranks
from steep.errors import UserError
from steep.evaluation.perplexity import DomainScore, evaluate, within_a_step
from steep.training.counting import Counting
from steep.training.guard import Guard
from steep.training.metrics import Meter

logger = logging.getLogger("steep")


class Reporting(Counting):
    """`Counting` that scores and logs.

    Attributes:
        evaluations: the scores of each evaluation of the corpus so far, by domain.
    """

    guard: Guard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluations: list[list[DomainScore]] = []
        self._meter = Meter()
        self._seconds_logged = 0.0
        for callback in self.callback_handler.callbacks:
            # It learns its folder when training begins: a score logged before would send all to the current folder.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = f"{self.args.output_dir}/{default_logdir()}"

    # ---- held-out text

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Score the corpus's held-out documents by domain; a data set of the caller's own is transformers' to score."""
        if self.corpus is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not self.corpus.heldout:
            raise UserError("eval_dataset", "the corpus holds no text out", "Raise pack's holdout, or add a source.")
        return self.evaluate_documents(self.corpus.heldout, self.args.eval_max_tokens, metric_key_prefix)

    def evaluate_documents(
        self, documents: Mapping[str, Sequence[Any]], max_tokens: int | None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score documents by domain, at most `max_tokens` of each, and log it as the corpus's evaluation.

        One of several processes scores, so that the scores are those of one process to the bit; the others wait.
        """
        assert self.corpus is not None
        max_length = self.corpus.train.max_length
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # a schedule-free optimizer trains other weights than it means
        score = partial(
            evaluate,
            self.model,
            documents,
            max_length=max_length,
            stride=self.args.eval_stride,
            batch_tokens=within_a_step(self.args.per_device_train_batch_size, max_length),
            max_tokens=max_tokens,
            step=self.state.global_step,
            autocast_dtype=self.autocast_dtype,
        )
        rows = ranks.from_main(lambda: [domain_score.as_dict() for domain_score in score()])
        scores = [DomainScore.from_dict(row) for row in rows]
        self.evaluations.append(scores)
        metrics = {f"{metric_key_prefix}_{s.domain}_bits_per_byte": s.bits_per_byte for s in scores}
        metrics |= {f"{metric_key_prefix}_{s.domain}_loss": s.loss for s in scores}
        metrics[f"{metric_key_prefix}_loss"] = sum(s.loss for s in scores) / len(scores)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that accelerate runs the forward in, or None without mixed precision."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    # ---- the log

    @property
    def steps_not_finite(self) -> int:
        """Steps so far that were not applied because loss or gradient was NaN or infinite."""
        return self.guard.steps_not_finite

    @property
    def steps_scaler_skipped(self) -> int:
        """Steps so far that fp16's loss scaler passed over."""
        return self.guard.steps_overflowed

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log a training window with what was measured here; a value that is not finite is left out, never replaced."""
        if "loss" in logs:
            logs = {**logs, **self._meter.close(), "steps_not_finite": self.steps_not_finite}
            logs["steps_skipped"] = self.guard.steps_skipped
            logs["save_seconds"] = self.seconds_saving - self._seconds_logged
            self._seconds_logged = self.seconds_saving
            if self.accelerator.scaler is not None:
                logs["steps_scaler_skipped"] = self.steps_scaler_skipped
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self._meter.mean_loss}
        super().log({k: v for k, v in logs.items() if not (isinstance(v, float) and not math.isfinite(v))}, start_time)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if self.epoch_end_follows:
            return
        if ranks.world_size() == 1:
            # What is logged is the meter's; to read this sum would be to wait for the update of the weights.
            tr_loss = torch.zeros(())
        pauses = self.control.should_evaluate or self.control.should_save
        if self.control.should_evaluate:
            logger.info("scoring held-out text at step %d", self.state.global_step)
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if pauses:
            self._meter.restart()  # evaluating and saving are not part of a step's time
