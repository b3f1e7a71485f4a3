"""What do products over a base in e4m3 cost with all that belongs to them, against the bare products of the card?

    python -m benchmarks.fp8 [--tokens 4096] [--seconds 4] [--out FILE]

The linear layers of one Llama-3-8B layer, y and dX of each, on random data; q, k and v are one product, gate and up
another. Each line is repeated for --seconds, after half as long that is not counted: so the card's clocks are those of
work that goes on for hours, lower than in short launches.

    bare fp8            torch's scaled product with a scale a row, fast accumulation on
    bare fp8, exact     the same with it off
    bare bf16           torch's product of 16-bit weights
    bare adapters       torch's bf16 products (x·Aᵀ)·Bᵀ and (dy·B)·A of rank 256, which ours have in the same sum
    ours                the groups' products, with the codes transposed anew for each dX
    ours, adapters      the same with adapters of rank 256
    transposition       of the codes alone, as it is in both
    producers           the ops before the products: norms, SwiGLU, rope, copies
    producers, e4m3     the same, writing rows in e4m3 too

Quantisation is the difference of the last two. The bar's share is `bare fp8` over `ours` with quantisation; the other
one adds adapters on both sides. A group whose results are not those of its stored weight is not timed: the command ends
with exit code 1.

Prints milliseconds a layer, and appends one line of JSON each to `benchmarks/results/DATE-GPU-fp8.jsonl`, as soon as it
is known, with that of a step's 32 layers. What a step adds once, such as the head in 16 bit, is no product in e4m3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import append, command, gpu_name, results_file, sustained_milliseconds, versions
from steep.ops.copy_rows import copy_rows
from steep.ops.fp8 import Fp8Weight, quantise_reference, quantise_weight
from steep.ops.fp8_linear import Fp8Group, transpose
from steep.ops.lora import Lora, Projection
from steep.ops.rms_norm import rms_norm_backward, rms_norm_forward
from steep.ops.rope import rope_backward
from steep.ops.swiglu import gated_backward, gated_forward

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, RANK = 4096, 14336, 32, 8, 128, 256
LAYERS = 32
DEVICE, DTYPE = "cuda", torch.bfloat16
EPS = 1e-5
TOLERANCE = 5e-2  # RMS of the difference over that of fp32 products over the stored weight; rows in e4m3 make 2.7e-2
WIDTHS: dict[str, Callable[[], tuple[int, list[int]]]] = {
    "qkv": lambda: (HIDDEN, [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]),
    "o": lambda: (HEADS * HEAD_DIM, [HIDDEN]),
    "gate_up": lambda: (HIDDEN, [INTERMEDIATE, INTERMEDIATE]),
    "down": lambda: (INTERMEDIATE, [HIDDEN]),
}
"""In features, and the out features of each projection."""

Launch = Callable[[], object]


def random(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE).mul_(std)


def flops(tokens: int) -> float:
    """Of the base's products of a layer, y and dX."""
    return 4 * tokens * sum(inputs * sum(outputs) for inputs, outputs in (width() for width in WIDTHS.values()))


def bare_fp8(tokens: int, fast: bool) -> Launch:
    products = []
    for width in WIDTHS.values():
        inputs, outputs = width()[0], sum(width()[1])
        for depth, columns in ((inputs, outputs), (outputs, inputs)):
            products.append((quantise_weight(random(tokens, depth)), quantise_weight(random(columns, depth))))

    def launch() -> None:
        for rows, weight in products:
            torch._scaled_mm(
                rows.codes, weight.codes.t(), scale_a=rows.scale[:, None], scale_b=weight.scale[None], out_dtype=DTYPE,
                use_fast_accum=fast,
            )  # fmt: skip

    return launch


def bare_bf16(tokens: int) -> Launch:
    products = []
    for width in WIDTHS.values():
        inputs, outputs = width()[0], sum(width()[1])
        weight = random(outputs, inputs)
        products += [(random(tokens, inputs), weight.t()), (random(tokens, outputs), weight)]
    return lambda: [rows @ weight for rows, weight in products]


def bare_adapters(tokens: int) -> Launch:
    """What the adapters add to y and dX, of low rows that are there."""
    products = []
    for width in WIDTHS.values():
        inputs, outputs = width()
        products += [(random(tokens, RANK), random(RANK, own)) for own in outputs]
        products.append((random(tokens, RANK * len(outputs)), random(RANK * len(outputs), inputs)))
    return lambda: [low @ other for low, other in products]


@dataclass
class Ours:
    """A group of steep's, and its operands for both directions.

    Attributes:
        codes: of all its weights.
    """

    codes: torch.Tensor
    group: Any
    buffer: Any
    xe: torch.Tensor
    x: Any
    y: torch.Tensor
    dye: torch.Tensor
    dy: Any
    dx: torch.Tensor

    def launch(self) -> None:
        self.group.forward(self.xe, self.buffer, self.y, quantised=self.x)
        self.group.input_gradient(self.dye, self.buffer, out=self.dx, quantised=self.dy)

    def wrong_by(self) -> float:
        """The larger scale-free difference of y and dX to fp32 products, over the stored weight with its adapters."""
        self.launch()
        weights = []
        for projection in self.group.projections:
            weight = torch.empty(projection.weight.shape, dtype=torch.float32, device=DEVICE)
            projection.weight.write(weight)
            for adapter in projection.adapters:
                weight += adapter.scale * adapter.b.float() @ adapter.a.float()
            weights.append(weight)
        whole = torch.cat(weights)
        x, dy = self.xe[:, self.group.x_columns].float(), self.dye[:, : self.group.outputs].float()
        pairs = (self.y, x @ whole.t()), (self.dx, dy @ whole)
        return max(float((ours.float() - truth).norm() / truth.norm()) for ours, truth in pairs)


def ours(tokens: int, adapters: bool) -> dict[str, Ours]:
    """Each group with operands that are written already."""
    made = {}
    for name, width in WIDTHS.items():
        inputs, outputs = width()
        whole = quantise_weight(random(sum(outputs), inputs, std=0.02))  # one behind the other, as models have them
        parts = zip(whole.codes.split(outputs), whole.scale.split(outputs), strict=True)
        projections = []
        for own, (codes, scale) in zip(outputs, parts, strict=True):
            lora = Lora(random(RANK, inputs, std=0.02), random(own, RANK, std=0.02), 2.0)
            projections.append(Projection(Fp8Weight(codes, scale), None, (lora,) if adapters else ()))
        group = Fp8Group(projections, DTYPE)
        buffer = group.filled_buffer(torch.device(DEVICE))
        xe, dye = random(tokens, group.input_width), random(tokens, group.gradient_width)
        x, dy = (make(tokens, xe.device) for make in (group.quantised_input, group.quantised_gradient))
        for rows, quantised in ((xe[:, group.x_columns], x), (dye[:, : group.outputs], dy)):
            quantise_reference(rows, quantised)
        group.extend_input(xe, buffer)
        group.extend_gradient(dye, buffer)
        y, dx = random(tokens, sum(outputs)), random(tokens, inputs)
        made[name] = Ours(whole.codes, group, buffer, xe, x, y, dye, dy, dx)
    return made


def both_directions(groups: dict[str, Ours]) -> Launch:
    return lambda: [each.launch() for each in groups.values()]


def transposition(groups: dict[str, Ours]) -> Launch:
    codes = [each.codes for each in groups.values()]
    pairs = [(each, torch.empty(each.shape[::-1], dtype=each.dtype, device=DEVICE)) for each in codes]
    return lambda: [transpose(each, out) for each, out in pairs]


def producers(tokens: int, groups: dict[str, Ours], quantised: bool) -> Launch:
    """The ops whose results the products read, as a decoder layer runs them. What they write over is put back, with
    and without e4m3, so that the difference of the two is that of e4m3 alone."""

    def into(name: str, place: str) -> dict[str, Any]:
        return {"quantised": getattr(groups[name], place)} if quantised else {}

    hidden, weight = random(tokens, HIDDEN), random(HIDDEN)
    attended, out = random(tokens, HEADS * HEAD_DIM), random(tokens, HIDDEN)
    kept_gate_up, kept_dh = random(tokens, 2 * INTERMEDIATE), random(tokens, INTERMEDIATE)
    gate_up, dh, h = (torch.empty_like(each) for each in (kept_gate_up, kept_dh, kept_dh))
    dqkv = random(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angles = torch.rand(tokens, HEAD_DIM // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    copied, dy = torch.empty_like(attended), random(tokens, HIDDEN)
    d_out = torch.empty_like(dy)

    def launch() -> None:
        rms_norm_forward(hidden, weight, EPS, out=out, **into("qkv", "x"))
        copy_rows(attended, copied, **into("o", "x"))
        rms_norm_forward(hidden, weight, EPS, out=out, **into("gate_up", "x"))
        gate_up.copy_(kept_gate_up)
        dh.copy_(kept_dh)
        gated_forward(gate_up, INTERMEDIATE, "silu", out=h, **into("down", "x"))
        copy_rows(dy, d_out, **into("down", "dy"))
        gated_backward(dh, gate_up, INTERMEDIATE, "silu", **into("gate_up", "dy"))
        rms_norm_backward(dy, hidden, weight, EPS, add=dy, out=d_out, **into("o", "dy"))
        rope_backward(dqkv, cos, sin, HEADS, KV_HEADS, HEAD_DIM, **into("qkv", "dy"))

    return launch


def refuse_wrong(groups: dict[str, Ours]) -> None:
    """
    Raises:
        SystemExit: a group's results are not those of its weight.
    """
    for name, each in groups.items():
        if not (off := each.wrong_by()) <= TOLERANCE:
            raise SystemExit(f"{name}: {off:.2e} off fp32 products over its stored weight; nothing is timed")


def measure(tokens: int, seconds: float, keep: Callable[[str, float], None]) -> dict[str, float]:
    """Milliseconds of each line, which is kept as soon as it is known."""
    found = {}

    def time(what: str, launch: Launch) -> None:
        found[what] = sustained_milliseconds(launch, seconds)
        print(f"{what:18} {found[what]:8.3f} ms a layer", flush=True)
        keep(what, found[what])

    time("bare fp8", bare_fp8(tokens, fast=True))
    time("bare fp8, exact", bare_fp8(tokens, fast=False))
    time("bare bf16", bare_bf16(tokens))
    time("bare adapters", bare_adapters(tokens))
    for what, adapters in (("ours", False), ("ours, adapters", True)):
        groups = ours(tokens, adapters)
        refuse_wrong(groups)
        time(what, both_directions(groups))
    time("transposition", transposition(groups))
    time("producers", producers(tokens, groups, quantised=False))
    time("producers, e4m3", producers(tokens, groups, quantised=True))
    return found


def shares(times: dict[str, float]) -> dict[str, float]:
    """Of the bare products' time in that of ours with quantisation and transposition: the bar's, and with adapters."""
    quantisation = times["producers, e4m3"] - times["producers"]
    bare, adapters = times["bare fp8"], times["bare adapters"]
    return {
        "share": bare / (times["ours"] + quantisation),
        "share_with_adapters": (bare + adapters) / (times["ours, adapters"] + quantisation),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=4.0, help="that each line is repeated for")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-fp8.jsonl")
    arguments = parser.parse_args(sys.argv[1:] if words is None else words)
    if DEVICE == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        raise SystemExit("there is no GPU with fp8 units, and this times them.")
    torch.manual_seed(0)
    said = {"tokens": arguments.tokens, "seconds": arguments.seconds, "gpu": gpu_name(), "versions": versions()}
    said["command"] = command()
    file = arguments.out or results_file("fp8")

    def keep(what: str, ms: float) -> None:
        speed = flops(arguments.tokens) / ms / 1e9 if what.startswith(("bare fp8", "bare bf16", "ours")) else None
        append(file, {"what": what, "ms_a_layer": ms, "ms_a_step": ms * LAYERS, "tflop_s": speed, **said})

    found = shares(measure(arguments.tokens, arguments.seconds, keep))
    print(f"{found['share']:.1%} of the bare fp8 products' speed, {found['share_with_adapters']:.1%} with adapters")
    append(file, {"what": "share of the bare fp8 products", **found, **said})


if __name__ == "__main__":
    main()
