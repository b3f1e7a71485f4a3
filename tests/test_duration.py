"""How long a step is predicted to take: counted by hand, and against measured steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import Work
from benchmarks.shapes import SHAPES, empty_model
from steep.cards import CARDS, card_named
from steep.config import parse_config
from steep.duration import LAUNCHED, seconds, speed_of
from steep.model.machine import Card
from steep.step_work import StepWork, step_work
from steep.terminal import duration_line
from tests.test_fused_run import benchmark_file, config_of, empty_llama, measured, step_of

H200 = speed_of(card_named("H200"))
DOCUMENT = 700  # mean length of the benchmark's packed documents, about


def work_of(step: Any, level: int, **given: Any) -> StepWork:
    return step_work(step, [level] * step.shape.layers, **{"micro_batches": 1, "document": 64, **given})


def test_the_count_is_that_by_hand() -> None:
    """Of two layers: hidden 64, 4 heads and 2 of keys and values of 16, intermediate 128, rank 8."""
    config = config_of(adapter={"r": 8}, training={"per_device_train_batch_size": 2})
    empty = empty_llama()
    sizes = empty.config
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    heads = sizes.num_attention_heads * sizes.head_dim
    kv = sizes.num_key_value_heads * sizes.head_dim
    step, layers = step_of(config, empty), sizes.num_hidden_layers
    qkv, o, gate_up, down = hidden * (heads + 2 * kv), hidden * heads, 2 * hidden * inner, hidden * inner
    of_qkv, of_o = 8 * (3 * hidden + heads + 2 * kv), 8 * (hidden + heads)
    of_gate_up, of_down = 8 * 2 * (hidden + inner), 8 * (hidden + inner)
    base, beside = qkv + o + gate_up + down, of_qkv + of_o + of_gate_up + of_down
    head = 3 * sizes.vocab_size * hidden
    again = [0, gate_up + of_gate_up, gate_up + of_gate_up + qkv + of_qkv, base + beside - down - of_down]
    for level in range(4):
        work = work_of(step, level)
        products = 2 * step.tokens * (layers * (2 * base + 3 * beside + again[level]) + head)
        assert work.products == pytest.approx(products) and work.fp8 == 0
        attention = 4 * 32 * heads * (3.5 + (level == 3))
        assert work.attention == pytest.approx(step.tokens * layers * attention)
    in_fp8 = work_of(replace(step, fp8="both"), 1)
    assert in_fp8.fp8 == pytest.approx(2 * step.tokens * layers * (2 * base + gate_up))
    assert in_fp8.fp8 + in_fp8.products == pytest.approx(work_of(step, 1).products)
    backward = work_of(replace(step, fp8="backward"), 1)
    assert backward.fp8 == pytest.approx(2 * step.tokens * layers * base)
    assert work_of(step, 0, document=128).attention == 2 * work_of(step, 0).attention


def test_more_that_is_computed_again_takes_longer() -> None:
    step = step_of(config_of(), empty_llama())
    assert H200 is not None
    times = [seconds(work_of(step, level), H200, 0) for level in range(4)]
    assert times == sorted(times) and len(set(times)) == 4
    two = seconds(work_of(step, 0, micro_batches=2), H200, 0)
    assert times[0] < two < 2 * times[0]  # there is one update
    assert seconds(work_of(step, 0), H200, 2) == 2 * LAUNCHED  # a layer of this size is over before it is launched


def test_cards() -> None:
    for name in CARDS:
        card = card_named(name)
        speed = speed_of(card)
        assert speed is not None and (speed.fp8 is not None) == card.has_fp8_units
    here = Card("NVIDIA H200", (9, 0), 140 * 2**30, 139 * 2**30)
    assert speed_of(here) == H200
    assert speed_of(replace(here, name="NVIDIA H100 PCIe")) is None  # which is slower
    assert duration_line(None) == "not known"
    line = duration_line({"seconds_per_step": 0.2881, "tokens_per_second": 14_216.9, "hours": 3.1234})
    assert line == "about 0.29 s a step, 14,217 tokens/s, 3.1 h"


def of_first_day(row: dict[str, Any]) -> bool:
    """Small models waited for the host then; the next day's rows are of the same command."""
    return row["call"] < "2026-11-29" and row["shape"] in ("llama-3.2-3b", "gemma-3-4b")


ROWS = [row for row in measured() if not of_first_day(row)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['shape']}, {row['batch']} x {row['seq']}")
def test_steps_took_as_long(row: dict[str, Any]) -> None:
    """Shares of the H200's rates were fitted to these; no row alone."""
    work = Work("x", row["batch"], row["seq"], row["r"], 12, row["packed"], "cuda")
    tree = benchmark_file(work, Path("text"), Path("run"))
    config = parse_config({**tree, "model": {**tree["model"], "fused": "on"}})
    step = step_of(config, empty_model(row["shape"]))
    document = DOCUMENT if row["packed"] else row["seq"]
    assert H200 is not None and len(row["levels"]) == SHAPES[row["shape"]]["num_hidden_layers"]
    predicted = seconds(step_work(step, row["levels"], micro_batches=1, document=document), H200, len(row["levels"]))
    assert predicted == pytest.approx(row["step_s"], rel=0.15)


def test_an_8b_in_fp8() -> None:
    """0.254 s were measured on an H200, 0.288 over nf4."""
    row = next(row for row in ROWS if (row["shape"], row["batch"]) == ("llama-3-8b", 2) and not sum(row["levels"]))
    work = Work("x", row["batch"], row["seq"], row["r"], 12, row["packed"], "cuda")
    tree = benchmark_file(work, Path("text"), Path("run"))
    config = parse_config({**tree, "model": {**tree["model"], "fused": "on"}})
    step = replace(step_of(config, empty_model(row["shape"])), fp8="both", base="fp8")
    assert H200 is not None
    found = seconds(step_work(step, row["levels"], micro_batches=1, document=row["seq"]), H200, 32)
    assert found == pytest.approx(0.254, rel=0.15)
