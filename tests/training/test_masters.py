"""fp32 masters of bf16 weights, and fp32 states: to the bit what a weight in fp32 gets, and kept as it is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import bitsandbytes
import pytest
import torch

from steep.errors import UserError
from steep.ops.backend import interpreted
from steep.ops.master_weights import join, split
from steep.planning.memory import Shape, states_bytes
from steep.training.adamw8bit import MASTERS, OFFLOADS, STATES, AdamW8bit, Masters, Offload, States
from tests.training.helpers import update_by_reference

BF16 = torch.bfloat16
SIZES = (8192, 300, 4096 + 7)
SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def drawn(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(BF16)


def weights(sizes: Sequence[int] = SIZES) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(drawn(size, index)) for index, size in enumerate(sizes)]


def step(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], number: int) -> None:
    for index, parameter in enumerate(parameters):
        parameter.grad = drawn(parameter.numel(), 100 * number + index).to(parameter.dtype)
    optimizer.step()


def masters_of(optimizer: AdamW8bit, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [join(parameter.detach(), optimizer.state[parameter]["low"]) for parameter in parameters]


@pytest.mark.parametrize("route", [interpreted, nullcontext])
@pytest.mark.parametrize("states", STATES)
def test_a_master_is_the_weight_that_trains_in_fp32(
    states: States, route: type[AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with the same states, by the kernel and by bitsandbytes: and the weight is its nearest bf16. In one
    update with others or cut into several."""
    monkeypatch.setattr("steep.training.bitsandbytes_update.SLICE", 2**13)
    ours, whole = weights(), [torch.nn.Parameter(weight.detach().float()) for weight in weights()]
    optimizer = AdamW8bit(ours, states=states, masters="all", **SETTINGS)
    theirs: Any = AdamW8bit(whole, states=states, **SETTINGS)
    if route is nullcontext:
        theirs = bitsandbytes.optim.AdamW(whole, optim_bits={"8bit": 8, "fp32": 32}[states], **SETTINGS)
    steps = 2 if route is interpreted else 10
    with route():
        for number in range(steps):
            step(optimizer, ours, number)
            step(theirs, whole, number)
    for one, master, other in zip(ours, masters_of(optimizer, ours), whole, strict=True):
        assert torch.equal(master, other.detach())
        assert torch.equal(one.detach(), split(other.detach())[0]) and not torch.equal(master, one.detach().float())
        kept, wanted = optimizer.state[one], theirs.state[other]
        assert kept.keys() - {"low"} == wanted.keys() and kept["step"] == wanted["step"] == steps
        assert kept["state1"].dtype == (torch.uint8 if states == "8bit" and one.numel() >= 4096 else torch.float32)
        assert all(torch.equal(kept[key], wanted[key]) for key in wanted.keys() - {"step"})


def test_small_updates_add_up() -> None:
    """Far below a last bit of bf16. Rounded to the nearest at each step they are lost."""
    ours, lost, whole = weights([8192]), weights([8192]), [torch.nn.Parameter(weights([8192])[0].detach().float())]
    start, settings = ours[0].detach().clone(), {"lr": 1e-6, "states": "fp32"}
    optimizer = AdamW8bit(ours, masters="all", **settings)
    for_whole, for_lost = AdamW8bit(whole, **settings), AdamW8bit(lost, masters="all", **settings)
    for _ in range(50):
        for each, parameters in ((optimizer, ours), (for_whole, whole), (for_lost, lost)):
            parameters[0].grad = torch.ones_like(parameters[0])
            each.step()
        for_lost.state[lost[0]]["low"].zero_()
    assert torch.equal(masters_of(optimizer, ours)[0], whole[0].detach())
    moved = [(parameter.detach() != start).float().mean() for parameter in (ours[0], lost[0])]
    assert moved[0] > 5 * moved[1] > 0
    done = (start.float() - masters_of(optimizer, ours)[0]).mean().item()
    assert done == pytest.approx(50e-6, rel=1e-2)


def test_whose_weights_have_one() -> None:
    """By group, and bf16 alone; before the first step it is the weight."""
    parameters = [*weights([300, 4096]), torch.nn.Parameter(torch.ones(300))]
    for masters, found in (("none", []), ("embeddings", [1]), ("all", [0, 1])):
        groups = [{"params": parameters[:1], "name": "adapters_a"}, {"params": parameters[1:], "name": "embeddings"}]
        optimizer = AdamW8bit(groups, lr=0.0, masters=masters)  # pyright: ignore[reportArgumentType]
        step(optimizer, parameters, 1)
        assert [index for index, each in enumerate(parameters) if "low" in optimizer.state[each]] == found
        for index in found:
            low = optimizer.state[parameters[index]]["low"]
            assert low.dtype == torch.int16 and low.shape == parameters[index].shape and not low.any()


def test_states_of_a_checkpoint_are_those_that_are_asked_for() -> None:
    """A master that is not there begins as the weight, one that is not asked for goes; codes are no fp32 states."""
    parameters = weights()
    saved = {}
    for states, masters in itertools.product(STATES, ("none", "all")):
        optimizer = AdamW8bit(parameters, states=states, masters=masters, **SETTINGS)
        step(optimizer, parameters, 1)
        saved[states, masters] = copy.deepcopy(optimizer.state_dict())
    for (states, masters), state in saved.items():
        for asked in ("none", "all"):
            other = AdamW8bit(parameters, states=states, masters=asked, **SETTINGS)
            other.load_state_dict(copy.deepcopy(state))
            for number, parameter in enumerate(parameters):
                kept, wanted = other.state[parameter], state["state"][number]["__bnb_optimizer_quant_state__"]
                assert ("low" in kept) == (asked == "all") and torch.equal(kept["state1"], wanted["state1"])
                if asked == "all":
                    low = wanted["low"] if masters == "all" else torch.zeros_like(parameter, dtype=torch.int16)
                    assert kept["low"].dtype == torch.int16 and torch.equal(kept["low"], low)
        other_kind: States = "8bit" if states == "fp32" else "fp32"
        with pytest.raises(UserError, match=rf"^optimizer_states: it is {other_kind}, .* are {states}\. Give {states}"):
            AdamW8bit(parameters, states=other_kind, **SETTINGS).load_state_dict(copy.deepcopy(state))


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("masters", MASTERS)
@pytest.mark.parametrize("states", STATES)
def test_bytes_are_those_of_the_plan(
    states: States, masters: Masters, offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the card, and on the host."""
    update_by_reference(monkeypatch)
    parameters = weights([2**14, 2**15])
    groups = [{"params": parameters[:1], "name": "adapters_a"}, {"params": parameters[1:], "name": "embeddings"}]
    optimizer = AdamW8bit(groups, lr=1e-3, states=states, masters=masters, offload=offload)
    step(optimizer, parameters, 1)
    names = ("state1", "state2", "absmax1", "absmax2", "low")
    taken = [
        sum(optimizer.state[each][name].nbytes for name in names if name in optimizer.state[each])
        for each in parameters
    ]
    on_card = sum(size for each, size in zip(parameters, taken, strict=True) if each not in optimizer._hosted)
    counts = dict.fromkeys(("linear", "embeddings", "other", "lora_start", "hidden", "intermediate", "layers"), 1)
    shape = Shape(**counts, lora=2**14, trained_embeddings=2**15, vocabulary=1)
    assert states_bytes(shape, "adamw_8bit", states=states, masters=masters) == sum(taken)
    assert states_bytes(shape, "adamw_8bit", offload, states=states, masters=masters) == on_card
