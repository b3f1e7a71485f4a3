"""What the card that is here reaches on bare work, measured in about two seconds before a run: products of a layer's
width, copies on the card and to its host, and attention.

Each is repeated until the clocks are those of work that goes on, which a card's power limits: short bursts of products
are 18 % faster on an H200 than those of a step. Then its time is the median of repeated runs. Numbers are random: on
zeros a card draws less power, and is faster. They are drawn by a generator of their own, so that the run draws what it
would have drawn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch

from steep.data.packed_dataset import PackedDataset
from steep.model.backends import Backends
from steep.model.layer import Attention, Layer
from steep.model.machine import Card
from steep.ops.attention import attention_backward, attention_forward
from steep.ops.fp8 import E4M3
from steep.ops.packing import Packing
from steep.ops.pinned import pinned_zeros
from steep.planning.step_work import ATTENTION_BACKWARD, attention_work, mean_document
from steep.training.deterministic import deterministic

T = TypeVar("T")
Launch = Callable[[], object]
Clock = Callable[[Launch, int], float]  # seconds that so many launches take, one behind the other

SECONDS = 1.6  # of all measurements, by the card's clock; libraries take up to another second to be loaded
# Shares of that time. The first has the card's clocks settle for those behind it; the last is each way.
_PRODUCTS, _FP8, _ATTENTION, _COPY, _LINK = 0.5, 0.16, 0.14, 0.06, 0.07
_WARM = 0.5  # of each share, not counted
_SAMPLES, _FEWEST = 20, 3  # of a share's time, about; at least
_TOKENS = 4096  # of a product
_COPIED, _LINKED = 2**28, 2**26  # bytes: more than any second-level cache; more than a copy takes to begin
_LONGEST = 16_384  # tokens of attention
_OF_CUDA = 2**30  # bytes of a card that CUDA itself keeps for a process, at most
_APART = 0.25  # of a median: samples of a card that has nothing else to do are within a few percent
_BUSY = "the card was busy while it was measured"
_COMPILED = ("flex",)  # compiling it takes longer than all the rest


@dataclass(frozen=True)
class Measured:
    """Rates of bare work.

    Attributes:
        products: operations a second, in the run's dtype.
        fp8: in e4m3; None: the card has no units for it.
        copied: bytes a second, read and written, of a copy on the card.
        to_host, from_host: bytes a second between the card and page-locked host memory.
        attention: operations a second, forward and backward, of the backend that the run takes; None: not measured.
    """

    products: float
    fp8: float | None
    copied: float
    to_host: float
    from_host: float
    attention: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """In `plan.json`."""
        return asdict(self)


def clock_of(device: torch.device) -> Clock:
    """By the card's own events; on a CPU by that of the host."""
    return _by_events if device.type == "cuda" else _by_host


@dataclass
class Timer:
    """Times work by a clock.

    Attributes:
        spread: how far samples of one measurement were apart, at most so far: the middle half of them, as a share of
            their median.
    """

    clock: Clock
    spread: float = 0.0

    def seconds_each(self, launch: Launch, seconds: float) -> float:
        """Median time of a launch, of samples of as many launches as a clock can tell apart; the first half is not
        counted.

        Args:
            seconds: that it may take, by the clock: but for at least three samples.
        """
        self.clock(launch, 1)  # libraries are loaded, and choose their kernels
        count, spent = 1, 0.0
        while spent < _WARM * seconds:
            took = self.clock(launch, count)
            spent += took
            if took < seconds / _SAMPLES:
                count *= 2
        samples, spent = [], 0.0
        while spent < (1 - _WARM) * seconds or len(samples) < _FEWEST:
            took = self.clock(launch, count)
            samples.append(took / count)
            spent += took
        low, _, high = statistics.quantiles(samples, n=4)
        median = statistics.median(samples)
        self.spread = max(self.spread, (high - low) / median)
        return median


def measure(
    hidden: int,
    inner: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_fp8_units: bool,
    timer: Timer | None = None,
    seconds: float = SECONDS,
) -> Measured:
    """Rates of bare work, but for attention.

    Args:
        hidden, inner: inputs and outputs of a product.
        tokens: of the run's batch.
        seconds: that all measurements, with attention's, may take.

    Raises:
        RuntimeError: memory ran out, or the card cannot do it.
        OSError: the host's memory ran out.
    """
    timer, tokens = timer or Timer(clock_of(device)), min(tokens, _TOKENS)
    return Measured(
        products=_products(hidden, inner, tokens, dtype, device, timer, _PRODUCTS * seconds),
        fp8=_fp8(hidden, inner, tokens, dtype, device, timer, _FP8 * seconds) if has_fp8_units else None,
        copied=_copied(device, timer, _COPY * seconds),
        **_linked(device, timer, _LINK * seconds),
    )


def measure_attention(
    attention: Attention,
    lengths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    of_run: bool = False,
    timer: Timer | None = None,
    seconds: float = SECONDS,
) -> float | None:
    """Operations a second of attention, forward and backward; None: its backend would have to be compiled.

    Args:
        lengths: of documents, see `documents`.
        of_run: kernels have to be deterministic.
        seconds: as of `measure`.
    """
    timer, packing = timer or Timer(clock_of(device)), Packing.from_lengths(lengths, device)
    with deterministic(of_run):
        backend = Backends().backend(attention, packing, dtype, trains=True)
        if backend in _COMPILED:
            return None
        noise = _generator(device)
        num_heads, num_kv_heads, head_dim = attention.heads
        q, k, v, dout = (
            _random((packing.num_tokens, heads, head_dim), dtype, noise)
            for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
        )
        window = attention.window if attention.window and attention.window < packing.max_length else None
        options = {"scale": attention.scale, "window": window, "softcap": attention.softcap, "backend": backend}

        def launch() -> None:
            out, saved = attention_forward(q, k, v, packing, **options)
            attention_backward(dout, q, k, v, out, saved, packing, **options)

        each = timer.seconds_each(launch, _ATTENTION * seconds)
    return packing.num_tokens * _operations(attention, lengths) / each


def documents(
    attention: Attention, tokens: int, document: float, *, uneven: bool, rate: float, seconds: float = SECONDS
) -> list[int]:
    """Lengths of documents to measure attention on: as a batch has them, or shorter, so that the time has room for a
    few runs of it. Of long ones it is faster: 16,384 tokens are nearer to 131,072 than 4,096 are.

    Args:
        tokens: of a batch.
        document: mean length of the document that a token is in.
        uneven: they are not all of one length, which other backends compute.
        rate: operations a second of products, of which attention is taken to reach a fifth.
    """
    tokens, length = min(tokens, _LONGEST), max(round(document), 1)
    most = rate / 5 * _ATTENTION * seconds / (_FEWEST + 1)
    while tokens > 1 and tokens * _operations(attention, [min(length, tokens)]) > most:
        tokens -= min(1024, tokens // 2)  # halves would make a rate of a percent less one of documents half as long
    length = min(length, tokens)
    lengths = [length] * (tokens // length)
    if uneven and length >= 3:
        lengths[:1] = [length - length // 3, length // 3]
    return lengths


def measured_here(layer: Layer, tokens: int, dtype: torch.dtype, card: Card, notes: list[str]) -> Measured | None:
    """What the card of this process reaches, but for attention; None where it failed, which is noted.

    Args:
        tokens: of a batch.
    """
    hidden, inner = layer.down.weight.shape
    has_units, device = card.has_fp8_units, _card()
    timer = Timer(clock_of(device))
    found = _told(
        lambda: measure(hidden, inner, tokens, dtype, device, has_fp8_units=has_units, timer=timer),
        "the time of a step is estimated from its maker's figures, where they are known",
        notes,
    )
    if found is not None:
        _note_if_busy(timer, card.memory - card.free, notes)
    return found


def with_attention(
    measured: Measured,
    layer: Layer,
    rows: PackedDataset,
    batch: int,
    dtype: torch.dtype,
    notes: list[str],
    *,
    of_run: bool,
) -> Measured:
    """`measured` and attention, over documents as the text has them; without it where it failed, which is noted, or
    would take too long.

    Args:
        batch: rows of a batch.
        of_run: see `measure_attention`.
    """
    # A batch counts as even only if all of its documents are of one length. Rows are drawn at random: with a share p
    # that is one document, p^batch of the batches are even, and most have to be.
    uneven = rows.whole_rows**batch <= 0.5
    attention, document, device = layer.attention, mean_document(rows.length), _card()
    tokens = batch * rows.max_length
    of_batch = documents(attention, tokens, document, uneven=uneven, rate=measured.products)
    timer = Timer(clock_of(device))
    found = _told(
        lambda: measure_attention(attention, of_batch, dtype, device, of_run=of_run, timer=timer),
        "attention is taken to reach its usual share of the products",
        notes,
    )
    _note_if_busy(timer, 0, notes)
    return replace(measured, attention=found)


def _note_if_busy(timer: Timer, held: int, notes: list[str]) -> None:
    """Once.

    Args:
        held: bytes of the card that this process cannot have.
    """
    signs = [f"others hold {held / 2**30:.3g} GiB of it"] if held > _OF_CUDA else []
    if timer.spread > _APART:
        signs.append(f"the same work took times up to {timer.spread:.0%} apart")
    if signs and not any(note.startswith(_BUSY) for note in notes):
        notes.append(f"{_BUSY} ({', '.join(signs)}): by itself it may be faster")


def _card() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _told(measurement: Callable[[], T], otherwise: str, notes: list[str]) -> T | None:
    """What `measurement` gives, with the card's memory given back, and a peak that a run begins with; or None, and a
    note why. Whatever goes wrong there (libraries raise errors of many kinds): a plan can do without.

    Args:
        otherwise: what that means for the plan.
    """
    before, found = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0, None
    try:
        found = measurement()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].removesuffix(".")
        named = ": ".join(filter(None, (type(error).__name__, reason)))
        notes.append(f"the card could not be measured ({named}): {otherwise}")
    if torch.cuda.is_available():  # here the error is gone, and with it what its frames held
        with suppress(RuntimeError):  # the card itself failed, which is noted
            torch.cuda.empty_cache()
            if torch.cuda.max_memory_allocated() > before:
                torch.cuda.reset_peak_memory_stats()
    return found


# ---- what is measured


def _products(
    hidden: int, inner: int, tokens: int, dtype: torch.dtype, device: torch.device, timer: Timer, seconds: float
) -> float:
    """A product of a layer and that to its input."""
    noise = _generator(device)
    x, dy, weight = (_random(shape, dtype, noise) for shape in ((tokens, hidden), (tokens, inner), (inner, hidden)))
    each = timer.seconds_each(lambda: (x @ weight.t(), dy @ weight), seconds)
    return 4 * tokens * hidden * inner / each


def _fp8(
    hidden: int, inner: int, tokens: int, dtype: torch.dtype, device: torch.device, timer: Timer, seconds: float
) -> float:
    """The same in e4m3. Its sizes are multiples of 16."""
    hidden, inner, tokens = (-(-size // 16) * 16 for size in (hidden, inner, tokens))
    noise, one = _generator(device), torch.ones((), device=device)
    shapes = ((tokens, hidden), (tokens, inner), (inner, hidden), (hidden, inner))
    x, dy, weight, transposed = (_random(shape, torch.bfloat16, noise).to(E4M3) for shape in shapes)
    out = dtype if dtype.itemsize == 2 else torch.bfloat16

    def launch() -> None:
        for rows, columns in ((x, weight), (dy, transposed)):
            torch._scaled_mm(rows, columns.t(), scale_a=one, scale_b=one, out_dtype=out, use_fast_accum=True)

    return 4 * tokens * hidden * inner / timer.seconds_each(launch, seconds)


def _copied(device: torch.device, timer: Timer, seconds: float) -> float:
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    return 2 * source.numel() / timer.seconds_each(lambda: out.copy_(source), seconds)


def _linked(device: torch.device, timer: Timer, seconds: float) -> dict[str, float]:
    """As `steep.model.host_store` copies."""
    there = torch.zeros(_LINKED, dtype=torch.uint8, device=device)
    here = pinned_zeros((_LINKED,), torch.uint8, device, "the copies of a step are measured slower than they could be")

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        return target.numel() / timer.seconds_each(lambda: target.copy_(source, non_blocking=True), seconds)

    return {"to_host": rate(here, there), "from_host": rate(there, here)}


def _operations(attention: Attention, lengths: Sequence[int]) -> float:
    """A token, in both directions."""
    return (1 + ATTENTION_BACKWARD) * attention_work(attention, mean_document(lengths))


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=generator.device).normal_(generator=generator)


# ---- clocks


def _by_host(launch: Launch, count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        launch()
    return time.perf_counter() - begun


def _by_events(launch: Launch, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
