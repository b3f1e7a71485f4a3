from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from steep.kernels import adamw8bit as kernels
from steep.ops import host_states
from steep.ops.backend import interpreted
from steep.training import adamw8bit, bitsandbytes_update
from steep.training.adamw8bit import AdamW8bit
from steep.training.bitsandbytes_update import stochastic_round_
from tests.ops.closeness import assert_as_good
from tests.ops.moment_codes import assert_same_codes
from tests.training.helpers import update_by_reference

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


def test_a_tensor_that_is_not_contiguous_goes_on_as_one_that_is() -> None:
    """With saved states too, which were those of a contiguous one by then."""

    def stepped(gradients: list[torch.Tensor], *, turns: bool, resumes: bool) -> torch.Tensor:
        saved = None
        value = weights().view(64, 128)
        for gradient in gradients:
            parameter = torch.nn.Parameter(value.t().contiguous().t() if turns else value.clone())
            assert parameter.is_contiguous() != turns
            optimizer = AdamW8bit([parameter], lr=1e-3)
            if saved is not None and resumes:
                optimizer.load_state_dict(saved)
            parameter.grad = gradient.view(64, 128)
            optimizer.step()
            value, saved = parameter.detach(), optimizer.state_dict()
        return value

    parameter = torch.nn.Parameter(weights().view(64, 128).t())
    first = AdamW8bit([parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    first.step()
    again = torch.nn.Parameter(parameter.detach().t().contiguous().t())
    second = AdamW8bit([again], lr=1e-3, masters="all")  # which begin with what is loaded
    second.load_state_dict(first.state_dict())
    again.grad = torch.ones_like(again)
    second.step()
    assert second.state[again]["low"].any()
    some = gradients(3)
    assert torch.equal(*(stepped(some, turns=turns, resumes=True) for turns in (False, True)))
    assert not torch.equal(*(stepped(some, turns=True, resumes=resumes) for resumes in (False, True)))


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


def test_rounding_keeps_nans() -> None:
    """A GPU's have bits that are all ones: noise would carry, and make them -0."""
    values = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32, device=DEVICE).view(torch.float32)
    target = torch.empty(3, dtype=torch.bfloat16, device=DEVICE)
    stochastic_round_(target, values, torch.Generator(DEVICE).manual_seed(0))
    assert target.isnan().all()


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
    monkeypatch.setattr(bitsandbytes_update, "SLICE", 1024)
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
    monkeypatch.setattr(bitsandbytes_update, "SLICE", slice_size)
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
    update = bitsandbytes_update._update
    monkeypatch.setattr(bitsandbytes_update, "_update", lambda pieces: (calls.append(len(pieces)), update(pieces)))
    many(2**20, monkeypatch, steps=1)
    # First group: three in 8 bit, the small one in fp32, the ragged one; second group: one, the small one, one.
    assert calls == [3, 1, 1, 1, 1, 1]


# --- the kernel, in Triton's interpreter --------------------------------------------------------------------------


def step_with(optimizer: AdamW8bit, parameters: list[torch.nn.Parameter], step: int) -> None:
    """One step of the kernel; the gradients are those of `step`."""
    for index, parameter in enumerate(parameters):
        draw = torch.Generator().manual_seed(1000 * step + index)
        gradient = torch.randn(parameter.numel(), generator=draw).view_as(parameter)
        parameter.grad = gradient.to(parameter.dtype)
    with interpreted():
        optimizer.step()


def mixed() -> list[torch.nn.Parameter]:
    """A bf16 matrix with 8-bit states, a bf16 vector with fp32 ones, fp32 masters."""
    return [
        torch.nn.Parameter(weights(4200).view(42, 100)),
        torch.nn.Parameter(weights(100)),
        torch.nn.Parameter(weights(4096).float()),
    ]


def test_all_groups_share_the_launches_of_their_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 coded, bf16 small, fp32 coded: three launches, whatever the groups. Each group keeps its rate."""
    launches, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **kind: launches.append(len(args[0])) or launch(*args, **kind))
    parameters = [*mixed(), *mixed()]
    optimizer = AdamW8bit([{"params": parameters[:3], "lr": 1e-2}, {"params": parameters[3:], "lr": 0.0}])
    step_with(optimizer, parameters, 1)
    assert launches == [2, 2, 2]
    assert not any(torch.equal(*pair) for pair in zip(parameters[:3], mixed(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(parameters[3:], mixed(), strict=True))


def test_kernel_is_bitsandbytes_update() -> None:
    """Of fp32 the weights and codes, but for ties; of bf16 the states, and the weights within their rounding."""
    ours, theirs = mixed(), [torch.nn.Parameter(p.detach().float()) for p in mixed()]
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    left, right = AdamW8bit(ours, **settings), bitsandbytes.optim.AdamW8bit(theirs, **settings)
    for step in range(1, 5):
        step_with(left, ours, step)
        for one, other in zip(ours, theirs, strict=True):
            other.grad = one.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        right.step()
    for one, other, start in zip(ours, theirs, mixed(), strict=True):
        kept, wanted = left.state[one], right.state[other]
        assert kept.keys() == wanted.keys() and kept["step"] == wanted["step"] == 4
        for key in kept.keys() - {"step"}:
            assert (kept[key].dtype, kept[key].shape) == (wanted[key].dtype, wanted[key].shape)
            if kept[key].dtype == torch.uint8:
                assert_same_codes(kept[key], wanted[key], int(key[-1]), steps=4)
            else:
                assert torch.allclose(kept[key], wanted[key], rtol=1e-4, atol=1e-7)
        if one.dtype == torch.float32:
            moved, meant = one.detach() - start.detach(), other.detach() - start.detach()
            assert_as_good(moved, meant, meant, slack=5e-3)
        else:
            assert (one.float() - other).abs().max() < 4 * 2**-7 * 4


def test_kernel_does_not_lose_small_updates() -> None:
    start = weights()
    moved, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    with interpreted():
        run(AdamW8bit([moved], lr=RATE), moved, 5)
    run(bitsandbytes.optim.AdamW8bit([plain], lr=RATE), plain, 5)
    exact = torch.nn.Parameter(start.float())
    run(bitsandbytes.optim.AdamW8bit([exact], lr=RATE), exact, 5)
    shares = [(p.detach() != start).double().mean().item() for p in (moved, plain)]
    # What should move: of each weight, its update over the distance to its neighbour (bits of the mantissa: 7).
    wanted = exact.detach() - start.float()
    due = (wanted.abs() / 2.0 ** (start.float().abs().log2().floor() - 7)).clamp(max=1).mean().item()
    print(f"changed at {RATE}: {shares[0]:.2%}, plain bf16 {shares[1]:.2%}, due {due:.2%}")
    assert shares[0] == pytest.approx(due, rel=0.25)
    assert shares[1] < 0.25 * due
    slope = ((moved.detach().float() - start.float()) * wanted.sign()).sum() / wanted.abs().sum()
    assert slope.item() == pytest.approx(1, abs=0.5)


def test_kernel_leaves_a_tensor_without_gradient() -> None:
    parameters = mixed()
    optimizer = AdamW8bit(parameters, lr=1e-2)
    step_with(optimizer, parameters, 1)
    kept = parameters[0].detach().clone()
    states = {key: value.clone() for key, value in optimizer.state[parameters[0]].items() if key != "step"}
    parameters[0].grad = None
    with interpreted():
        optimizer.step()
    assert torch.equal(parameters[0], kept)
    assert [optimizer.state[parameter]["step"] for parameter in parameters] == [1, 2, 2]
    for key, value in states.items():
        assert torch.equal(value, optimizer.state[parameters[0]][key])


@pytest.mark.parametrize("route", [interpreted, nullcontext])
def test_gradient_factor_is_of_one_step(route: type[AbstractContextManager[None]]) -> None:
    """As if the gradients had been scaled; the kernel does not touch them."""
    ours, theirs = mixed(), mixed()
    left, right = AdamW8bit(ours, lr=1e-3), AdamW8bit(theirs, lr=1e-3)
    for step, factor in enumerate((0.25, None)):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(one.shape, generator=torch.Generator().manual_seed(10 * step + index))
            one.grad = gradient.to(one.dtype)
            other.grad = one.grad * (factor or 1)
        before = [one.grad.clone() for one in ours if one.grad is not None]
        left.gradient_factor = None if factor is None else torch.tensor(factor)
        with route():
            left.step()
            right.step()
        assert left.gradient_factor is None
        if route is interpreted:
            assert all(torch.equal(one.grad, kept) for one, kept in zip(ours, before, strict=True))  # pyright: ignore
    for one, other in zip(ours, theirs, strict=True):  # factors are powers of two: the same to the bit, but for ties
        assert (one != other).float().mean() < 2e-3
        for key in ("state1", "state2"):
            kept, wanted = left.state[one][key], right.state[other][key]
            if kept.dtype == torch.uint8:
                assert_same_codes(kept, wanted, int(key[-1]))
            else:
                assert torch.allclose(kept, wanted, rtol=1e-5, atol=1e-8)


def test_a_bf16_weight_with_an_fp32_gradient() -> None:
    parameter, other = torch.nn.Parameter(weights(4096)), torch.nn.Parameter(weights(4096))
    parameter.grad_dtype = torch.float32  # pyright: ignore
    optimizer, exact = AdamW8bit([parameter], lr=1e-3), AdamW8bit([other], lr=1e-3)
    parameter.grad = torch.randn(4096, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    other.grad = parameter.grad.bfloat16()
    with interpreted():
        optimizer.step()
        exact.step()
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("given", [{}, {"states": "fp32", "masters": "all"}, {"masters": "all"}], ids=str)
def test_kernel_resumes_to_the_bit(given: dict[str, Any], tmp_path: Path) -> None:
    parameters = mixed()
    optimizer = AdamW8bit(parameters, lr=1e-3, seed=7, **given)
    for step in (1, 2):
        step_with(optimizer, parameters, step)
    torch.save((optimizer.state_dict(), [p.detach() for p in parameters]), tmp_path / "checkpoint")
    step_with(optimizer, parameters, 3)
    states, values = torch.load(tmp_path / "checkpoint")
    resumed = [torch.nn.Parameter(value) for value in values]
    again = AdamW8bit(resumed, lr=1e-3, seed=7, **given)
    again.load_state_dict(states)
    step_with(again, resumed, 3)
    for one, other in zip(parameters, resumed, strict=True):
        assert torch.equal(one, other)
        assert optimizer.state[one].keys() == again.state[other].keys()
        for key, value in optimizer.state[one].items():
            assert value == again.state[other][key] if key == "step" else torch.equal(value, again.state[other][key])


@pytest.mark.parametrize("saved_by", ["bitsandbytes", "kernel"])
def test_states_go_from_one_update_to_the_other(saved_by: str) -> None:
    """Checkpoints of runs before there was a kernel resume with it, and a GPU's on a CPU: one format, and the next step
    is the other's, but for its rounding noise."""
    parameters = mixed()
    optimizer = AdamW8bit(parameters, lr=1e-3)
    for step in (1, 2):
        if saved_by == "kernel":
            step_with(optimizer, parameters, step)
        else:
            step_by_bitsandbytes(optimizer, parameters, step)
    saved = optimizer.state_dict()
    wrapped = {"qmap1", "qmap2", "absmax1", "absmax2", "state1", "state2"}
    assert {key for state in saved["state"].values() for key in state} == {"step", "__bnb_optimizer_quant_state__"}
    assert saved["state"][0]["__bnb_optimizer_quant_state__"].keys() == wrapped
    assert saved["state"][1]["__bnb_optimizer_quant_state__"].keys() == {"state1", "state2"}
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = AdamW8bit(resumed, lr=1e-3)
    other.load_state_dict(saved)
    step_with(optimizer, parameters, 3)
    step_by_bitsandbytes(other, resumed, 3)
    for one, two in zip(parameters, resumed, strict=True):
        for key in ("state1", "state2"):
            left, right = optimizer.state[one][key], other.state[two][key]
            if left.dtype == torch.uint8:
                assert_same_codes(left, right, int(key[-1]))
            else:
                assert torch.allclose(left, right, rtol=1e-5, atol=1e-8)
        assert torch.allclose(one.float(), two.float(), rtol=2**-6, atol=1e-5)


def step_by_bitsandbytes(optimizer: AdamW8bit, parameters: list[torch.nn.Parameter], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw8bit, "uses_kernels", lambda tensor: False)
        step_with(optimizer, parameters, step)


def test_a_prepared_step_is_the_step_and_another_is_worked_out_anew() -> None:
    def updated(prepare: bool, change: str = "") -> list[torch.Tensor]:
        torch.manual_seed(3)
        weights = [torch.nn.Parameter(torch.randn(5000).bfloat16()), torch.nn.Parameter(torch.randn(300).bfloat16())]
        optimizer = AdamW8bit(weights, lr=1e-2, seed=5)
        with interpreted():
            for step in range(2):
                for weight in weights:
                    weight.grad = torch.randn_like(weight)
                if prepare:
                    optimizer.prepare()
                if step == 1 and change == "rate":
                    optimizer.param_groups[0]["lr"] = 1e-3
                if step == 1 and change == "gradients":
                    weights[0].grad = torch.ones_like(weights[0])
                    weights[1].grad = None
                if step == 1 and change == "moved":
                    for weight in weights:
                        weight.data = weight.data.clone()
                if step == 1 and change == "states":
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer.step()
        assert [optimizer.state[weight]["step"] for weight in weights] == [2, 1 if change == "gradients" else 2]
        return [weight.detach() for weight in weights]

    for change in ("", "rate", "gradients", "moved", "states"):
        for one, other in zip(updated(True, change), updated(False, change), strict=True):
            assert torch.equal(one, other), change
    assert not torch.equal(updated(True)[0], updated(True, "rate")[0])


# --- states in host memory ----------------------------------------------------------------------------------------


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        update_by_reference(monkeypatch)


def offloaded(
    offload: adamw8bit.Offload, kind: str = "step", **given: Any
) -> tuple[list[torch.nn.Parameter], AdamW8bit]:
    """Three steps of large and small tensors in two groups; kind: by `step`, prepared, or by `update`, or resumed with
    the other choice in their midst, or the third with the states from before the second. `given` to the optimizer."""
    parameters = [*mixed(), *(torch.nn.Parameter(weights(12_289).to(dtype)) for dtype in (torch.bfloat16, torch.float))]

    def made(choice: adamw8bit.Offload) -> AdamW8bit:
        groups = [
            {"params": parameters[:3], "lr": 1e-2, "name": "adapters_a"},
            {"params": parameters[3:], "lr": 1e-3, "weight_decay": 0.1, "name": "embeddings"},
        ]
        return AdamW8bit(groups, seed=3, offload=choice, **given)

    optimizer, saved = made(offload), {}
    for step in range(3):
        for index, parameter in enumerate(parameters):
            draw = torch.Generator().manual_seed(10 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(DEVICE, parameter.dtype)
        if kind == "resumed":
            other = made("all" if (offload == "none") == (step == 1) else "none")
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = other
        if kind == "rolled back" and step > 0:
            saved = copy.deepcopy(optimizer.state_dict()) if step == 1 else saved
            optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.gradient_factor = torch.tensor([0.5], device=DEVICE) if kind != "update" else None
        if kind == "prepared":
            optimizer.prepare()
        if kind == "update":
            for index in (4, 0, 2, 1, 3):
                optimizer.update([parameters[index]])
            optimizer.finish_updates()
        else:
            optimizer.step()
    return parameters, optimizer


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("kind", ["step", "prepared", "update", "resumed", "rolled back"])
@pytest.mark.parametrize("offload", ["embeddings", "all"])
@pytest.mark.parametrize(
    "given", [{}, {"states": "fp32", "masters": "all"}, {"masters": "embeddings"}, {"states": "fp32"}], ids=str
)
def test_states_in_host_memory_are_those_on_the_card(
    offload: adamw8bit.Offload, kind: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and states, to the bit; and the states never leave their page-locked blocks."""
    monkeypatch.setattr(host_states, "PIECE", 2**12)
    updated: list[int] = []
    run = host_states.Staging.run
    monkeypatch.setattr(
        host_states.Staging,
        "run",
        lambda self, updates, *rest: updated.append(len(updates)) or run(self, updates, *rest),
    )
    wanted, whole = offloaded("none", "step" if kind == "resumed" else kind, **given)
    assert updated == []
    found, optimizer = offloaded(offload, kind, **given)
    each = {"embeddings": [2], "all": [4]}[offload]  # the one of 100 elements keeps its own
    if kind == "update":
        each = each[0] * [1]
    assert updated == (2 * [4] if kind == "resumed" else 3 * each)  # resumed with all, with none, with all
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        kept, theirs = optimizer.state[one], whole.state[other]
        assert kept.keys() == theirs.keys() and kept["step"] == theirs["step"] == (2 if kind == "rolled back" else 3)
        assert all(torch.equal(kept[key].cpu(), theirs[key].cpu()) for key in kept.keys() - {"step"})
        assert all(kept[key].shape == theirs[key].shape for key in kept.keys() - {"step"})
    if kind != "resumed":
        hosted = {"embeddings": [3, 4], "all": [0, 2, 3, 4]}[offload]
        assert [index for index, one in enumerate(found) if one in optimizer._hosted] == hosted
        for index in hosted:
            state, master = optimizer.state[found[index]], found[index].dtype == torch.bfloat16
            names = {"state1", "state2"} | ({"absmax1", "absmax2"} if given.get("states") != "fp32" else set())
            names |= {"low"} if master and given.get("masters") in ("all", index >= 3 and "embeddings") else set()
            assert state.keys() - {"step", "qmap1", "qmap2"} == names
            assert state["state1"] is optimizer._hosted[found[index]].tensors[0]
            assert all(state[key].device.type == "cpu" for key in names)
    assert not optimizer._under_way


@pytest.mark.usefixtures("by_reference")
def test_states_that_are_loaded_replace_others_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those before nor those of the checkpoint stay in memory beside them."""
    parameters = [torch.nn.Parameter(weights(4096)) for _ in range(4)]
    optimizer = AdamW8bit([{"params": parameters, "lr": 1e-2}], offload="all")

    def step() -> None:
        for parameter in parameters:
            parameter.grad = gradients(1, 4096)[0]
        optimizer.step()

    step()
    before = [weakref.ref(state) for state in optimizer._hosted.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded = [weakref.ref(optimizer.state[parameter]["state1"]) for parameter in parameters]
    beside: list[list[bool]] = []
    put = adamw8bit.host_states

    def spied(*given: Any) -> Any:
        beside.append([reference() is not None for reference in loaded])
        return put(*given)

    monkeypatch.setattr(adamw8bit, "host_states", spied)
    monkeypatch.setattr(adamw8bit, "SHARED", 2 * 4096)
    step()
    assert beside == [[True] * 4, [False, False, True, True]]
    assert not any(reference() for reference in (*before, *loaded))


@pytest.mark.usefixtures("by_reference")
def test_updates_over_host_memory_are_awaited_a_few_calls_later() -> None:
    """What they read lives until then: on a card they run on a stream of their own."""
    parameters = [torch.nn.Parameter(weights(4096)) for _ in range(6)]
    optimizer = AdamW8bit([{"params": parameters, "lr": 1e-2}], offload="all")
    held = []
    for parameter in parameters:
        parameter.grad = gradients(1, 4096)[0]
        optimizer.update([parameter])
        parameter.grad = None
        held.append(len(optimizer._under_way))
    assert held == [1, 2, 3, 4, 4, 4] and adamw8bit.UPDATES_UNDER_WAY == 4
    optimizer.finish_updates()
    assert not optimizer._under_way


@pytest.mark.usefixtures("by_reference")
def test_who_reads_states_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, and the proof that reads masters: copies to the host may still be under way."""
    parameters, optimizer = offloaded("all", masters="all")
    waited: list[int] = []
    monkeypatch.setattr(host_states.Staging, "synchronize", lambda self: waited.append(1))
    optimizer.state_dict()
    assert waited == [1]
    assert optimizer.low_of(parameters[0]) is not None and waited == [1, 1]


@pytest.mark.usefixtures("by_reference")
def test_states_of_a_checkpoint_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bitsandbytes would move them to the parameter."""
    parameters, optimizer = offloaded("all")
    saved, moved = optimizer.state_dict(), []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, **kw: moved.append(self.numel()) or to(self, *args, **kw)
    )
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "name": "embeddings"}]
    other = AdamW8bit(groups, offload="all")
    other.load_state_dict(saved)
    other.to_gpu()
    assert 256 in moved and not {4200, 4096, 12_289} & {*moved}  # code maps; the small tensor's states
    AdamW8bit(groups).load_state_dict(saved)
    assert {4200, 4096, 12_289} <= {*moved}


def test_an_override_is_of_its_tensor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes keeps settings of single tensors; the others of a group share what the group says."""
    weights = [torch.nn.Parameter(torch.ones(300)) for _ in range(4)]
    optimizer = AdamW8bit([{"params": weights[:3], "lr": 1e-2}, {"params": weights[3:], "lr": 1e-3}])
    for weight in weights:
        weight.grad = torch.ones(300)

    def rates() -> list[float]:
        return [update.lr for update in optimizer._updates_of(list(optimizer._slots(weights)))]

    assert rates() == [1e-2, 1e-2, 1e-2, 1e-3]
    for of_whom in ({"index2config": {(0, 1): {"lr": 0.5}}}, {"pid2config": {id(weights[1]): {"lr": 0.5}}}):
        with monkeypatch.context() as patch:
            for name, settings in of_whom.items():
                patch.setattr(optimizer.mng, name, settings)
            assert rates() == [1e-2, 0.5, 1e-2, 1e-3]
