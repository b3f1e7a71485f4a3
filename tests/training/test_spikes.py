"""Planted spikes are found, a healthy run gives no alarm, and a rare kind of text is no spike."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from steep.training.spikes import SpikeDetector

STEPS = 10_000


def healthy(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A loss that falls under noise, and norms that scatter by a factor and rise in the warm-up and slowly after it."""
    random, step = np.random.default_rng(seed), np.arange(STEPS)
    loss = 1.8 + 1.5 * np.exp(-step / 700) + 0.08 * random.standard_normal(STEPS)
    norm = np.exp(0.25 * random.standard_normal(STEPS)) * np.minimum(1, (step + 5) / 300) * (1 + step / STEPS)
    return loss, norm


def alarms(loss: np.ndarray, norm: np.ndarray, detector: SpikeDetector) -> list[tuple[int, str]]:
    found = []
    for step, (one, other) in enumerate(zip(loss.tolist(), norm.tolist(), strict=True)):
        spike = detector.judge(one, other)
        if spike is not None and not spike.recurs:
            found.append((step, spike.kind))
        detector.remember(one, other)
    return found


def in_loss(loss: np.ndarray) -> list[int]:
    """The steps whose loss is a spike."""
    return [step for step, _ in alarms(loss, np.ones(len(loss)), SpikeDetector(6.0, 256))]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_gives_no_alarm(seed: int) -> None:
    assert alarms(*healthy(seed), SpikeDetector(6.0, 256)) == []


def test_text_of_two_kinds_gives_no_alarm_once_it_is_known() -> None:
    """Every twentieth step, by chance, is of text whose loss is ten standard deviations higher."""
    random = np.random.default_rng(3)
    loss = 2 + 0.1 * random.standard_normal(STEPS) + (random.random(STEPS) < 0.05)
    found = in_loss(loss)
    assert len(found) == 6 and found[-1] < 150  # two of them in a row


@pytest.mark.parametrize(
    ("share", "height", "spread", "most"), [(0.02, 0.8, 0.0, 5), (0.01, 0.8, 0.0, 12), (0.01, 2.0, 0.5, 30)]
)
def test_a_rare_kind_of_text_is_not_taken_for_spikes_for_ever(
    share: float, height: float, spread: float, most: int
) -> None:
    """Also where its own loss scatters."""
    for seed in range(2):
        random = np.random.default_rng(seed)
        rare = random.random(STEPS) < share
        excess = height + spread * random.standard_normal(STEPS)
        found = in_loss(2 + 0.06 * random.standard_normal(STEPS) + rare * excess)
        assert len(found) <= most and len(found) < 0.4 * rare.sum()
        assert all(rare[step] for step in found)


def test_a_few_alike_are_spikes_each() -> None:
    loss = healthy(0)[0]
    close = list(range(2000, 2050, 10))
    loss[[*close, 2050, 2900]] += 2
    assert in_loss(loss) == close  # what comes next is as far out as five before
    loss[[2500, 2501]] += 9
    assert in_loss(loss) == [*close, 2500, 2501]  # and others are none of that kind
    loss[[4100, 4200]] += 2
    assert in_loss(loss) == [*close, 2500, 2501, 4100, 4200]  # nor is what comes as late as this


@pytest.mark.parametrize("apart", [300, 500, 2000])
def test_what_seldom_comes_is_a_spike_each_time(apart: int) -> None:
    loss = healthy(0)[0]
    planted = list(range(apart, STEPS, apart))
    loss[planted] += 4
    assert in_loss(loss) == planted


def test_nothing_stands_out_before_something_is_known() -> None:
    """Else the first values of a one-sided scatter would be taken for a kind of text."""
    loss = 2 + 0.05 * np.random.default_rng(0).standard_normal(200)
    loss[[20, 30, 40, 50, 60, 100]] += 2
    assert in_loss(loss) == [100]


def test_one_spike_does_not_hide_lower_ones() -> None:
    loss = 2 + 0.05 * np.random.default_rng(0).standard_normal(400)
    loss[[200, 220, 240, 300]] = 9, 8, 5, 3
    assert in_loss(loss) == [200, 220, 240, 300]


@pytest.mark.parametrize(("before", "known"), [([], 0), ([300, 320, 340, 360, 400], 8)])
def test_what_diverges_is_no_kind_of_text(before: list[int], known: int) -> None:
    """Nor where it is as far out as a kind that is known."""
    loss = 2 + 0.05 * np.random.default_rng(0).standard_normal(600)
    loss[before] += 4
    loss[500:] += 4
    assert [step for step in in_loss(loss) if step >= 500] == list(range(500 + known, 600))


def test_planted_spikes_are_found() -> None:
    loss, norm = healthy(0)
    loss[[700, 4000]] += 0.9
    norm[[1000, 4000, 9000]] *= 12
    assert alarms(loss, norm, SpikeDetector(6.0, 256)) == [
        (700, "spike in loss"),
        (1000, "spike in gradient norm"),
        (4000, "spike in loss"),
        (9000, "spike in gradient norm"),
    ]


def test_what_is_said_of_a_spike() -> None:
    detector = SpikeDetector(6.0, 32)
    for number in range(32):
        detector.remember(2 + 0.1 * (-1) ** number, math.exp(0.1 * (-1) ** number))
    spike = detector.judge(4.0, 1.0)
    assert spike is not None
    assert (spike.kind, spike.value, spike.median) == ("spike in loss", 4.0, pytest.approx(2.0))
    assert spike.z == pytest.approx(2 / 0.14826)
    spike = detector.judge(2.0, math.exp(3))
    assert spike is not None
    assert (spike.kind, spike.value, spike.median) == ("spike in gradient norm", math.exp(3), pytest.approx(1.0))
    assert spike.z == pytest.approx(3 / 0.14826)
    assert detector.judge(0.0, math.exp(-9)) is None  # downwards is no spike
    assert detector.judge(2 + 0.14826 * 5.9, 1.0) is None


def test_a_run_that_stands_still_gives_no_alarm() -> None:
    detector = SpikeDetector(6.0, 64)
    for _ in range(64):
        detector.remember(2.0, 1.0)
    assert detector.judge(np.nextafter(2.0, 3.0), np.nextafter(1.0, 2.0)) is None
    assert detector.judge(2.01, 1.1) is None
    assert detector.judge(2.1, 1.0) is not None and detector.judge(2.0, 1.3) is not None


@pytest.mark.parametrize(("window", "enough"), [(256, 64), (16, 8)])
def test_nothing_is_judged_without_a_history(window: int, enough: int) -> None:
    detector = SpikeDetector(6.0, window)
    for _ in range(enough):
        assert detector.judge(1e6, 1e6) is None
        detector.remember(2.0, 1.0)
    assert detector.judge(1e6, 1.0) is not None


def test_norms_of_zero() -> None:
    detector = SpikeDetector(6.0, 16)
    for _ in range(16):
        detector.remember(2.0, 0.0)
    assert detector.judge(2.0, 0.0) is None


def test_its_state_is_all_it_knows() -> None:
    loss, norm = healthy(0)
    whole, first, second = SpikeDetector(6.0, 64), SpikeDetector(6.0, 64), SpikeDetector(6.0, 64)
    loss[600] += 2
    loss[[420, 450, 480, 510, 588, 589, 590, 650]] += 2
    expected = alarms(loss[:1000], norm[:1000], whole)
    before = alarms(loss[:590], norm[:590], first)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [step for step, _ in expected] == [420, 450, 480, 510, 588, 589, 590]
    assert before + [(step + 590, kind) for step, kind in alarms(loss[590:1000], norm[590:1000], second)] == expected
    assert second.state() == whole.state()
