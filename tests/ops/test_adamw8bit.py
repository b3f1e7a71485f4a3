"""The 8-bit AdamW's kernel against its reference and against bitsandbytes: codes, rounding, places, scale."""

# pyright: reportArgumentType=false
# (a kernel's constants are plain numbers)

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from bitsandbytes import functional

from steep.kernels import adamw8bit as kernels
from steep.ops import master_weights
from steep.ops.adamw8bit import Update, adamw8bit, adamw8bit_reference, noise_key, rounding_noise
from steep.ops.row_gradient import places
from tests.ops.closeness import assert_as_good
from tests.ops.moment_codes import assert_same_codes
from tests.ops.routes import along, cases

SIZES = (1, 63, 4095, 4096, 4097, 10_003)
LARGE = (*SIZES, 100_003, 2**20, 2**22 + 1)
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP32, FP32)]
# Whether states are 8-bit from 4,096 elements on, and whether bf16 weights have masters.
KINDS = [(True, True), (False, True), (False, False)]


def maps(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    signed, unsigned = functional.create_dynamic_map(signed=True), functional.create_dynamic_map(signed=False)
    return signed.to(device), unsigned.to(device)


def placed(values: torch.Tensor, device: str, offset: int) -> torch.Tensor:
    """`values` inside a longer buffer, `offset` elements behind an aligned place."""
    buffer = torch.full((offset + values.numel() + 64,), 77, dtype=values.dtype, device=device)
    view = buffer[offset : offset + values.numel()]
    view.copy_(values)
    return view


def assert_nothing_beside(view: torch.Tensor) -> None:
    buffer = view._base
    assert buffer is not None
    start = view.storage_offset()
    assert (buffer[:start] == 77).all() and (buffer[start + view.numel() :] == 77).all()


def tensors(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    gradient: torch.dtype,
    device: str = "cpu",
    offset: int = 0,
    coded: bool = True,
    masters: bool = False,
) -> list[Update]:
    """One update of tensors of `sizes` in the midst of a training.

    Args:
        coded: their states are 8-bit from 4,096 elements on.
        masters: of bf16 weights, anything that may stand beside them.
    """
    draw = torch.Generator().manual_seed(1)
    updates: list[Update] = []
    for index, size in enumerate(sizes):
        blocks, scales = -(-size // 256), None
        if size >= 4096 and coded:
            moments = [torch.randint(0, 256, (size,), generator=draw, dtype=torch.uint8) for _ in range(2)]
            magnitudes = [torch.rand(blocks, generator=draw) * most for most in (0.1, 0.01)]
            scales = (placed(magnitudes[0], device, 0), placed(magnitudes[1], device, 0))
        else:
            moments = [torch.randn(size, generator=draw) * 0.1, torch.rand(size, generator=draw) * 0.01]
        weights, gradients = (torch.randn(size, generator=draw) for _ in range(2))
        updates.append(
            Update(
                placed(weights.to(dtype), device, offset),
                placed(gradients.to(gradient), device, offset),
                (placed(moments[0], device, offset), placed(moments[1], device, offset)),
                scales,
                step=3 + index,
                lr=1e-2 / (1 + index),
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=0.1 * (index % 2),
                key=noise_key(5, 3 + index, index),
            )
        )
        if masters:
            own = torch.Generator().manual_seed(index)  # the rest is the same with and without
            low = torch.randint(-(2**15), 2**15, (size,), generator=own, dtype=torch.int16)
            low[weights.to(dtype) == 0] = 0  # no value is below a zero: that would be a NaN
            updates[-1].low = placed(low, device, offset)
    return updates


def written(update: Update) -> tuple[torch.Tensor, ...]:
    low = () if update.low is None else (update.low,)
    return (update.parameter, *update.moments, *(update.scales or ()), *low)


def on_cpu(update: Update) -> Update:
    first, second = (moment.cpu() for moment in update.moments)
    scales = None if update.scales is None else (update.scales[0].cpu(), update.scales[1].cpu())
    low = None if update.low is None else update.low.cpu()
    return replace(update, parameter=update.parameter.cpu(), moments=(first, second), scales=scales, low=low)


def exact(update: Update) -> torch.Tensor:
    """What is updated, in fp32."""
    return update.parameter if update.low is None else master_weights.join(update.parameter, update.low)


def assert_equal(ours: Update, theirs: Update) -> None:
    for one, other in zip(written(ours), written(theirs), strict=True):
        assert torch.equal(one, other)


def assert_close(ours: Update, theirs: Update) -> None:
    """Codes but for ties, and values but for the last bits of fp32: of an update that can be 100 times the weight,
    where v is next to nothing. A bf16 weight one such bit from where the noise turns it over may fall to the other
    side; with masters these are compared."""
    if ours.low is not None and theirs.low is not None:
        both = [(exact(each).float(), *each.moments, *(each.scales or ())) for each in (ours, theirs)]
        assert (ours.parameter != theirs.parameter).float().mean() < 1e-3 + 1 / ours.parameter.numel()
        assert torch.allclose(both[0][0], both[1][0], rtol=2e-6, atol=1e-3)
        ours, theirs = (replace(each, parameter=each.moments[0], low=None) for each in (ours, theirs))
    for one, other in zip(written(ours), written(theirs), strict=True):
        slack = 1e-3 if one is ours.parameter else 1e-7
        if one.dtype == torch.uint8:
            assert (one.int() - other.int()).abs().max() <= 1
            assert (one != other).sum() <= 2 + 1e-3 * one.numel()
        elif one.dtype == BF16:
            assert (one != other).sum() <= 1 + 1e-3 * one.numel()
            assert torch.allclose(one.float(), other.float(), rtol=2**-7, atol=slack)
        else:
            assert torch.allclose(one, other, rtol=2e-6, atol=slack)


# --- codes ----------------------------------------------------------------------------------------------------------


@triton.jit
def encode_kernel(values, codes, numel, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(values + place, place < numel, 0.0)
    tl.store(codes + place, kernels.encode_signed(x) if SIGNED else kernels.encode_unsigned(x), place < numel)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("route", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_each_value_takes_the_nearest_code(route: str, signed: bool) -> None:
    device, count = ("cuda", 10_000_001) if route == "gpu" else ("cpu", 300_001)
    code_map = functional.create_dynamic_map(signed=signed).double()
    midpoints = (code_map[1:] + code_map[:-1]) / 2
    width = code_map.diff()
    grid = [torch.linspace(0, 1, count, dtype=torch.float64), torch.logspace(-9, 0, count, dtype=torch.float64)]
    near = [midpoints - 2e-4 * width, midpoints, midpoints + 2e-4 * width, code_map]
    values = torch.cat([*grid, *near]).clamp(-1, 1)
    values = (torch.cat([values, -values]) if signed else values.abs()).float()
    codes = torch.full(values.shape, 77, dtype=torch.uint8, device=device)
    size = 1024 if route == "gpu" else 2**16
    encode_kernel[(triton.cdiv(values.numel(), size),)](values.to(device), codes, values.numel(), signed, size)
    found, nearest = codes.cpu().long(), torch.searchsorted(midpoints, values.double())
    other = found != nearest
    assert (found - nearest).abs().max() <= 1
    lower = torch.minimum(found, nearest)[other]  # what is not the nearest code is a tie, but for 1e-4 bins
    assert ((values[other].double() - midpoints[lower]).abs() <= 1e-4 * width[lower]).all()
    assert other.float().mean() < 2e-3
    assert found.unique().numel() == 256


# --- one launch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "sizes", "offset"),
    cases([(SIZES, 0), (SIZES[:4], 1)], real=[(LARGE, 0), (LARGE, 1)]),
)
@pytest.mark.parametrize(("dtype", "gradient"), DTYPES)
def test_many_tensors(
    route: str, sizes: tuple[int, ...], offset: int, dtype: torch.dtype, gradient: torch.dtype
) -> None:
    """Small and large, aligned or not: one launch for 8-bit states and one for fp32, within what is theirs."""
    with along(route, kernels, launch=2) as device:
        updates = tensors(sizes, dtype, gradient, device, offset)
        truth = tensors(sizes, dtype, gradient)
        start = [update.parameter.float().clone() for update in truth]
        factor = torch.tensor([0.37])
        adamw8bit(updates, maps(device), factor.to(device))
    adamw8bit_reference(truth, maps(), factor)
    for update, wanted, before in zip(updates, truth, start, strict=True):
        for view in written(update):
            assert_nothing_beside(view)
        moved = on_cpu(update)
        assert_close(moved, wanted)
        if dtype == FP32 and len(before) > 1:
            done, meant = moved.parameter - before, wanted.parameter - before
            assert_as_good(done, meant, meant, slack=1e-4)
    with pytest.raises(AssertionError):  # without the factor
        again = tensors(sizes, dtype, gradient)
        adamw8bit_reference(again, maps())
        assert_close(again[-1], truth[-1])


@pytest.mark.parametrize(
    ("route", "sizes", "offset"), cases([(SIZES, 0), (SIZES[:4], 1)], real=[(LARGE, 0), (LARGE, 1)])
)
@pytest.mark.parametrize(("coded", "masters"), KINDS)
@pytest.mark.parametrize("gradient", [BF16, FP32])
def test_fp32_states_and_masters(
    route: str, sizes: tuple[int, ...], offset: int, coded: bool, masters: bool, gradient: torch.dtype
) -> None:
    kind = {"coded": coded, "masters": masters}
    with along(route, kernels, launch=2 if coded else 1) as device:
        updates = tensors(sizes, BF16, gradient, device, offset, **kind)
        adamw8bit(updates, maps(device), torch.tensor([0.37], device=device))
    truth, before = (tensors(sizes, BF16, gradient, **kind) for _ in range(2))
    adamw8bit_reference(truth, maps(), torch.tensor([0.37]))
    for update, wanted, start in zip(updates, truth, before, strict=True):
        for view in written(update):
            assert_nothing_beside(view)
        assert_close(on_cpu(update), wanted)
        assert len(start.parameter) == 1 or not torch.equal(wanted.parameter, start.parameter)
    if masters:
        with pytest.raises(AssertionError):  # without what the masters have beside the weights
            again = tensors(sizes, BF16, gradient, **kind)
            for update in again:
                assert update.low is not None
                update.low.zero_()
            adamw8bit_reference(again, maps(), torch.tensor([0.37]))
            assert_close(again[-1], truth[-1])


@pytest.mark.parametrize(("route", "sizes"), cases([((4097, 100),)], real=[(LARGE,)]))
@pytest.mark.parametrize("coded", [True, False])
def test_a_master_is_the_weight_that_trains_in_fp32(route: str, sizes: tuple[int, ...], coded: bool) -> None:
    """To the bit over some steps, moments too, and the weight is the bf16 nearest to it. (On a card either is compiled
    by itself.)"""
    steps = 2 if route == "interpreter" else 5
    with along(route, kernels, launch=steps * (4 if coded else 2)) as device:
        ours = tensors(sizes, BF16, FP32, device, coded=coded, masters=True)
        whole = tensors(sizes, FP32, FP32, device, coded=coded)
        for one, other in zip(ours, whole, strict=True):
            other.parameter.copy_(exact(one))
        for _ in range(steps):
            adamw8bit(ours, maps(device))
            adamw8bit(whole, maps(device))
    for one, other in zip(ours, whole, strict=True):
        wanted = replace(other, parameter=master_weights.split(other.parameter)[0])
        wanted.low = master_weights.split(other.parameter)[1]
        if route == "gpu":
            assert_close(on_cpu(one), on_cpu(wanted))
        else:
            assert_equal(one, wanted)
            assert torch.equal(exact(one), other.parameter)


@pytest.mark.parametrize(("route",), cases([()]))
def test_updates_below_a_last_bit_add_up_in_a_master(route: str) -> None:
    """Each moves a weight of 1 by a hundredth of the distance to its neighbour below; the noise draws another path."""
    with along(route, kernels, launch=40) as device:
        found = []
        for masters in (True, False):
            weights = torch.ones(256, dtype=BF16, device=device)
            low = torch.zeros(256, dtype=torch.int16, device=device) if masters else None
            moments = (torch.ones(256, device=device), torch.ones(256, device=device))
            update = Update(
                weights, torch.ones(256, device=device), moments, None, 10**6, 2**-8 / 100, (0.9, 0.95), 0.0, 0.0, 3,
                low=low,
            )  # fmt: skip
            for step in range(20):
                update = replace(update, key=noise_key(0, step, 0))
                adamw8bit([update], maps(device))
            found.append(update)
    ours, noisy = (on_cpu(each) for each in found)
    assert (ours.parameter == 1).all() and torch.allclose(exact(ours), torch.tensor(1 - 0.2 * 2**-8), rtol=1e-6)
    assert 0.05 < (noisy.parameter != 1).float().mean() < 0.4


@pytest.mark.parametrize(("route", "size"), cases([(4096 + 100,), (100,)]))
def test_what_is_not_finite_in_a_master(route: str, size: int) -> None:
    """A NaN stays one whatever its bits are, infinities too; the rest is untouched by them."""
    with along(route, kernels, launch=1) as device, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the interpreter
        (update,) = tensors((size,), BF16, FP32, device, coded=False, masters=True)
        assert update.low is not None
        update.gradient[::4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device=device).view(FP32)
        update.parameter[1::4] = torch.tensor(0x7FFF, dtype=torch.int16, device=device).view(BF16)
        for place, sign in ((2, 1), (6, -1)):
            update.parameter[place::8], update.low[place::8] = sign * math.inf, 0
        adamw8bit([update], maps(device))
    weights, values, place = update.parameter.cpu(), exact(on_cpu(update)), torch.arange(size)
    for found in (weights, values):
        assert torch.equal(found.isnan(), place % 4 < 2)
        assert torch.equal(found.isinf(), place % 4 == 2)
        assert torch.equal(found < -1e38, place % 8 == 6)


def test_what_is_launched_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the types and constants that the kernel is compiled for to look at its machine code."""
    built = [(dict(each.constants), each.num_warps) for each in kernels.compilations(BF16)]
    types = {torch.int64: "*i64", FP32: "*fp32"}
    signatures = [dict(each.signature) for each in kernels.compilations(BF16)]

    def told(kernel: Any, grid: Any, tensors: Any, numbers: Any, num_warps: int) -> None:
        names = kernel.arg_names
        given = dict(zip(names, map(types.get, (one.dtype for one in tensors)), strict=False))
        assert given in signatures and all(one.data_ptr() % 16 == 0 for one in tensors[:2])
        assert (dict(zip(names[len(tensors) :], numbers, strict=True)), num_warps) in built
        grids.append(grid)

    grids: list[tuple[int, int, int]] = []
    monkeypatch.setattr(kernels.variants, "launch", told)
    for dtypes in DTYPES:
        for offset in (0, 1):
            with along("interpreter", kernels, launch=1):
                adamw8bit(tensors((4096, 4097), *dtypes, offset=offset), maps(), torch.ones(1))
    assert grids == 6 * [(3, 1, 1)]
    with along("interpreter", kernels, launch=3):
        for coded, masters in KINDS:
            adamw8bit(tensors((4096, 4097), BF16, BF16, coded=coded, masters=masters), maps(), torch.ones(1))


@pytest.mark.parametrize(("route", "sizes"), cases([((1, 4096, 63, 4097),)], real=[(LARGE,)]))
def test_together_is_one_by_one(route: str, sizes: tuple[int, ...]) -> None:
    with along(route, kernels, launch=2 + len(sizes)) as device:
        together, alone = (tensors(sizes, BF16, BF16, device) for _ in range(2))
        adamw8bit(together, maps(device))
        for update in alone:
            adamw8bit([update], maps(device))
    for one, other in zip(together, alone, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize(("route",), cases([()]))
def test_blocks_of_zeros_and_of_next_to_nothing(route: str) -> None:
    """No division by zero, nothing that is not finite, the codes of zero."""
    with along(route, kernels, launch=1) as device:
        (update,) = tensors((4096,), FP32, FP32, device)
        for moment, zero in zip(update.moments, (127, 0), strict=True):
            moment.fill_(zero)
        update.gradient.zero_()
        update.gradient[256:512] = 1e-25
        adamw8bit([update], maps(device))
    assert update.parameter.isfinite().all()
    assert update.scales is not None and all(scale.isfinite().all() for scale in update.scales)
    assert (update.moments[0][:256] == 127).all() and (update.moments[1][:512] == 0).all()


@pytest.mark.parametrize(("route",), cases([()]))
def test_an_epsilon_whose_square_is_zero(route: str) -> None:
    """Rows of the table whose tokens never came have moments of zero."""
    with along(route, kernels, launch=1) as device:
        (update,) = tensors((100,), FP32, FP32, device)
        update = replace(update, eps=1e-24, weight_decay=0.0)
        for tensor in (*update.moments, update.gradient):
            tensor.zero_()
        before = update.parameter.clone()
        adamw8bit([update], maps(device))
    assert torch.equal(update.parameter, before)


def test_nothing_to_do() -> None:
    adamw8bit([], maps())


# --- rows of a table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "rows", "width", "first"),
    cases([(5, 1000, 0), (70, 64, 256), (3, 2304, 512)], real=[(20_001, 896, 0), (2**16, 4096, 2**26)]),
)
@pytest.mark.parametrize(
    ("dtype", "gradient", "kind"),
    [
        *((*dtypes, (True, False)) for dtypes in [(BF16, FP32), (FP32, FP32), (BF16, BF16)]),
        *((BF16, FP32, kind) for kind in KINDS),
    ],
)
def test_a_gradient_of_some_rows_is_the_dense_one(
    route: str, rows: int, width: int, first: int, dtype: torch.dtype, gradient: torch.dtype, kind: tuple[bool, bool]
) -> None:
    """To the bit, of a whole table or of its part from `first` on: rows without a gradient decay and move too."""
    coded, masters = kind
    drawn = {"coded": coded, "masters": masters}
    with along(route, kernels, launch=2) as device:
        (dense,), (ours,) = (tensors((rows * width - first,), dtype, gradient, device, **drawn) for _ in range(2))
        table = torch.zeros(rows * width, dtype=gradient, device=device)
        table[first:] = dense.gradient
        table = table.view(rows, width)
        there = torch.arange(0, rows, 3, device=device)
        absent = torch.ones(rows, dtype=torch.bool, device=device).index_fill_(0, there, False)
        table[absent] = 0
        dense = replace(dense, gradient=table.view(-1)[first:])
        place = places(there, rows)
        assert place[absent].eq(-1).all() and place[there].tolist() == list(range(len(there)))
        ours = replace(ours, gradient=table[there].contiguous(), rows=place, first=first)
        start = ours.parameter.clone()
        adamw8bit([ours], maps(device))
        adamw8bit([dense], maps(device))
    assert_equal(ours, dense)
    assert (ours.parameter != start)[absent.repeat_interleave(width)[first:]].any()
    (wrong,) = tensors((rows * width - first,), dtype, gradient, device, **drawn)
    adamw8bit_reference([replace(wrong, gradient=ours.gradient, rows=place.roll(1), first=first)], maps(device))
    assert not torch.equal(wrong.parameter, ours.parameter)


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "size", "steps"), cases([(4096 + 7, 20), (100, 20)], real=[(2**20 + 3, 50)]))
def test_fp32_is_bitsandbytes_update(route: str, size: int, steps: int) -> None:
    """Its update on a CPU, step by step from the same weights and states: weights but for their last bits, codes but
    for ties. (Its kernel on a GPU has the smallest negative code where ours is that of zero: `steep.ops.adamw8bit`.)
    """
    draw = torch.Generator().manual_seed(2)
    weights, coded = torch.randn(size, generator=draw), size >= 4096
    kept = [torch.zeros(size, dtype=torch.uint8 if coded else FP32) for _ in range(2)]
    if coded:
        kept[0].fill_(127)
        kept += [torch.zeros(-(-size // 256)) for _ in range(2)]
    signed, unsigned = maps()
    with along(route, kernels, launch=steps) as device:
        for step in range(1, steps + 1):
            before = weights.clone()
            ours, *states = (tensor.to(device, copy=True) for tensor in (weights, *kept))
            gradient = torch.randn(size, generator=draw) * torch.logspace(-6, 0, size)
            if coded:
                functional.optimizer_update_8bit_blockwise(
                    "adam", gradient, weights, kept[0], kept[1], 0.9, 0.95, 0.0, 0.0, 1e-8, step, 1e-3,
                    signed, unsigned, kept[2], kept[3], weight_decay=0.1,
                )  # fmt: skip
            else:
                functional.optimizer_update_32bit(
                    "adam", gradient, weights, kept[0], 0.9, 1e-8, step, 1e-3, kept[1], 0.95, weight_decay=0.1
                )
            scales = (states[2], states[3]) if coded else None
            update = Update(
                ours, gradient.to(device), (states[0], states[1]), scales, step, 1e-3, (0.9, 0.95), 1e-8, 0.1
            )
            adamw8bit([update], maps(device))
            assert_as_good(ours.cpu() - before, weights - before, weights - before, slack=1e-3)  # a last bit is 2e-4
            for place, (state, wanted) in enumerate(zip(states, kept, strict=True)):
                if state.dtype == torch.uint8:
                    # the first v is of one gradient: more of it is near zero
                    assert_same_codes(state, wanted, place + 1, most=5e-2 if step == 1 else 1e-2)
                else:
                    assert_as_good(state.cpu(), wanted, wanted, slack=1e-6)
                    assert torch.allclose(state.cpu(), wanted, rtol=1e-2, atol=1e-12)


# --- rounding -------------------------------------------------------------------------------------------------------


def test_noise_is_uniform_and_independent() -> None:
    count = 2**20
    noise = rounding_noise(noise_key(0, 1, 0), count)
    assert noise.min() >= 0 and noise.max() < 2**16
    for bits in (noise >> 8, noise & 255):  # chi squared with 255 degrees of freedom: 255 ± 22.6
        counted = torch.bincount(bits, minlength=256).double()
        assert 255 - 5 * 22.6 < ((counted - count / 256) ** 2 / (count / 256)).sum() < 255 + 5 * 22.6
    centred = noise.double() / 2**16 - 0.5
    others = [rounding_noise(noise_key(*key), count) for key in ((0, 1, 1), (0, 2, 0), (1, 1, 0))]
    pairs = [(centred[lag:], centred[:-lag]) for lag in (1, 2, 3, 7, 8, 128, 255, 256, 257, 4096, 2**16)]
    pairs += [(centred, other.double() / 2**16 - 0.5) for other in others]
    for one, other in pairs:
        assert abs((one * other).mean() * 12 * math.sqrt(len(one))) < 5  # a correlation in its standard deviations


def test_noise_of_a_part_is_that_of_the_whole() -> None:
    key = noise_key(3, 4, 5)
    assert (
        key == -8997878195137644842 and noise_key(0, 1, 2) == 6768782832058643234
    )  # a run that was begun before goes on with the same
    assert torch.equal(rounding_noise(key, 1000), rounding_noise(key, 5000)[:1000])
    assert len({noise_key(seed, step, index) for seed in range(8) for step in range(8) for index in range(8)}) == 512
    assert all(-(2**63) <= noise_key(seed, 1, 1) < 2**63 for seed in (-1, 0, 2**40, 2**70))


@pytest.mark.parametrize(("route", "size"), cases([(2**15,)], real=[(2**24,)]))
@pytest.mark.parametrize("share", [0.0, 0.01, 0.37])
def test_rounding_is_unbiased(route: str, size: int, share: float) -> None:
    """Weights of 1.5 move down by a `share` of the 2^-7 to their neighbour: that share of them goes there."""
    with along(route, kernels, launch=1) as device:
        weights = torch.full((size,), 1.5, dtype=BF16, device=device)
        moments = (torch.ones(size, device=device), torch.ones(size, device=device))
        gradient = torch.ones(size, device=device)
        betas, step = (0.9, 0.95), 10**6  # corrections of 1: the weight moves by the rate
        update = Update(weights, gradient, moments, None, step, share * 2**-7, betas, 0.0, 0.0, noise_key(0, 1, 2))
        adamw8bit([update], maps(device))
    assert ((weights == 1.5) | (weights == 1.5 - 2**-7)).all()
    spread = math.sqrt(share * (1 - share) / size)
    assert abs((weights != 1.5).double().mean().item() - share) <= 5 * spread


@pytest.mark.parametrize(("route", "size"), cases([(4096 + 100,), (100,)]))
def test_a_nan_stays_one(route: str, size: int) -> None:
    """Also one whose bits are all ones, as a GPU makes them: in a gradient here, and in what becomes of a weight."""
    with along(route, kernels, launch=1) as device, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the interpreter
        (update,) = tensors((size,), BF16, FP32, device)
        before = update.parameter.float().isnan()
        update.gradient[::3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device=device).view(FP32)
        update.parameter[1::3] = torch.tensor(0x7FFF, dtype=torch.int16, device=device).view(BF16)
        adamw8bit([update], maps(device))
    expected = torch.arange(size, device=device) % 3 != 2
    assert not before.any() and torch.equal(update.parameter.isnan(), expected)


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements() -> None:
    """The last blocks get what they would get as a tensor of their own; the first are not touched twice."""
    size, tail = 2**31 + 4096 + 5, 4096 + 5
    blocks = -(-size // 256)
    weights = torch.zeros(size, dtype=BF16, device="cuda")
    gradient = torch.empty(size, dtype=BF16, device="cuda").normal_()
    moments = (torch.full_like(weights, 127, dtype=torch.uint8), torch.zeros_like(weights, dtype=torch.uint8))
    scales = (torch.zeros(blocks, device="cuda"), torch.zeros(blocks, device="cuda"))
    whole = Update(weights, gradient, moments, scales, 1, 1e-3, (0.9, 0.95), 1e-8, 0.0, 3)
    ends = []
    for part, block in ((slice(0, 4096), slice(0, 16)), (slice(size - tail, size), slice(blocks - 17, blocks))):
        cut = [tensor[part].clone() for tensor in (weights, gradient, *moments)]
        own = Update(cut[0], cut[1], (cut[2], cut[3]), (scales[0][block].clone(), scales[1][block].clone()),
                     1, 1e-3, (0.9, 0.95), 1e-8, 0.0, 3)  # fmt: skip
        adamw8bit([own], maps("cuda"))
        ends.append((part, block, own))
    adamw8bit([whole], maps("cuda"))
    for part, block, own in ends:
        assert own.scales is not None
        for codes, wanted in zip(moments, own.moments, strict=True):
            assert torch.equal(codes[part], wanted)
        for scale, wanted in zip(scales, own.scales, strict=True):
            assert torch.equal(scale[block], wanted)
    assert (weights[2**31 :] != 0).float().mean() > 0.99
