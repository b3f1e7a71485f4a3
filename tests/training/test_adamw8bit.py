from __future__ import annotations

import bitsandbytes
import pytest
import torch

from steep.training import adamw8bit
from steep.training.adamw8bit import AdamW8bit, stochastic_round_

SIZE = 8192  # two moments in 8 bit need at least 4,096 elements
RATE = 5e-6


def gradients(steps: int, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator).bfloat16() for _ in range(steps)]


def weights(size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(4)).bfloat16()


def run(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: int) -> torch.Tensor:
    for gradient in gradients(steps, parameter.numel()):
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    values = torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 2**-8 + 2**-12, -3.1415926, 1e-30, -0.0, 65504.25])
    draws = 20_000
    repeated = values.repeat_interleave(draws)
    target = torch.empty(repeated.numel(), dtype=torch.bfloat16)
    stochastic_round_(target, repeated.clone(), torch.Generator().manual_seed(0))
    rounded = target.float().reshape(len(values), draws)
    for value, row in zip(values, rounded, strict=True):
        below = (value.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards zero
        above = ((value.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
        assert set(row.unique().tolist()) <= {below.item(), above.item()}
        step = (above - below).double()
        share = ((value - below).double() / step).item()
        assert ((row.double() - below.double()) / step).mean().item() == pytest.approx(share, abs=0.015)
    assert (rounded[0] == 1.0).all()  # what bf16 can hold stays


def test_rounding_keeps_infinities() -> None:
    values = torch.tensor([float("inf"), -float("inf")])
    target = torch.empty(2, dtype=torch.bfloat16)
    stochastic_round_(target, values.clone(), torch.Generator().manual_seed(0))
    assert not torch.isfinite(target).any()


@pytest.mark.parametrize("size", [SIZE, SIZE - 3, 100])  # 100: the states stay in fp32
def test_bf16_is_the_fp32_update_rounded(size: int) -> None:
    exact = torch.nn.Parameter(weights(size).float())
    rounded = torch.nn.Parameter(weights(size))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    reference = bitsandbytes.optim.AdamW8bit([exact], **settings)
    optimizer = AdamW8bit([rounded], **settings)
    run(reference, exact, 1)
    run(optimizer, rounded, 1)
    one_step = torch.maximum(exact.detach().abs(), weights(size).float().abs()) * 2**-7
    assert ((rounded.detach().float() - exact.detach()).abs() <= one_step + 1e-9).all()
    for _ in range(4):
        run(reference, exact, 5)
        run(optimizer, rounded, 5)
    # The states never see the weights, so they are the same to the bit.
    for key in ("state1", "state2"):
        assert torch.equal(reference.state[exact][key], optimizer.state[rounded][key])
    error = rounded.detach().float() - exact.detach()
    movement = (exact.detach() - weights(size).float()).abs().mean()
    assert error.abs().mean() < 0.5 * movement
    if size == SIZE:
        assert error.mean().abs() < 5e-4  # no drift: 0.012 (the spread of one) / sqrt(8192), times three


def test_slices_change_nothing_but_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> tuple[torch.Tensor, AdamW8bit, torch.nn.Parameter]:
        parameter = torch.nn.Parameter(weights())
        optimizer = AdamW8bit([parameter], lr=1e-2)
        return run(optimizer, parameter, 3), optimizer, parameter

    whole, one, first = train()
    monkeypatch.setattr(adamw8bit, "SLICE", 1024)
    pieces, other, second = train()
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(one.state[first][key], other.state[second][key])
    assert torch.equal(whole, pieces)


def test_small_updates_are_not_lost() -> None:
    start = weights()
    stochastic = torch.nn.Parameter(start.clone())
    nearest = torch.nn.Parameter(start.clone())
    moved = (run(AdamW8bit([stochastic], lr=RATE), stochastic, 20) != start).float().mean()
    plain = (run(bitsandbytes.optim.AdamW8bit([nearest], lr=RATE), nearest, 20) != start).float().mean()
    assert moved > 10 * plain
    assert moved > 0.005
    exact = torch.nn.Parameter(start.float())
    run(bitsandbytes.optim.AdamW8bit([exact], lr=RATE), exact, 20)
    wanted = exact.detach() - start.float()
    done = stochastic.detach().float() - start.float()
    # In expectation the whole update arrives: the regression of what was done on what was wanted is 1.
    slope = (done * wanted.sign()).sum() / wanted.abs().sum()
    assert slope.item() == pytest.approx(1, abs=0.5)


def test_noise_depends_on_seed_and_step_alone() -> None:
    def train(seed: int, disturb: bool = False) -> torch.Tensor:
        parameter = torch.nn.Parameter(weights())
        if disturb:
            torch.rand(17)
        return run(AdamW8bit([parameter], lr=1e-3, seed=seed), parameter, 3)

    assert torch.equal(train(1), train(1, disturb=True))
    assert not torch.equal(train(1), train(2))


def test_fp32_takes_bitsandbytes_own_path() -> None:
    ours, theirs = torch.nn.Parameter(weights().float()), torch.nn.Parameter(weights().float())
    left = run(AdamW8bit([ours], lr=1e-3, weight_decay=0.1), ours, 5)
    right = run(bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, weight_decay=0.1), theirs, 5)
    assert torch.equal(left, right)


def test_a_tensor_without_gradient_stays() -> None:
    parameter, other = torch.nn.Parameter(weights()), torch.nn.Parameter(weights())
    optimizer = AdamW8bit([parameter, other], lr=1e-2)
    parameter.grad = gradients(1)[0]
    optimizer.step()
    assert torch.equal(other, weights())
    assert not torch.equal(parameter, weights())
