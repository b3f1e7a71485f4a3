"""Each schedule's values by its formula, and against transformers' own where that has the same one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from steep.data.packing import Corpus
from steep.errors import UserError
from steep.training.schedules import Schedule, schedule_of
from tests.training.helpers import adapted, arguments, trainer_for


def made(folder: Path, kind: str, steps: int, *, start: float | None = None, **fields: Any) -> Schedule:
    args = arguments(folder, lr_scheduler_type=kind, **{"warmup_steps": 0, **fields})
    schedule = schedule_of(args, steps, start=start)
    assert schedule is not None
    return schedule


def values(schedule: Schedule, more: int = 3) -> list[float]:
    return [schedule(step) for step in range(schedule.num_steps + more)]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("minimum", [0.1, 1.0])
def test_warms_up_and_ends_at_the_minimum(shape: str, warmup: int, minimum: float, tmp_path: Path) -> None:
    seen = values(made(tmp_path, shape, 12, warmup_steps=warmup, min_lr_rate=minimum))
    assert seen[: warmup + 1] == pytest.approx([step / warmup for step in range(warmup)] + [1.0])
    assert seen[12:] == pytest.approx([minimum] * 3)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(seen[warmup:], seen[warmup + 1 :], strict=False))


def test_shapes_half_way(tmp_path: Path) -> None:
    assert made(tmp_path, "linear", 10, warmup_steps=2, min_lr_rate=0.2)(6) == pytest.approx(0.6)
    cosine = made(tmp_path, "cosine", 10, warmup_steps=2, min_lr_rate=0.2)
    assert cosine(6) == pytest.approx(0.6)
    assert cosine(4) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize(
    ("shape", "half"), [("1-sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5), ("cosine", 0.5 * (1 + math.cos(math.pi / 2)))]
)
def test_warmup_stable_decay(shape: str, half: float, tmp_path: Path) -> None:
    fields = {"warmup_steps": 10, "decay_steps": 20, "decay_type": shape, "min_lr_rate": 0.1}
    schedule = made(tmp_path, "warmup_stable_decay", 100, **fields)
    assert (schedule(0), schedule(5)) == (0, 0.5)
    assert {schedule(step) for step in range(10, 81)} == {1.0}
    assert schedule(81) < 1
    assert schedule(90) == pytest.approx(0.1 + 0.9 * half)
    assert schedule(100) == schedule(105) == pytest.approx(0.1)


def test_warmup_stable_decay_by_default(tmp_path: Path) -> None:
    """The last fifth of the steps, 1-sqrt, to zero."""
    schedule = made(tmp_path, "warmup_stable_decay", 50, warmup_steps=0.05)
    assert schedule(3) == schedule(40) == 1
    assert schedule(45) == pytest.approx(1 - math.sqrt(0.5))
    assert schedule(50) == 0


def test_a_share_of_the_steps_is_rounded_up(tmp_path: Path) -> None:
    schedule = made(tmp_path, "warmup_stable_decay", 11, decay_steps=0.25)
    assert [step for step in range(12) if schedule(step) == 1][-1] == 8  # 3 steps of decay: 9, 10, 11


def test_a_warm_up_may_start_above_zero(tmp_path: Path) -> None:
    schedule = made(tmp_path, "cosine", 20, warmup_steps=4, warmup_lr_rate=0.1, min_lr_rate=0.1)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    assert schedule(20) == pytest.approx(0.1)


def test_the_infinite_schedule_cools_down_and_stays(tmp_path: Path) -> None:
    """Ibrahim et al. 2024: warm-up, a cosine to the constant rate, and then no end."""
    fields = {"warmup_steps": 5, "cooldown_steps": 10, "stable_lr_rate": 0.4}
    schedule = made(tmp_path, "constant_with_warmup", 40, **fields)
    assert schedule(5) == 1
    assert schedule(10) == pytest.approx(0.7)
    assert schedule(15) == schedule(40) == schedule(10_000) == 0.4
    assert schedule.describe() == "0 → 1 in 5 steps, 1 → 0.4 in 10 (cosine), 0.4 for 25"


def test_all_phases_in_a_row(tmp_path: Path) -> None:
    fields = {"warmup_steps": 2, "cooldown_steps": 4, "stable_lr_rate": 0.5, "decay_steps": 4, "decay_type": "linear"}
    schedule = made(tmp_path, "warmup_stable_decay", 12, min_lr_rate=0.1, **fields)
    middle = 0.75
    quarter = 0.5 + 0.25 * (1 + math.cos(math.pi / 4))
    expected = [0, 0.5, 1, quarter, middle, 1.5 - quarter, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert values(schedule, 1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "fields", "theirs"),
    [
        ("linear", {}, None),
        ("cosine", {}, None),
        ("constant_with_warmup", {}, None),
        ("warmup_stable_decay", {"decay_steps": 6}, {"num_decay_steps": 6, "decay_type": "1-sqrt"}),
        (
            "warmup_stable_decay",
            {"decay_steps": 6, "decay_type": "linear"},
            {"num_decay_steps": 6, "decay_type": "linear"},
        ),
        ("warmup_stable_decay", {"decay_steps": 6, "decay_type": "cosine"}, {"num_decay_steps": 6}),
    ],
)  # fmt: skip
def test_transformers_own_values(kind: str, fields: dict[str, Any], theirs: dict[str, Any], tmp_path: Path) -> None:
    """`warmup_lr_rate: 0` changes nothing, but asks for steep's schedule."""
    own = made(tmp_path, kind, 20, warmup_steps=4, warmup_lr_rate=0.0, **fields)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    given: Any = get_scheduler(kind, optimizer, 4, 20, theirs)
    assert [own(step) for step in range(21)] == pytest.approx([given.lr_lambdas[0](step) for step in range(21)])


def test_warm_up_longer_than_the_run(tmp_path: Path) -> None:
    schedule = made(tmp_path, "linear", 3, warmup_steps=5, min_lr_rate=0.1)
    assert values(schedule, 2) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_transformers_schedules_stay_transformers(tmp_path: Path) -> None:
    for kind, kwargs in (
        ("cosine", None),
        ("constant", None),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("warmup_stable_decay", {"num_decay_steps": 3}),
    ):
        assert schedule_of(arguments(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs), 10) is None


# --- a branch begins at the rate of its checkpoint ------------------------------------------------------------


def test_a_branch_decays_from_the_rate_of_its_checkpoint(tmp_path: Path) -> None:
    schedule = made(tmp_path, "linear", 10, start=0.5, min_lr_rate=0.1)
    assert values(schedule, 1) == pytest.approx([0.5 - 0.04 * step for step in range(11)])
    schedule = made(tmp_path, "cosine", 10, start=0.5)
    assert (schedule(0), schedule(5), schedule(10)) == pytest.approx((0.5, 0.25, 0))


def test_the_stable_part_of_a_branch_is_its_parent(tmp_path: Path) -> None:
    schedule = made(tmp_path, "warmup_stable_decay", 16, start=1.0)
    assert values(schedule, 1) == pytest.approx([1 - math.sqrt(step / 16) for step in range(17)])
    schedule = made(tmp_path, "warmup_stable_decay", 16, start=1.0, decay_steps=4)
    assert schedule(12) == 1 and schedule(13) == pytest.approx(0.5)


def test_a_branch_goes_on_at_a_constant_rate(tmp_path: Path) -> None:
    for kind in ("constant", "constant_with_warmup"):
        assert set(values(made(tmp_path, kind, 5, start=0.3))) == {0.3}


def test_a_branch_warms_up_again_from_where_its_parent_ended(tmp_path: Path) -> None:
    """The re-warming of Ibrahim et al. 2024, between two corpora of one model."""
    schedule = made(tmp_path, "cosine", 12, start=0.1, warmup_steps=2, min_lr_rate=0.1)
    assert [schedule(step) for step in (0, 1, 2, 7, 12)] == pytest.approx([0.1, 0.55, 1, 0.55, 0.1])


def test_a_branch_leaves_out_what_its_checkpoint_has_behind_it(tmp_path: Path) -> None:
    """So that the fields of the parent's run file may stay."""
    assert made(tmp_path, "linear", 10, start=1.0, warmup_steps=100).warmup_steps == 0
    cooled = {"cooldown_steps": 100, "stable_lr_rate": 0.5}
    schedule = made(tmp_path, "warmup_stable_decay", 4, start=0.5, **cooled)
    assert values(schedule, 1) == pytest.approx([0.5 * (1 - math.sqrt(step / 4)) for step in range(5)])
    again = made(tmp_path, "constant_with_warmup", 9, start=0.8, cooldown_steps=4, stable_lr_rate=0.5)
    assert [again(step) for step in (0, 2, 4, 9)] == pytest.approx([0.8, 0.65, 0.5, 0.5])


# --- what contradicts itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("constant", {"min_lr_rate": 0.1}, r"^min_lr_rate: 0\.1 has no meaning for lr_scheduler_type constant"),
        ("constant", {"warmup_lr_rate": 0.1}, r"^warmup_lr_rate: 0\.1 has no meaning"),
        ("cosine", {"decay_steps": 5}, r"^decay_steps: 5 has no meaning .* set lr_scheduler_type: warmup_stable_decay"),
        ("linear", {"decay_type": "linear"}, r"^decay_type: linear has no meaning"),
        ("cosine", {"cooldown_steps": 5, "stable_lr_rate": 0.5}, r"^cooldown_steps: 5 has no meaning"),
        ("polynomial", {"min_lr_rate": 0.1}, r"^min_lr_rate: 0\.1 has no meaning"),
        ("constant_with_warmup", {"cooldown_steps": 5}, r"^cooldown_steps: it is set and stable_lr_rate is not"),
        ("constant_with_warmup", {"stable_lr_rate": 0.5}, r"^stable_lr_rate: it is set and cooldown_steps is not"),
        (
            "warmup_stable_decay",
            {"cooldown_steps": 2, "stable_lr_rate": 0.1, "min_lr_rate": 0.2},
            r"^stable_lr_rate: 0\.1 is below min_lr_rate",
        ),
        ("warmup_stable_decay", {"warmup_steps": 6, "decay_steps": 5}, r"^decay_steps: the phases are longer than"),
        ("warmup_stable_decay", {"warmup_steps": 0.5, "decay_steps": 0.6}, r"warm-up 5, cool-down 0, decay 6"),
        ("cosine", {"warmup_lr_rate": 0.1, "warmup_steps": 0}, r"^warmup_lr_rate: there is no warm-up"),
        (
            "warmup_stable_decay",
            {"decay_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 2}},
            r"^lr_scheduler_kwargs: they belong to transformers' own warmup_stable_decay, and decay_steps is 2",
        ),
        ("cosine", {"min_lr_rate": 0.1, "lr_scheduler_kwargs": {"num_cycles": 1}}, r"or set min_lr_rate: 0"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        schedule_of(arguments(tmp_path, lr_scheduler_type=kind, **{"warmup_steps": 0.1, **fields}), 10)


@pytest.mark.parametrize(
    ("kind", "start", "fields", "message"),
    [
        ("polynomial", 1.0, {}, r"^lr_scheduler_type: polynomial cannot begin at the rate of a checkpoint"),
        ("linear", 0.0, {}, r"^--branch: the rate of the checkpoint is 0\. Warm up again: set warmup_steps"),
        ("constant", 0.0, {}, r"^--branch: the rate of the checkpoint is 0"),
        ("cosine", 0.1, {"min_lr_rate": 0.2}, r"^min_lr_rate: the decay would raise the rate: it begins at 0\.1"),
        ("cosine", 0.1, {"warmup_steps": 2, "warmup_lr_rate": 0.1}, r"^warmup_lr_rate: a branch warms up from"),
        ("cosine", 1.0, {"lr_scheduler_kwargs": {"num_cycles": 1}}, r"^lr_scheduler_kwargs: .* a branch has a"),
    ],
)  # fmt: skip
def test_a_branch_refuses_nonsense(
    kind: str, start: float, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        schedule_of(arguments(tmp_path, lr_scheduler_type=kind, **{"warmup_steps": 0, **fields}), 10, start=start)


@pytest.mark.parametrize(
    "fields",
    [
        {"warmup_lr_rate": 1.5}, {"stable_lr_rate": 0.0}, {"decay_steps": 0}, {"decay_steps": math.nan},
        {"cooldown_steps": -1}, {"decay_type": "sqrt"}, {"min_lr_rate": -0.1},
    ],
)  # fmt: skip
def test_arguments_out_of_range(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(fields))}: "):
        arguments(tmp_path, **fields)


def test_every_group_has_its_own_peak(corpus: Corpus, tmp_path: Path) -> None:
    fields = {"warmup_steps": 2, "warmup_lr_rate": 0.5, "decay_steps": 2, "decay_type": "linear", "min_lr_rate": 0.2}
    trainer = trainer_for(
        adapted(), corpus, tmp_path, lr_scheduler_type="warmup_stable_decay", learning_rate=1e-2,
        embedding_learning_rate=2e-3, **fields,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    factors = [0.5, 0.75, 1, 1, 1, 0.6]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 * factor for factor in factors])
    assert [row["embedding_learning_rate"] for row in rows] == pytest.approx([2e-3 * factor for factor in factors])


@pytest.mark.parametrize("shape", ["linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("minimum", [0.1, 0.3])
def test_a_branch_begins_where_a_finished_run_ended(shape: str, minimum: float, tmp_path: Path) -> None:
    ended = made(tmp_path, shape, 12, min_lr_rate=minimum)(12)
    assert ended == minimum  # to the bit
    assert values(made(tmp_path, shape, 4, start=ended, min_lr_rate=minimum)) == pytest.approx([minimum] * 7)
    within_rounding = made(tmp_path, shape, 4, start=1 - (1 - minimum), min_lr_rate=minimum)
    assert values(within_rounding) == pytest.approx([minimum] * 7)
