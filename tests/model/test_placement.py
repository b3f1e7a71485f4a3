"""Where what layers keep is: bytes on the GPU and in host memory, and the fewest layers with something there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steep.model.block import PLACES
from steep.model.install import fused_of, install
from steep.model.placement import HIDDEN, Kept
from steep.model.read_layer import read_layer
from steep.model.recompute import levels_within
from steep.model.step_bytes import products_a_byte, stored_bytes, work_bytes
from steep.model.unwrap import unwrap
from tests.model.test_fused import adapted, loss_and_gradients, packed
from tests.model.test_recompute import layer_of_8b
from tests.tiny import FAMILIES, tiny_model

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def of_8b() -> Kept:
    return Kept.of([layer_of_8b()], BF16, BF16, "none", 1000)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_the_host_has_what_is_planned(family: str, level: int) -> None:
    """Buffers of a model that trained, but for sums that not every backend of attention keeps."""
    model = adapted(tiny_model(family))
    layer = unwrap(model).model.layers[0]
    for number, place in enumerate(PLACES[1:], 1):
        install(model, levels=level, places=place)
        loss_and_gradients(model, packed())
        read = read_layer(layer, layer.traits)
        planned = 128 * stored_bytes(read, torch.float32, torch.float32)[level][number].on_host
        sums = 128 * 4 * read.attention.num_heads if level <= 2 and number > 1 else 0
        for buffer in fused_of(model)._host._buffers.values():
            assert planned - sums <= buffer.numel() <= planned
        del unwrap(model).fused, unwrap(model).model.fused


def test_places_hold_more_and_more() -> None:
    read = layer_of_8b()
    found = stored_bytes(read, BF16, BF16)
    there = [[each.on_host for each in places] for places in found]
    assert all(sorted(each) == each and each[0] == 0 for each in there)
    assert [each[1] for each in there] == [8192] * 4
    kept, sums = 3 * 8192 + 6144 * 2, 32 * 4
    assert there[1] == [0, 8192, kept + sums, kept + sums] and there[3] == [0, 8192, 8192, 8192]
    assert there[2] == [0, 8192, 2 * 8192 + sums, 2 * 8192 + sums]  # without x2
    assert [each.on_gpu for each in found[2]] == [3 * 8192 + sums, 2 * 8192 + sums, 0, 0]


def test_copies_that_compute_hides(of_8b: Kept) -> None:
    """Of an 8B all that level 1 keeps; of a narrow model its input alone. Gate and up never."""
    assert [PLACES[number] for number in of_8b.furthest] == ["attention", "attention", "attention", "x"]
    read = layer_of_8b()
    assert HIDDEN < products_a_byte(read, stored_bytes(read, BF16, BF16)[1][2].on_host) < 1.5 * HIDDEN
    tiny = unwrap(adapted(tiny_model("llama"))).model.layers[0]
    narrow = Kept.of([read_layer(tiny, install_traits())], BF16, BF16, "none", 1000)
    assert narrow.furthest == [0, 0, 0, 0]
    assert narrow.most([3, 3, 3], 10**12) == ["x", "x", "x"]  # where nothing else is left


def install_traits() -> Any:
    return unwrap(install(adapted(tiny_model("llama")))).model.layers[0].traits


def test_the_gpu_has_the_rest_and_two_slots(of_8b: Kept) -> None:
    x, whole = of_8b.on_host[3][1], of_8b.on_host[1][-1]
    everywhere: Any = ["gpu"] * 4
    assert of_8b.on_gpu([3] * 4, everywhere) == 4 * x and of_8b.in_host_memory([3] * 4, everywhere) == 0
    assert of_8b.in_backward([3] * 4, everywhere) == [(0, x), (3, 4 * x)]
    three: Any = ["x"] * 3 + ["gpu"]
    assert of_8b.on_gpu([3] * 4, three) == x and of_8b.in_host_memory([3] * 4, three) == 3 * x
    # the last layer's own and one slot; then two slots
    assert of_8b.in_backward([3] * 4, three) == [(0, 2 * x), (2, 2 * x), (3, 2 * x)]
    mixed: Any = ["attention", "x", "gpu", "gpu"]
    assert of_8b.in_host_memory([1] * 4, mixed) == whole + x
    assert of_8b.in_backward([1] * 4, mixed) == [
        (0, 2 * whole),
        (1, whole - x + 2 * whole),
        (2, whole - x + whole + whole),
        (3, whole - x + 2 * whole),
    ]
    gate_up = of_8b.on_host[0][3] - of_8b.on_host[0][2]
    assert of_8b.in_backward([0], ["all"]) == [(0, of_8b.on_host[0][3] + gate_up)]


def test_a_long_sequence_has_one_slot() -> None:
    """Of inputs from 65,536 tokens of an 8B on; where a layer has more than x and a on the host, two."""
    here: Any = ["attention"] * 4
    for tokens, slots in ((65_535, 2), (65_536, 1)):
        kept = Kept.of([layer_of_8b()], BF16, BF16, "none", tokens)
        x, with_a, whole = kept.on_host[3][1], kept.on_host[2][2], kept.on_host[1][-1]
        three: Any = ["x"] * 3 + ["gpu"]
        assert kept.in_backward([3] * 4, three) == [(0, slots * x), (2, slots * x), (3, slots * x)]
        assert kept.in_backward([2] * 4, here)[0] == (0, with_a)
        assert kept.in_backward([1] * 4, here)[0] == (0, 2 * whole)


def test_as_few_as_fit(of_8b: Kept) -> None:
    levels = [1] * 8
    asked: list[Any] = []

    def within(limit: int, room: int = 10**15) -> Any:
        def fits(places: Any) -> bool:
            asked.append(places)
            return max(own for _, own in of_8b.in_backward(levels, places)) <= limit

        return of_8b.fewest(levels, room, fits)

    x, whole = of_8b.on_host[1][1], of_8b.on_host[1][-1]
    assert within(8 * whole) == ["gpu"] * 8 and len(asked) == 1
    for limit in range(3 * whole, 8 * whole, x):
        places = within(limit)
        assert max(own for _, own in of_8b.in_backward(levels, places)) <= limit
        fewer = of_8b._places(levels, of_8b._reach(levels, of_8b.in_host_memory(levels, places)) - 1)
        assert max(own for _, own in of_8b.in_backward(levels, fewer)) > limit
        assert places[-1] == "gpu"  # whose backward pass comes at once
    assert within(2 * whole) == ["attention"] * 7 + ["gpu"] and within(2 * whole - 1) is None
    assert within(6 * whole, room=0) is None
    assert within(8 * whole - 4 * x, room=4 * x) == ["x"] * 4 + ["gpu"] * 4
    assert within(8 * whole - 4 * x, room=4 * x - 1) is None
    assert of_8b.most(levels, 7 * x + 2 * (whole - x)) == ["attention"] * 2 + ["x"] * 5 + ["gpu"]


def test_the_last_layer_goes_to_the_host_last() -> None:
    """With all that it keeps: of a long sequence, whose layers have one slot, and at the loss."""
    kept = Kept.of([layer_of_8b()], BF16, BF16, "none", 131_072)
    levels, with_a = [2] * 4, kept.on_host[2][2]
    everywhere: Any = ["attention"] * 4
    most = kept.in_host_memory(levels, everywhere)

    def within(limit: int, room: int) -> Any:
        def fits(places: Any) -> bool:
            own = [each for _, each in kept.in_backward(levels, places)]
            return max(*own, kept.on_gpu(levels, places)) <= limit

        return kept.fewest(levels, room, fits)

    assert within(with_a, most) == everywhere
    assert within(with_a, most - 1) is None
    assert within(with_a + 2**30, most) == ["attention"] * 3 + ["gpu"]  # which keeps x2 too
    assert kept.on_gpu(levels, everywhere) == 0


def test_the_host_comes_before_computing_again(of_8b: Kept) -> None:
    """As far as there is host memory; a room that it has not changes nothing."""
    read, tokens = layer_of_8b(), 1000
    work = [work_bytes(read, BF16, BF16, level, tokens) for level in range(4)]

    def within(room: float, host_room: int) -> Any:
        return levels_within(room, host_room, 8, read, BF16, BF16, tokens, 0)[:2]

    kept = [each[-1] for each in of_8b.on_host]
    everything = 8 * kept[0] + work[0]
    assert within(everything, 10**12) == ([0] * 8, ["gpu"] * 8)
    levels, places = within(everything - 1, 10**12)
    assert levels == [0] * 8 and places[0] == "x" and places[-1] == "gpu"
    assert within(everything - 1, 0) == ([1] + [0] * 7, ["gpu"] * 8)
    levels, places = within(2 * kept[1] + work[1], 10**12)
    assert max(levels) <= 1 and "attention" in places
    assert within(0, 10**12) == ([3] * 8, ["x"] * 8)
    assert within(0, 3 * of_8b.on_host[3][1]) == ([3] * 8, ["x"] * 3 + ["gpu"] * 5)
