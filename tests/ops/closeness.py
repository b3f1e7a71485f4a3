"""The oracle of the op tests: fp32 truth, and an error that may not be worse than the same-dtype reference's."""

from __future__ import annotations

import torch

SLACK = 2e-3  # scale-free: RMS of the difference over RMS of the truth
SLACK_FP32 = 1e-5  # of fp32 on a CPU: one rounding to bf16 is 1.7e-3, and has to fail


def slack_of(tensor: torch.Tensor) -> float:
    return SLACK_FP32 if tensor.dtype == torch.float32 and tensor.device.type == "cpu" else SLACK


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS(value - truth) / RMS(truth), in fp64; infinite where a value is not finite or the truth is all zero."""
    assert value.shape == truth.shape, (value.shape, truth.shape)
    difference, truth = value.double() - truth.double(), truth.double()
    scale = truth.square().mean().sqrt().item()
    result = difference.square().mean().sqrt().item() / scale if scale else float("inf")
    return result if result == result else float("inf")


def assert_as_good(
    ours: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, slack: float = SLACK, name: str = "output"
) -> None:
    """Our error against the fp32 `truth` is at most the same-dtype `reference`'s plus `slack`, and a halved output is
    not: a bound so wide that it would let that pass is a fault of the test."""
    bound = error(reference, truth) + slack
    assert bound < 0.25, f"{name}: the reference itself is {bound:.3f} off"
    assert error(ours, truth) <= bound, f"{name}: {error(ours, truth):.2e} off, the reference {bound - slack:.2e}"
    assert error(ours / 2, truth) > bound, f"{name}: a halved output passes"
