"""Gated activations, silu or tanh-gelu of the gate times up, and their gradients in place.

Both activations are gate · sigmoid(z): z = gate for silu, z = 2·sqrt(2/π)·(gate + 0.044715·gate³) for tanh-gelu, since
(1 + tanh(z/2)) / 2 = sigmoid(z). So one exponential serves both, of -|z|, which never overflows.

Results can be written in e4m3 too, for a product to read; then a program does a whole row. A scale for the row is known
only when all of it is computed. A row of h stays in registers meanwhile, where it has no more than WHOLE_ROW columns:
0.116 ms against 0.162 for two passes at 4096 x 14336 on an H200. In backward, where gate's and up's gradients are made
of three inputs, that gave 0.282 ms against 0.291, and at 8,192 columns 0.191 against 0.138. So there, and in longer
rows, all is computed twice, from inputs that the second-level cache still has: in backward a row's are 86 KB, and three
programs on each of an H200's 132 multiprocessors, as their registers allow, have 34 MB of its 50.
To read back what the first pass wrote would move less, 57 KB for 86, but in 16 bit: e4m3 would be rounded twice, and
backward's inputs lie where its results go. With a scale for each 128 columns one pass is enough.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch takes options; a kernel's part gives several tensors; next_power_of_2 of a plain number is one)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels import OLDEST_FP8_CARD, variants
from steep.kernels.compilation import Compilation, triton_type
from steep.kernels.fp8_rows import Rows, inverse_of, largest_of, magnitude, sharing, store_columns, weighted

FORWARD_BLOCK, FORWARD_WARPS = 2048, 4
BACKWARD_BLOCK, BACKWARD_WARPS = 1024, 4  # 2,048 elements lost: 0.48 against 0.18 ms at 4096 x 14336 on an H200
ROW_BLOCK, ROW_WARPS = 2048, 8  # as many elements a thread
WHOLE_ROW, WHOLE_ROW_WARPS = 16384, 16


@triton.jit
def sigmoid_of(gate, IS_GELU: tl.constexpr):
    """The factor that makes the activation out of its gate."""
    z = gate
    if IS_GELU:
        z *= 1.5957691216057308 * (1.0 + 0.044715 * gate * gate)
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def gated_kernel(
    gate_up,
    h,
    gate_up_stride,
    h_stride,
    INTERMEDIATE: tl.constexpr,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks_a_row: tl.constexpr = (INTERMEDIATE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    column = tl.program_id(0) % blocks_a_row * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTERMEDIATE
    pointer = gate_up + row * gate_up_stride + column
    gate = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pointer + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    sigmoid = sigmoid_of(gate, IS_GELU)
    tl.store(h + row * h_stride + column, (gate * sigmoid * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def gradients(gate, up, gradient, IS_GELU: tl.constexpr):
    """h, and the gradients of gate and up."""
    sigmoid = sigmoid_of(gate, IS_GELU)
    activated = gate * sigmoid
    slope = activated * (1.0 - sigmoid)
    if IS_GELU:
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    return activated * up, gradient * up * (sigmoid + slope), gradient * activated


@triton.jit
def gated_backward_kernel(
    dh,  # becomes h
    gate_up,  # become their gradients
    dh_stride,
    gate_up_stride,
    INTERMEDIATE: tl.constexpr,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks_a_row: tl.constexpr = (INTERMEDIATE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    column = tl.program_id(0) % blocks_a_row * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTERMEDIATE
    pointer = gate_up + row * gate_up_stride + column
    h_pointer = dh + row * dh_stride + column
    gate = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pointer + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(h_pointer, mask=inside, other=0.0).to(tl.float32)
    h, dgate, dup = gradients(gate, up, gradient, IS_GELU)
    tl.store(h_pointer, h.to(dh.dtype.element_ty), mask=inside)
    tl.store(pointer, dgate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(pointer + INTERMEDIATE, dup.to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def load_streamed(pointer, inside):
    """In fp32. Past the first-level cache, which keeps the factors of the columns."""
    return tl.load(pointer, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def gated_fp8_kernel(
    gate_up,
    h,
    codes,
    code_scale,
    factors,  # or None
    gate_up_stride,
    h_stride,
    codes_stride,
    INTERMEDIATE: tl.constexpr,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,  # columns that share a scale; BLOCK: the row has one
):
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    gate_up += row * gate_up_stride
    h += row * h_stride
    codes += row * codes_stride
    inverse = 1.0
    if SHARED == BLOCK and INTERMEDIATE > BLOCK:
        bits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, INTERMEDIATE, BLOCK):
            column = start + offset
            inside = column < INTERMEDIATE
            gate = load_streamed(gate_up + column, inside)
            up = load_streamed(gate_up + INTERMEDIATE + column, inside)
            values = gate * sigmoid_of(gate, IS_GELU) * up
            bits = tl.maximum(bits, magnitude(weighted(values, factors, column, inside)))
        largest = largest_of(tl.max(bits, axis=0))
        tl.store(code_scale + row, largest / 448.0)
        inverse = inverse_of(largest)
    for start in range(0, INTERMEDIATE, BLOCK):
        column = start + offset
        inside = column < INTERMEDIATE
        gate = load_streamed(gate_up + column, inside)
        up = load_streamed(gate_up + INTERMEDIATE + column, inside)
        values = gate * sigmoid_of(gate, IS_GELU) * up
        tl.store(h + column, values.to(h.dtype.element_ty), mask=inside)
        if SHARED == BLOCK:
            values = weighted(values, factors, column, inside)
            if INTERMEDIATE <= BLOCK:
                largest = largest_of(tl.max(magnitude(values), axis=0))
                tl.store(code_scale + row, largest / 448.0)
                inverse = inverse_of(largest)
            tl.store(codes + column, (values * inverse).to(tl.float8e4nv), mask=inside)
        else:
            scales = code_scale + row * ((INTERMEDIATE + SHARED - 1) // SHARED)
            store_columns(values, start, INTERMEDIATE, codes, scales, factors, BLOCK, SHARED)


@triton.jit
def gated_backward_fp8_kernel(
    dh,  # becomes h
    gate_up,  # become their gradients
    codes,
    code_scale,
    factors,  # or None
    dh_stride,
    gate_up_stride,
    codes_stride,
    INTERMEDIATE: tl.constexpr,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,  # columns that share a scale; BLOCK: the row of both has one
):
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    dh += row * dh_stride
    gate_up += row * gate_up_stride
    codes += row * codes_stride
    inverse = 1.0
    if SHARED == BLOCK:
        bits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, INTERMEDIATE, BLOCK):
            column = start + offset
            inside = column < INTERMEDIATE
            gate = load_streamed(gate_up + column, inside)
            up = load_streamed(gate_up + INTERMEDIATE + column, inside)
            _, dgate, dup = gradients(gate, up, load_streamed(dh + column, inside), IS_GELU)
            bits = tl.maximum(bits, magnitude(weighted(dgate, factors, column, inside)))
            bits = tl.maximum(bits, magnitude(weighted(dup, factors, INTERMEDIATE + column, inside)))
        largest = largest_of(tl.max(bits, axis=0))
        tl.store(code_scale + row, largest / 448.0)
        inverse = inverse_of(largest)
    for start in range(0, INTERMEDIATE, BLOCK):
        column = start + offset
        inside = column < INTERMEDIATE
        gate = load_streamed(gate_up + column, inside)
        up = load_streamed(gate_up + INTERMEDIATE + column, inside)
        h, dgate, dup = gradients(gate, up, load_streamed(dh + column, inside), IS_GELU)
        tl.store(dh + column, h.to(dh.dtype.element_ty), mask=inside)
        tl.store(gate_up + column, dgate.to(gate_up.dtype.element_ty), mask=inside)
        tl.store(gate_up + INTERMEDIATE + column, dup.to(gate_up.dtype.element_ty), mask=inside)
        if SHARED == BLOCK:
            dgate = weighted(dgate, factors, column, inside) * inverse
            dup = weighted(dup, factors, INTERMEDIATE + column, inside) * inverse
            tl.store(codes + column, dgate.to(tl.float8e4nv), mask=inside)
            tl.store(codes + INTERMEDIATE + column, dup.to(tl.float8e4nv), mask=inside)
        else:
            scales = code_scale + row * (2 * INTERMEDIATE // SHARED)
            store_columns(dgate, start, INTERMEDIATE, codes, scales, factors, BLOCK, SHARED)
            store_columns(dup, INTERMEDIATE + start, 2 * INTERMEDIATE, codes, scales, factors, BLOCK, SHARED)


def forward(gate_up: torch.Tensor, intermediate: int, is_gelu: bool, h: torch.Tensor) -> None:
    """h [T, I] = activation(gate) · up, of gate_up [T, >= 2·I]."""
    variants.launch(
        gated_kernel,
        (gate_up.shape[0] * -(-intermediate // FORWARD_BLOCK), 1, 1),
        (gate_up, h),
        (gate_up.stride(0), h.stride(0), intermediate, is_gelu, FORWARD_BLOCK),
        num_warps=FORWARD_WARPS,
    )


def backward(dh: torch.Tensor, gate_up: torch.Tensor, intermediate: int, is_gelu: bool) -> None:
    """In place: dh becomes h, gate and up become their gradients."""
    variants.launch(
        gated_backward_kernel,
        (gate_up.shape[0] * -(-intermediate // BACKWARD_BLOCK), 1, 1),
        (dh, gate_up),
        (dh.stride(0), gate_up.stride(0), intermediate, is_gelu, BACKWARD_BLOCK),
        num_warps=BACKWARD_WARPS,
    )


def forward_quantised(gate_up: torch.Tensor, intermediate: int, is_gelu: bool, h: torch.Tensor, rows: Rows) -> None:
    """As `forward`, and h in e4m3 into `rows`."""
    block, warps = ROW_BLOCK, ROW_WARPS
    _, scale, _ = rows
    if scale.dim() == 1 and intermediate <= WHOLE_ROW:
        block = max(triton.next_power_of_2(intermediate), WHOLE_ROW // WHOLE_ROW_WARPS)
        warps = WHOLE_ROW_WARPS * block // WHOLE_ROW  # as many elements a thread
    codes_stride, shared = sharing(rows, block)
    variants.launch(
        gated_fp8_kernel,
        (gate_up.shape[0], 1, 1),
        (gate_up, h, *rows),
        (gate_up.stride(0), h.stride(0), codes_stride, intermediate, is_gelu, block, shared),
        num_warps=warps,
    )


def backward_quantised(dh: torch.Tensor, gate_up: torch.Tensor, intermediate: int, is_gelu: bool, rows: Rows) -> None:
    """As `backward`, and the gradients of gate and up in e4m3 into `rows` [T, 2·I]."""
    codes_stride, shared = sharing(rows, ROW_BLOCK)
    variants.launch(
        gated_backward_fp8_kernel,
        (gate_up.shape[0], 1, 1),
        (dh, gate_up, *rows),
        (dh.stride(0), gate_up.stride(0), codes_stride, intermediate, is_gelu, ROW_BLOCK, shared),
        num_warps=ROW_WARPS,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched in `dtype`: Llama-3-8B's silu, and Gemma-3-4B's gelu, which has pieces in e4m3."""
    kind = triton_type(dtype)
    signature = {"gate_up": kind, "h": kind, "dh": kind}
    signature |= dict.fromkeys(("gate_up_stride", "h_stride", "dh_stride", "codes_stride"), "i32")
    signature |= {"codes": "*fp8e4nv", "code_scale": "*fp32", "factors": "*fp32"}
    found = []
    for intermediate, is_gelu in ((14336, False), (10240, True)):
        constants = {"INTERMEDIATE": intermediate, "IS_GELU": is_gelu}
        found += [
            Compilation(gated_kernel, signature, constants | {"BLOCK": FORWARD_BLOCK}, FORWARD_WARPS),
            Compilation(gated_backward_kernel, signature, constants | {"BLOCK": BACKWARD_BLOCK}, BACKWARD_WARPS),
        ]
        constants |= {"BLOCK": ROW_BLOCK, "SHARED": 128 if is_gelu else ROW_BLOCK}
        forward = constants | {"factors": None}
        whole = forward | {"BLOCK": WHOLE_ROW, "SHARED": WHOLE_ROW}
        longer = forward if is_gelu else forward | {"INTERMEDIATE": 28672}  # Llama-3-70B's, gone through twice
        found += [
            Compilation(gated_fp8_kernel, signature, whole, WHOLE_ROW_WARPS, OLDEST_FP8_CARD),
            Compilation(gated_fp8_kernel, signature, longer, ROW_WARPS, OLDEST_FP8_CARD),
            Compilation(gated_backward_fp8_kernel, signature, constants, ROW_WARPS, OLDEST_FP8_CARD),
        ]
    return found
