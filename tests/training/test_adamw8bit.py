from __future__ import annotations

import bitsandbytes
import pytest
import torch

from steep.training import adamw8bit
from steep.training.adamw8bit import AdamW8bit, stochastic_round_

SIZE = 8192  # two moments in 8 bit need at least 4,096 elements
RATE = 5e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gradients(steps: int, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator).bfloat16().to(DEVICE) for _ in range(steps)]


def weights(size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(4)).bfloat16().to(DEVICE)


def run(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: int) -> torch.Tensor:
    for gradient in gradients(steps, parameter.numel()):
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    values = torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 2**-8 + 2**-12, -3.1415926, 1e-30, -0.0, 65504.25], device=DEVICE)
    draws = 20_000
    repeated = values.repeat_interleave(draws)
    target = torch.empty(repeated.numel(), dtype=torch.bfloat16, device=DEVICE)
    stochastic_round_(target, repeated.clone(), torch.Generator(DEVICE).manual_seed(0))
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
    values = torch.tensor([float("inf"), -float("inf")], device=DEVICE)
    target = torch.empty(2, dtype=torch.bfloat16, device=DEVICE)
    stochastic_round_(target, values.clone(), torch.Generator(DEVICE).manual_seed(0))
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
    if DEVICE == "cpu":  # there the generator goes on from slice to slice as one stream
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


SIZES = [SIZE, SIZE, 5 * SIZE, 300, 4096 + 7, SIZE, 100, 2 * SIZE]


def many(slice_size: int, monkeypatch: pytest.MonkeyPatch, steps: int = 4) -> list[dict[str, torch.Tensor]]:
    """Tensors of `SIZES` after some steps, the fourth without a gradient in the second step; weights and states."""
    monkeypatch.setattr(adamw8bit, "SLICE", slice_size)
    parameters = [torch.nn.Parameter(weights(size)) for size in SIZES]
    optimizer = AdamW8bit([{"params": parameters[:5], "lr": 1e-2}, {"params": parameters[5:], "lr": 2e-3}])
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            drawn = torch.randn(parameter.numel(), generator=torch.Generator().manual_seed(100 * step + index))
            parameter.grad = None if (step, index) == (1, 3) else drawn.bfloat16().to(DEVICE)
        optimizer.step()
    kept = ("state1", "state2", "absmax1", "absmax2")
    return [
        {"weights": p.detach(), **{key: optimizer.state[p][key] for key in kept if key in optimizer.state[p]}}
        for p in parameters
    ]


def test_tensors_that_share_an_update_get_what_each_would_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed into one update or cut into many: states and weights are the same to the bit, and those of one tensor."""
    packed, cut = many(2**20, monkeypatch), many(1024, monkeypatch)
    for one, other in zip(packed, cut, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key != "weights":
                assert torch.equal(value, other[key]), key
    for index, size in enumerate(SIZES):
        reference = torch.nn.Parameter(weights(size).float())
        optimizer = bitsandbytes.optim.AdamW8bit([reference], lr=1e-2 if index < 5 else 2e-3)
        for step in range(4):
            drawn = torch.randn(size, generator=torch.Generator().manual_seed(100 * step + index)).bfloat16().float()
            if (step, index) != (1, 3):
                reference.grad = drawn.to(DEVICE)
                optimizer.step()
        for key in packed[index].keys() - {"weights"}:
            assert torch.equal(packed[index][key], optimizer.state[reference][key]), (index, key)
        difference = packed[index]["weights"].float() - reference.detach()
        assert (difference.abs() <= 4 * 2**-7 * reference.detach().abs().clamp(min=0.1)).all()


def test_many_tensors_take_few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    update = adamw8bit._update
    monkeypatch.setattr(adamw8bit, "_update", lambda pieces, *rest: (calls.append(len(pieces)), update(pieces, *rest)))
    many(2**20, monkeypatch, steps=1)
    # First group: three in 8 bit, the small one in fp32, the ragged one; second group: one, the small one, one.
    assert calls == [3, 1, 1, 1, 1, 1]
