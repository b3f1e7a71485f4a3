"""rope: whole and partial heads, scaled angles, strided rows, in place and back, in e4m3 too, against fp32 truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steep.kernels import rope as kernels
from steep.ops.backend import vjp
from steep.ops.rope import rope, rope_backward, rope_forward, rope_reference
from tests.ops.closeness import assert_as_good
from tests.ops.fp8_rows import KINDS, assert_quantised, assert_undefined, assert_zeros, fp8_rows
from tests.ops.routes import along, assert_nothing_beside, assert_refused, cases, columns, far_apart, slack

SCALE = 1.2  # of cos and sin, as YaRN has it
CASES = cases(  # tokens, num_heads, num_kv_heads, head_dim, rotated
    small=[(1, 8, 2, 64, 64), (13, 9, 3, 96, 96), (13, 4, 1, 128, 32), (63, 3, 1, 64, 48)],
    large=[(1000, 9, 3, 64, 64), (63, 16, 16, 128, 128), (63, 8, 2, 256, 256)],
    real=[(4096, 32, 8, 128, 128), (1000, 64, 8, 128, 64), (1000, 8, 4, 256, 256)],
)


def angles(tokens: int, half: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, half] of positions that restart, as columns of what transformers has: both halves."""
    positions = torch.arange(tokens) % 700
    frequencies = 10000.0 ** -(torch.arange(half) / half)
    turns = (positions[:, None] * frequencies + 0.3).repeat(1, 2).to(device)
    return (SCALE * turns.cos())[:, :half], (SCALE * turns.sin())[:, :half]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("route", "tokens", "num_heads", "num_kv_heads", "head_dim", "rotated"), CASES)
def test_there_and_back(
    route: str, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, rotated: int, dtype: torch.dtype
) -> None:
    heads = num_heads, num_kv_heads, head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    with along(route, kernels, rotate=2) as device:
        raw, dy = torch.randn(2, tokens, width, device=device).to(dtype)
        cos, sin = angles(tokens, rotated // 2, device)
        qkv, dqkv = columns(raw), columns(dy, before=64, after=16)
        assert rope_forward(qkv, cos, sin, *heads) is qkv
        assert rope_backward(dqkv, cos, sin, *heads) is dqkv
    truth = rope_reference(raw.float(), cos, sin, *heads)
    assert_as_good(qkv, rope_reference(raw, cos, sin, *heads), truth, slack(dtype))
    (true_gradient,) = vjp(lambda x: rope_reference(x, cos, sin, *heads), (raw.float(),), dy.float())
    assert_as_good(dqkv, true_gradient.to(dtype), true_gradient, slack(dtype), "gradient")
    for written, before in ((qkv, raw), (dqkv, dy)):
        assert_nothing_beside(written)
        start = (num_heads + num_kv_heads) * head_dim
        assert torch.equal(written[:, start:], before[:, start:])  # v
        rest = written.unflatten(1, (-1, head_dim))[..., rotated:]
        assert torch.equal(rest, before.unflatten(1, (-1, head_dim))[..., rotated:])


# tokens, num_heads, num_kv_heads, head_dim, rotated. A piece is a head, two heads, four or eight, or a part of one.
QUANTISED = cases(
    small=[
        (1, 8, 2, 64, 64),
        (5, 9, 3, 96, 96),
        (5, 4, 1, 128, 32),
        (63, 3, 1, 64, 48),
        (3, 5, 3, 32, 32),
        (2, 3, 2, 256, 256),
    ],
    large=[(63, 9, 3, 64, 64), (63, 14, 2, 64, 64), (63, 8, 2, 256, 64), (63, 1, 1, 16, 16)],
    real=[(4096, 32, 8, 128, 128), (1000, 64, 8, 128, 64), (1000, 8, 4, 256, 256), (1000, 9, 3, 64, 64)],
)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("route", "tokens", "num_heads", "num_kv_heads", "head_dim", "rotated"), QUANTISED)
def test_quantised(
    route: str,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotated: int,
    dtype: torch.dtype,
    pieces: bool,
    weighted: bool,
) -> None:
    """In e4m3 from fp32 with the v heads, beside a gradient that is the same to the bit."""
    heads = num_heads, num_kv_heads, head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    fit = not pieces or head_dim != 96  # which 128 is no multiple of
    with along(route, kernels, rotate=1, rotate_back=int(fit)) as device:
        size = torch.logspace(-3, 1, tokens, device=device)[:, None]
        dy = (torch.randn(tokens, width, device=device) * size).to(dtype)
        cos, sin = angles(tokens, rotated // 2, device)
        dqkv, rows = columns(dy), fp8_rows(tokens, width, device, pieces=pieces, weighted=weighted)
        plain = rope_backward(dy.clone(), cos, sin, *heads)
        if fit:
            assert rope_backward(dqkv, cos, sin, *heads, quantised=rows) is dqkv
        else:
            with pytest.raises(AssertionError):
                rope_backward(dqkv, cos, sin, *heads, quantised=rows)
    assert_nothing_beside(dqkv)
    if fit:
        assert torch.equal(dqkv, plain)
        assert_quantised(rows, rope_reference(dy.float(), cos, -sin, *heads))


@KINDS
@pytest.mark.parametrize(("route",), cases([()]))
def test_quantised_zeros_and_what_is_not_finite(route: str, pieces: bool, weighted: bool) -> None:
    """In a q head, which a rotation spreads over two columns of it, and in a v head."""
    with along(route, kernels, rotate_back=1) as device, np.errstate(invalid="ignore"):
        dqkv = torch.randn(4, 6 * 128, device=device)
        dqkv[0], dqkv[1, 130], dqkv[2, 700], dqkv[3, 767] = 0, torch.inf, torch.nan, -torch.inf
        rows = fp8_rows(4, 6 * 128, device, pieces=pieces, weighted=weighted)
        rope_backward(dqkv, *angles(4, 64, device), 4, 1, 128, quantised=rows)
    assert_zeros(rows, 0)
    assert_undefined(rows, {1: 130, 2: 700, 3: 767})


def test_the_reference_is_what_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qkv = torch.randn(5, 6 * 32)
    cos, sin = angles(5, 16, "cpu")
    q, k, _ = qkv.unflatten(1, (6, 32)).transpose(0, 1)[None].split((4, 1, 1), 1)
    expected = torch.cat(apply_rotary_pos_emb(q, k, cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]), 1)
    rotated = rope_reference(qkv, cos, sin, 4, 1, 32)[:, : 5 * 32]
    torch.testing.assert_close(rotated.unflatten(1, (5, 32)), expected[0].transpose(0, 1))


@pytest.mark.parametrize(("route",), cases([()]))
def test_autograd(route: str) -> None:
    with along(route, kernels, rotate=2) as device:
        raw, dy = torch.randn(2, 9, 5 * 64, device=device)
        cos, sin = angles(9, 32, device)
        leaf = raw.clone().requires_grad_()
        y = rope(leaf, cos, sin, 3, 1, 64)
        given = dy.clone()
        (dx,) = torch.autograd.grad(y, leaf, given)
    truth = rope_reference(raw, cos, sin, 3, 1, 64)
    assert_as_good(y.detach(), truth, truth, slack(torch.float32))
    (true_gradient,) = vjp(lambda x: rope_reference(x, cos, sin, 3, 1, 64), (raw,), dy)
    assert_as_good(dx, true_gradient, true_gradient, slack(torch.float32))
    assert torch.equal(given, dy) and torch.equal(leaf, raw)


@pytest.mark.parametrize(("route",), cases([()]))
def test_no_tokens(route: str) -> None:
    with along(route, kernels, rotate=1) as device:
        assert rope_forward(torch.empty(0, 5 * 64, device=device), *angles(0, 32, device), 3, 1, 64).shape == (0, 320)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_planted_faults_are_refused(dtype: torch.dtype) -> None:
    raw = torch.randn(63, 6 * 64).to(dtype)
    cos, sin = angles(63, 32, "cpu")
    truth, reference = rope_reference(raw.float(), cos, sin, 4, 1, 64), rope_reference(raw, cos, sin, 4, 1, 64)
    x = raw.float().unflatten(1, (-1, 64))
    pairs = x.unflatten(2, (32, 2))
    interleaved = torch.stack(
        (
            pairs[..., 0] * cos[:, None] - pairs[..., 1] * sin[:, None],
            pairs[..., 1] * cos[:, None] + pairs[..., 0] * sin[:, None],
        ),
        -1,
    ).flatten(2)
    interleaved[:, 5:] = x[:, 5:]
    swapped = x.roll(32, 2).flatten(1)
    for fault in (
        rope_reference(raw, cos, -sin, 4, 1, 64),  # the other way round
        rope_reference(raw, sin, cos, 4, 1, 64),
        rope_reference(swapped, cos, sin, 4, 1, 64),  # the wrong half
        interleaved.flatten(1),  # GPT-J's pairs
        rope_reference(raw, cos, sin, 4, 0, 64),  # k left out
        rope_reference(raw, cos, sin, 5, 1, 64),  # v turned too
        rope_reference(raw, cos.roll(1, 0), sin.roll(1, 0), 4, 1, 64),  # the neighbour's position
        rope_reference(raw, cos[:, :16], sin[:, :16], 4, 1, 64),
        reference.where(torch.arange(6 * 64) < 6 * 64 - 1, float("nan")),
        raw,
    ):
        assert_refused(fault.to(dtype), reference, truth)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    near = torch.randn(3, 6 * 64, device="cuda").bfloat16()
    far, angle = far_apart(near), angles(3, 32, "cuda")
    assert torch.equal(rope_forward(far, *angle, 4, 1, 64), rope_forward(near, *angle, 4, 1, 64))
