"""How near is each op to what the card can do? Against its reference, that compiled, and Liger's kernel.

    python -m benchmarks.ops [--only NAME ...] [--out FILE]

The floor of an op is its bytes over the measured speed of a copy, or its FLOPs over the measured speed of a bf16
product, whichever is longer. Times are medians of 20 launches, with the second-level cache flushed before each. An op
whose first result is not that of its reference is not timed: the command ends with exit code 1. All of its results,
gradients too, are what `pytest -m gpu tests/ops` is for. Liger's functions get what
Liger's users give them, and their results are held against the reference too.

Prints a table, and appends one line of JSON a row to `benchmarks/results/DATE-GPU-ops.jsonl`. The rows stand in
`benchmarks/op_rows.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from benchmarks.measuring import (
    append,
    command,
    copy_bytes_per_second,
    gpu_name,
    milliseconds,
    product_flops_per_second,
    putting_back,
    results_file,
    versions,
)
from benchmarks.op_rows import ROWS, Case, Rival, first

TOLERANCE = 2e-2  # RMS of the difference over RMS of the reference, both in bf16; the tests of ops are far stricter


def launcher(competitor: Rival, case: Case) -> Callable[[], Any]:
    """What a call of its function is timed as: its forward, its backward, or both."""
    function, inputs = competitor.function, competitor.inputs
    if case.direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [tensor.detach() for tensor in inputs]
    wanted = [*(leaves[place].requires_grad_() for place in competitor.wrt), *case.adapters]
    if case.direction == "backward":
        out = function(*leaves)
        return lambda: torch.autograd.grad(out, wanted, case.cotangent, retain_graph=True)
    return lambda: torch.autograd.grad(function(*leaves), wanted, case.cotangent)


def reference_of(case: Case) -> Rival:
    assert case.reference is not None
    return Rival(case.reference, case.inputs, case.wrt)


def wrong_by(case: Case, result: torch.Tensor) -> float:
    """Scale-free difference of a first result to the reference's."""
    ours, reference = result.double(), first(launcher(reference_of(case), case)()).double()
    return ((ours - reference).square().mean() / reference.square().mean()).sqrt().item()


def result_of(rival: Rival, case: Case) -> torch.Tensor:
    """Of copies, which it may write to."""
    fresh = dataclasses.replace(rival, inputs=tuple(tensor.clone() for tensor in rival.inputs))
    return rival.as_reference(launcher(fresh, case)())


def attempt(what: str, case: Case, competitor: Rival | None, *, check: bool = False) -> float | None:
    """Milliseconds of a competitor; None where there is none, where it cannot do this, or where what it gives is not
    what the reference gives.

    Args:
        check: compare that.
    """
    if competitor is None:
        return None
    try:
        off = wrong_by(case, result_of(competitor, case)) if check else 0.0
        if off <= TOLERANCE:
            # Liger's functions write over what they get
            return milliseconds(launcher(competitor, case), putting_back(*competitor.inputs))
        print(f"{case.op}: {what} is {off:.2e} off the reference; not timed", file=sys.stderr)
    except Exception:  # whatever another library raises: said, and the other columns go on
        print(f"{case.op}: {what} failed\n{traceback.format_exc(limit=-2)}", file=sys.stderr)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="OP", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-ops.jsonl")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU, and ops are timed on one.")
    torch._functorch.config.donated_buffer = False  # pyright: ignore[reportAttributeAccessIssue] # one graph, many backwards
    torch.manual_seed(0)
    file = arguments.out or results_file("ops")
    copied, multiplied = copy_bytes_per_second(), product_flops_per_second()
    print(f"{gpu_name()}: copy {copied / 1e12:.2f} TB/s, bf16 products {multiplied / 1e12:.0f} TFLOP/s")
    print(f"{'op':24} {'shape':28} {'ours':>8} {'reference':>9} {'compiled':>8} {'liger':>8} {'floor':>8} share")
    failed = False
    for name in arguments.only or ROWS:
        for case in ROWS[name]():
            off = wrong_by(case, first(case.result())) if case.reference is not None else 0.0
            if not off <= TOLERANCE:
                print(f"{case.op} {case.shape}: {off:.2e} off its reference; not timed", file=sys.stderr)
                failed = True
                continue
            floor = max(case.bytes / copied, case.flops / multiplied) * 1e3
            ours = milliseconds(case.ours, case.before)
            plain = reference_of(case) if case.reference is not None and case.times_reference else None
            compiled = plain and dataclasses.replace(plain, function=torch.compile(plain.function))
            times = {
                "ours_ms": ours,
                "reference_ms": attempt("reference", case, plain),
                "compiled_ms": attempt("compiled", case, compiled),
                "liger_ms": attempt("liger", case, case.liger, check=True),
                "floor_ms": floor,
            }
            note = f"; liger {case.liger.note}" if case.liger and case.liger.note else ""
            shown = " ".join(f"{'-' if time is None else f'{time:.3f}':>8}" for time in times.values())
            print(f"{case.op:24} {case.shape:28} {shown} {floor / ours:.0%}{note}", flush=True)
            row = {"op": case.op, "shape": case.shape, **times, "share_of_floor": floor / ours}
            row["liger_note"] = case.liger.note if case.liger else ""
            measured = {"copy_tb_s": copied / 1e12, "product_tflop_s": multiplied / 1e12}
            append(file, row | measured | {"gpu": gpu_name(), "versions": versions(), "command": command()})
            del case
            gc.collect()
            torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
