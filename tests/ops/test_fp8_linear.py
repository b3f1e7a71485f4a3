"""The product of e4m3 rows and weights with adapters in its sum, and groups of projections over it.

The truth is computed in fp32 from the same stored weights and, where an op is handed quantised rows, from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from steep.kernels import fp8_linear as kernels
from steep.kernels import fp8_weight
from steep.kernels.fp8_linear import FEW, TILES, Tile, Tiles, tile_of, tiles_of
from steep.ops import fp8_groups
from steep.ops import fp8_linear as op
from steep.ops.backend import interpreted
from steep.ops.fp8 import (
    E4M3,
    Fp8Rows,
    Fp8Weight,
    dequantise_rows,
    empty_fp8_rows,
    fp8_reference,
    quantise_reference,
)
from steep.ops.fp8_groups import Fp8BackwardGroup, Fp8Products, group_of
from steep.ops.fp8_linear import Fp8Group, fp8_linear, fp8_linears, why_not_fp8
from steep.ops.fp8_product import LowPart, fp8_product, fp8_product_reference
from steep.ops.lora import Lora, LoraGroup, Projection
from steep.ops.lora_linear import extended_gradient, lora_linears
from tests.allocations import allocations
from tests.ops.closeness import assert_as_good, error
from tests.ops.fp8_cases import as_bytes, make_fp8_projection, stacked_in_one
from tests.ops.lora_cases import copied, exact, fill_new_tensors, make_projection
from tests.ops.routes import along, assert_nothing_beside, assert_refused, cases, columns, far_apart, slack, unwritten

BF16 = torch.bfloat16
ROUNDED = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 2e-6}  # an error that one rounding leaves
ON_A_CARD = 3e-3  # of fp32 outputs there: partial sums of 128 columns are short


@dataclass
class Operands:
    """Of one product."""

    rows: Fp8Rows
    codes: torch.Tensor
    scale: torch.Tensor | None
    low: torch.Tensor
    b: torch.Tensor
    parts: list[LowPart]
    bias: torch.Tensor | None
    add: torch.Tensor

    def truth(self, **changes: object) -> torch.Tensor:
        """In fp32, in fp64's place: sums of numbers of this size agree to 1e-6."""
        given = {"low": self.low, "b": self.b, "parts": self.parts, "bias": self.bias, "add": self.add} | changes
        rows, scale = given.pop("rows", self.rows), given.pop("scale", self.scale)
        return fp8_product_reference(rows, self.codes, scale, **given)  # pyright: ignore[reportArgumentType]

    def run(self, out: torch.Tensor) -> torch.Tensor:
        fp8_product(
            self.rows, self.codes, self.scale, out, low=self.low, b=self.b, parts=self.parts, bias=self.bias,
            add=self.add,
        )  # fmt: skip
        return out


def operands(
    tokens: int,
    depth: int,
    outputs: Sequence[int],
    ranks: Sequence[int],
    device: str,
    *,
    blocks: bool = False,
    dtype: torch.dtype = BF16,
    out_dtype: torch.dtype = BF16,
    turned: bool = False,
    scaled: bool = True,
    bias: bool = True,
) -> Operands:
    """Adapters about as large as the product; `turned`: b as the backward pass has it, its columns contiguous."""
    num_outputs, widths = sum(outputs), [-(-rank // 8) * 8 for rank in ranks]
    rows = empty_fp8_rows(tokens, depth, torch.device(device), pieces=blocks)
    quantise_reference(torch.randn(tokens, depth).to(device), rows)
    codes = torch.randn(num_outputs, depth).to(E4M3).to(device)
    shape = (-(-num_outputs // 128), -(-depth // 128)) if blocks else (num_outputs,)
    scale = (torch.rand(shape) + 0.5).to(device) if scaled else None
    low = columns(torch.randn(tokens, sum(widths)).to(device, dtype))
    b = torch.full((num_outputs, max(widths)), torch.nan).to(device, dtype)
    parts, start, column = [], 0, 0
    for size, width in zip(outputs, widths, strict=True):
        b[start : start + size, :width] = torch.randn(size, width).to(device, dtype) * (depth / max(width, 1)) ** 0.5
        parts.append(LowPart(start, start + size, column, width))
        start, column = start + size, column + width
    if turned:
        b = b.t().contiguous().t()
    add = columns((torch.randn(tokens, num_outputs) * depth**0.5).to(device, out_dtype))
    return Operands(rows, codes, scale, low, b, parts, torch.randn(num_outputs).to(device) * 9 if bias else None, add)


SMALL = [
    (1, 64, (48,), (16,)),
    (63, 208, (300,), (24,)),
    (70, 336, (128, 128, 64), (16, 8, 0)),  # parts end where tiles do
    (37, 144, (96, 40, 24), (4, 20, 40)),  # and within
    (5, 32, (20,), (0,)),  # no adapter
]
LARGE = [(1000, 1040, (512, 256, 256), (64, 192, 8)), (1000, 2064, (1000,), (200,))]
REAL = [
    (4096, 4096, (4096, 1024, 1024), (256, 256, 256)),
    (4096, 4096, (14336, 14336), (256, 256)),
    (4096, 14336, (4096,), (256,)),
    (1000, 4096, (4096,), (1024,)),
]


def bound(out_dtype: torch.dtype, route: str) -> float:
    return ROUNDED[out_dtype] + (ON_A_CARD if route == "gpu" else 0)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("route", "tokens", "depth", "outputs", "ranks"), cases(SMALL, LARGE, REAL))
def test_product(route: str, tokens: int, depth: int, outputs: tuple, ranks: tuple, blocks: bool) -> None:
    """Against the truth; and with each planted fault, which the same bound does not let pass."""
    if blocks and any(size % 128 for size in outputs[:-1]):
        outputs = tuple(-(-size // 128) * 128 for size in outputs)
    with along(route, kernels, product=1) as device:
        own = operands(tokens, depth, outputs, ranks, device, blocks=blocks)
        out = own.run(unwritten(tokens, sum(outputs), BF16, device))
    truth, limit = own.truth(), bound(BF16, route)
    assert error(out, truth) < limit
    assert_nothing_beside(out)
    assert own.scale is not None
    faults = {
        "half": truth / 2,
        "no residual": own.truth(add=None),
        "no bias": own.truth(bias=None),
        "the scales of the neighbours": own.truth(scale=own.scale.roll(1, 0)) if len(own.scale) > 1 else truth / 2,
        "the scales of other rows": own.truth(rows=replace(own.rows, scale=own.rows.scale.roll(1, 0) * 1.1)),
    }
    if any(ranks):
        faults["no adapter"] = own.truth(parts=[])
    for name, fault in faults.items():
        assert error(fault, truth) > limit, name


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("route",), cases([()]))
def test_dtypes_of_adapters_and_output(route: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """The output is rounded once, from fp32; the residual may be the output itself."""
    with along(route, kernels, product=1) as device:
        own = operands(63, 208, (96, 64), (8, 24), device, dtype=dtype, out_dtype=out_dtype)
        truth = own.truth()
        own.run(own.add)
    assert error(own.add, truth) < bound(out_dtype, route)
    assert_nothing_beside(own.add)
    assert_refused(own.add / 2, truth.to(out_dtype), truth)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("route", "tokens", "depth", "outputs"), cases([(63, 208, 304)], real=[(4096, 6144, 4096)]))
def test_product_as_the_backward_pass_has_it(route: str, tokens: int, depth: int, outputs: int, blocks: bool) -> None:
    """b's columns are contiguous, and where rows have a scale the weight's is in them already."""
    with along(route, kernels, product=1) as device:
        own = operands(tokens, depth, (outputs,), (40,), device, blocks=blocks, turned=True, scaled=blocks, bias=False)
        out = own.run(unwritten(tokens, outputs, BF16, device))
    truth = own.truth()
    assert error(out, truth) < bound(BF16, route) < error(out / 2, truth)


def test_an_adapter_added_to_a_rounded_output_is_refused() -> None:
    """The usual two products: the bound that one rounding passes does not let two pass."""
    own = operands(63, 208, (304,), (16,), "cpu", bias=False)
    base = own.truth(parts=[], add=None).bfloat16().float()
    adapter = own.truth(add=None) - own.truth(parts=[], add=None)
    twice = ((base + adapter).bfloat16().float() + own.add.float()).bfloat16()
    once = own.run(torch.empty(63, 304, dtype=BF16))
    assert error(once, own.truth()) < ROUNDED[BF16] * 0.9 < error(twice, own.truth())


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [False, True])
def test_a_sum_of_one_sign_is_not_cut_off(blocks: bool) -> None:
    """Added in the short accumulator all the way it is 6.6 % too small."""
    own = operands(256, 14336, (512,), (0,), "cuda", blocks=blocks, bias=False)
    own.add.zero_()
    own.rows.codes.view(torch.uint8).bitwise_and_(127)
    own.codes.view(torch.uint8).bitwise_and_(127)
    out = own.run(torch.empty(256, 512, dtype=BF16, device="cuda"))
    truth = own.truth()
    assert abs((out.float() / truth).mean().item() - 1) < 2e-3


@pytest.mark.gpu
def test_product_beyond_int32() -> None:
    """Rows of input, adapters' input and output so far apart that the third begins past 2^31 elements."""
    own = operands(3, 64, (48,), (16,), "cuda", bias=False)
    codes = far_apart(as_bytes(own.rows.codes)).view(E4M3)
    own = replace(own, rows=replace(own.rows, codes=codes), low=far_apart(own.low), add=far_apart(own.add))
    out = own.run(own.add.clone())
    assert error(out, own.truth()) < bound(BF16, "gpu")
    into = far_apart(torch.zeros(3, 48, dtype=BF16, device="cuda"))
    assert torch.equal(own.run(into), out)


# ---- groups


def group_projections(
    in_features: int, outputs: Sequence[int], ranks: Sequence[Sequence[int]], blocks: bool, **options: object
) -> list[Projection]:
    """The last has no bias."""
    return [
        make_fp8_projection(in_features, size, own, blocks=blocks, bias=index + 1 < len(outputs), **options)
        for index, (size, own) in enumerate(zip(outputs, ranks, strict=True))
    ]


GROUPS = [
    (1, 128, (256, 128, 128), ((16,), (8,), (24,))),
    (63, 208, (256, 128, 100), ((16, 4), (), (3,))),  # two adapters, none, and a rank that is padded
    (70, 144, (90,), ((12,),)),
    (70, 144, (96,), ((16,),)),  # read in place, where dtypes agree
]


def results(op, x: torch.Tensor, projections: Sequence[Projection], cotangent: torch.Tensor) -> list[torch.Tensor]:
    """Output, the input's gradient, and those of the adapters."""
    leaf = x.detach().clone().requires_grad_()
    y = op(leaf, projections)
    leaves = [leaf, *(tensor for projection in projections for tensor in projection.tensors())]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def quantised_alike(x: torch.Tensor, projections: Sequence[Projection], cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The truth of `results`: in fp32 over the same stored weights, with x and dy · scales in e4m3 where the weights
    are multiplied, and as they are where the adapters are."""
    weights = [projection.weight for projection in projections]
    assert all(isinstance(weight, Fp8Weight) for weight in weights)
    blocks = weights[0].has_blocks  # pyright: ignore[reportAttributeAccessIssue]
    dense = torch.cat([fp8_reference(weight) for weight in weights])  # pyright: ignore[reportArgumentType]
    own = [exact(projection) for projection in projections]
    truth = results(lora_linears, x.float(), own, cotangent.float())

    def rounding(values: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """What quantising changes."""
        rows = empty_fp8_rows(len(values), values.shape[1], values.device, pieces=blocks, factors=factors)
        quantise_reference(values, rows)
        dequantised = dequantise_rows(rows)
        return dequantised - values.float() if factors is None else dequantised / factors - values.float()

    factors = None if blocks else torch.cat([weight.scale for weight in weights])  # pyright: ignore[reportAttributeAccessIssue]
    truth[0] = truth[0] + rounding(x, None) @ dense.t()
    truth[1] = truth[1] + rounding(cotangent, factors) @ dense
    return truth


@pytest.mark.parametrize("lie", ["apart", "stacked"])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("route", "tokens", "in_features", "outputs", "ranks"), cases(GROUPS))
def test_group(
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    tokens: int,
    in_features: int,
    outputs: tuple,
    ranks: tuple,
    blocks: bool,
    lie: str,
) -> None:
    """Output and every gradient. A stack is one launch forward; dX is one launch always."""
    fill_new_tensors(monkeypatch)
    launches = (1 if lie == "stacked" else len(outputs)) + 1
    turned = 1 if lie == "stacked" else len(outputs)
    with along(route, kernels, product=launches), along(route, fp8_weight, transpose=turned) as device:
        own = group_projections(in_features, outputs, ranks, blocks, dtype=BF16, device=device)
        if lie == "stacked":
            own = stacked_in_one(own)
        x = torch.randn(tokens, in_features).to(device, BF16)
        cotangent = torch.randn(tokens, sum(outputs)).to(device, BF16)
        found = results(fp8_linears, x, own, cotangent)
    truth = quantised_alike(x, own, cotangent)
    limit = 8e-3 if tokens > 1 else 2e-2  # x·Aᵀ, s·B and gradients are rounded to bf16
    for index, (ours, true) in enumerate(zip(found, truth, strict=True)):
        assert error(ours, true) < limit < error(ours / 2, true), index


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_group_at_larger_sizes(device: str, dtype: torch.dtype, blocks: bool, tokens: int) -> None:
    own = group_projections(1040, (512, 256, 72), ((64,), (16, 16), (256,)), blocks, dtype=dtype, device=device)
    x, cotangent = torch.randn(tokens, 1040).to(device, dtype), torch.randn(tokens, 840).to(device, dtype)
    found, truth = results(fp8_linears, x, own, cotangent), quantised_alike(x, own, cotangent)
    for index, (ours, true) in enumerate(zip(found, truth, strict=True)):
        assert error(ours, true) < (8e-3 if tokens > 1 else 2e-2) < error(ours / 2, true), index


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("in_features", "outputs"), [(4096, (4096, 1024, 1024)), (14336, (4096,))])
def test_group_at_real_size(in_features: int, outputs: tuple, blocks: bool) -> None:
    ranks = ((256,),) * len(outputs)
    own = stacked_in_one(group_projections(in_features, outputs, ranks, blocks, dtype=BF16, device="cuda"))
    x = torch.randn(4096, in_features).to("cuda", BF16)
    cotangent = torch.randn(4096, sum(outputs)).to("cuda", BF16)
    found, truth = results(fp8_linears, x, own, cotangent), quantised_alike(x, own, cotangent)
    for index, (ours, true) in enumerate(zip(found, truth, strict=True)):
        assert error(ours, true) < 8e-3 < error(ours / 2, true), index


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("outlier", [1, 100])
def test_an_outlier_in_x(outlier: int, blocks: bool) -> None:
    """A channel 100 times as large as the others, against the truth of x itself. What the other channels contribute is
    off by 2.6 % (2.8 % beside the outlier, bf16's rounding of the larger sum included): e4m3 is a floating-point
    format, and what is 100 times smaller than the largest of its row is still a normal number there. Of the whole
    output, which then is mostly the outlier's, 0.6 %."""
    own = make_fp8_projection(512, 384, (), blocks=blocks, dtype=BF16)
    x = torch.randn(63, 512)
    x[:, 5] *= outlier
    x = x.bfloat16()
    assert isinstance(own.weight, Fp8Weight)
    dense = fp8_reference(own.weight)
    y = fp8_linear(x, own)
    off = error(y, x.float() @ dense.t())
    beside = y.float() - dequantised_outlier(x, own.weight) @ dense[:, 5:6].t()
    others = x.float() @ dense.t() - x[:, 5:6].float() @ dense[:, 5:6].t()
    print(f"outlier {outlier}: output {off:.4f} off, what is beside it {error(beside, others):.4f}")
    assert off < (0.03 if outlier == 1 else 0.01)
    assert error(beside, others) < 0.035 < error(beside / 2, others)


def dequantised_outlier(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """Column 5 of x as the product sees it."""
    rows = empty_fp8_rows(len(x), x.shape[1], x.device, pieces=weight.has_blocks)
    quantise_reference(x, rows)
    return dequantise_rows(rows)[:, 5:6]


def test_every_buffer_may_be_columns_of_a_wider_one() -> None:
    """And hold NaN before; the residual stream may be fp32 while adapters are in bf16."""
    own = group_projections(144, (96, 40), ((4,), (16, 3)), False, dtype=BF16)
    group = Fp8Group(own, BF16)
    device = torch.device("cpu")
    buffer = group.filled_buffer(device)
    xe = unwritten(63, group.input_width, BF16, "cpu")
    dye = unwritten(63, group.gradient_width, BF16, "cpu")
    out, dx = unwritten(63, group.outputs, torch.float32, "cpu"), unwritten(63, 144, torch.float32, "cpu")
    x, dy, add = torch.randn(63, 144), torch.randn(63, 136), torch.randn(63, 136)
    xe[:, group.x_columns], dye[:, : group.outputs] = x, dy
    of_x, of_dy = group.quantised_input(63, device), group.quantised_gradient(63, device)
    quantise_reference(xe[:, group.x_columns], of_x)
    quantise_reference(dye[:, : group.outputs], of_dy)
    group.extend_input(xe, buffer)
    group.forward(xe, buffer, out, add=add, quantised=of_x)
    group.extend_gradient(dye, buffer)
    assert group.input_gradient(dye, buffer, out=dx, quantised=of_dy) is dx
    truth = quantised_alike(x.bfloat16(), own, dy.bfloat16())
    assert error(out, truth[0] + add) < 5e-3 < error(out / 2, truth[0] + add)
    assert error(dx, truth[1]) < 5e-3 < error(dx / 2, truth[1])
    for ours, true in zip(group.adapter_gradients(dye, xe, torch.float32), truth[2:], strict=True):
        assert ours is not None and error(ours, true) < 8e-3 < error(ours / 2, true)
    assert_nothing_beside(out)
    assert_nothing_beside(dx)


def test_rows_in_e4m3_are_asked_for() -> None:
    own = group_projections(144, (96,), ((4,),), False, dtype=BF16)
    group, device = Fp8Group(own, BF16), torch.device("cpu")
    buffer, xe, dye = group.filled_buffer(device), torch.zeros(3, 152).bfloat16(), torch.zeros(3, 104).bfloat16()
    with pytest.raises(AssertionError):
        group.forward(xe, buffer, torch.empty(3, 96, dtype=BF16))
    with pytest.raises(AssertionError):
        group.input_gradient(dye, buffer)


def test_a_group_of_dequantised_weights_wants_none() -> None:
    group = LoraGroup(group_projections(144, (96,), ((4,),), False, dtype=BF16), BF16)
    assert group.quantised_input(3, torch.device("cpu")) is group.quantised_gradient(3, torch.device("cpu")) is None
    buffer = group.filled_buffer(torch.device("cpu"))
    assert group.buffer_bytes == buffer.numel() * 2 and group.transposed_bytes == 0


def test_bytes_of_a_group() -> None:
    group = Fp8Group(group_projections(144, (100, 40), ((16,), (8,)), False, dtype=BF16), BF16)
    buffer = group.filled_buffer(torch.device("cpu"))
    assert group.buffer_bytes == sum(part.numel() * part.element_size() for part in buffer)
    assert group.buffer_bytes == 2 * (140 * 16 + 24 * 144)
    assert group.transposed_bytes == 144 * 144  # 140 outputs, their rows at multiples of 16


def test_a_single_adapter_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same results as one that was filled in, but for where s is rounded."""
    own = group_projections(144, (96,), ((16,),), False, dtype=BF16)
    group, adapter = Fp8Group(own, BF16), own[0].adapters[0]
    buffer = group.filled_buffer(torch.device("cpu"))
    assert (buffer.b.data_ptr(), buffer.a.data_ptr()) == (adapter.b.data_ptr(), adapter.a.data_ptr())
    assert adapter.scale != 1
    x, dy = torch.randn(37, 144).bfloat16(), torch.randn(37, 96).bfloat16()
    read = results(fp8_linears, x, own, dy)
    monkeypatch.setattr(Fp8Group, "_read_in_place", lambda self: None)
    filled = results(fp8_linears, x, own, dy)
    for ours, other in zip(read, filled, strict=True):
        assert error(ours, other) < 8e-3 < error(ours / 2, other)


@pytest.mark.parametrize("why", ["rank", "adapters", "dtype", "strides", "address", "projections"])
def test_and_others_are_filled_in(why: str) -> None:
    ranks = {"rank": (12,), "adapters": (8, 8)}.get(why, (16,))
    outputs = (96, 48) if why == "projections" else (96,)
    adapter_dtype = torch.float32 if why == "dtype" else BF16
    own = group_projections(144, outputs, [ranks, ()][: len(outputs)], False, dtype=BF16, adapter_dtype=adapter_dtype)
    (adapter, *_) = own[0].adapters
    if why == "strides":
        own = [replace(own[0], adapters=(replace(adapter, a=adapter.a.t().contiguous().t()),))]
    if why == "address":
        beside = torch.empty(16 * 144 + 1, dtype=BF16)[1:].view(16, 144)
        own = [replace(own[0], adapters=(replace(adapter, a=beside),))]
    group = Fp8Group(own, BF16)
    buffer = group.filled_buffer(torch.device("cpu"))
    assert buffer.a.data_ptr() != own[0].adapters[0].a.data_ptr() and buffer.a.dtype == buffer.b.dtype == BF16
    assert group.buffer_bytes == sum(part.numel() * 2 for part in buffer)


def test_the_transposed_codes_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, transpose = [], op.transpose
    monkeypatch.setattr(op, "transpose", lambda *given: calls.append(1) or transpose(*given))
    own = group_projections(144, (96, 40), ((4,), (8,)), False, dtype=BF16)
    group, device = Fp8Group(own, BF16), torch.device("cpu")
    buffer, dy = group.filled_buffer(device), torch.randn(5, 136).bfloat16()
    of_dy = group.quantised_gradient(5, device)
    quantise_reference(dy, of_dy)
    first, second = [
        group.input_gradient(extended_gradient(dy, group, buffer), buffer, quantised=of_dy) for _ in range(2)
    ]
    assert torch.equal(first, second) and len(calls) == 4  # of two weights that stand apart


def test_codes_that_lie_together_are_read_in_place() -> None:
    own = stacked_in_one(group_projections(144, (96, 48, 40), ((4,), (8,), ()), False, dtype=BF16))
    first, second, third = own
    copy = replace(third, weight=replace(third.weight, codes=third.weight.codes.clone()))  # pyright: ignore
    (whole,) = Fp8Group(own, BF16)._runs
    assert whole.codes.shape == (184, 144) and whole.codes.data_ptr() == first.weight.codes.data_ptr()  # pyright: ignore
    two, one = Fp8Group([first, second, copy], BF16)._runs
    assert (len(two.codes), len(one.codes), one.rows) == (144, 40, slice(144, 184))
    assert [(part.start, part.stop) for part in (*two.parts, *one.parts)] == [(0, 96), (96, 144), (0, 40)]
    turned_round = Fp8Group([second, first, third], BF16)._runs
    assert [len(run.codes) for run in turned_round] == [48, 96, 40]
    between = Fp8Group([first, third], BF16)._runs  # `second` lies between them
    assert [len(run.codes) for run in between] == [96, 40]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("blocks", [False, True])
def test_scales_and_biases_that_are_written_over_are_read(blocks: bool, together: bool) -> None:
    """As a checkpoint that is loaded into a model does: the group is that of before."""
    own = group_projections(144, (128, 40), ((4,), (8,)), blocks, dtype=BF16)
    if together:
        scales = torch.cat([each.weight.scale for each in own]).split([len(each.weight.scale) for each in own])  # pyright: ignore
        own = [
            replace(each, weight=replace(each.weight, scale=scale))  # pyright: ignore[reportArgumentType]
            for each, scale in zip(own, scales, strict=True)
        ]
    x, dy, device = torch.randn(5, 144).bfloat16(), torch.randn(5, 168).bfloat16(), torch.device("cpu")

    def computed(group: Fp8Group) -> list[torch.Tensor]:
        buffer, xe = group.filled_buffer(device), torch.zeros(5, group.input_width, dtype=BF16)
        xe[:, group.x_columns] = x
        of_x, of_dy = group.quantised_input(5, device), group.quantised_gradient(5, device)
        quantise_reference(x, of_x)
        quantise_reference(dy, of_dy)
        group.extend_input(xe, buffer)
        group.forward(xe, buffer, out := torch.empty(5, 168, dtype=BF16), quantised=of_x)
        return [out, group.input_gradient(extended_gradient(dy, group, buffer), buffer, quantised=of_dy)]

    group = Fp8Group(own, BF16)
    assert (group._scale_in_place is not None) is together
    before = computed(group)
    for each in own:
        assert isinstance(each.weight, Fp8Weight)
        each.weight.scale.mul_(2)
    assert own[0].bias is not None
    own[0].bias.data.add_(1)
    for now, then, new in zip(computed(group), before, computed(Fp8Group(own, BF16)), strict=True):
        assert torch.equal(now, new) and error(now, then) > 0.4


@pytest.mark.parametrize("trained", ["first", "a", "b"])
def test_only_what_trains_gets_a_gradient(trained: str) -> None:
    (own,) = group_projections(144, (96,), ((8, 16),), False, dtype=BF16)
    adapters = tuple(
        Lora(
            adapter.a.detach().requires_grad_(trained == "a" or (trained == "first" and index == 0)),
            adapter.b.detach().requires_grad_(trained == "b" or (trained == "first" and index == 0)),
            adapter.scale,
        )
        for index, adapter in enumerate(own.adapters)
    )
    own = replace(own, adapters=adapters)
    fp8_linear(torch.randn(5, 144).bfloat16(), own).sum().backward()
    for tensor in own.tensors():
        assert (tensor.grad is not None) == tensor.requires_grad


def test_the_scale_of_an_adapter_is_multiplied_in_fp32_and_rounded_once() -> None:
    (own,) = group_projections(144, (96,), ((16,),), False, dtype=BF16, adapter_dtype=torch.float32)
    own = replace(own, adapters=(replace(own.adapters[0], scale=0.7071),))
    buffer = Fp8Group([own], BF16).filled_buffer(torch.device("cpu"))
    (adapter,) = own.adapters
    assert torch.equal(buffer.b, (adapter.b.detach() * 0.7071).bfloat16())
    assert torch.equal(buffer.a, adapter.a.detach().bfloat16())


# ---- which group


def test_which_group_is_chosen() -> None:
    rows = make_fp8_projection(144, 96)
    blocks = make_fp8_projection(144, 96, blocks=True)
    whole_blocks = make_fp8_projection(144, 256, blocks=True)
    dense, narrow = make_projection(144, 96), make_fp8_projection(72, 96)

    def chosen(
        *projections: Projection, dtype: torch.dtype = BF16, fp8: Fp8Products = "both", head_dim: int | None = None
    ) -> type:
        return type(group_of(projections, dtype, fp8, head_dim))

    assert chosen(rows) is chosen(rows, rows) is chosen(blocks) is chosen(whole_blocks, blocks) is Fp8Group
    assert chosen(rows, dtype=torch.float16) is Fp8Group
    assert chosen(rows, fp8="none") is chosen(rows, dtype=torch.float32) is LoraGroup
    assert chosen(rows, dense) is chosen(rows, blocks) is chosen(narrow) is LoraGroup
    assert chosen(blocks, whole_blocks) is LoraGroup  # a block would run across both
    heads = {64: Fp8Group, 256: Fp8Group, 80: LoraGroup, 96: LoraGroup}
    assert {head_dim: chosen(whole_blocks, whole_blocks, head_dim=head_dim) for head_dim in heads} == heads
    assert chosen(rows, rows, head_dim=80) is Fp8Group
    assert why_not_fp8([dense.weight], BF16) == "no weight is in e4m3"
    assert chosen(rows, fp8="backward") is Fp8BackwardGroup and chosen(dense, fp8="backward") is LoraGroup
    for weight in (rows, dense):
        with pytest.raises(ValueError, match="'forward'; one of both, backward, none"):
            chosen(weight, fp8="forward")  # pyright: ignore[reportArgumentType]


def test_what_a_forward_product_in_16_bit_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight and outputs of the larger of two projections. The product is torch's of a card, which makes nothing
    beside."""

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, **_: object) -> torch.Tensor:
        return torch.zeros(len(a), b.shape[1]) if out is None else out

    monkeypatch.setattr(fp8_groups, "product", product)
    monkeypatch.setattr(Fp8Weight, "write", lambda self, out: out.zero_())
    own = group_projections(256, (1024, 512), ((8,), (8,)), False, dtype=BF16)
    group = Fp8BackwardGroup([replace(each, bias=None) for each in own], BF16)
    xe, buffer = torch.zeros(200, group.input_width, dtype=BF16), group.filled_buffer(torch.device("cpu"))
    out, add = torch.zeros(200, 1536), torch.ones(200, 1536)
    watched = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with watched as prof, torch.profiler.record_function("forward"):
        group.forward(xe, buffer, out, add=add)
    peak = max(accumulate(allocations(prof, "forward")))
    planned = group.forward_bytes(200)
    assert planned == 1024 * (256 * 2 + 200 * 4) and 0.95 * planned < peak <= planned
    assert torch.equal(out, add)
    assert Fp8Group(own, BF16).forward_bytes(200) == LoraGroup(own, BF16).forward_bytes(200) == 0


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantised_weights_beside_dense_ones(dtype: torch.dtype, blocks: bool) -> None:
    """What has no fp8 units, or another weight beside, trains over the same stored weights in products of `dtype`."""
    own = [make_fp8_projection(144, 96, blocks=blocks, dtype=dtype), make_projection(144, 40, dtype=dtype)]
    x, cotangent = torch.randn(63, 144).to(dtype), torch.randn(63, 136).to(dtype)
    found = results(lora_linears, x, [copied(each) for each in own], cotangent)
    truth = results(lora_linears, x.float(), [exact(each) for each in own], cotangent.float())
    for ours, true in zip(found, truth, strict=True):
        assert error(ours, true) < (8e-3 if dtype == BF16 else 1e-5) < error(ours / 2, true)


# ---- tiles


def test_tiles_are_those_of_the_card() -> None:
    assert tiles_of((9, 0)) is TILES[9, 0] and tiles_of((10, 3)) is TILES[10, 0] and tiles_of((12, 1)) is TILES[12, 0]
    for tiles in TILES.values():
        for tile in (tiles.large, tiles.small, tiles.of_blocks):
            assert 128 % tile.columns == 128 % tile.depth == 0
        assert tile_of(tiles, 4096, 4096, has_blocks=False) is tiles.large
        assert tile_of(tiles, 4096, 4096, has_blocks=True) is tiles.of_blocks
        assert tile_of(tiles, 64, 1024, has_blocks=False) is tiles.small
        rows = 2 * tiles.large.half
        assert tile_of(tiles, rows, FEW * tiles.large.columns, has_blocks=False) is tiles.large


Launch = tuple[int, bool, bool, bool, bool, bool]


@pytest.mark.parametrize("blocks", [False, True])
def test_what_a_layer_launches_is_built(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its parts, what is there, and whether b is turned: groups of a layer are among `compilations`."""
    launched: set[Launch] = set()

    def launch(kernel: object, grid: object, tensors: tuple, numbers: tuple, **options: object) -> None:
        _, _, _, scale, _, low, _, bias, add = [each is not None for each in tensors]
        b_row_stride, _, stops = numbers[7:10]
        launched.add((len(stops), scale, low, bias, add, b_row_stride == 1))

    monkeypatch.setattr(kernels, "variants", SimpleNamespace(launch=launch))
    monkeypatch.setattr("steep.ops.fp8_product.uses_kernels", lambda tensor: True)
    device = torch.device("cpu")
    for outputs, rank, has_bias, has_add in (
        ((512, 256, 256), 8, False, False), ((512, 256, 256), 8, True, False), ((256, 256), 8, False, False),
        ((256,), 8, False, True), ((256,), 0, False, True),
    ):  # fmt: skip
        ranks = ((rank,) if rank else (),) * len(outputs)
        own = stacked_in_one(group_projections(256, outputs, ranks, blocks, dtype=BF16))
        own = own if has_bias else [replace(each, bias=None) for each in own]
        group, total = Fp8Group(own, BF16), sum(outputs)
        buffer = group.filled_buffer(device)
        xe, dye = (torch.zeros(5, width, dtype=BF16) for width in (group.input_width, group.gradient_width))
        out = torch.zeros(5, total, dtype=BF16)
        group.forward(xe, buffer, out, add=out if has_add else None, quantised=group.quantised_input(5, device))
        if rank:
            group.input_gradient(dye, buffer, quantised=group.quantised_gradient(5, device))
    built: set[Launch] = set()
    for each in kernels.compilations(BF16):
        if each.constants["HAS_BLOCKS"] == blocks:
            scale, low, bias, add = (name not in each.constants for name in ("weight_scale", "low", "bias", "add"))
            built.add((len(each.signature["stops"]), scale, low, bias, add, "b_row_stride" in each.constants))
    assert launched == built


@pytest.mark.parametrize("tile", sorted({tile for tiles in TILES.values() for tile in tiles}))
def test_every_tile_in_the_interpreter(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    """Two tiles and a bit in each direction, the width of a tile's depth twice and a bit; in one sum where a card's
    cores add so."""
    monkeypatch.setattr(kernels, "_tiles_on", lambda device: Tiles(tile, tile, tile))
    tokens, outputs, depth = 2 * tile.half + 5, tile.columns + 7, tile.depth + 16
    for blocks in (False, True):
        own = operands(tokens, depth, (outputs,), (tile.low_depth + 8,), "cpu", blocks=blocks)
        with interpreted():
            out = own.run(torch.empty(tokens, outputs, dtype=BF16))
        assert_as_good(out, own.truth().bfloat16(), own.truth(), slack(BF16))
