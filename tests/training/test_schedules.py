from __future__ import annotations

import math

import pytest
import torch

from steep.errors import UserError
from steep.training.schedules import schedule_with_min_rate


def rates(shape: str, warmup: int, steps: int, minimum: float) -> list[list[float]]:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = schedule_with_min_rate(
        optimizer, scheduler_type=shape, num_warmup_steps=warmup, num_training_steps=steps, min_lr_rate=minimum
    )
    seen = []
    for _ in range(steps + 3):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("minimum", [0.1, 1.0])
def test_warms_up_and_ends_at_the_minimum(shape: str, warmup: int, minimum: float) -> None:
    seen = rates(shape, warmup, 12, minimum)
    main = [pair[0] for pair in seen]
    assert main[: warmup + 1] == pytest.approx([step / warmup for step in range(warmup)] + [1.0])
    assert main[12:] == pytest.approx([minimum] * 3)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(main[warmup:], main[warmup + 1 :], strict=False))
    assert [pair[1] for pair in seen] == pytest.approx([rate / 10 for rate in main])


def test_shapes_half_way() -> None:
    assert rates("linear", 2, 10, 0.2)[6][0] == pytest.approx(0.6)
    assert rates("cosine", 2, 10, 0.2)[6][0] == pytest.approx(0.6)
    assert rates("cosine", 2, 10, 0.2)[4][0] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))


def test_warm_up_longer_than_the_run() -> None:
    assert [pair[0] for pair in rates("linear", 5, 3, 0.1)][:5] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"min_lr_rate: 0\.1 has no meaning for the schedule 'constant'"):
        rates("constant", 0, 3, 0.1)
