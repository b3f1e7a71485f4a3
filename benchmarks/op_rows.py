"""The rows of `benchmarks.ops`: the shapes of Llama-3-8B at 4,096 tokens, where an op has no other.

A row is a function that gives its cases one by one, so that only one stands in memory.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.measuring import putting_back
from steep.ops.fp8 import Fp8Rows, empty_fp8_rows, quantise_reference
from steep.ops.lora import Lora, Projection
from steep.ops.nf4 import Nf4Weight

TOKENS, HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 4096, 4096, 14336, 128256, 256
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 8, 128, 32
EPS = 1e-5
DEVICE = "cuda"


def first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


@dataclass
class Rival:
    """Another library's function, on what its own users give it.

    Attributes:
        wrt: as a case's.
        as_reference: its result as the reference's first.
        note: what it does beside.
    """

    function: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...]
    wrt: tuple[int, ...] = (0,)
    as_reference: Callable[[Any], torch.Tensor] = first
    note: str = ""


@dataclass
class Case:
    """One line of the table.

    Attributes:
        ours: what is timed.
        before: what puts back the tensors that `ours` wrote over.
        result: our result of fresh inputs, which is compared with the reference's first output or gradient.
        reference: differentiable function of `inputs`; None: there is nothing to compare with.
        bytes, flops: that the op has to move or do.
        direction: of reference and rival: what of `function(*inputs)` is timed.
        wrt: places of the inputs whose gradients are asked for.
        adapters: tensors that the reference closes over, whose gradients are asked for too.
        times_reference: False where the reference would take too long or too much memory, or does less than the op.
    """

    op: str
    shape: str
    ours: Callable[[], Any]
    result: Callable[[], Any]
    reference: Callable[..., Any] | None
    inputs: tuple[torch.Tensor, ...] = ()
    bytes: float = 0
    flops: float = 0
    direction: Literal["forward", "backward", "both"] = "forward"
    wrt: tuple[int, ...] = (0,)
    adapters: tuple[torch.Tensor, ...] = ()
    cotangent: torch.Tensor | None = None
    liger: Rival | None = None
    before: Callable[[], Any] | None = None
    times_reference: bool = True


def liger(name: str) -> Callable[..., Any] | None:
    """One of Liger's functions, where Liger is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}")


def random(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE, dtype=torch.float32) * std).to(dtype)


def rms_norm() -> Iterator[Case]:
    from steep.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference

    x, dy, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(HIDDEN)
    out = torch.empty_like(x)
    theirs = liger("rms_norm")
    shape, inputs = f"{TOKENS} x {HIDDEN}", (x, weight)
    common: dict[str, Any] = {
        "shape": shape,
        "inputs": inputs,
        "reference": lambda x, weight: rms_norm_reference(x, weight, EPS),
    }

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert theirs is not None
        return theirs(x, weight, EPS, in_place=False)

    def rival(note: str) -> Rival | None:
        return theirs and Rival(norm, inputs, note=note)

    def forward() -> torch.Tensor:
        return rms_norm_forward(x, weight, EPS, out=out)

    def backward() -> torch.Tensor:
        return rms_norm_backward(dy, x, weight, EPS, out=out)

    yield Case(
        "rms_norm forward", ours=forward, result=forward, bytes=2 * 2 * x.numel(), liger=rival(""), **common
    )  # fmt: skip
    yield Case(
        "rms_norm backward", ours=backward, result=backward, bytes=3 * 2 * x.numel(), direction="backward",
        cotangent=dy, liger=rival("also makes dW"), **common,
    )  # fmt: skip


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D / 2]."""
    frequencies = 5e5 ** (-torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
    turned = torch.arange(TOKENS, device=DEVICE)[:, None] * frequencies
    return turned.cos(), turned.sin()


def rope() -> Iterator[Case]:
    from steep.ops.rope import rope_forward, rope_reference

    cos, sin = angles()
    qkv = random(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    mine = qkv.clone()
    function = liger("rope")
    wide_cos, wide_sin = (torch.cat([part, part], dim=-1).to(qkv.dtype)[None] for part in (cos, sin))

    # q and k as transformers has them: of a projection each, the heads in front
    heads = qkv.view(1, TOKENS, -1, HEAD_DIM)
    q, k, v = (part.contiguous().transpose(1, 2) for part in heads.split([HEADS, KV_HEADS, KV_HEADS], dim=2))

    def joined(rotated: Any) -> torch.Tensor:
        return torch.cat([*rotated, v], dim=1).transpose(1, 2).reshape(TOKENS, -1)

    moved = 2 * 2 * TOKENS * (HEADS + KV_HEADS) * HEAD_DIM + 2 * 4 * cos.numel()
    yield Case(
        "rope", f"{TOKENS} x ({HEADS} + {KV_HEADS}) x {HEAD_DIM}",
        ours=lambda: rope_forward(mine, cos, sin, HEADS, KV_HEADS, HEAD_DIM),
        before=putting_back(mine), result=lambda: rope_forward(qkv.clone(), cos, sin, HEADS, KV_HEADS, HEAD_DIM),
        reference=lambda qkv, cos, sin: rope_reference(qkv, cos, sin, HEADS, KV_HEADS, HEAD_DIM),
        inputs=(qkv, cos, sin), bytes=moved,
        liger=function and Rival(function, (q, k, wide_cos, wide_sin), as_reference=joined),
    )  # fmt: skip


def qk_norm() -> Iterator[Case]:
    """Qwen3-8B's: norm of each head, and the rotation."""
    from steep.ops.qk_norm import qk_norm_rope_backward, qk_norm_rope_forward, qk_norm_rope_reference

    cos, sin = angles()
    qkv, dqkv = (random(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in range(2))
    weights = random(HEAD_DIM), random(HEAD_DIM)
    heads = HEADS, KV_HEADS, HEAD_DIM
    out, mine = torch.empty_like(qkv), dqkv.clone()
    common: dict[str, Any] = {
        "shape": f"{TOKENS} x ({HEADS} + {KV_HEADS}) x {HEAD_DIM}",
        "inputs": (qkv, *weights, cos, sin),
        "reference": lambda qkv, q, k, cos, sin: qk_norm_rope_reference(qkv, q, k, EPS, cos, sin, *heads),
    }

    def forward() -> torch.Tensor:
        return qk_norm_rope_forward(qkv, *weights, EPS, cos, sin, *heads, out=out)

    def backward(dqkv: torch.Tensor) -> torch.Tensor:
        return qk_norm_rope_backward(dqkv, qkv, *weights, EPS, cos, sin, *heads)

    read = 2 * 4 * cos.numel()
    yield Case("qk_norm forward", ours=forward, result=forward, bytes=2 * 2 * qkv.numel() + read, **common)
    yield Case(
        "qk_norm backward", ours=lambda: backward(mine), result=lambda: backward(dqkv.clone()),
        before=putting_back(mine), bytes=3 * 2 * TOKENS * (HEADS + KV_HEADS) * HEAD_DIM + read,
        direction="backward", cotangent=dqkv, **common,
    )  # fmt: skip


def swiglu() -> Iterator[Case]:
    yield from _gated("swiglu", "silu")


def geglu() -> Iterator[Case]:
    yield from _gated("geglu", "gelu_tanh")


def _gated(name: str, activation: Any) -> Iterator[Case]:
    from steep.ops.swiglu import gated_backward, gated_forward, gated_reference

    gate_up, dh = random(TOKENS, 2 * INTERMEDIATE), random(TOKENS, INTERMEDIATE)
    out, mine, my_dh = torch.empty_like(dh), gate_up.clone(), dh.clone()
    function, halves = liger(name), tuple(half.contiguous() for half in gate_up.chunk(2, 1))
    common: dict[str, Any] = {
        "shape": f"{TOKENS} x {INTERMEDIATE}",
        "inputs": (gate_up,),
        "reference": lambda gate_up: gated_reference(gate_up, INTERMEDIATE, activation),
    }

    def forward() -> torch.Tensor:
        return gated_forward(gate_up, INTERMEDIATE, activation, out)

    def gradient() -> torch.Tensor:
        both = gate_up.clone()
        gated_backward(dh.clone(), both, INTERMEDIATE, activation)
        return both

    def backward() -> torch.Tensor:
        gated_backward(my_dh, mine, INTERMEDIATE, activation)
        return mine

    yield Case(
        f"{name} forward", ours=forward, result=forward, bytes=3 * 2 * out.numel(),
        liger=function and Rival(function, halves), **common,
    )  # fmt: skip
    yield Case(
        f"{name} backward", ours=backward, result=gradient, before=putting_back(my_dh, mine),
        bytes=6 * 2 * out.numel(), direction="backward", cotangent=dh,
        liger=function
        and Rival(function, halves, (0, 1), lambda both: torch.cat(both, dim=1), "5 passes of 6: no act(gate)·up"),
        **common,
    )  # fmt: skip


def fp8_rows() -> Iterator[Case]:
    """What writes its result in e4m3 beside it, rows with one scale: compared are the codes. Gradients are times
    factors, as the scales of a weight's rows are folded into them."""
    from steep.ops.backend import vjp
    from steep.ops.copy_rows import copy_rows
    from steep.ops.qk_norm import qk_norm_rope_backward, qk_norm_rope_reference
    from steep.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference
    from steep.ops.rope import rope_backward, rope_reference
    from steep.ops.swiglu import gated_backward, gated_forward, gated_reference

    def rows_for(columns: int, factors: torch.Tensor | None = None) -> Fp8Rows:
        return empty_fp8_rows(TOKENS, columns, torch.device(DEVICE), pieces=False, factors=factors)

    def codes_of(values: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        rows = rows_for(values.shape[1], factors)
        quantise_reference(values, rows)
        return rows.codes

    def case(name: str, shape: str, write: Callable[..., Any], rows: Fp8Rows, read: int, **rest: Any) -> Case:
        """`write(rows, *tensors)`, where `tensors` are those that it writes over."""
        tensors = rest.pop("tensors", ())
        mine = tuple(tensor.clone() for tensor in tensors)

        def run(*tensors: torch.Tensor) -> torch.Tensor:
            write(rows, *tensors)
            return rows.codes

        written = rows.codes.numel() + 4 * rows.scale.numel()
        return Case(
            f"{name}, e4m3", shape, ours=lambda: run(*mine), result=lambda: run(*(each.clone() for each in tensors)),
            before=putting_back(*mine) if mine else None,
            bytes=read + written + (0 if rows.factors is None else 4 * rows.factors.numel()), **rest,
        )  # fmt: skip

    factors = 0.5 + random(2 * INTERMEDIATE, dtype=torch.float32).abs()
    x, dy, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(HIDDEN)
    out, of_hidden, shape = torch.empty_like(x), factors[:HIDDEN].contiguous(), f"{TOKENS} x {HIDDEN}"

    def norm(x: torch.Tensor) -> torch.Tensor:
        return rms_norm_reference(x, weight.float(), EPS)

    yield case(
        "copy_rows", shape, lambda rows: copy_rows(x, out, quantised=rows), rows_for(HIDDEN, of_hidden),
        2 * 2 * x.numel(), reference=lambda x: codes_of(x, of_hidden), inputs=(x,),
    )  # fmt: skip
    yield case(
        "rms_norm forward", shape, lambda rows: rms_norm_forward(x, weight, EPS, out=out, quantised=rows),
        rows_for(HIDDEN), 2 * 2 * x.numel(), reference=lambda x: codes_of(norm(x.float())), inputs=(x,),
    )  # fmt: skip
    yield case(
        "rms_norm backward", shape, lambda rows: rms_norm_backward(dy, x, weight, EPS, out=out, quantised=rows),
        rows_for(HIDDEN, of_hidden), 3 * 2 * x.numel(),
        reference=lambda x: codes_of(vjp(norm, (x.float(),), dy.float())[0], of_hidden), inputs=(x,),
    )  # fmt: skip

    gate_up, dh = random(TOKENS, 2 * INTERMEDIATE), random(TOKENS, INTERMEDIATE)
    h, shape = torch.empty_like(dh), f"{TOKENS} x {INTERMEDIATE}"

    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        return gated_reference(gate_up, INTERMEDIATE, "silu")

    yield case(
        "swiglu forward", shape, lambda rows: gated_forward(gate_up, INTERMEDIATE, "silu", h, quantised=rows),
        rows_for(INTERMEDIATE), 3 * 2 * h.numel(), reference=lambda gate_up: codes_of(gated(gate_up.float())),
        inputs=(gate_up,),
    )  # fmt: skip
    yield case(
        "swiglu backward", shape,
        lambda rows, dh, gate_up: gated_backward(dh, gate_up, INTERMEDIATE, "silu", quantised=rows),
        rows_for(2 * INTERMEDIATE, factors), 6 * 2 * h.numel(), tensors=(dh, gate_up), inputs=(gate_up,),
        reference=lambda gate_up: codes_of(vjp(gated, (gate_up.float(),), dh.float())[0], factors),
    )  # fmt: skip

    cos, sin = angles()
    heads, width = (HEADS, KV_HEADS, HEAD_DIM), (HEADS + 2 * KV_HEADS) * HEAD_DIM
    qkv, dqkv, q_weight, k_weight = random(TOKENS, width), random(TOKENS, width), random(HEAD_DIM), random(HEAD_DIM)
    of_heads = (0.5 + random(width, dtype=torch.float32).abs()).contiguous()
    v, read, shape = (
        TOKENS * KV_HEADS * HEAD_DIM,
        2 * 4 * cos.numel(),
        f"{TOKENS} x ({HEADS} + {KV_HEADS}) x {HEAD_DIM}",
    )

    def normed(qkv: torch.Tensor) -> torch.Tensor:
        return qk_norm_rope_reference(qkv, q_weight, k_weight, EPS, cos, sin, *heads)

    yield case(
        "rope backward", shape, lambda rows, dqkv: rope_backward(dqkv, cos, sin, *heads, quantised=rows),
        rows_for(width, of_heads), 2 * (2 * dqkv.numel() - v) + read, tensors=(dqkv,), inputs=(dqkv,),
        reference=lambda dqkv: codes_of(rope_reference(dqkv.float(), cos, -sin, *heads), of_heads),
    )  # fmt: skip
    yield case(
        "qk_norm backward", shape,
        lambda rows, dqkv: qk_norm_rope_backward(dqkv, qkv, q_weight, k_weight, EPS, cos, sin, *heads, quantised=rows),
        rows_for(width, of_heads), 2 * (3 * dqkv.numel() - 2 * v) + read, tensors=(dqkv,), inputs=(qkv,),
        reference=lambda qkv: codes_of(vjp(normed, (qkv.float(),), dqkv.float())[0], of_heads),
    )  # fmt: skip


def linear_cross_entropy() -> Iterator[Case]:
    """Loss and both gradients: three products. By chunks of the vocabulary more are done, and none is needed."""
    from steep.ops import linear_cross_entropy as op

    x, weight = random(TOKENS, HIDDEN), random(VOCABULARY, HIDDEN, std=0.02)
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)
    one = torch.ones((), device=DEVICE)
    function = liger("fused_linear_cross_entropy")
    for way in ("tokens", "vocabulary"):

        def ours(way: Any = way) -> Any:
            return torch.autograd.grad(op.linear_cross_entropy(*leaves, labels, way=way), leaves, one)

        yield Case(
            f"linear_ce by {way}", f"{TOKENS} x {HIDDEN} -> {VOCABULARY}", ours=ours, result=ours,
            flops=3 * 2 * x.numel() * VOCABULARY,
            reference=lambda x, weight: op.linear_cross_entropy_reference(x, weight, labels), inputs=(x, weight),
            direction="both", wrt=(0, 1), cotangent=one,
            liger=function and Rival(lambda x, weight: function(x, weight, labels), (x, weight), (0, 1)),
        )  # fmt: skip


def nf4_weight(rows: int, columns: int) -> Nf4Weight:
    """A random weight, quantised twice."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        random(rows, columns, std=0.02), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert state.code is not None and state.offset is not None and state.state2 is not None
    return Nf4Weight(
        codes, state.absmax, state.code, (rows, columns), code_book=state.state2.code,
        nested_absmax=state.state2.absmax, offset=state.offset.reshape(1),
    )  # fmt: skip


def nf4() -> Iterator[Case]:
    from steep.ops.nf4 import nf4_reference

    for rows, columns in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        stored = nf4_weight(rows, columns)
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)

        def write(stored: Nf4Weight = stored, out: torch.Tensor = out) -> torch.Tensor:
            stored.write(out)
            return out

        read = stored.codes.numel() + stored.absmax.numel() + stored.absmax.numel() / 64
        yield Case(
            "nf4 dequantise", f"{rows} x {columns}", ours=write, result=write,
            reference=lambda codes, stored=stored: nf4_reference(stored).to(torch.bfloat16), inputs=(stored.codes,),
            bytes=read + 2 * out.numel(),
        )  # fmt: skip


def int8() -> Iterator[Case]:
    from steep.ops.int8 import Int8Weight, int8_reference

    codes = torch.randint(-127, 128, (INTERMEDIATE, HIDDEN), dtype=torch.int8, device=DEVICE)
    stored = Int8Weight(codes, random(INTERMEDIATE, dtype=torch.float32).abs())
    out = torch.empty(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device=DEVICE)

    def write() -> torch.Tensor:
        stored.write(out)
        return out

    yield Case(
        "int8 dequantise", f"{INTERMEDIATE} x {HIDDEN}", ours=write, result=write,
        reference=lambda codes: int8_reference(stored).to(torch.bfloat16), inputs=(codes,), bytes=3 * out.numel(),
    )  # fmt: skip


def fp8() -> Iterator[Case]:
    """Over a weight in e4m3: dequantised, turned, and multiplied with the adapters in its sum."""
    from steep.ops.fp8 import empty_fp8_rows, fp8_reference, quantise_reference, quantise_weight
    from steep.ops.fp8_linear import transpose
    from steep.ops.fp8_product import LowPart, fp8_product, fp8_product_reference

    for outputs, inputs in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        stored = quantise_weight(random(outputs, inputs, std=0.02))
        dense = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=DEVICE)
        turned = torch.empty(inputs, outputs, dtype=stored.codes.dtype, device=DEVICE)

        def write(stored: Any = stored, dense: torch.Tensor = dense) -> torch.Tensor:
            stored.write(dense)
            return dense

        def turn(stored: Any = stored, turned: torch.Tensor = turned) -> torch.Tensor:
            transpose(stored.codes, turned)
            return turned.float()

        size = outputs * inputs
        shape = f"{outputs} x {inputs}"
        yield Case(
            "fp8 dequantise", shape, ours=write, result=write, bytes=3 * size, inputs=(dense,),
            reference=lambda _, stored=stored: fp8_reference(stored).to(torch.bfloat16),
        )  # fmt: skip
        yield Case(
            "fp8 transpose", shape, ours=lambda stored=stored, turned=turned: transpose(stored.codes, turned),
            result=turn, bytes=2 * size, inputs=(dense,), times_reference=False,
            reference=lambda _, stored=stored: stored.codes.float().t(),
        )  # fmt: skip

        rows = empty_fp8_rows(TOKENS, inputs, dense.device, pieces=False)
        quantise_reference(random(TOKENS, inputs), rows)
        low, b = random(TOKENS, RANK), random(outputs, RANK, std=0.1)
        out = torch.empty(TOKENS, outputs, dtype=torch.bfloat16, device=DEVICE)
        adapters: dict[str, Any] = {"low": low, "b": b, "parts": [LowPart(0, outputs, 0, RANK)]}

        def product(
            rows: Any = rows, stored: Any = stored, out: torch.Tensor = out, adapters: Any = adapters
        ) -> torch.Tensor:
            fp8_product(rows, stored.codes, stored.scale, out, **adapters)
            return out

        def library(low: torch.Tensor, b: torch.Tensor, rows: Any = rows, stored: Any = stored) -> torch.Tensor:
            """torch's, into whose rounded result it adds the adapters' product. It has row scales on a GPU only."""
            if DEVICE == "cpu":
                own = {"low": low, "b": b, "parts": [LowPart(0, len(b), 0, RANK)], "bias": None, "add": None}
                return fp8_product_reference(rows, stored.codes, stored.scale, **own)
            base = torch._scaled_mm(
                rows.codes, stored.codes.t(), rows.scale[:, None], stored.scale[None], out_dtype=torch.bfloat16
            )
            return torch.addmm(base, low, b.t())

        yield Case(
            "fp8 product", f"{TOKENS} x {inputs} -> {outputs}, rank {RANK}", ours=product, result=product,
            reference=library, inputs=(low, b), flops=2 * TOKENS * outputs * (inputs + RANK),
        )  # fmt: skip


def projection(outputs: int, inputs: int) -> Projection:
    b = random(outputs, RANK, std=0.01).requires_grad_()
    a = random(RANK, inputs, std=0.01).requires_grad_()
    return Projection(nf4_weight(outputs, inputs), None, (Lora(a, b, 2.0),))


def lora_flops(outputs: int, inputs: int) -> float:
    """Forward and backward of one projection: y and dX of the base and of the adapter, dA and dB."""
    return TOKENS * (4 * outputs * inputs + 6 * RANK * (outputs + inputs))


def copy_rows() -> Iterator[Case]:
    """Hidden states into the first columns of wider rows."""
    from steep.ops.copy_rows import copy_rows

    x, wider, theirs = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN + RANK), random(TOKENS, HIDDEN + RANK)

    def ours() -> torch.Tensor:
        copy_rows(x, wider[:, :HIDDEN])
        return wider[:, :HIDDEN]

    yield Case(
        "copy_rows", f"{TOKENS} x {HIDDEN}, apart", ours=ours, result=ours, inputs=(x, theirs),
        reference=lambda x, theirs: theirs[:, :HIDDEN].copy_(x), bytes=2 * 2 * x.numel(),
    )  # fmt: skip


def join_rows() -> Iterator[Case]:
    """The gradients of q, k and v side by side."""
    from steep.ops.copy_rows import join_rows

    q, k, v = parts = tuple(random(TOKENS, heads * HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    wider = random(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * RANK)
    joined = wider[:, : (HEADS + 2 * KV_HEADS) * HEAD_DIM]

    def ours() -> torch.Tensor:
        join_rows((q, k, v), joined)
        return joined

    yield Case(
        "join_rows", f"{TOKENS} x ({HEADS} + 2 x {KV_HEADS}) x {HEAD_DIM}, apart", ours=ours, result=ours,
        inputs=parts, reference=lambda *parts: torch.cat(parts, dim=1), bytes=2 * 2 * joined.numel(),
    )  # fmt: skip


def lora_fill() -> Iterator[Case]:
    """What stands beside W in the buffer of gate and up: s·B, A and zeros."""
    from steep.ops.lora_fill import LoraFill
    from steep.ops.lora_layout import layout_of

    projections = [projection(INTERMEDIATE, HIDDEN) for _ in range(2)]
    layout = layout_of(tuple([each.member() for each in projections]))
    buffer = random(layout.gradient_width, layout.input_width)
    tensors = [tensor.detach() for each in projections for tensor in each.tensors()]
    fill = LoraFill(layout, tensors, [1.0, 2.0] * 2, [None, None])
    place = layout.places[0]

    def ours() -> torch.Tensor:
        fill.write(buffer)
        return buffer[place.outputs, place.low]

    read, written = sum(tensor.numel() for tensor in tensors), buffer.numel() - 2 * INTERMEDIATE * HIDDEN
    yield Case(
        "lora_fill", f"2 x {INTERMEDIATE} x {HIDDEN}, rank {RANK}", ours=ours, result=ours,
        reference=lambda b: b * 2, inputs=(tensors[1],), bytes=2 * (read + written), times_reference=False,
    )  # fmt: skip


def lora_linear() -> Iterator[Case]:
    """Forward and backward."""
    from steep.ops.lora_linear import lora_linear, lora_linear_reference

    down = projection(HIDDEN, INTERMEDIATE)
    x, dy = random(TOKENS, INTERMEDIATE).requires_grad_(), random(TOKENS, HIDDEN)

    def ours() -> Any:
        return torch.autograd.grad(lora_linear(x, down), (x, *down.tensors()), dy)

    yield Case(
        "lora_linear both ways", f"{TOKENS} x {INTERMEDIATE} -> {HIDDEN}, rank {RANK}", ours=ours, result=ours,
        reference=lambda x: lora_linear_reference(x, down), inputs=(x,), direction="both", cotangent=dy,
        adapters=down.tensors(), flops=lora_flops(HIDDEN, INTERMEDIATE),
    )  # fmt: skip


def lora_qkv() -> Iterator[Case]:
    """Forward and backward."""
    from steep.ops.lora_qkv import lora_qkv, lora_qkv_reference

    sizes = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    projections = [projection(size, HIDDEN) for size in sizes]
    x, dy = random(TOKENS, HIDDEN).requires_grad_(), random(TOKENS, sum(sizes))
    adapters = tuple(tensor for each in projections for tensor in each.tensors())

    def ours() -> Any:
        return torch.autograd.grad(lora_qkv(x, projections), (x, *adapters), dy)

    yield Case(
        "lora_qkv both ways", f"{TOKENS} x {HIDDEN} -> {sum(sizes)}, rank {RANK}", ours=ours, result=ours,
        reference=lambda x: lora_qkv_reference(x, projections), inputs=(x,), direction="both", cotangent=dy,
        adapters=adapters, flops=sum(lora_flops(size, HIDDEN) for size in sizes),
    )  # fmt: skip


def lora_mlp() -> Iterator[Case]:
    """Forward and backward."""
    from steep.ops.lora_mlp import lora_mlp, lora_mlp_reference

    sizes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    gate, up, down = (projection(*size) for size in sizes)
    x, dy = random(TOKENS, HIDDEN).requires_grad_(), random(TOKENS, HIDDEN)
    adapters = gate.tensors() + up.tensors() + down.tensors()

    def ours() -> Any:
        return torch.autograd.grad(lora_mlp(x, gate, up, down, "silu"), (x, *adapters), dy)

    yield Case(
        "lora_mlp both ways", f"{TOKENS} x {HIDDEN} x {INTERMEDIATE}, rank {RANK}", ours=ours, result=ours,
        reference=lambda x: lora_mlp_reference(x, gate, up, down, "silu"), inputs=(x,), direction="both",
        cotangent=dy, adapters=adapters, flops=sum(lora_flops(*size) for size in sizes),
    )  # fmt: skip


def adamw8bit() -> Iterator[Case]:
    """The embeddings' table alone, and all adapters of the model; compared is the change of a small one. The tables of
    addresses are there before, as in a training step, whose host makes them while the card computes."""
    from bitsandbytes.functional import create_dynamic_map

    from steep.ops.adamw8bit import Update, adamw8bit, adamw8bit_reference, launches

    maps = create_dynamic_map(signed=True).to(DEVICE), create_dynamic_map(signed=False).to(DEVICE)

    def update(*shape: int) -> Update:
        parameter, gradient = random(*shape, std=0.02), random(*shape, std=1e-3)
        blocks = -(-parameter.numel() // 256)
        moments = tuple(torch.randint(1, 255, shape, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        scales = tuple(torch.full((blocks,), size, device=DEVICE) for size in (1e-3, 1e-6))
        return Update(
            parameter, gradient, (moments[0], moments[1]), (scales[0], scales[1]), step=3, lr=1e-2,
            betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        )  # fmt: skip

    small = update(64, HIDDEN)

    def changed(run: Callable[..., None]) -> torch.Tensor:
        moments, scales = small.moments, small.scales
        assert scales is not None
        fresh = dataclasses.replace(
            small, parameter=small.parameter.clone(), moments=(moments[0].clone(), moments[1].clone()),
            scales=(scales[0].clone(), scales[1].clone()),
        )  # fmt: skip
        run([fresh], maps)
        return fresh.parameter.float() - small.parameter.float()

    sizes = [(HIDDEN, HIDDEN), (HIDDEN, KV_HEADS * HEAD_DIM), (HIDDEN, KV_HEADS * HEAD_DIM), (HIDDEN, HIDDEN)]
    sizes += [(HIDDEN, INTERMEDIATE)] * 3
    adapters = [(RANK, side) for _ in range(LAYERS) for size in sizes for side in size]
    for shapes in ([(VOCABULARY, HIDDEN)], adapters):
        updates = [update(*shape) for shape in shapes]
        elements = sum(each.parameter.numel() for each in updates)
        prepared = launches(updates, maps)

        def update_all(prepared: Sequence[Any] = prepared) -> None:
            for launch in prepared:
                launch.run()

        yield Case(
            "adamw8bit", f"{elements / 1e6:.0f} M in {len(updates)} tensors", ours=update_all,
            result=lambda: changed(adamw8bit),
            reference=lambda parameter: changed(adamw8bit_reference), inputs=(small.parameter,), bytes=10 * elements,
            times_reference=False,
        )  # fmt: skip


def attention() -> Iterator[Case]:
    """Two documents of 2,048 tokens, each backend that is fit."""
    from steep.ops.attention import attention_backward, attention_forward
    from steep.ops.attention_backends import usable_backends
    from steep.ops.packing import Packing

    documents, length, scale = 2, TOKENS // 2, HEAD_DIM**-0.5
    q, dout = random(TOKENS, HEADS, HEAD_DIM), random(TOKENS, HEADS, HEAD_DIM)
    k, v = random(TOKENS, KV_HEADS, HEAD_DIM), random(TOKENS, KV_HEADS, HEAD_DIM)
    packing = Packing.from_lengths([length] * documents, DEVICE)
    flops = documents * 4 * length**2 / 2 * HEADS * HEAD_DIM

    def library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(documents, length, -1, HEAD_DIM).transpose(1, 2) for part in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(TOKENS, HEADS, HEAD_DIM)

    for backend in usable_backends(DEVICE, torch.bfloat16, HEAD_DIM, length):
        if backend == "reference" and DEVICE == "cuda":
            continue
        options: dict[str, Any] = {"scale": scale, "backend": backend}
        out, saved = attention_forward(q, k, v, packing, **options)
        common: dict[str, Any] = {
            "shape": f"{documents} x {length}, {HEADS}/{KV_HEADS} x {HEAD_DIM}",
            "reference": library,
            "inputs": (q, k, v),
        }

        def forward(options: dict[str, Any] = options) -> torch.Tensor:
            return attention_forward(q, k, v, packing, **options)[0]

        def backward(out: Any = out, saved: Any = saved, options: dict[str, Any] = options) -> Any:
            return attention_backward(dout, q, k, v, out, saved, packing, **options)

        yield Case(f"attention {backend} forward", ours=forward, result=forward, flops=flops, **common)
        yield Case(
            f"attention {backend} backward", ours=backward, result=backward, flops=2.5 * flops, direction="backward",
            wrt=(0, 1, 2), cotangent=dout, **common,
        )  # fmt: skip


ROWS: dict[str, Callable[[], Iterator[Case]]] = {
    row.__name__: row
    for row in (
        rms_norm,
        rope,
        qk_norm,
        swiglu,
        geglu,
        fp8_rows,
        linear_cross_entropy,
        nf4,
        int8,
        fp8,
        copy_rows,
        join_rows,
        lora_fill,
        lora_linear,
        lora_qkv,
        lora_mlp,
        adamw8bit,
        attention,
    )
}
