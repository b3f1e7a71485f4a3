"""The part of the Trainer that counts: which rows a step has, what became of them, and how many tokens it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from steep import ranks
from steep.data.sampler import FILLER
from steep.training.guard import Outcome
from steep.training.rollback import Rollback

COUNTS = ("times_seen", "times_trained", "times_skipped", "times_seen_before")


class Counting(Rollback):
    """`Rollback` that counts the rows of its `corpus`.

    Attributes:
        times_seen, times_trained, times_skipped: how often each row was in a step (of any process), in one that was
            applied, and in one that was skipped as a spike; int64 [rows], empty without a corpus.
        times_seen_before: in a branch over its parent's text, how often each row was in a step before; int64 [rows].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times_seen = torch.zeros(len(self.corpus.train) if self.corpus else 0, dtype=torch.int64)
        self.times_trained, self.times_skipped = torch.zeros_like(self.times_seen), torch.zeros_like(self.times_seen)
        self.times_seen_before = torch.zeros_like(self.times_seen)
        self._rows = np.empty(0, np.int64)
        self._begin_step()

    def _begin_step(self) -> None:
        """Forget the micro-batches so far: an interrupted step may have left some."""
        self._rows_of_step: list[np.ndarray] = []
        self._tokens_of_step = self._micro_batches = 0

    def _note_rows(self, rows: Any) -> None:
        """Take the rows of a micro-batch; a collator of the caller's own may have made their numbers a tensor."""
        self._rows_of_step.append(rows.cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows))

    def _note_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of a micro-batch whose rows nobody knows."""
        mask = inputs.get("attention_mask")
        self._tokens_of_step += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def _rows_of_all(self) -> np.ndarray:
        """Numbers of the rows that all processes have in the step, as far as they are known: int64 [rows]."""
        rows = ranks.gathered(np.concatenate([np.empty(0, np.int64), *self._rows_of_step]))
        return rows[rows != FILLER]

    @property
    def _is_short(self) -> bool:
        """Whether the step, whose rows are `_rows`, has fewer than others, as the last of an epoch may. Where nobody
        knows its rows it is told by its micro-batches."""
        if not len(self._rows):
            return self._micro_batches < self.args.gradient_accumulation_steps
        full = self._train_batch_size * self.args.gradient_accumulation_steps * ranks.world_size()
        return len(self._rows) < full

    def _count_step(self, outcome: Outcome) -> int:
        """Count the step that ends, whose rows are `_rows`; gives the tokens that were computed, of all processes.
        Padding is no work done, and neither is what was passed over."""
        rows = torch.from_numpy(self._rows)
        once = torch.ones_like(rows)
        self.times_seen.index_add_(0, rows, once)  # a row that came twice counts twice
        if outcome in (Outcome.SKIPPED, Outcome.PASSED_OVER):
            self.times_skipped.index_add_(0, rows, once)
        elif outcome is Outcome.APPLIED:
            self.times_trained.index_add_(0, rows, once)
        own = self._tokens_of_step
        self._begin_step()
        if outcome is Outcome.PASSED_OVER:
            return 0
        if self.corpus is not None and len(rows):
            return int(self.corpus.train.row_tokens[self._rows].sum())
        return int(ranks.gathered(np.array([own])).sum())

    def ledger(self) -> dict[str, Any]:
        """Where every document and token of the `Corpus` went so far; `Corpus.ledger` describes it."""
        assert self.corpus is not None
        return self.corpus.ledger(
            self.times_trained.numpy(),
            self.times_seen.numpy(),
            self.times_seen_before.numpy(),
            self.times_skipped.numpy(),
        )
