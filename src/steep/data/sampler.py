"""The order of rows in an epoch: a function of seed and epoch alone, so that a resumed run finds its place again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows 0 … num_rows - 1, each once, in the order of this epoch: int64 [num_rows]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).permutation(num_rows)


class EpochSampler(Sampler[int]):
    """Yields row numbers in `epoch_order`; `set_epoch` chooses the epoch (0 at first)."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.num_rows, self.seed, self.epoch).tolist())

    def __len__(self) -> int:
        return self.num_rows
