"""How near is each op to what the card can do? Against its reference, that compiled, and Liger's kernel.

    python -m benchmarks.ops [--only NAME ...] [--out FILE]

The floor of an op is its bytes over the measured speed of a copy, or its FLOPs over the measured speed of a bf16
product, whichever is longer. Times are medians of 20 launches, with the second-level cache flushed before each. An op
whose result is not that of its reference is not timed: the command ends with exit code 1.

Prints a table, and appends one line of JSON a row to `benchmarks/results/DATE-GPU-ops.jsonl`. The rows stand in
`benchmarks/op_rows.py`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import (
    append,
    command,
    copy_bytes_per_second,
    gpu_name,
    milliseconds,
    product_flops_per_second,
    results_file,
    versions,
)
from benchmarks.op_rows import ROWS, Case

TOLERANCE = 2e-2  # RMS of the difference over RMS of the reference, both in bf16; the tests of ops are far stricter


def launcher(function: Callable[..., Any], case: Case) -> Callable[[], Any]:
    """What a call of `function` is timed as: its forward, its backward, or both."""
    if case.direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*case.inputs)

        return forward
    leaves = [tensor.detach() for tensor in case.inputs]
    wanted = [*(leaves[place].requires_grad_() for place in case.wrt), *case.adapters]
    if case.direction == "backward":
        out = function(*leaves)
        return lambda: torch.autograd.grad(out, wanted, case.cotangent, retain_graph=True)
    return lambda: torch.autograd.grad(function(*leaves), wanted, case.cotangent)


def first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def wrong_by(case: Case) -> float:
    """Scale-free difference of our first result to the reference's."""
    assert case.reference is not None
    ours, reference = first(case.result()).double(), first(launcher(case.reference, case)()).double()
    return ((ours - reference).square().mean() / reference.square().mean()).sqrt().item()


def attempt(what: str, case: Case, function: Callable[..., Any] | None) -> float | None:
    """Milliseconds of a competitor; None where there is none, or where it cannot do this."""
    if function is None:
        return None
    try:
        return milliseconds(launcher(function, case))
    except Exception:  # whatever another library raises: said, and the other columns go on
        print(f"{case.op}: {what} failed\n{traceback.format_exc(limit=-2)}", file=sys.stderr)
        return None


def compiled(reference: Callable[..., Any] | None) -> Callable[..., Any] | None:
    return None if reference is None else torch.compile(reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-ops.jsonl")
    arguments = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # pyright: ignore[reportAttributeAccessIssue] # one graph, many backwards
    torch.manual_seed(0)
    file = arguments.out or results_file("ops")
    copied, multiplied = copy_bytes_per_second(), product_flops_per_second()
    print(f"{gpu_name()}: copy {copied / 1e12:.2f} TB/s, bf16 products {multiplied / 1e12:.0f} TFLOP/s")
    print(f"{'op':24} {'shape':28} {'ours':>8} {'reference':>9} {'compiled':>8} {'liger':>8} {'floor':>8} share")
    failed = False
    for name in arguments.only or ROWS:
        for case in ROWS[name]():
            off = wrong_by(case) if case.reference is not None else 0.0
            if not off <= TOLERANCE:
                print(f"{case.op} {case.shape}: {off:.2e} off its reference; not timed", file=sys.stderr)
                failed = True
                continue
            floor = max(case.bytes / copied, case.flops / multiplied) * 1e3
            ours = milliseconds(case.ours)
            times = {
                "ours_ms": ours,
                "reference_ms": attempt("reference", case, case.reference if case.times_reference else None),
                "compiled_ms": attempt("compiled", case, compiled(case.reference) if case.times_reference else None),
                "liger_ms": attempt("liger", case, case.liger),
                "floor_ms": floor,
            }
            shown = " ".join(f"{'-' if time is None else f'{time:.3f}':>8}" for time in times.values())
            print(f"{case.op:24} {case.shape:28} {shown} {floor / ours:.0%}", flush=True)
            row = {"op": case.op, "shape": case.shape, **times, "share_of_floor": floor / ours}
            measured = {"copy_tb_s": copied / 1e12, "product_tflop_s": multiplied / 1e12}
            append(file, row | measured | {"gpu": gpu_name(), "versions": versions(), "command": command()})
            del case
            gc.collect()
            torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
