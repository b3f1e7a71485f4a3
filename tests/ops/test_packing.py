"""Where documents lie in a batch."""

from __future__ import annotations

import pytest
import torch

from steep.ops.packing import Packing


def test_lengths() -> None:
    packing = Packing.from_lengths([3, 1, 4], "cpu")
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert (packing.num_tokens, packing.max_length, packing.uniform) == (8, 4, None)
    assert packing.slices == (slice(0, 3), slice(3, 4), slice(4, 8))


def test_equal_lengths_are_uniform() -> None:
    assert Packing.from_lengths([5, 5], "cpu").uniform == 5
    assert Packing.from_lengths([5], "cpu").uniform == 5


def test_a_document_starts_at_position_0_and_never_goes_over_rows() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    packing = Packing.from_positions(positions)
    assert packing.lengths == (3, 2, 1, 4)
    assert packing.cu_seqlens.tolist() == [0, 3, 5, 6, 10]


@pytest.mark.parametrize(
    "positions",
    [
        [[0, 1], [2, 3]],  # a document that goes over rows
        [[1, 2, 3]],  # padding on the left, cut off
        [[0, 1, 1, 1]],  # padding on the right, as it is often filled
        [[0, 2]],
        [[0, 1, -1]],
    ],
)
def test_other_positions_are_refused(positions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="count up by 1"):
        Packing.from_positions(torch.tensor(positions))


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows, tokens"):
        Packing.from_positions(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="rows, tokens"):
        Packing.from_positions(torch.empty(0, 4, dtype=torch.long))


@pytest.mark.parametrize("lengths", [[], [2, 0]])
def test_empty_documents_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Packing.from_lengths(lengths, "cpu")


def test_what_is_derived_is_made_once() -> None:
    packing, made = Packing.from_lengths([2], "cpu"), []
    for _ in range(2):
        assert packing.derived("key", lambda: made.append(1) or "value") == "value"
    assert made == [1]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # of the one cycle that there is
def test_positions_on_the_card_take_one_transfer() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]], device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        packing = Packing.from_positions(positions)
    assert packing.cu_seqlens.is_cuda
    assert packing.lengths == (3, 2)
    assert sum(event.count for event in profile.key_averages() if "Memcpy DtoH" in event.key) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_does_not_wait_for_the_card() -> None:
    """The second time: the first one's page-locked memory is new."""
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            packing = Packing.from_lengths([3, 1, 4], "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 8]
