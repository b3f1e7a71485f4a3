from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from steep.training.adamw8bit import AdamW8bit
from steep.training.gradients import GradientReport
from steep.training.gradients import measure_and_clip as measure_and_clip_named


def network(scale: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).to(dtype)
    model[0].bias.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = scale * torch.randn_like(parameter)
    return model


def measure_and_clip(model: nn.Module, max_norm: float | None) -> GradientReport:
    return measure_and_clip_named({n: p for n, p in model.named_parameters() if p.requires_grad}, max_norm)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_clips_as_torch_does(scale: float) -> None:
    ours, theirs = network(scale), network(scale)
    report = measure_and_clip(ours, 1.0)
    total = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    assert report.total == pytest.approx(total.item(), rel=1e-6)
    assert report.names == ["0.weight", "1.weight", "1.bias"]
    assert report.finite and report.offenders == []
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None
        else:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)


def test_measures_before_it_clips() -> None:
    model = network(10.0)
    before = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    report = measure_and_clip(model, 0.5)
    assert report.norms.tolist() == pytest.approx(before)
    assert measure_and_clip(model, None).total == pytest.approx(0.5, rel=1e-4)


def test_none_leaves_gradients_alone() -> None:
    model, same = network(10.0), network(10.0)
    measure_and_clip(model, None)
    assert all(
        a.grad is b.grad is None or (a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad))
        for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


def test_an_optimizer_that_multiplies_gradients_itself_is_told_the_factor() -> None:
    model, clipped = network(10.0), network(10.0)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    ours, theirs = AdamW8bit(model.parameters(), lr=0.1), AdamW8bit(clipped.parameters(), lr=0.1)
    report = measure_and_clip_named({n: p for n, p in model.named_parameters() if p.requires_grad}, 1.0, ours)
    assert report.total > 1 and float(ours.gradient_factor) == pytest.approx(1 / report.total, rel=1e-5)  # pyright: ignore[reportArgumentType]
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    torch.nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
    ours.step()
    theirs.step()
    assert ours.gradient_factor is None
    for one, other in zip(model.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_small_gradients_are_not_multiplied(max_norm: float | None) -> None:
    model = network(1e-4)
    optimizer = AdamW8bit(model.parameters(), lr=0.1)
    measure_and_clip_named({n: p for n, p in model.named_parameters() if p.requires_grad}, max_norm, optimizer)
    assert optimizer.gradient_factor is None if max_norm is None else optimizer.gradient_factor == 1.0


def test_something_else_is_done_before_the_norms_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = network(10.0), []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (done.append("read"), read(self))[1])
    measure_and_clip_named(dict(model.named_parameters()), 1.0, None, lambda: done.append("meanwhile"))
    assert done[:2] == ["meanwhile", "read"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_left(bad: float) -> None:
    model = network(1.0)
    weight = model[1].weight  # pyright: ignore[reportIndexIssue]
    weight.grad[0, 0] = bad
    kept = weight.grad.clone()
    report = measure_and_clip(model, 1.0)
    assert not report.finite
    assert report.offenders == ["1.weight"]
    assert torch.equal(weight.grad, kept) or math.isnan(bad)
    assert torch.isfinite(weight.grad).sum() == weight.numel() - 1


def test_no_gradients_at_all() -> None:
    model = nn.Linear(2, 2)
    report = measure_and_clip(model, None)
    assert report.total == 0 and report.norms.tolist() == [0, 0]


def test_no_gradients_at_all_with_clipping() -> None:
    assert measure_and_clip(nn.Linear(2, 2), 1.0).total == 0


def test_bf16_norms_are_summed_in_fp32() -> None:
    model = nn.Linear(1, 100_000, bias=False, dtype=torch.bfloat16)
    model.weight.grad = torch.full_like(model.weight, 0.125)
    assert measure_and_clip(model, None).total == pytest.approx(0.125 * math.sqrt(100_000), rel=1e-4)
