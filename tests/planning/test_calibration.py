"""What a card reaches is measured: by a clock of the test's own, on the CPU as far as it goes, and on a card."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steep.data.packed_dataset import PackedDataset
from steep.data.rows import pack_best_fit
from steep.errors import RunError, UserError
from steep.model import machine
from steep.model.layer import Attention
from steep.model.machine import Card, card_here
from steep.model.placement import HIDDEN
from steep.plan import Plan, plan_run
from steep.planning import calibration
from steep.planning.calibration import (
    SECONDS,
    Measured,
    Timer,
    clock_of,
    documents,
    measure,
    measure_attention,
    measured_here,
    with_attention,
)
from steep.planning.fusing import fused_step
from steep.planning.rates import rates_of
from steep.planning.step_work import attention_work, mean_document
from steep.run import train_run
from steep.terminal import plan_tables
from tests.command_line import Steep
from tests.model.test_recompute import layer_of_8b
from tests.test_fused_run import fused_file

CPU = torch.device("cpu")
CARD = Card("NVIDIA Test", (9, 0), 80 * 2**30, 79 * 2**30)
FOUND = Measured(products=6e14, fp8=1.2e15, copied=4e12, to_host=5e10, from_host=5.5e10)


class Ticking:
    """A clock by which the n-th call takes `times(n)` a launch."""

    def __init__(self, times: Callable[[int], float]) -> None:
        self.times, self.counts, self.launched = times, [], 0

    def __call__(self, launch: Callable[[], object], count: int) -> float:
        for _ in range(count):
            launch()
        self.counts.append(count)
        return count * self.times(len(self.counts))

    def launch(self) -> None:
        self.launched += 1


class OfACompiler(Exception): ...


def rows_of(lengths: list[int], max_length: int) -> PackedDataset:
    """Documents of these lengths in rows."""
    numbers = np.arange(len(lengths), dtype=np.int32)
    mixture: Any = SimpleNamespace(source=np.zeros_like(numbers), document=numbers)
    return PackedDataset([], mixture, pack_best_fit(np.array(lengths), max_length), max_length, 0)


def attention_of(**others: Any) -> Attention:
    return replace(Attention(2, 1, 8, 8**-0.5, None, None, None, None), **others)


# ---- the time of a launch


def test_a_time_is_the_median_after_a_warm_up() -> None:
    """Of a card that is slow at first, and now and then."""
    clock = Ticking(lambda call: 0.05 if call < 12 else 0.9 if call % 5 == 0 else 0.02)
    assert Timer(clock).seconds_each(clock.launch, 1.0) == 0.02
    assert clock.launched == sum(clock.counts) and clock.counts[0] == 1
    mean = Ticking(lambda call: 0.9)
    assert Timer(mean).seconds_each(mean.launch, 1.0) == 0.9
    assert len(mean.counts) == 1 + 1 + 3  # of what takes long no more than has to be


def test_short_launches_are_timed_together() -> None:
    clock = Ticking(lambda call: 1e-6)
    assert Timer(clock).seconds_each(clock.launch, 0.1) == pytest.approx(1e-6)
    longest = max(clock.counts)
    assert 0.005 <= longest * 1e-6 <= 0.01 and clock.counts[-3:] == [longest] * 3
    assert sum(clock.counts) * 1e-6 < 0.13  # in all about what was given


def test_a_timer_knows_how_far_samples_were_apart() -> None:
    """Of all that it timed the most; one that is late now and then does not count."""
    late, busy = Ticking(lambda call: 0.9 if call % 8 == 0 else 0.02), Ticking(lambda call: 0.02 + 0.02 * (call % 2))
    timer = Timer(late)
    timer.seconds_each(late.launch, 1.0)
    assert timer.spread < 1e-9
    timer.clock = busy
    timer.seconds_each(busy.launch, 1.0)
    timer.clock = late
    timer.seconds_each(late.launch, 1.0)
    assert 0.3 < timer.spread <= 1


def test_a_cpu_has_the_hosts_clock() -> None:
    clock = clock_of(CPU)
    assert 0.02 <= clock(lambda: time.sleep(0.01), 2) < 1
    assert clock_of(torch.device("cuda")) is not clock


# ---- what is measured


def test_rates_are_operations_and_bytes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_COPIED", 2**12)
    monkeypatch.setattr(calibration, "_LINKED", 2**10)
    clock = Ticking(lambda call: 0.5)
    found = measure(48, 80, 40, torch.float32, CPU, has_fp8_units=False, timer=Timer(clock))
    assert found == Measured(4 * 40 * 48 * 80 / 0.5, None, 2 * 2**12 / 0.5, 2**10 / 0.5, 2**10 / 0.5)
    assert found.as_dict()["attention"] is None
    longer = measure(48, 80, 10**6, torch.float32, CPU, has_fp8_units=False, timer=Timer(clock))
    assert longer.products == 4 * 4096 * 48 * 80 / 0.5  # of no more tokens than are needed


def test_products_in_fp8_are_of_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's scaled product wants them, both of whose operands are e4m3."""
    seen = []

    def scaled(rows: torch.Tensor, columns: torch.Tensor, **given: Any) -> None:
        assert rows.dtype == columns.dtype == torch.float8_e4m3fn and rows.shape[1] == columns.shape[0]
        assert rows.is_contiguous() and columns.t().is_contiguous() and not any(size % 16 for size in columns.shape)
        assert rows.float().isfinite().all() and rows.float().std() > 0.5
        seen.append((*rows.shape, columns.shape[1], given["out_dtype"]))

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    monkeypatch.setattr(calibration, "_COPIED", 2**12)
    monkeypatch.setattr(calibration, "_LINKED", 2**10)
    found = measure(40, 80, 30, torch.float32, CPU, has_fp8_units=True, timer=Timer(Ticking(lambda call: 0.5)))
    assert found.fp8 == 4 * 32 * 48 * 80 / 0.5
    assert set(seen) == {(32, 48, 80, torch.bfloat16), (32, 80, 48, torch.bfloat16)}


@pytest.mark.parametrize("others", [{}, {"window": 4}, {"softcap": 20.0}], ids=["plain", "window", "soft cap"])
def test_attention_is_that_of_the_backend_that_runs(others: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    forward = calibration.attention_forward
    monkeypatch.setattr(
        calibration, "attention_forward", lambda *given, **how: ran.append(how) or forward(*given, **how)
    )
    attention, lengths = attention_of(**others), [10, 6]
    clock = Ticking(lambda call: 0.5)
    rate = measure_attention(attention, lengths, torch.float32, CPU, timer=Timer(clock))
    seen = min(mean_document(lengths) / 2, others.get("window", 10**9))
    assert rate == pytest.approx(16 * 3.5 * 4 * seen * 16 / 0.5)
    assert len(ran) == sum(clock.counts) and ran[0]["backend"] in ("sdpa", "reference", "flex")
    assert (ran[0]["window"], ran[0]["softcap"]) == (others.get("window"), others.get("softcap"))


def test_what_has_to_be_compiled_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration.Backends, "backend", lambda *given, **how: "flex")
    assert measure_attention(attention_of(), [8], torch.float32, CPU) is None


def test_documents_are_those_of_a_batch_or_shorter() -> None:
    attention = layer_of_8b().attention
    fast = 6e14
    assert documents(attention, 4096, 2048, uneven=False, rate=fast) == [2048, 2048]
    uneven = documents(attention, 4096, 2048, uneven=True, rate=fast)
    assert len(set(uneven)) > 1 and sum(uneven) == 4096
    assert documents(attention, 4096, 700.2, uneven=False, rate=fast) == [700] * 5
    assert documents(attention, 8, 10**6, uneven=True, rate=fast) == [6, 2]
    for rate in (fast, 1e13):
        (long,) = documents(attention, 131_072, 131_072, uneven=False, rate=rate)
        each = 3.5 * long * attention_work(attention, long) / (rate / 5)
        assert 0.01 < each < SECONDS / 25
    assert documents(attention, 4096, 2048, uneven=True, rate=1.0) == [1]


def test_a_card_that_is_a_percent_slower_is_not_measured_on_documents_half_as_long() -> None:
    """An H200's products reach 683 to 698 TFLOP/s from run to run, and attention in 8,192 tokens 9 % less than in
    16,384."""
    attention = layer_of_8b().attention
    lengths = [
        documents(attention, 131_072, 131_072, uneven=False, rate=rate * 1e12)[0] for rate in (683, 686, 688, 698)
    ]
    assert lengths[-1] == 16_384 and lengths[0] >= 15_360


def test_the_random_numbers_of_a_run_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_COPIED", 2**12)
    monkeypatch.setattr(calibration, "_LINKED", 2**10)
    before = torch.get_rng_state()
    found = measure(16, 32, 8, torch.float32, CPU, has_fp8_units=True, seconds=0.01)
    rate = measure_attention(attention_of(), [8], torch.float32, CPU, seconds=0.01)
    assert torch.equal(torch.get_rng_state(), before)
    rates = (found.products, found.fp8, found.copied, found.to_host, found.from_host, rate)
    assert all(each is not None and each > 0 for each in rates)


# ---- in a plan


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee"), "CUDA out of memory"),
        (MemoryError(), "(MemoryError)"),
        (
            RunError("flash has no deterministic form in torch.\nSet it to false"),
            "RunError: flash has no deterministic",
        ),
        (ValueError("head_dim 96 is not supported"), "ValueError: head_dim 96"),
        (OfACompiler("PTXAS failed"), "OfACompiler: PTXAS failed"),  # as triton's are: of no kind of Python's
    ],
)
def test_a_failure_is_noted_and_the_run_goes_on(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **how: Any) -> None:
        raise error

    monkeypatch.setattr(calibration, "_card", lambda: CPU)
    monkeypatch.setattr(calibration, "measure", fails)
    monkeypatch.setattr(calibration, "measure_attention", fails)
    notes: list[str] = []
    layer = layer_of_8b()
    assert measured_here(layer, 4096, torch.bfloat16, CARD, notes) is None
    assert said in notes[0] and "estimated from its maker's figures" in notes[0] and "\n" not in notes[0]
    found = with_attention(FOUND, layer, rows_of([2048, 2048], 2048), 2, torch.bfloat16, notes, of_run=False)
    assert found == FOUND and said in notes[1] and "its usual share" in notes[1]


def test_a_busy_card_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others hold memory of it, or samples are far apart: of its products, or of attention alone."""
    spread = [0.0, 0.0]

    def found(number: int) -> Callable[..., Any]:
        def measured(*given: Any, timer: Timer, **how: Any) -> Any:
            timer.spread = spread[number]
            return None if number else FOUND

        return measured

    def told(of_products: float, of_attention: float, card: Card = CARD) -> list[str]:
        spread[:], notes = [of_products, of_attention], []
        measured_here(layer_of_8b(), 4096, torch.bfloat16, card, notes)
        with_attention(FOUND, layer_of_8b(), rows_of([512, 512], 512), 1, torch.bfloat16, notes, of_run=False)
        return notes

    monkeypatch.setattr(calibration, "_card", lambda: CPU)
    monkeypatch.setattr(calibration, "measure", found(0))
    monkeypatch.setattr(calibration, "measure_attention", found(1))
    assert told(0.2, 0.25) == []
    shared = replace(CARD, free=40 * 2**30)
    assert told(0.0, 0.0, shared) == [
        "the card was busy while it was measured (others hold 40 GiB of it): by itself it may be faster"
    ]
    (both,) = told(0.4, 0.5, shared)
    assert "others hold 40 GiB of it, the same work took times up to 40% apart" in both
    assert [note.partition("(")[2][:30] for note in told(0.0, 0.5)] == ["the same work took times up to"]


def test_who_interrupts_it_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "_card", lambda: CPU)
    monkeypatch.setattr(calibration, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured_here(layer_of_8b(), 4096, torch.bfloat16, CARD, [])


def test_attention_is_measured_as_the_text_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(calibration, "_card", lambda: CPU)

    def measured(attention: Attention, lengths: list[int], *given: Any, of_run: bool, **how: Any) -> None:
        seen.append((lengths, of_run))

    monkeypatch.setattr(calibration, "measure_attention", measured)
    layer, mostly = layer_of_8b(), [512] * 8 + [100, 200]  # 8 of 9 rows are one document, and 0.62 of 4 of them
    for lengths, batch in ((mostly, 4), (mostly, 8), ([512, 300, 211, 90], 1), ([500] * 9, 1)):
        rows = rows_of(lengths, 512)
        with_attention(FOUND, layer, rows, batch, torch.bfloat16, [], of_run=len(seen) > 0)
    assert [len(set(lengths)) > 1 for lengths, _ in seen] == [False, True, True, True]
    assert [of_run for _, of_run in seen] == [False, True, True, True]


@pytest.fixture
def planned_here(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Plan]:
    """A plan as on a machine with that card, whose rates are `found` without a measurement; and what was noted."""

    def plan(found: Measured | None, *, measures: bool = True, card: Card = CARD, **sections: Any) -> Plan:
        def none(*given: Any) -> None:
            return given[-1].append("it could not be measured")

        monkeypatch.setattr("steep.plan.measured_here", none if found is None else lambda *given: found)
        monkeypatch.setattr("steep.plan.with_attention", lambda found, *given, **how: replace(found, attention=4e14))
        monkeypatch.setattr(machine, "why_not_here", lambda: None)
        model = {"base": "nf4", "compute_dtype": "bf16", **sections.pop("model", {})}
        config = fused_file(llama_folder, korean_corpus, tmp_path / "run", model=model, **sections)
        return plan_run(config, card=card, measures=measures)

    return plan


def test_a_plan_keeps_what_was_measured(planned_here: Any) -> None:
    plan = planned_here(FOUND)
    figures = plan.as_dict()
    assert figures["duration"]["measured"] == {**FOUND.as_dict(), "attention": 4e14}
    assert plan.duration.rates == rates_of(None, replace(FOUND, attention=4e14))
    assert "measured on this card" in said(plan)


def test_a_plan_goes_on_with_the_makers_figures(planned_here: Any) -> None:
    plan = planned_here(None, card=replace(CARD, name="NVIDIA H200"))
    assert plan.as_dict()["duration"]["measured"] is None and "estimated from the maker's" in said(plan)
    assert "it could not be measured" in plan.warnings
    assert planned_here(None).duration is None  # of a card that is in no list


def test_nothing_is_measured_unless_it_is_asked_for_and_the_card_is_here(planned_here: Any) -> None:
    assert planned_here(FOUND, measures=False).duration is None
    elsewhere = planned_here(FOUND, card=replace(CARD, name="H200", is_here=False))
    assert elsewhere.as_dict()["duration"]["measured"] is None
    assert planned_here(FOUND, model={"fused": "off"}).duration is None


def test_what_may_wait_in_host_memory_follows_from_the_link(planned_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def step(*given: Any, **how: Any) -> Any:
        if how["fp8"] == "none":  # the bases beside the run's own have a figure of their own
            seen.append(how["hidden"])
        return fused_step(*given, **how)

    monkeypatch.setattr("steep.planning.computation.fused_step", step)
    planned_here(FOUND)
    planned_here(replace(FOUND, to_host=1e10))
    planned_here(None)
    quick, slow, unknown = dict.fromkeys(seen)
    assert slow == pytest.approx(5 * quick) and unknown == HIDDEN
    seen.clear()
    timed = planned_here(FOUND, training={"deterministic": True})
    assert set(seen) == {HIDDEN} and timed.duration.rates.measured is not None  # no timer chooses


def test_who_shows_a_time_measures(
    steep: Steep, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`steep plan` and `steep train` do; a plan of Python's own, as of a finished run, does not."""
    seen = []
    monkeypatch.setattr("steep.plan.card_here", lambda: CARD)
    monkeypatch.setattr("steep.plan.measured_here", lambda *given: seen.append(given[1:4]))
    monkeypatch.setattr(machine, "why_not_here", lambda: None)
    config = fused_file(llama_folder, korean_corpus, tmp_path / "run", model={"base": "nf4", "compute_dtype": "bf16"})
    plan_run(config)
    assert not seen
    monkeypatch.setattr("steep.run.check_base", lambda *given: (_ for _ in ()).throw(UserError("x", "y", "z")))
    with pytest.raises(UserError, match="y"):
        train_run(config)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert steep("plan", file).code == 0
    tokens = config.training.per_device_train_batch_size * config.data.max_length
    assert seen == [(tokens, torch.bfloat16, CARD)] * 2
    assert steep("plan", file, "--card", "L4").code == 0 and len(seen) == 2


def said(plan: Plan) -> str:
    (table, *_) = plan_tables(plan.as_dict())
    return " ".join(str(cell) for column in table.columns for cell in column.cells)


# ---- on a card


@pytest.mark.gpu
def test_a_card_reaches_what_its_kind_does() -> None:
    """Of the order of what the maker says; within 3 s, with nothing of it left."""
    card, layer, notes = card_here(), layer_of_8b(), []
    assert card is not None
    ones = torch.ones(64, 64, device="cuda")
    torch.mm(ones, ones)  # cuBLAS has begun, and has its workspace
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated(), time.perf_counter()
    found = measured_here(layer, 4096, torch.bfloat16, card, notes)
    assert found is not None and not notes
    found = with_attention(found, layer, rows_of([2048] * 8, 2048), 2, torch.bfloat16, notes, of_run=False)
    took = time.perf_counter() - begun
    assert took < 3 and not notes, (took, notes)
    assert torch.cuda.memory_reserved() - before < 2**28
    assert torch.cuda.max_memory_allocated() - before < 2**27  # workspaces of libraries, which a run has too
    assert found.attention is not None and 0.05 < found.attention / found.products < 1.2, found
    assert (found.fp8 is not None) == card.has_fp8_units and min(found.to_host, found.from_host) > 2e9, found
    published = rates_of(card)
    if published is not None:
        reached = rates_of(card, found)
        assert reached is not None
        for kind in ("products", "fp8", "attention", "moved", "link"):
            ours, theirs = getattr(reached, kind), getattr(published, kind)
            assert theirs is None or 0.5 < ours / theirs < 1.5, (kind, found)
