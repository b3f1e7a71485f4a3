"""The order of rows in an epoch: a function of seed and epoch alone, so that a resumed run finds its place again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

FILLER = -1  # the number of a row that holds no target


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows 0 … num_rows - 1, each once, in the order of this epoch: int64 [num_rows]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).permutation(num_rows)


def rows_of_step(num_rows: int, seed: int, rows_per_step: int, step: int) -> np.ndarray:
    """The rows that are trained in a step, from 0: int64 [rows_per_step], fewer in the last one of an epoch."""
    epoch, place = divmod(step, -(-num_rows // rows_per_step))
    return epoch_order(num_rows, seed, epoch)[place * rows_per_step :][:rows_per_step]


def share_of(order: np.ndarray, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The rows of one of several processes, whole batches of them: int64 [N].

    Batches of the order go round the processes, so that a step has the same rows however many there are. Every process
    has to have as many batches as the others, or they would wait for it: the last round is filled with `FILLER`.
    """
    round_size = batch_size * world_size
    filled = np.concatenate([order, np.full(-len(order) % round_size, FILLER, order.dtype)])
    return filled.reshape(-1, world_size, batch_size)[:, rank].ravel()


class EpochSampler(Sampler[int]):
    """Yields row numbers in `epoch_order`; `set_epoch` chooses the epoch (0 at first).

    Args:
        num_rows: rows of an epoch.
        seed: of the order.
        batch_size, rank, world_size: in one of several processes, to yield its share (`share_of`).
    """

    def __init__(self, num_rows: int, seed: int, batch_size: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0
        self._share = (batch_size, rank, world_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.num_rows, self.seed, self.epoch)
        if self._share[2] > 1:  # one process trains a smaller last batch instead
            order = share_of(order, *self._share)
        return iter(order.tolist())

    def __len__(self) -> int:
        batch_size, _, world_size = self._share
        return self.num_rows if world_size == 1 else -(-self.num_rows // (batch_size * world_size)) * batch_size
