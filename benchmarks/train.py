"""A training step of steep and of its peers, side by side: time, memory, and the loss, which has to be the same.

    python -m benchmarks.train --peers steep,hf,hf-lean,hf-liger,unsloth --shape llama-3-8b --batch 2 --seq 2048
                               [--cap-gib X] [--packed] [--steps 12] [--r 256] [--out FILE] [--steep-args "..."]

QLoRA over NF4 with double quantisation: rank 256 on all linear layers, embed_tokens and lm_head trained, 8-bit AdamW,
clipping at 1. Each peer runs in a process of its own and loads the same random weights, which are made on the GPU once
(--weights). Each step has fresh random tokens, a row is one document, and with --packed some of 128 to 1,024 tokens.

A time is the median of the steps after the third. MFU is the FLOPs that the step has to do, none twice, over the
measured speed of a bf16 product. `steep` is `steep train`, with everything that it does; `steep-bare` its model and
optimizer in the loop of the others: the losses of all bare loops are compared.

Appends one line of JSON a peer to `benchmarks/results/DATE-GPU-train.jsonl`, and prints them as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import append, command, gpu_name, product_flops_per_second, results_file, versions
from benchmarks.peers import PEERS, Work, bare_loop
from benchmarks.shapes import SHAPES, config_of, flops_a_step, write
from benchmarks.steep_run import steep_train

WARM_UP = 3
GIB = 2**30
BARE_AGREE = 0.02  # nats between first losses on the same weights and tokens: bf16's noise is a tenth of it


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="steep,steep-bare,hf", help=f"of steep, {', '.join(PEERS)}")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help=f"of these, {WARM_UP} are not timed")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--cap-gib", type=float, help="no more of the GPU's memory can be had")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--weights", type=Path, help="folder for the weights; default: in the system's temporary one")
    parser.add_argument("--steep-args", default="", help="further words for `steep train`")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-train.jsonl")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.weights = arguments.weights or Path(tempfile.gettempdir()) / "steep-benchmarks"
    return arguments


def work_of(arguments: argparse.Namespace) -> Work:
    folder = arguments.weights / f"{arguments.shape}-{arguments.device}"
    return Work(
        str(folder), arguments.batch, arguments.seq, arguments.r, arguments.steps, arguments.packed, arguments.device
    )


def measure(arguments: argparse.Namespace, peer: str) -> dict[str, Any]:
    """In the peer's own process."""
    begun, work = float(os.environ["BENCHMARK_BEGUN"]), work_of(arguments)
    if arguments.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.cap_gib * GIB / total)
    if peer == "steep":
        vocab_size = config_of(arguments.shape).vocab_size
        with tempfile.TemporaryDirectory() as temporary:
            words = shlex.split(arguments.steep_args)
            result = steep_train(work, vocab_size, Path(temporary), begun, words)
    else:
        result = bare_loop(PEERS[peer](work), work, begun)
    on_gpu = arguments.device == "cuda"
    result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB if on_gpu else None
    return result | {"versions": versions()}


def run(arguments: argparse.Namespace, peer: str, words: list[str]) -> dict[str, Any] | str:
    """What the peer's process measured, or the last line of its error."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "result.json"
        environment = {**os.environ, "BENCHMARK_BEGUN": str(time.time()), "UNSLOTH_DISABLE_STATISTICS": "1"}
        process = [sys.executable, "-m", "benchmarks.train", *words, "--worker", peer, str(file)]
        done = subprocess.run(process, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode or not file.exists():
            print(done.stderr[-8000:], file=sys.stderr)
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return json.loads(file.read_text())


def row_of(arguments: argparse.Namespace, peer: str, result: dict[str, Any], ceiling: float | None) -> dict[str, Any]:
    timed = result["seconds"][WARM_UP:]
    step = statistics.median(timed)
    flops = flops_a_step(arguments.shape, arguments.batch, arguments.seq, arguments.r)
    return {
        "peer": peer,
        "shape": arguments.shape,
        "batch": arguments.batch,
        "seq": arguments.seq,
        "r": arguments.r,
        "packed": arguments.packed,
        "cap_gib": arguments.cap_gib,
        "step_s": step,
        "step_s_min": min(timed),
        "step_s_max": max(timed),
        "steps_timed": len(timed),
        "tokens_per_second": arguments.batch * arguments.seq / step,
        "mfu": flops / step / ceiling if ceiling else None,
        "peak_allocated_gib": result["peak_allocated_gib"],
        "peak_reserved_gib": result["peak_reserved_gib"],
        "first_step_s": result["first_step_s"],
        "loss_first": result["losses"][0],
        "loss_last": result["losses"][-1],
        "gpu": gpu_name() if arguments.device == "cuda" else "none",
        "versions": result["versions"],
        "command": command(),
    }


def shown(row: dict[str, Any]) -> str:
    def number(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    return (
        f"{row['peer']:11} {row['step_s']:8.4f} s ({row['step_s_min']:.4f}-{row['step_s_max']:.4f}) "
        f"{row['tokens_per_second']:8.0f} tokens/s, MFU {number('mfu', '.1%')}, peak "
        f"{number('peak_allocated_gib', '.2f')} allocated {number('peak_reserved_gib', '.2f')} reserved GiB, "
        f"first step after {row['first_step_s']:.1f} s, loss {row['loss_first']:.4f} to {row['loss_last']:.4f}"
    )


def disagreement(rows: list[dict[str, Any]]) -> float:
    """The largest difference of first losses between bare loops: the same weights, tokens and untrained adapters."""
    first = [row["loss_first"] for row in rows if row["peer"] != "steep"]
    return max(first) - min(first) if first else 0.0


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    if arguments.worker:
        peer, file = arguments.worker
        Path(file).write_text(json.dumps(measure(arguments, peer)))
        return
    peers = arguments.peers.split(",")
    if unknown := [peer for peer in peers if peer != "steep" and peer not in PEERS]:
        raise SystemExit(f"no such peer: {', '.join(unknown)}. There are steep, {', '.join(PEERS)}.")
    if arguments.steps <= WARM_UP:
        raise SystemExit(f"--steps: the first {WARM_UP} are not timed; give more.")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start = time.perf_counter()
    write(arguments.shape, Path(work_of(arguments).folder), arguments.device)
    print(f"weights in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    ceiling = product_flops_per_second() if arguments.device == "cuda" else None
    if arguments.device == "cuda":
        torch.cuda.empty_cache()  # the peers' processes need the memory
    call = datetime.now(UTC).isoformat(timespec="seconds")
    rows, failed = [], []
    for peer in peers:
        result = run(arguments, peer, words)
        if isinstance(result, str):
            failed.append(peer)
            print(f"{peer:11} failed: {result}", flush=True)
            continue
        rows.append({"call": call, **row_of(arguments, peer, result, ceiling)})
        print(shown(rows[-1]), flush=True)
        append(arguments.out or results_file("train"), rows[-1])
    off = disagreement(rows)
    print(f"first losses of bare loops differ by {off:.4f} nats, {BARE_AGREE} allowed")
    for row in rows[1:]:
        print(f"{rows[0]['peer']} against {row['peer']}: {row['step_s'] / rows[0]['step_s']:.2f} x as fast")
    sys.exit(1 if failed or off > BARE_AGREE else 0)


if __name__ == "__main__":
    main()
