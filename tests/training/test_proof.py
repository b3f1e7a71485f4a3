from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from steep.errors import RunError
from steep.model.checksum import checksum
from steep.training.adamw8bit import AdamW8bit
from steep.training.proof import MAX_SAMPLED, MIN_UPDATES, Proof
from steep.training.state_files import load_state
from tests.training.helpers import save_state


class Two(nn.Module):
    """A trained and a frozen tensor, and a buffer."""

    def __init__(self, size: int = 100) -> None:
        super().__init__()
        self.moving = nn.Parameter(torch.linspace(-1, 1, size))
        self.frozen = nn.Parameter(torch.arange(10.0), requires_grad=False)
        self.register_buffer("table", torch.arange(5))


def steps(
    model: Two, proof: Proof, gradient: float, count: int = MIN_UPDATES, rate: float = 1e-3, decay: float = 0.1
) -> None:
    optimizer = torch.optim.AdamW([{"params": [model.moving], "lr": rate, "weight_decay": decay}])
    for _ in range(count):
        model.moving.grad = torch.full_like(model.moving, gradient)
        optimizer.step()
        proof.observe({"moving": float(model.moving.grad.norm())}, optimizer)


def watch(model: Two) -> Proof:
    return Proof(model, {"moving": "other"})


def test_a_trained_tensor_passes() -> None:
    model = Two()
    proof = watch(model)
    steps(model, proof, gradient=1.0)
    proof.judge()
    report = proof.report()
    assert report["ok"] and report["complete"]
    assert report["trained"]["moving"]["changed_share"] == 1.0
    assert report["trained"]["moving"]["learning_rate"] == 1e-3
    assert report["trained"]["moving"]["updates"] == MIN_UPDATES
    assert report["frozen_tensors"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_alone_is_not_training(dtype: torch.dtype) -> None:
    model = Two()
    model.moving.data = model.moving.data.to(dtype)
    before = model.moving.detach().clone()
    proof = watch(model)
    steps(model, proof, gradient=0.0, rate=1e-1, decay=0.5)
    assert not torch.equal(before, model.moving)
    with pytest.raises(RunError, match=r"1 of 1 tensors .* moving \(its gradient was always zero or missing\)"):
        proof.judge()
    assert proof.records["moving"].changed_share == 0


def test_updates_that_round_away_are_not_training() -> None:
    model = Two()
    model.moving.data = torch.ones(100, dtype=torch.bfloat16)
    proof = watch(model)
    steps(model, proof, gradient=1.0, rate=1e-6, decay=0.0)
    with pytest.raises(RunError, match=r"may all round away in bfloat16"):
        proof.judge()


def test_what_a_master_keeps_is_training() -> None:
    """Where no weight has moved by a last bit yet; and what was there before the first step is not."""
    model = Two()
    model.moving.data = torch.ones(100, dtype=torch.bfloat16)
    optimizer = AdamW8bit([model.moving], lr=1e-6, masters="all")

    def updated(proof: Proof, gradient: float) -> None:
        for _ in range(MIN_UPDATES):
            model.moving.grad = torch.full_like(model.moving, gradient)
            optimizer.step()
            proof.observe({"moving": 1.0}, optimizer)

    proof = Proof(model, {"moving": "other"}, optimizer=optimizer)
    updated(proof, 1.0)
    assert (model.moving == 1).all()
    proof.judge()
    assert proof.records["moving"].changed_share == 1
    later = Proof(model, {"moving": "other"}, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    updated(later, 1.0)
    later.measure()
    assert later.records["moving"].changed_share == 0


def test_steps_at_rate_zero_are_no_updates() -> None:
    model = Two()
    proof = watch(model)
    steps(model, proof, gradient=1.0, count=10, rate=0.0)
    assert not proof.ready
    proof.judge()
    assert not proof.report()["ok"]
    assert not proof.report()["complete"]


@pytest.mark.parametrize("name", ["frozen", "table"])
def test_a_frozen_change_is_found(name: str) -> None:
    model = Two()
    proof = watch(model)
    steps(model, proof, gradient=1.0)
    with torch.no_grad():
        getattr(model, name)[3] += 1
    assert proof.changed_frozen() == [name]
    report = proof.report()
    assert report["frozen_changed"] == [name] and not report["ok"]


def test_what_each_forward_sets_anew_is_not_watched() -> None:
    model = Two()
    for name in ("inv_freq", "original_inv_freq", "local_inv_freq"):  # of the last one no original is kept
        model.register_buffer(name, torch.ones(4))
    proof = watch(model)
    for name in ("inv_freq", "original_inv_freq", "local_inv_freq"):
        getattr(model, name).mul_(2)
    assert proof.changed_frozen() == ["local_inv_freq", "original_inv_freq"]


def test_large_tensors_are_sampled() -> None:
    model = Two(size=MAX_SAMPLED + 1000)
    proof = watch(model)
    steps(model, proof, gradient=1.0)
    proof.judge()
    record = proof.records["moving"]
    assert (record.elements, record.elements_checked) == (MAX_SAMPLED + 1000, MAX_SAMPLED)
    assert record.changed_share > 0.99


def test_state_goes_on_from_the_first_step(tmp_path: Path) -> None:
    model = Two()
    proof = watch(model)
    steps(model, proof, gradient=1.0, count=2)
    save_state(proof.state(), tmp_path, "proof")
    later = watch(model)
    later.load_state(load_state(tmp_path, "proof"))
    assert not later.ready
    steps(model, later, gradient=1.0, count=1)
    assert later.ready
    later.judge()
    assert later.report()["ok"]
    with torch.no_grad():
        model.frozen[0] = 7
    with pytest.raises(RunError, match=r"not the base model that the run began with: 1 of 2 frozen tensors.*frozen"):
        watch(model).load_state(load_state(tmp_path, "proof"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64])
@pytest.mark.parametrize("size", [1, 7, 8, 1000])
def test_checksum_sees_any_flipped_bit(dtype: torch.dtype, size: int) -> None:
    tensor = (100 * torch.rand(size, generator=torch.Generator().manual_seed(1))).to(dtype)
    first = checksum(tensor)
    assert checksum(tensor.clone()) == first
    raw = tensor.view(torch.uint8)
    for place in {0, raw.numel() // 2, raw.numel() - 1}:
        for bit in range(8):
            raw[place] ^= 1 << bit
            assert checksum(tensor) != first, (place, bit)
            raw[place] ^= 1 << bit
    assert checksum(tensor) == first


def test_checksum_sees_a_swap_a_shape_and_a_dtype() -> None:
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    first = checksum(tensor)
    swapped = tensor.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    assert checksum(swapped) != first
    assert checksum(tensor.view(32, 128)) != first
    assert checksum(tensor.view(torch.int32)) != first
    assert checksum(tensor.flip(0)) != first


@pytest.mark.parametrize("distance", [1, 2, 64, 4096])
def test_checksum_sees_two_signs_flipped(distance: int) -> None:
    tensor = torch.ones(4 * 5000, dtype=torch.bfloat16)
    first = checksum(tensor)
    tensor[3] = -1  # the highest bit of a 64-bit word
    tensor[3 + 4 * distance] = -1
    assert checksum(tensor) != first


def test_checksum_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1001)
    first = checksum(tensor)
    monkeypatch.setattr("steep.model.checksum._CHUNK", 64)
    assert checksum(tensor) == first
