"""Updates over moments in host memory: to the bit those over moments on the card, in whatever pieces."""

from __future__ import annotations

import importlib
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from steep.kernels import adamw8bit as kernels
from steep.ops import host_states, piece_tables
from steep.ops.adamw8bit import Update, adamw8bit, noise_key
from steep.ops.host_states import HostState, Staging, staging_bytes, state_bytes
from tests.ops.routes import cases
from tests.ops.test_adamw8bit import BF16, DTYPES, FP32, KINDS, along, maps, tensors, written

adamw8bit_module = importlib.import_module("steep.ops.adamw8bit")

SIZES = (4097, 100, 12_289, 4096)
LARGE = (2**24 + 5, 2**22, 3 * 2**24, 100)


def hosted(updates: list[Update], device: str) -> list[tuple[Update, HostState]]:
    """The same updates with their moments on the host."""
    given = [[tensor.cpu() for tensor in written(update)[1:]] for update in updates]
    states = host_states.host_states(given, torch.device(device))
    found = []
    for update, state in zip(updates, states, strict=True):
        first, second, *rest = state.tensors
        scales = (rest[0], rest[1]) if state.coded else None
        low = rest[-1] if state.master else None
        found.append((replace(update, moments=(first, second), scales=scales, low=low), state))
    return found


def moved(update: Update) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in written(update)]


def differ(one: Update, other: Update) -> bool:
    return not all(torch.equal(*pair) for pair in zip(moved(one), moved(other), strict=True))


@pytest.mark.parametrize(("route", "sizes", "piece"), cases([(SIZES, 2**12)], real=[(LARGE, 2**24)]))
@pytest.mark.parametrize(
    ("dtype", "gradient", "coded", "masters", "launches"),
    [*((*dtypes, True, False, (8, 6)) for dtypes in DTYPES), *((BF16, BF16, *kind, None) for kind in KINDS)],
)
def test_pieces_are_the_whole_to_the_bit(
    route: str,
    sizes: tuple[int, ...],
    piece: int,
    dtype: torch.dtype,
    gradient: torch.dtype,
    coded: bool,
    masters: bool,
    launches: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over several steps, whose pieces meet other slots each time."""
    monkeypatch.setattr(host_states, "PIECE", piece)
    device = "cuda" if route == "gpu" else "cpu"
    whole, given = (
        tensors(sizes, dtype, gradient, device, coded=coded, masters=masters and dtype == BF16) for _ in range(2)
    )
    ours, factor = hosted(given, device), torch.tensor([0.37], device=device)
    of_batches = [{one.state.coded for one in batch.pieces} for batch in host_states._batches(s for _, s in ours)]
    of_pieces = sum(map(len, of_batches))
    assert launches is None or of_pieces == launches[sizes == LARGE]
    staging = Staging(torch.device(device))
    steps = 1 if route == "interpreter" else 3
    for step in range(steps):
        scale = factor if step < 2 else None
        with along(route, kernels, launch=(2 if coded else 1) + of_pieces):
            adamw8bit(whole, maps(device), scale)
            done = staging.run(ours, maps(device), scale)
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        for update in (*whole, *(update for update, _ in ours)):
            update.gradient.mul_(-1.5)  # what is queued behind the event
    staging.synchronize()
    for wanted, (update, _) in zip(whole, ours, strict=True):
        assert not differ(update, wanted)


def test_tables_of_pieces_follow_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step to step: addresses and dtypes of gradients, rates, keys, and the slots. All is sent in one copy, and no
    owners again."""
    monkeypatch.setattr(host_states, "PIECE", 2**12)
    sizes = (100, 200, 4096)  # two batches
    whole, ours = tensors(sizes, BF16, BF16), hosted(tensors(sizes, BF16, BF16), "cpu")
    staging, sent = Staging(torch.device("cpu")), list[int]()
    for module in (adamw8bit_module, piece_tables):
        monkeypatch.setattr(module, "upload", lambda table, device: sent.append(table.numel()) or table)
    draw = torch.Generator().manual_seed(4)
    for step, dtype in enumerate((BF16, BF16, FP32, BF16)):
        given = [torch.randn(size, generator=draw).to(dtype) for size in sizes]
        new = {"lr": 1e-3 * (1 + step), "step": 7 + step, "key": noise_key(1, step, 2)}
        whole = [replace(one, gradient=gradient, **new) for one, gradient in zip(whole, given, strict=True)]
        ours = [
            (replace(one, gradient=gradient, **new), state) for (one, state), gradient in zip(ours, given, strict=True)
        ]
        with along("interpreter", kernels, launch=2 + 2):
            adamw8bit(whole, maps())
            sent.clear()
            staging.run(ours, maps())
        assert len(sent) == (3 if step == 0 else 1)
        for wanted, (update, _) in zip(whole, ours, strict=True):
            assert not differ(update, wanted)
    (batches,) = staging._batches.values()
    assert sorted(batches.tables) == [0, 1, 2]


class Stream:
    """Of a card that there is not: says when it is taken."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_event(self, event: Event) -> None:
        assert event.recorded


class Event:
    made = 0

    def __init__(self) -> None:
        Event.made += 1
        self.recorded: Stream | None = None

    def record(self, stream: Stream) -> None:
        assert self.recorded in (None, stream)
        self.recorded = stream


def test_streams_are_taken_in_turn_and_events_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_states, "PIECE", 2**12)
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: told.append(stream.name))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(host_states, "adamw8bit", lambda *given: told.append("launch"))
    staging: Any = Staging(torch.device("cpu"))
    for name in ("up", "compute", "down"):
        getattr(staging, f"_{name}")._stream = Stream(name, told)
    updates = hosted(tensors((4096, 4097), FP32, FP32), "cpu")  # three batches
    made = []
    for _ in range(3):
        before = Event.made
        staging.run(updates, maps())
        made.append(Event.made - before)
    assert told == 9 * ["up", "compute", "launch", "down"]
    assert made == [2 + 3 + 1, 1, 1]  # of the lanes, the batches, and the end of the call


def test_the_stream_of_before_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an error too, and so is the device."""
    told: list[object] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", told.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(told.append(device)))
    with pytest.raises(RuntimeError), host_states._own_streams(torch.device("cuda", 1)):
        raise RuntimeError
    assert told == [torch.device("cuda", 1), "before"]


def test_the_noise_of_a_piece_is_that_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are rounded as if each were a tensor of its own differ, in their weights alone."""
    monkeypatch.setattr(host_states, "PIECE", 2**12)
    part = host_states.part
    monkeypatch.setattr(host_states, "part", lambda update, *rest: replace(part(update, *rest), key=update.key))
    (whole,), ours = tensors((12_289,), BF16, BF16), hosted(tensors((12_289,), BF16, BF16), "cpu")
    adamw8bit([whole], maps())
    Staging(torch.device("cpu")).run(ours, maps())
    same = [torch.equal(*pair) for pair in zip(moved(whole), moved(ours[0][0]), strict=True)]
    assert same == [False, True, True, True, True]
    assert torch.equal(whole.parameter[:4096], ours[0][0].parameter[:4096])


def test_small_tensors_share_a_slot_and_large_ones_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_states, "PIECE", 2**13)
    launches: list[list[int]] = []
    monkeypatch.setattr(
        host_states, "adamw8bit", lambda parts, *rest: launches.append([one.parameter.numel() for one in parts])
    )
    updates = hosted(tensors((100, 200, 4096, 4096, 2**14 + 1), FP32, FP32), "cpu")
    Staging(torch.device("cpu")).run(updates, maps())
    assert launches == [[100, 200, 4096], [4096], [8192], [8192], [1]]


def test_what_is_updated_together_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors that share a block and a slot; of a piece a range is a copy, and so are blocks that stand apart."""
    monkeypatch.setattr(host_states, "PIECE", 2**13)
    slot = torch.empty(state_bytes(2**13), dtype=torch.uint8)

    def copied(states: list[HostState]) -> list[list[int]]:
        return [[host.numel() for host, _ in batch.in_slot(0, slot).copies] for batch in host_states._batches(states)]

    states = [state for _, state in hosted(tensors((100, 300, 4096, 2**14), FP32, FP32), "cpu")]
    small = sum(state_bytes(state.numel, state.coded) for state in states[:3])
    assert copied(states) == [[small], [2**13, 2**13, 128, 128], [2**13, 2**13, 128, 128]]
    (batch, *_) = host_states._batches(states)
    ((host, card),) = batch.in_slot(0, slot).copies
    card.copy_(host)
    for of_slot, state in zip(batch.in_slot(0, slot).pieces, states, strict=False):
        assert all(torch.equal(one, two.view(-1)) for one, two in zip(of_slot.state, state.tensors, strict=True))
    one = [state for size in (100, 300) for _, state in hosted(tensors((size,), FP32, FP32), "cpu")]
    assert [len(batch) for batch in copied(one)] == [2]


def test_batches_of_so_many_pieces_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the tensors that have a gradient: it may be others each step. What is let go of is gone."""
    monkeypatch.setattr(host_states, "KEPT", 4)
    updates = hosted(tensors((100, 200, 4096), FP32, FP32), "cpu")
    staging, alive = Staging(torch.device("cpu")), weakref.ref(updates[0][1])
    for some in (updates, updates[1:], updates[:1], updates[1:]):
        staging.run(some, maps())
    assert list(map(len, staging._batches)) == [2, 1]
    states = [state for _, state in updates]
    del updates, some
    staging.forget(states[1:])
    assert list(map(len, staging._batches)) == [1]
    staging.forget(states[:1])
    del states
    assert alive() is None


def test_bytes() -> None:
    assert state_bytes(2**23) == 2 * 2**23 + 2 * 2**17 == staging_bytes() // 3
    assert state_bytes(1000, coded=False) == 2 * 4032
    assert state_bytes(2**23, master=True) == state_bytes(2**23) + 2 * 2**23
    codes = [torch.arange(300).view(3, 100).to(torch.uint8), torch.ones(3, 100, dtype=torch.uint8)]
    scales = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    moments, low = [torch.randn(3, 100) for _ in range(2)], torch.arange(-150, 150).view(3, 100).short()
    for given in ([*codes, *scales], moments, [*codes, *scales, low], [*moments, low]):
        (state,) = host_states.host_states([given], torch.device("cpu"))
        assert all(torch.equal(*pair) for pair in zip(state.tensors, given, strict=True))
        assert all(one.is_contiguous() for one in state.tensors)
        assert len({one.data_ptr() % 64 for one in state.tensors}) == 1
        assert (state.coded, state.master) == (len(given) > 3, given[-1] is low)


@pytest.mark.parametrize(("coded", "masters"), [(True, False), *KINDS])
def test_a_piece_fills_a_slot(coded: bool, masters: bool) -> None:
    """As far as a power of two can, so that noise is that of the whole tensor, and never more."""
    (update,) = tensors((2**14,), BF16, BF16, coded=coded, masters=masters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_states, "PIECE", 2**12)
        ((_, state),) = hosted([update], "cpu")
        sizes = {piece.stop - piece.start for piece in state.pieces()}
        assert sizes == {
            2**12 // {(True, False): 1, (True, True): 2, (False, False): 4, (False, True): 8}[coded, masters]
        }
        (size,) = sizes
        assert state_bytes(size, coded, masters) <= state_bytes(2**12) < state_bytes(2 * size, coded, masters)


@pytest.mark.gpu
def test_streams_are_ordered_by_events_alone() -> None:
    """The card is kept busy while everything is queued: a piece that came too early, or an update that was read too
    early, would show."""
    device = torch.device("cuda")
    sizes = (5 * 2**24 + 3,)
    whole, given = tensors(sizes, BF16, BF16, "cuda"), tensors(sizes, BF16, BF16, "cuda")
    ours = hosted(given, "cuda")
    staging, tables = Staging(device), maps("cuda")
    busy = torch.randn(8192, 8192, device=device)
    others = hosted(tensors((2**24,), BF16, BF16, "cuda"), "cuda")
    adamw8bit([others[0][0]], tables)  # compiled, and the streams made
    staging.run(others, tables)
    for _ in range(3):
        for _ in range(5):
            busy = (busy @ busy).clamp(-1, 1)
        for update in (*whole, ours[0][0]):
            update.gradient.add_(1)
        adamw8bit(whole, tables)
        done = staging.run(ours, tables)
        assert done is not None and not done.query()
        torch.cuda.current_stream().wait_event(done)
        assert torch.equal(ours[0][0].parameter, whole[0].parameter)
    staging.synchronize()
    assert not differ(ours[0][0], whole[0])
