"""Which tiles the fp8 product should take on a card: each candidate's time beside torch's own product.

    python -m benchmarks.fp8_tiles [--tokens 4096] [--rank 256] [--shapes 4096x6144 14336x4096 ...] [--backward]
                                   [--out FILE]

A shape is K x N. Prints what each measurement gave, and appends one line of JSON each to
`benchmarks/results/DATE-GPU-fp8-tiles.jsonl`, as soon as it is known: `torch` without and with fast accumulation (the
bare product, row scales), `write` and `transpose` of such a weight, and each tile with the adapters of `--rank` in
its sum, with sums that are split and with sums that stay in the card's short accumulator (`splits`). All tiles are
tried on the first shape, and on the others the BEST of them. The clock falls under load, so compare within one call;
`of_torch` is the share of the bare product's speed without fast accumulation, the adapter's own work counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.measuring import append, command, gpu_name, milliseconds, results_file, versions
from steep.kernels import fp8_linear, fp8_weight
from steep.kernels.fp8_linear import Tile
from steep.ops.fp8 import empty_fp8_rows, quantise_reference, quantise_weight
from steep.ops.fp8_product import LowPart, fp8_product_reference

SHAPES = ["4096x6144", "4096x4096", "4096x28672", "14336x4096", "6144x4096", "28672x4096"]
TOLERANCE = 5e-3
BEST = 6
DEVICE = "cuda"


class Keep(Protocol):
    """Takes the figures of a measurement."""

    def __call__(self, **figures: object) -> None: ...


def candidates() -> Iterator[Tile]:
    for half, columns, depth in itertools.product((64, 128), (64, 128, 256), (128, 256)):
        for warps, stages, splits in itertools.product((4, 8), (2, 3, 4), (True, False)):
            a_thread = 2 * half * columns // (32 * warps)
            fits = (2 * half + columns) * depth * stages <= 227 * 1024
            if fits and a_thread == 128:  # fewer were slower, more do not fit
                yield Tile(half, columns, depth, 64, warps, stages, splits)


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


def measure(
    tokens: int, depth: int, outputs: int, rank: int, tiles: Iterable[Tile], keep: Keep, *, backward: bool
) -> dict[Tile, float]:
    """Milliseconds of each tile that is right.

    Args:
        keep: called with what is known, as soon as it is.
        backward: b with contiguous columns, and no scale of the weight.
    """
    x, weight = torch.randn(tokens, depth, device=DEVICE), torch.randn(outputs, depth, device=DEVICE)
    rows, stored = empty_fp8_rows(tokens, depth, x.device, pieces=False), quantise_weight(weight)
    quantise_reference(x, rows)
    low = torch.randn(tokens, rank, dtype=torch.bfloat16, device=DEVICE)
    b = torch.randn((rank, outputs) if backward else (outputs, rank), dtype=torch.bfloat16, device=DEVICE)
    b = b.t() if backward else b
    scale = None if backward else stored.scale
    out = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=DEVICE)
    parts = [LowPart(0, outputs, 0, rank)]
    truth = fp8_product_reference(rows, stored.codes, scale, low=low, b=b, parts=parts, bias=None, add=None)
    what = {"shape": f"{tokens} x {depth} -> {outputs}", "rank": rank, "backward": backward}
    bare = 2 * tokens * depth * outputs

    def bare_product(fast: bool) -> torch.Tensor:
        column_scale = torch.ones(1, outputs, device=DEVICE) if scale is None else scale[None]
        return torch._scaled_mm(
            rows.codes, stored.codes.t(), rows.scale[:, None], column_scale, out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )  # fmt: skip

    times = {fast: milliseconds(lambda fast=fast: bare_product(fast)) for fast in (False, True)}
    for fast, taken in times.items():
        keep(**what, name="torch", fast_accumulation=fast, ms=taken, tflops=bare / taken / 1e9)
    dense = torch.empty(outputs, depth, dtype=torch.bfloat16, device=DEVICE)
    turned = torch.empty(depth, outputs, dtype=stored.codes.dtype, device=DEVICE)
    keep(**what, name="write", ms=milliseconds(lambda: fp8_weight.write(stored.codes, stored.scale, dense)))
    keep(**what, name="transpose", ms=milliseconds(lambda: fp8_weight.transpose(stored.codes, turned)))

    with_adapters, found = bare + 2 * tokens * rank * outputs, dict[Tile, float]()
    for tile in tiles:

        def product(tile: Tile = tile) -> None:
            fp8_linear.product(rows.codes, rows.scale, stored.codes, scale, out, low, b, parts, None, None, tile=tile)

        try:
            product()
            wrong = error(out, truth)
            taken = milliseconds(product)
        except Exception as reason:  # a tile that does not fit on this card is an answer, too
            keep(**what, name="tile", **tile._asdict(), error=f"{type(reason).__name__}: {reason}"[:200])
            continue
        keep(
            **what, name="tile", **tile._asdict(), ms=taken, tflops=with_adapters / taken / 1e9,
            of_torch=times[False] / taken * with_adapters / bare, wrong=wrong, right=wrong < TOLERANCE,
        )  # fmt: skip
        if wrong < TOLERANCE:
            found[tile] = taken
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-fp8-tiles.jsonl")
    given = parser.parse_args(sys.argv[1:] if words is None else words)
    if DEVICE == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        raise SystemExit("there is no GPU with fp8 units, and this times them.")
    torch.manual_seed(0)
    said = {"gpu": gpu_name(), "versions": versions(), "command": command()}
    file = given.out or results_file("fp8-tiles")

    def keep(**figures: object) -> None:
        print(json.dumps(figures), flush=True)
        append(file, {**figures, **said})

    tiles = list(candidates())
    for number, shape in enumerate(given.shapes):
        depth, outputs = map(int, shape.split("x"))
        times = measure(given.tokens, depth, outputs, given.rank, tiles, keep, backward=given.backward)
        if number == 0:
            tiles = sorted(times, key=times.__getitem__)[:BEST]


if __name__ == "__main__":
    main()
