"""qk_norm_rope: Qwen3's and Gemma 3's norm of q and k heads, then the rotation; in e4m3 too; against fp32 truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steep.kernels import qk_norm as kernels
from steep.ops.backend import vjp
from steep.ops.qk_norm import qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_forward, qk_norm_rope_reference
from tests.ops.closeness import assert_as_good
from tests.ops.fp8_rows import KINDS, assert_quantised, assert_undefined, assert_zeros, fp8_rows
from tests.ops.routes import (
    along,
    assert_nothing_beside,
    assert_refused,
    assert_unchanged,
    cases,
    columns,
    far_apart,
    slack,
    unwritten,
)

EPS = 1e-6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = cases(  # tokens, num_heads, num_kv_heads, head_dim, rotated
    small=[(1, 8, 2, 64, 64), (3, 9, 3, 96, 96), (3, 4, 1, 128, 32), (7, 3, 1, 64, 48)],  # a program has one token
    large=[(63, 3, 1, 64, 48), (1000, 9, 3, 64, 64), (63, 16, 16, 128, 128), (63, 8, 2, 256, 256)],
    real=[(4096, 32, 8, 128, 128), (1000, 64, 8, 128, 128), (1000, 8, 4, 256, 256)],
)
# unit_offset, and the dtypes of qkv, and of the weights
FORMS = [(False, BF16, BF16), (True, BF16, FP32), (True, FP16, FP16), (False, FP32, BF16)]


def inputs(
    tokens: int, width: int, head_dim: int, rotated: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: str
) -> tuple[Any, ...]:
    """qkv, dqkv, the weights, cos and sin. Heads are of many sizes, down to where eps counts; their gradients too, so
    that each counts in the result."""
    num_heads = width // head_dim
    size = torch.logspace(-3, 1, tokens * num_heads)[torch.randperm(tokens * num_heads)]
    size = size.reshape(tokens, num_heads).repeat_interleave(head_dim, 1)
    qkv, dqkv = torch.randn(2, tokens, width) * size
    q_weight, k_weight = 0.5 + torch.rand(2, head_dim)
    turns = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(rotated // 2) / rotated) + 0.3
    cos, sin = 1.2 * turns.cos(), 1.2 * turns.sin()
    buffers = columns(qkv.to(device, dtype)), columns(dqkv.to(device, dtype), before=64, after=16)
    weights = q_weight.to(device, weight_dtype), k_weight.to(device, weight_dtype)
    return *buffers, *weights, columns(cos.to(device)), columns(sin.to(device))


def true_gradient(
    dqkv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *heads: int,
    unit_offset: bool = False,
) -> torch.Tensor:
    def function(x: torch.Tensor) -> torch.Tensor:
        return qk_norm_rope_reference(
            x, q_weight.float(), k_weight.float(), eps, cos, sin, *heads, unit_offset=unit_offset
        )

    return vjp(function, (qkv.float(),), dqkv.float())[0]


@pytest.mark.parametrize(("unit_offset", "dtype", "weight_dtype"), FORMS)
@pytest.mark.parametrize(("route", "tokens", "num_heads", "num_kv_heads", "head_dim", "rotated"), CASES)
def test_forward_and_backward(
    route: str,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotated: int,
    unit_offset: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    heads = num_heads, num_kv_heads, head_dim
    form: dict[str, Any] = {"unit_offset": unit_offset}
    width = (num_heads + 2 * num_kv_heads) * head_dim
    with along(route, kernels, forward=2, backward=1) as device:
        qkv, dqkv, q_weight, k_weight, cos, sin = inputs(tokens, width, head_dim, rotated, dtype, weight_dtype, device)
        operands = q_weight, k_weight, EPS, cos, sin, *heads
        raw, dy = qkv.clone(), dqkv.clone()
        out = unwritten(tokens, width, dtype, device)
        assert qk_norm_rope_forward(qkv, *operands, **form, out=out) is out
        assert torch.equal(qk_norm_rope_forward(qkv, *operands, **form), out)
        assert qk_norm_rope_backward(dqkv, qkv, *operands, **form) is dqkv
    assert torch.equal(qkv, raw)
    v = (num_heads + num_kv_heads) * head_dim
    assert torch.equal(out[:, v:], raw[:, v:]) and torch.equal(dqkv[:, v:], dy[:, v:])
    assert_nothing_beside(out)
    assert_nothing_beside(dqkv)
    truth = qk_norm_rope_reference(raw.float(), *operands, **form)
    reference = qk_norm_rope_reference(raw, *operands, **form)
    assert_as_good(out[:, :v], reference[:, :v], truth[:, :v], slack(dtype))
    truth = true_gradient(dy, raw, *operands, **form)
    assert_as_good(dqkv[:, :v], truth[:, :v].to(dtype), truth[:, :v], slack(dtype), "gradient")


# tokens, num_heads, num_kv_heads, head_dim, rotated. A piece is a head, two heads, four or eight, or a part of one.
QUANTISED = cases(
    small=[
        (1, 8, 2, 64, 64),
        (3, 9, 3, 96, 96),
        (3, 4, 1, 128, 32),
        (7, 3, 1, 64, 48),
        (3, 5, 3, 32, 32),
        (2, 3, 2, 256, 256),
    ],
    large=[(63, 3, 1, 64, 48), (63, 9, 3, 64, 64), (63, 14, 2, 64, 64), (63, 8, 2, 256, 64), (63, 1, 1, 16, 16)],
    real=[(4096, 32, 8, 128, 128), (1000, 64, 8, 128, 64), (1000, 8, 4, 256, 256), (1000, 9, 3, 64, 64)],
)


@KINDS
@pytest.mark.parametrize(("unit_offset", "dtype", "weight_dtype"), [(False, BF16, BF16), (True, FP32, BF16)])
@pytest.mark.parametrize(("route", "tokens", "num_heads", "num_kv_heads", "head_dim", "rotated"), QUANTISED)
def test_quantised(
    route: str,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotated: int,
    unit_offset: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    pieces: bool,
    weighted: bool,
) -> None:
    """In e4m3 from fp32 with the v heads, beside a gradient that stays what it was."""
    heads = num_heads, num_kv_heads, head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    fit = not pieces or head_dim != 96  # which 128 is no multiple of
    with along(route, kernels, backward=1 + fit) as device:
        qkv, dqkv, q_weight, k_weight, cos, sin = inputs(tokens, width, head_dim, rotated, dtype, weight_dtype, device)
        operands = qkv, q_weight, k_weight, EPS, cos, sin, *heads
        rows = fp8_rows(tokens, width, device, pieces=pieces, weighted=weighted)
        truth = true_gradient(dqkv, *operands, unit_offset=unit_offset)
        plain = qk_norm_rope_backward(dqkv.clone(), *operands, unit_offset=unit_offset)
        if fit:
            assert qk_norm_rope_backward(dqkv, *operands, unit_offset=unit_offset, quantised=rows) is dqkv
        else:
            with pytest.raises(AssertionError):
                qk_norm_rope_backward(dqkv, *operands, unit_offset=unit_offset, quantised=rows)
    assert_nothing_beside(dqkv)
    if fit:
        assert_unchanged(route, dqkv, plain, truth)
        assert_quantised(rows, truth)


@KINDS
@pytest.mark.parametrize(("route",), cases([()]))
def test_quantised_zeros_and_what_is_not_finite(route: str, pieces: bool, weighted: bool) -> None:
    """In a q head, of which the norm leaves nothing, and in a v head."""
    with along(route, kernels, backward=1) as device, np.errstate(invalid="ignore"):
        qkv, dqkv, q_weight, k_weight, cos, sin = inputs(4, 6 * 128, 128, 128, FP32, BF16, device)
        dqkv[0], dqkv[1, 130], dqkv[2, 700], qkv[3, 600] = 0, torch.inf, torch.nan, torch.nan
        rows = fp8_rows(4, 6 * 128, device, pieces=pieces, weighted=weighted)
        qk_norm_rope_backward(dqkv, qkv, q_weight, k_weight, EPS, cos, sin, 4, 1, 128, quantised=rows)
    assert_zeros(rows, 0)
    assert_undefined(rows, {1: 130, 2: 700, 3: 600})


def test_the_reference_is_what_transformers_does() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    qkv, _, q_weight, k_weight, cos, sin = inputs(5, 6 * 32, 32, 32, FP32, FP32, "cpu")
    normed: list[Any] = []
    for weight, columns_of in ((q_weight, slice(0, 4)), (k_weight, slice(4, 5))):
        norm = Qwen3RMSNorm(32, eps=EPS)
        norm.weight.data.copy_(weight)
        normed.append(norm(qkv.unflatten(1, (6, 32))[None, :, columns_of]).transpose(1, 2))
    q, k = normed
    rotated = apply_rotary_pos_emb(q, k, cos.repeat(1, 2)[None], sin.repeat(1, 2)[None])
    ours = qk_norm_rope_reference(qkv, q_weight, k_weight, EPS, cos, sin, 4, 1, 32)[:, : 5 * 32]
    torch.testing.assert_close(ours.unflatten(1, (5, 32)), torch.cat(rotated, 1)[0].transpose(0, 1).detach())


@pytest.mark.parametrize(("route",), cases([()]))
def test_autograd(route: str) -> None:
    with along(route, kernels, forward=1, backward=1) as device:
        qkv, dqkv, q_weight, k_weight, cos, sin = inputs(9, 5 * 64, 64, 64, FP32, FP32, device)
        operands = q_weight, k_weight, EPS, cos, sin, 3, 1, 64
        leaf, given = qkv.clone().requires_grad_(), dqkv.clone()
        y = qk_norm_rope(leaf, *operands, unit_offset=True)
        (dx,) = torch.autograd.grad(y, leaf, given)
    truth = qk_norm_rope_reference(qkv, *operands, unit_offset=True)
    assert_as_good(y.detach(), truth, truth, slack(FP32))
    truth = true_gradient(dqkv, qkv, *operands, unit_offset=True)
    assert_as_good(dx, truth, truth, slack(FP32), "gradient")
    assert torch.equal(given, dqkv) and torch.equal(leaf, qkv)


def test_a_trained_weight_is_an_error() -> None:
    qkv, _, q_weight, k_weight, cos, sin = inputs(2, 5 * 64, 64, 64, FP32, FP32, "cpu")
    with pytest.raises(ValueError, match="freeze it"):
        qk_norm_rope(qkv, q_weight, k_weight.requires_grad_(), EPS, cos, sin, 3, 1, 64)


@pytest.mark.parametrize(("route",), cases([()]))
def test_no_tokens(route: str) -> None:
    with along(route, kernels, forward=1, backward=1) as device:
        qkv, dqkv, q_weight, k_weight, cos, sin = inputs(0, 5 * 64, 64, 64, FP32, FP32, device)
        operands = q_weight, k_weight, EPS, cos, sin, 3, 1, 64
        assert qk_norm_rope_forward(qkv, *operands).shape == (0, 5 * 64)
        assert qk_norm_rope_backward(dqkv, qkv, *operands).shape == (0, 5 * 64)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_planted_faults_are_refused(dtype: torch.dtype) -> None:
    qkv, dqkv, q_weight, k_weight, cos, sin = inputs(63, 6 * 64, 64, 64, dtype, dtype, "cpu")
    q, heads, end = q_weight, (4, 1, 64), 5 * 64  # columns of q and k
    wholly = torch.cat((q.repeat(4), k_weight))  # what a norm over all heads at once would multiply by
    x = qkv[:, :end].float()
    over_all_heads = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * wholly.float()
    truth = qk_norm_rope_reference(qkv.float(), q, k_weight, EPS, cos, sin, *heads)[:, :end]
    reference = qk_norm_rope_reference(qkv, q, k_weight, EPS, cos, sin, *heads)[:, :end]
    true_dx = true_gradient(dqkv, qkv, q, k_weight, EPS, cos, sin, *heads)[:, :end]
    variants: tuple[tuple[Any, ...], ...] = (
        (q, k_weight, 0.0, cos, sin, False),
        (q, k_weight, EPS, cos, sin, True),
        (q, k_weight, EPS, cos, -sin, False),
        (q, k_weight, EPS, sin, cos, False),
        (k_weight, q, EPS, cos, sin, False),
        (q, q, EPS, cos, sin, False),
        (q.roll(32), k_weight.roll(32), EPS, cos, sin, False),  # the wrong half's weight
        (q, k_weight, EPS, cos.roll(1, 0), sin.roll(1, 0), False),
    )
    for variant in variants:
        operands: Any = (*variant[:5], *heads)
        forward = qk_norm_rope_reference(qkv, *operands, unit_offset=variant[5])[:, :end]
        assert_refused(forward, reference, truth)
        backward = true_gradient(dqkv, qkv, *operands, unit_offset=variant[5])[:, :end]
        assert_refused(backward.to(dtype), true_dx.to(dtype), true_dx)
    assert_refused(over_all_heads.to(dtype), reference, truth)
    assert_refused(x.to(dtype), reference, truth)
    assert_refused(dqkv[:, :end], true_dx.to(dtype), true_dx)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    qkv, dqkv, q_weight, k_weight, cos, sin = inputs(3, 6 * 64, 64, 64, BF16, BF16, "cuda")
    operands = q_weight, k_weight, EPS, cos, sin, 4, 1, 64
    far = far_apart(qkv)
    assert torch.equal(qk_norm_rope_forward(far, *operands), qk_norm_rope_forward(qkv, *operands))
    far_gradient = qk_norm_rope_backward(dqkv.clone(), far, *operands)
    assert torch.equal(far_gradient, qk_norm_rope_backward(dqkv, qkv, *operands))
