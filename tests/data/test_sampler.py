"""The order of rows: a permutation that only seed and epoch decide."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steep.data.sampler import FILLER, EpochSampler, epoch_order


def test_a_permutation_for_each_seed_and_epoch():
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 9
    assert tuple(epoch_order(50, 1, 2)) == orders[1, 2]


def test_the_order_stays_the_same_in_every_release():
    # A run must be resumable after an upgrade; numpy keeps PCG64 and SeedSequence stable.
    assert epoch_order(8, 42, 0).tolist() == FROZEN


FROZEN = [3, 4, 2, 7, 6, 1, 5, 0]


def test_sampler_follows_set_epoch():
    sampler = EpochSampler(20, seed=7)
    assert len(sampler) == 20
    assert list(sampler) == epoch_order(20, 7, 0).tolist()
    sampler.set_epoch(3)
    assert list(sampler) == epoch_order(20, 7, 3).tolist()
    assert all(isinstance(row, int) for row in sampler)
    assert epoch_order(20, 7, 3).dtype == np.int64


@given(
    num_rows=st.integers(1, 200),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    processes=st.integers(2, 5),
)
def test_processes_share_the_rows_of_each_step(num_rows: int, batch_size: int, accumulation: int, processes: int):
    """Each step has the rows that one process with as many a step has; none is lost or comes twice."""
    samplers = [EpochSampler(num_rows, 3, batch_size, rank, processes) for rank in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(1)
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    assert len(samplers[0]) % batch_size == 0  # whole batches: as many in each process
    alone, own = epoch_order(num_rows, 3, 1).tolist(), batch_size * accumulation
    for step in range(-(-num_rows // (own * processes))):
        together = [row for share in shares for row in share[step * own : (step + 1) * own]]
        expected = alone[step * own * processes : (step + 1) * own * processes]
        assert sorted(row for row in together if row != FILLER) == sorted(expected)
        # The last step alone is filled up, and by less than a round.
        assert together.count(FILLER) == -len(expected) % (batch_size * processes)
