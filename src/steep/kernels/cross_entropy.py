"""Cross-entropy over a tile of logits [rows, columns]: a row a program, passes of 4,096 columns, arithmetic in fp32.

`loss_and_gradient` has whole rows: a pass for the maximum and the sum, and a second, which finds the row in the cache,
that turns the logits into their gradient in place. `statistics` and `gradient` are the two passes over a chunk of the
vocabulary. Rows are padded to a multiple of ROW_MULTIPLE columns, so that every read and write is of 16 bytes whatever
the vocabulary; what is read there counts as -inf, and a gradient leaves zeros.

With z the product, the logit is v = scale · z, or v = softcap · tanh(scale · z / softcap).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (a launch takes options; a function under @triton.jit returns; cdiv of plain numbers is one)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels.compilation import Compilation, triton_type

ROW_MULTIPLE = 64
MAX_BLOCK = 4096
SCALED_BLOCK = 2048
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
SCALED_PROGRAMS = 2048  # enough for any card; a program that has nothing to do costs its launch


def configuration(width: int) -> tuple[int, int]:
    """(BLOCK, num_warps): 16 elements a thread. With 32 the registers leave room for two rows at once, not four."""
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    return block, max(block // 512, 1)


@triton.jit
def _read(row, columns, width, num_columns, scale, softcap, SOFTCAP: tl.constexpr):
    """The logits v, and dv/dz / scale."""
    products = tl.load(row + columns, mask=columns < width, other=0.0)
    values = tl.where(columns < num_columns, products, 0.0).to(tl.float32) * scale
    slope = 1.0
    if SOFTCAP:
        size = tl.abs(values)
        small = tl.exp(size * (-2.0 / softcap))
        tanh = (1.0 - small) / (1.0 + small)
        slope = 1.0 - tanh * tanh
        capped = tl.where(values < 0, -tanh, tanh) * softcap
        values = tl.where(size == float("inf"), float("nan"), capped)  # the cap would hide an overflow
    return tl.where(columns < num_columns, values, float("-inf")), slope


@triton.jit
def _statistics(row, maximum, total, width, num_columns, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The running (maximum, sum of exp(v - maximum)). A NaN or +inf among v makes the sum a NaN, -inf adds 0."""
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values, _ = _read(row, columns, width, num_columns, scale, softcap, SOFTCAP)
        higher = tl.maximum(tl.maximum(maximum, tl.max(values, axis=0)), LOWEST)  # -inf less -inf is a NaN
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(values - higher), axis=0)
        maximum = higher
    return maximum, total


@triton.jit
def _gradient(row, label, lse, factor, width, num_columns, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """z := factor · (softmax - one-hot) · dv/dz / scale."""
    label = label.to(tl.int32)  # one that is cut short by that is outside of the vocabulary, and lse a NaN
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values, slope = _read(row, columns, width, num_columns, scale, softcap, SOFTCAP)
        result = tl.exp(values - lse)
        result = tl.where(columns == label, result - 1.0, result) * slope * factor
        result = tl.where(columns < num_columns, result, 0.0)
        tl.store(row + columns, result.to(row.dtype.element_ty), mask=columns < width)


@triton.jit
def _zeros(row, width, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(row + columns, tl.zeros([BLOCK], row.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["ignore_index"])
def loss_and_gradient_kernel(
    logits,
    labels,
    losses,
    factor,
    stride,
    width,
    num_columns,
    ignore_index,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * stride
    label = tl.load(labels + place)
    if label == ignore_index:
        tl.store(losses + place, 0.0)
        _zeros(row, width, BLOCK)
    else:
        known = (label >= 0) & (label < num_columns)
        target, _ = _read(row, tl.where(known, label, 0), width, num_columns, scale, softcap, SOFTCAP)
        maximum, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
        maximum, total = _statistics(row, maximum, total, width, num_columns, scale, softcap, SOFTCAP, BLOCK)
        lse = tl.where(known, maximum + tl.log(total), float("nan"))
        tl.store(losses + place, lse - target)
        _gradient(row, label, lse, tl.load(factor), width, num_columns, scale, softcap, SOFTCAP, BLOCK)


@triton.jit(do_not_specialize=["first", "ignore_index"])
def loss_statistics_kernel(
    logits,
    labels,
    statistics,
    stride,
    statistics_stride,
    first,
    width,
    num_columns,
    ignore_index,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * stride
    label = tl.load(labels + place)
    if label != ignore_index:
        label -= first
        if (label >= 0) & (label < num_columns):
            target, _ = _read(row, label, width, num_columns, scale, softcap, SOFTCAP)
            tl.store(statistics + 2 * statistics_stride + place, target)
        maximum = tl.load(statistics + place)
        total = tl.load(statistics + statistics_stride + place)
        maximum, total = _statistics(row, maximum, total, width, num_columns, scale, softcap, SOFTCAP, BLOCK)
        tl.store(statistics + place, maximum)
        tl.store(statistics + statistics_stride + place, total)


@triton.jit(do_not_specialize=["first", "ignore_index"])
def loss_gradient_kernel(
    logits,
    labels,
    lse,
    factor,
    stride,
    first,
    width,
    num_columns,
    ignore_index,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * stride
    label = tl.load(labels + place)
    if label == ignore_index:
        _zeros(row, width, BLOCK)
    else:
        total = tl.load(lse + place)
        _gradient(row, label - first, total, tl.load(factor), width, num_columns, scale, softcap, SOFTCAP, BLOCK)


@triton.jit
def scaled_kernel(source, out, factor, num_elements, num_blocks, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if IN_PLACE:
        num_blocks = tl.where(by == 1.0, 0, num_blocks)
    program = tl.program_id(0)
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, num_blocks, tl.num_programs(0)):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < num_elements
        values = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=inside)
        start += tl.num_programs(0).to(tl.int64) * BLOCK


def padded(num_columns: int) -> int:
    """The columns that a row of `num_columns` logits takes up."""
    return triton.cdiv(num_columns, ROW_MULTIPLE) * ROW_MULTIPLE


def _geometry(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int, int]:
    """(padded width, BLOCK, num_warps)"""
    width = padded(logits.shape[1])
    assert logits.stride(1) == 1 and logits.stride(0) >= width, "rows are not padded"
    assert labels.shape == logits.shape[:1] and labels.is_contiguous() and labels.dtype == torch.int64
    return width, *configuration(width)


def loss_and_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
) -> None:
    """Write each row's loss, and turn the row into factor · (softmax - one-hot) · dv/dz / scale.

    `losses` is fp32 [rows], `factor` one fp32 on the device. A label outside of the vocabulary makes both NaN.
    """
    width, block, num_warps = _geometry(logits, labels)
    loss_and_gradient_kernel[(logits.shape[0],)](
        logits,
        labels,
        losses,
        factor,
        logits.stride(0),
        width,
        logits.shape[1],
        ignore_index,
        float(scale),
        float(softcap or 1),
        SOFTCAP=softcap is not None,
        BLOCK=block,
        num_warps=num_warps,
    )


def statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    running: torch.Tensor,
    first: int,
    ignore_index: int,
    scale: float,
    softcap: float | None,
) -> None:
    """Take the columns from `first` on into `running` [3, rows]: maximum, sum of exponentials, the label's logit."""
    width, block, num_warps = _geometry(logits, labels)
    assert running.stride(1) == 1
    loss_statistics_kernel[(logits.shape[0],)](
        logits,
        labels,
        running,
        logits.stride(0),
        running.stride(0),
        first,
        width,
        logits.shape[1],
        ignore_index,
        float(scale),
        float(softcap or 1),
        SOFTCAP=softcap is not None,
        BLOCK=block,
        num_warps=num_warps,
    )


def gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    first: int,
    ignore_index: int,
    scale: float,
    softcap: float | None,
) -> None:
    """Turn the columns from `first` on into their gradient, given log(sum(exp)) of the whole rows."""
    width, block, num_warps = _geometry(logits, labels)
    loss_gradient_kernel[(logits.shape[0],)](
        logits,
        labels,
        lse,
        factor,
        logits.stride(0),
        first,
        width,
        logits.shape[1],
        ignore_index,
        float(scale),
        float(softcap or 1),
        SOFTCAP=softcap is not None,
        BLOCK=block,
        num_warps=num_warps,
    )


def scaled(source: torch.Tensor, out: torch.Tensor, factor: torch.Tensor) -> None:
    """out = source · factor, contiguous both. In place nothing is read or written if the factor is exactly 1."""
    assert source.is_contiguous() and out.is_contiguous() and source.shape == out.shape
    num_blocks = triton.cdiv(source.numel(), SCALED_BLOCK)
    scaled_kernel[(min(num_blocks, SCALED_PROGRAMS),)](
        source,
        out,
        factor,
        source.numel(),
        num_blocks,
        IN_PLACE=source.data_ptr() == out.data_ptr(),
        BLOCK=SCALED_BLOCK,
        num_warps=4,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched for a large and a small vocabulary, and activations of `dtype`."""
    logits = triton_type(dtype)
    common = {"stride": "i32", "width": "i32", "num_columns": "i32", "ignore_index": "i32"}
    common |= {"logits": logits, "labels": "*i64", "scale": "fp32", "softcap": "fp32"}
    kernels = [
        (loss_and_gradient_kernel, {"losses": "*fp32", "factor": "*fp32"}),
        (loss_statistics_kernel, {"statistics": "*fp32", "statistics_stride": "i32", "first": "i32"}),
        (loss_gradient_kernel, {"lse": "*fp32", "factor": "*fp32", "first": "i32"}),
    ]
    found = []
    for kernel, own in kernels:
        for width, softcap in ((128256, False), (262144, True), (384, False)):
            block, num_warps = configuration(width)
            found.append(Compilation(kernel, common | own, {"SOFTCAP": softcap, "BLOCK": block}, num_warps))
    for source, out in ((logits, logits), ("*fp32", "*fp32"), ("*fp32", logits)):
        signature = {"source": source, "out": out, "factor": "*fp32", "num_elements": "i64", "num_blocks": "i32"}
        found.append(Compilation(scaled_kernel, signature, {"IN_PLACE": source == out, "BLOCK": SCALED_BLOCK}, 4))
    return found
