"""swiglu and geglu: forward into columns, backward in place, large and tiny gates, in e4m3 too, against fp32 truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steep.kernels import swiglu as kernels
from steep.ops.backend import vjp
from steep.ops.swiglu import Activation, gated, gated_backward, gated_forward, gated_reference
from tests.ops.closeness import assert_as_good
from tests.ops.fp8_rows import KINDS, assert_quantised, assert_undefined, assert_zeros, fp8_rows
from tests.ops.routes import along, assert_nothing_beside, assert_refused, cases, columns, far_apart, slack, unwritten

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = cases(
    small=[(1, 64), (3, 2500), (7, 100)],  # a program has one row at the most
    large=[(63, 100), (1000, 352)],
    real=[(4096, 14336), (1000, 11008), (63, 6912), (1000, 1001)],
)
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])


def inputs(tokens: int, intermediate: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up, with gates from tiny to large, and dh."""
    gate_up = torch.randn(tokens, 2 * intermediate)
    gate_up[:, :intermediate] *= torch.logspace(-2, 1, intermediate)[torch.randperm(intermediate)]
    dh = torch.randn(tokens, intermediate)
    return columns(gate_up.to(device, dtype)), columns(dh.to(device, dtype), before=64, after=16)


def true_gradients(
    dh: torch.Tensor, gate_up: torch.Tensor, intermediate: int, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of gate and of up."""

    def function(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated_reference(torch.cat((gate, up), 1), intermediate, activation)

    dgate, dup = vjp(function, gate_up.float().tensor_split(2, 1), dh.float())
    return dgate, dup


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("route", "tokens", "intermediate"), SHAPES)
def test_forward(route: str, tokens: int, intermediate: int, dtype: torch.dtype, activation: Activation) -> None:
    with along(route, kernels, forward=3) as device:
        gate_up, _ = inputs(tokens, intermediate, dtype, device)
        out, wide = unwritten(tokens, intermediate, dtype, device), unwritten(tokens, intermediate, FP32, device)
        assert gated_forward(gate_up, intermediate, activation, out=out) is out
        gated_forward(gate_up, intermediate, activation, out=wide)
        alone = gated_forward(gate_up, intermediate, activation)
    assert alone.dtype == dtype and torch.equal(alone, out)
    truth = gated_reference(gate_up.float(), intermediate, activation)
    assert_as_good(out, gated_reference(gate_up, intermediate, activation), truth, slack(dtype))
    assert_as_good(wide, truth, truth, slack(FP32), "into fp32")
    assert_nothing_beside(out)
    assert_nothing_beside(wide)


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("route", "tokens", "intermediate"), SHAPES)
def test_backward(route: str, tokens: int, intermediate: int, dtype: torch.dtype, activation: Activation) -> None:
    with along(route, kernels, backward=1) as device:
        gate_up, dh = inputs(tokens, intermediate, dtype, device)
        h = gated_reference(gate_up.float(), intermediate, activation)
        dgate, dup = true_gradients(dh, gate_up, intermediate, activation)
        gated_backward(dh, gate_up, intermediate, activation)
    for ours, truth, name in (
        (dh, h, "h"),
        (gate_up[:, :intermediate], dgate, "gate"),
        (gate_up[:, intermediate:], dup, "up"),
    ):
        assert_as_good(ours, truth.to(dtype), truth, slack(dtype), name)
    assert_nothing_beside(dh)
    assert_nothing_beside(gate_up)


@KINDS
@ACTIVATIONS
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("route", "tokens", "intermediate"),
    cases(  # one block of the kernels, two of them, four; a row held whole, and one that is too long for that
        small=[(1, 64), (7, 100), (3, 384), (2, 5000), (1, 16640)],
        large=[(63, 100), (63, 4224), (5, 16384)],
        real=[(4096, 14336), (1000, 11008), (63, 6912), (1000, 1001), (63, 8192), (63, 28672)],
    ),
)
def test_quantised(
    route: str, tokens: int, intermediate: int, dtype: torch.dtype, activation: Activation, pieces: bool, weighted: bool
) -> None:
    """In e4m3 from fp32, beside results that are the same to the bit."""
    both = intermediate % 128 == 0 or not pieces  # gate and up have no piece together
    counts = {"forward": 1, "forward_quantised": 1, "backward": int(both), "backward_quantised": int(both)}
    with along(route, kernels, **counts) as device:
        gate_up, dh = inputs(tokens, intermediate, dtype, device)
        kind = {"pieces": pieces, "weighted": weighted}
        h = fp8_rows(tokens, intermediate, device, **kind)
        out = unwritten(tokens, intermediate, dtype, device)
        gated_forward(gate_up, intermediate, activation, out, quantised=h)
        assert torch.equal(gated_forward(gate_up, intermediate, activation), out)
        true_h = gated_reference(gate_up.float(), intermediate, activation)
        truth = torch.cat(true_gradients(dh, gate_up, intermediate, activation), 1)
        gradient = fp8_rows(tokens, 2 * intermediate, device, **kind)
        if both:
            plain = dh.clone(), gate_up.clone()
            gated_backward(*plain, intermediate, activation)
            gated_backward(dh, gate_up, intermediate, activation, quantised=gradient)
            assert torch.equal(dh, plain[0]) and torch.equal(gate_up, plain[1])
        else:
            with pytest.raises(AssertionError, match="pieces of gate and up"):
                gated_backward(dh, gate_up, intermediate, activation, quantised=gradient)
    for written in (out, dh, gate_up):
        assert_nothing_beside(written)
    assert_quantised(h, true_h)
    if both:
        assert_quantised(gradient, truth)


@KINDS
@ACTIVATIONS
@pytest.mark.parametrize(("route",), cases([()]))
def test_quantised_zeros_and_what_is_not_finite(
    route: str, activation: Activation, pieces: bool, weighted: bool
) -> None:
    with along(route, kernels, forward_quantised=1, backward_quantised=1) as device, np.errstate(invalid="ignore"):
        gate_up, dh = inputs(5, 256, FP32, device)
        gate_up[:4, 256:] = 0
        gate_up[1, 256 + 140], gate_up[2, 256 + 255], gate_up[4, 256] = torch.nan, torch.inf, -torch.inf
        gate_up[2:, [0, 255]] = 1
        dh[0], dh[1:, :] = 0, 1
        h = fp8_rows(5, 256, device, pieces=pieces, weighted=weighted)
        gradient = fp8_rows(5, 512, device, pieces=pieces, weighted=weighted)
        gated_forward(gate_up, 256, activation, quantised=h)
        gated_backward(dh, gate_up, 256, activation, quantised=gradient)
    for rows in (h, gradient):  # up is a factor of h and of gate's gradient
        assert_zeros(rows, 0)
        assert_undefined(rows, {1: 140, 2: 255, 4: 0})


@ACTIVATIONS
@pytest.mark.parametrize(("route",), cases([()]))
def test_a_buffer_wider_than_gate_and_up(route: str, activation: Activation) -> None:
    """As a group of adapters makes it: what stands behind up is neither read nor written."""
    with along(route, kernels, forward=1, backward=1) as device:
        gate_up, dh = inputs(5, 64, BF16, device)
        wider = torch.cat((gate_up, torch.full((5, 16), float("nan"), dtype=BF16, device=device)), 1)
        truth = gated_reference(gate_up.float(), 64, activation)
        dgate, dup = true_gradients(dh, gate_up, 64, activation)
        h = gated_forward(wider, 64, activation)
        gated_backward(dh, wider, 64, activation)
    assert_as_good(h, truth.bfloat16(), truth, slack(BF16))
    gradient = torch.cat((dgate, dup), 1)
    assert_as_good(wider[:, :128], gradient.bfloat16(), gradient, slack(BF16))
    assert bool(wider[:, 128:].isnan().all())


@ACTIVATIONS
@pytest.mark.parametrize(("route",), cases([()]))
def test_large_gates_do_not_overflow(route: str, activation: Activation) -> None:
    gates = torch.tensor([[-6e4, -1e3, -100.0, -89.0, -20.0, -0.0, 0.0, 20.0, 89.0, 100.0, 1e3, 6e4]])
    with along(route, kernels, forward=1, backward=1) as device:
        gate_up = torch.cat((gates, torch.full_like(gates, 0.5)), 1).to(device)
        h = gated_forward(gate_up, 12, activation)
        expected = gated_reference(gate_up, 12, activation)
        slope = true_gradients(torch.ones_like(h), gate_up, 12, activation)[0]
        gated_backward(torch.ones_like(h), gate_up, 12, activation)
    torch.testing.assert_close(h, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gate_up[:, :12], slope, atol=1e-6, rtol=1e-5)


@ACTIVATIONS
@pytest.mark.parametrize(("route",), cases([()]))
def test_autograd(route: str, activation: Activation) -> None:
    with along(route, kernels, forward=1, backward=1) as device:
        gate_up, dh = inputs(9, 96, FP32, device)
        leaf, given = gate_up.clone().requires_grad_(), dh.clone()
        h = gated(leaf, activation)
        (gradient,) = torch.autograd.grad(h, leaf, given)
    truth = gated_reference(gate_up, 96, activation)
    assert_as_good(h.detach(), truth, truth, slack(FP32))
    truth = torch.cat(true_gradients(dh, gate_up, 96, activation), 1)
    assert_as_good(gradient, truth, truth, slack(FP32), "gradient")
    assert torch.equal(given, dh) and torch.equal(leaf, gate_up)


@pytest.mark.parametrize(("route",), cases([()]))
def test_no_tokens(route: str) -> None:
    with along(route, kernels, forward=1, backward=1) as device:
        gate_up, dh = inputs(0, 64, BF16, device)
        assert gated_forward(gate_up, 64, "silu").shape == (0, 64)
        gated_backward(dh, gate_up, 64, "silu")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_planted_faults_are_refused(dtype: torch.dtype) -> None:
    gate_up, dh = inputs(63, 100, dtype, "cpu")
    gate, up = gate_up.float().tensor_split(2, 1)
    silu, gelu = gated_reference(gate_up, 100, "silu"), gated_reference(gate_up, 100, "gelu_tanh")
    true_silu = gated_reference(gate_up.float(), 100, "silu")
    true_gelu = gated_reference(gate_up.float(), 100, "gelu_tanh")
    for fault in (gelu, F.silu(up) * gate, F.silu(gate), gate * up, silu.roll(1, 1), F.silu(-gate) * up):
        assert_refused(fault.to(dtype), silu, true_silu)
    for fault in (silu, gate * torch.sigmoid(1.702 * gate) * up):  # and the sigmoid approximation of gelu
        assert_refused(fault.to(dtype), gelu, true_gelu)
    if dtype == FP32:  # a difference of 1e-4 is below what bf16 holds
        assert_refused(F.gelu(gate) * up, gelu, true_gelu)
    dgate, dup = true_gradients(dh, gate_up, 100, "silu")
    sigmoid = torch.sigmoid(gate)
    for fault in (
        dup,
        dh.float() * up * sigmoid,  # without the sigmoid's own slope
        dh.float() * up * (sigmoid + gate * sigmoid),
        dgate * up,
        true_gradients(dh, gate_up, 100, "gelu_tanh")[0],
    ):
        assert_refused(fault.to(dtype), dgate.to(dtype), dgate)
    assert_refused(dgate.to(dtype), dup.to(dtype), dup)


@pytest.mark.gpu
@ACTIVATIONS
def test_offsets_beyond_32_bits(activation: Activation) -> None:
    gate_up, dh = inputs(3, 512, BF16, "cuda")
    far = far_apart(gate_up)
    assert torch.equal(gated_forward(far, 512, activation), gated_forward(gate_up, 512, activation))
    other = dh.clone()
    gated_backward(other, far, 512, activation)
    gated_backward(dh, gate_up, 512, activation)
    assert torch.equal(far, gate_up) and torch.equal(other, dh)
