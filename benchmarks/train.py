"""A training step of steep and of its peers, side by side: time, memory, and the loss, which has to be the same.

    python -m benchmarks.train --peers steep,hf,hf-lean,hf-liger,unsloth --shape llama-3-8b --batch 2 --seq 2048
                               [--cap-gib X [--card-gib Y]] [--packed] [--steps 12] [--r 256] [--out FILE]
                               [--steep-args "..."]

QLoRA over NF4 with double quantisation: rank 256 on all linear layers, embed_tokens and lm_head trained, 8-bit AdamW,
clipping at 1. Each peer runs in a process of its own and loads the same random weights, which are made on the GPU once
(--weights). Each step has fresh random tokens, a row is one document, and with --packed some of 128 to 1,024 tokens.

A time is the median of the steps after the third, each of which stands in `seconds` of a row. MFU is the FLOPs that
the step has to do, none twice, over the measured speed of a bf16 product; packed rows have none, since the work of
attention differs from step to step. `steep` is `steep train`, with everything that it does; `steep-fp8` the same over
a base in e4m3 (`model.base: fp8`, not QLoRA); `-lean` behind either: without clipping, updated inside the backward
pass, the optimizer's states in host memory; `steep-bare` its model and optimizer in the loop of the others,
`steep-script` that of `hf` after `steep.install(model)`. --cap-gib holds the first three to so much allocated memory,
and to a ninth more with the gaps between allocations, and nobody else; `--cap-gib hf` to the peak of the fastest of
hf, hf-flash and hf-varlen, which the call then begins with. Without --peers these are all timed on packed rows,
hf-flash where the package flash-attn is installed.

The losses of all bare loops have to agree, the first and the last, and steep's first one with theirs as far as its
other tokens let it; over e4m3 its base has other weights too, and the first loss may differ as much as that of another
model. On a GPU steep has to compute fused, unless --steep-args has `--model.fused off`.

--profile says where the time of `steep` and `steep-fp8` goes: of the last steps, milliseconds by class of kernel, the
share in which no kernel runs, and how much of copies to and from the host is hidden behind kernels
(`benchmarks/profiling.py`).

Appends one line of JSON a peer to `benchmarks/results/DATE-GPU-train.jsonl`, one that failed with its reason, and
prints them as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import append, command, gpu_name, product_flops_per_second, results_file, versions
from benchmarks.peers import PEERS, Peer, Work, bare_loop, flash_of_the_hub, flash_package
from benchmarks.shapes import SHAPES, config_of, flops_a_step, folder_of, write
from benchmarks.steep_run import RUNS, chosen, steep_bare, steep_script, steep_train
from steep.allocator import let_segments_grow
from steep.planning.vram import SHARE

WARM_UP = 3  # steps
GIB = 2**30
STEEP = (*RUNS, "steep-bare", "steep-script")
LIBRARY = ("hf", "hf-flash", "hf-varlen")
BARE: dict[str, Callable[[Work], Peer]] = {"steep-bare": steep_bare, "steep-script": steep_script, **PEERS}
LOSSY = ("hf-lean",)  # bf16 weights that are rounded to the nearest stay where they are, for many an update
# Nats between losses on the same weights and tokens. That a loop computes something is seen by it, not that it computes
# the right thing: random weights give nearly the same loss by any layers. Tests hold that (tests/model/test_fused*.py).
FIRST_AGREE = 0.005  # 0.003 was seen
LAST_AGREE = 0.02  # after a few steps of 8-bit AdamW; 0.01 was seen
SPREAD = 6.5  # five standard deviations of a token's loss, which is 1.3 nats for a head of std 0.02 over 4,096 values
# Over other weights the logit of a random token is another draw, were it on the same tokens: as two independent means.
OTHER_BASE = SPREAD * 2**0.5


NEEDS = {"unsloth": "unsloth", "hf-liger": "liger_kernel", "hf-flash": "flash_attn"}  # they are no part of steep's


def gib(word: str) -> float:
    return positive(float, word)


def cap(word: str) -> float | str:
    return word if word == "hf" else gib(word)


def positive(kind: type, word: str) -> Any:
    number = kind(word)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{word} is not above 0")
    return number


def count(word: str) -> int:
    return positive(int, word)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers",
        help=f"of {', '.join([*RUNS, *BARE])}; default: steep,steep-bare,hf, packed all ways of hf that are there",
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batch", type=count, default=2)
    parser.add_argument("--seq", type=count, default=2048)
    parser.add_argument("--r", type=count, default=256)
    parser.add_argument("--steps", type=count, default=12, help="of these, those of --warm-up are not timed")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="the first steps; fewer where each takes long")
    parser.add_argument(
        "--stored", choices=["bf16", "nf4"], default="bf16", help="what the weights are written in; nf4: a 70B in 40 GB"
    )
    parser.add_argument("--packed", action="store_true")
    parser.add_argument(
        "--profile",
        type=count,
        default=0,
        metavar="STEPS",
        help="of `steep train`, the last so many steps are not timed but profiled: time by class of kernel, and idle",
    )
    parser.add_argument(
        "--cap-gib", type=cap, help="what steep may allocate of the GPU's memory; hf: as much as hf did"
    )
    parser.add_argument(
        "--card-gib", type=gib, help="what torch may reserve for it, as on a card of so much; default: a ninth more"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--weights", type=Path, help="folder for the weights; default: in the system's temporary one")
    parser.add_argument(
        "--steep-args", default="", help="further words for `steep train`, both: --steep-args='--model.fused off'"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-train.jsonl")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.cap_of = "hf" if arguments.cap_gib == "hf" else None
    arguments.weights = arguments.weights or Path(tempfile.gettempdir()) / "steep-benchmarks"
    return arguments


def usual_peers(arguments: argparse.Namespace) -> list[str]:
    """Those that are timed where none are named; says which one is missing."""
    peers = ["steep", "steep-bare", "hf"]
    if arguments.packed and arguments.device == "cuda":
        if flash_package():
            peers.append("hf-flash")
        else:
            print("hf-flash is left out: the package flash-attn is not installed")
        peers.append("hf-varlen")
    return peers


def is_there(peer: str) -> bool:
    """Whether what the peer needs is installed."""
    if peer == "hf-flash":
        return bool(flash_package() or flash_of_the_hub())
    return peer not in NEEDS or find_spec(NEEDS[peer]) is not None


def refuse(arguments: argparse.Namespace, peers: list[str]) -> None:
    """What cannot be measured, before anything is.

    Raises:
        SystemExit: with what to do instead.
    """
    if unknown := [peer for peer in peers if peer not in RUNS and peer not in BARE]:
        raise SystemExit(f"no such peer: {', '.join(unknown)}. There are {', '.join([*RUNS, *BARE])}.")
    warm_up = arguments.warm_up
    if warm_up < 1:
        raise SystemExit("--warm-up: the first step has no beginning to be timed from; give 1 or more.")
    if arguments.stored == "nf4" and (others := [peer for peer in peers if "fp8" in peer]):
        raise SystemExit(f"--stored nf4 is a base in 4 bits already: leave {', '.join(others)} out of --peers.")
    if arguments.steps - arguments.profile <= warm_up:
        of_profile = f", nor the {arguments.profile} of the profile" if arguments.profile else ""
        raise SystemExit(f"--steps: the first {warm_up} are not timed{of_profile}; give more.")
    if arguments.profile and arguments.device == "cpu":
        raise SystemExit("--profile is of a GPU's kernels: leave it out.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU. To try the command on a CPU: --device cpu --shape tiny --r 8.")
    if absent := [f"{peer} ({NEEDS[peer]})" for peer in peers if not is_there(peer)]:
        raise SystemExit(f"not installed: {', '.join(absent)}. Install it, or leave it out of --peers.")
    if arguments.cap_gib and "steep-script" in peers:
        raise SystemExit("steep-script plans for the whole card: leave out --cap-gib, or steep-script of --peers.")
    if arguments.card_gib and not (isinstance(arguments.cap_gib, float) and arguments.cap_gib <= arguments.card_gib):
        raise SystemExit("--card-gib: give what may be allocated of it, too: --cap-gib, a number that is no larger.")
    if arguments.cap_gib == "hf":
        if not set(LIBRARY) & set(peers):
            raise SystemExit(f"--cap-gib hf: one of {', '.join(LIBRARY)} has to be among the peers.")
    elif arguments.cap_gib and arguments.device == "cuda" and arguments.cap_gib * GIB > (total := gpu_bytes()):
        raise SystemExit(f"--cap-gib: the GPU has {total / GIB:.1f} GiB; give less.")


def gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def work_of(arguments: argparse.Namespace) -> Work:
    in_nf4 = arguments.stored == "nf4"
    folder = folder_of(arguments.weights, arguments.shape, arguments.device, in_nf4=in_nf4)
    return Work(
        str(folder), arguments.batch, arguments.seq, arguments.r, arguments.steps, arguments.packed, arguments.device,
        None if arguments.cap_gib == "hf" else arguments.cap_gib,
    )  # fmt: skip


def measure(arguments: argparse.Namespace, peer: str) -> dict[str, Any]:
    """In the peer's own process.

    Raises:
        RuntimeError: steep was not fused on a GPU, and not asked to be so; or it took more memory than it was held to.
    """
    begun, work = float(os.environ["BENCHMARK_BEGUN"]), work_of(arguments)
    on_gpu = arguments.device == "cuda"
    capped = work.cap_gib if peer in STEEP and on_gpu else None
    if capped:
        reserved = arguments.card_gib or capped / SHARE
        torch.cuda.set_per_process_memory_fraction(min(1.0, reserved * GIB / gpu_bytes()))
    if peer in RUNS:
        vocab_size = config_of(arguments.shape).vocab_size
        with tempfile.TemporaryDirectory() as temporary:
            words = [*RUNS[peer], *shlex.split(arguments.steep_args)]
            result = steep_train(work, vocab_size, Path(temporary), begun, words, arguments.profile)
    else:
        made = BARE[peer](work)
        result = bare_loop(made, work, begun)
        if peer in STEEP:
            result["chosen"] = chosen(made.model, work.steps)
    refuse_unfused(arguments, peer, result)
    result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB if on_gpu else None
    refuse_over(capped, result["peak_allocated_gib"])
    return result | {"versions": versions()}


def refuse_over(capped: float | None, peak: float | None) -> None:
    """
    Args:
        capped, peak: GiB that may be allocated, and that were.

    Raises:
        RuntimeError: more than may be.
    """
    if capped and peak and peak > capped:
        raise RuntimeError(f"its peak was {peak:.2f} GiB, above the {capped:.2f} that it was held to")


def refuse_unfused(arguments: argparse.Namespace, peer: str, result: dict[str, Any]) -> None:
    """A slower step than the one that is meant is no result."""
    if peer not in STEEP or arguments.device == "cpu" or result["chosen"]["fused"]:
        return
    if peer in RUNS and re.search(r"--model\.fused[ =]off\b", arguments.steep_args):
        return
    raise RuntimeError("its step was not fused: see what it said above")


def run(arguments: argparse.Namespace, peer: str, words: list[str]) -> dict[str, Any] | str:
    """What the peer's process measured, or the last line of its error."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "result.json"
        environment = {**os.environ, "BENCHMARK_BEGUN": str(time.time()), "UNSLOTH_DISABLE_STATISTICS": "1"}
        if peer in RUNS:
            let_segments_grow(environment)  # as the command does, whose process would not have imported torch yet
        process = [sys.executable, "-m", "benchmarks.train", *words, "--worker", peer, str(file)]
        done = subprocess.run(process, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode or not file.exists():
            print(done.stderr[-8000:], file=sys.stderr)
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return json.loads(file.read_text())


def work_row(arguments: argparse.Namespace, peer: str) -> dict[str, Any]:
    """What a row says of its work."""
    return {
        "peer": peer,
        "shape": arguments.shape,
        "batch": arguments.batch,
        "seq": arguments.seq,
        "r": arguments.r,
        "packed": arguments.packed,
        "cap_gib": arguments.cap_gib if peer in STEEP else None,
        "cap_of": arguments.cap_of if peer in STEEP else None,
        "card_gib": arguments.card_gib if peer in STEEP else None,
        "steep_args": arguments.steep_args if peer in RUNS else "",
        "stored": arguments.stored,
        "gpu": gpu_name() if arguments.device == "cuda" else "none",
        "command": command(),
    }


def row_of(arguments: argparse.Namespace, peer: str, result: dict[str, Any], ceiling: float | None) -> dict[str, Any]:
    timed = result["seconds"][arguments.warm_up :]
    step = statistics.median(timed)
    flops = flops_a_step(arguments.shape, arguments.batch, arguments.seq, arguments.r)
    return {
        **work_row(arguments, peer),
        "step_s": step,
        "seconds": timed,
        "step_s_min": min(timed),
        "step_s_max": max(timed),
        "steps_timed": len(timed),
        "tokens_per_second": arguments.batch * arguments.seq / step,
        "mfu": flops / step / ceiling if ceiling and not arguments.packed else None,
        "peak_allocated_gib": result["peak_allocated_gib"],
        "peak_reserved_gib": result["peak_reserved_gib"],
        "first_step_s": result["first_step_s"],
        "loss_first": result["losses"][0],
        "loss_last": result["losses"][-1],
        **result.get("chosen", {}),
        **({"profile": result["profile"]} if "profile" in result else {}),
        "versions": result["versions"],
    }


def shown(row: dict[str, Any]) -> str:
    def number(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    return (
        f"{row['peer']:11} {row['step_s']:8.4f} s ({row['step_s_min']:.4f}-{row['step_s_max']:.4f}) "
        f"{row['tokens_per_second']:8.0f} tokens/s, MFU {number('mfu', '.1%')}, peak "
        f"{number('peak_allocated_gib', '.2f')} allocated {number('peak_reserved_gib', '.2f')} reserved GiB, "
        f"first step after {row['first_step_s']:.1f} s, loss {row['loss_first']:.4f} to {row['loss_last']:.4f}"
        f"{'' if row.get('fused', True) else ', not fused'}{_shown_profile(row.get('profile'))}"
    )


def _shown_profile(profile: dict[str, Any] | None) -> str:
    if profile is None:
        return ""
    step, hidden = profile["step_ms"], profile["hidden_share"]
    lines = [f"  profile: {step:.1f} ms a step, no kernel in {profile['idle_ms'] / step:.1%} of it"]
    if hidden is not None:
        lines.append(f"  copies to and from the host: {hidden:.0%} of their time is hidden behind kernels")
    lines += [f"  {taken:8.2f} ms  {kind}" for kind, taken in profile["by_class_ms"].items()]
    return "\n" + "\n".join(lines)


def disagreements(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Of which losses, by how much they differ, and by how much they may.

    Bare loops have the same weights and tokens. steep has other tokens from the same lot, and another schedule: its
    first loss is a mean of others over as many tokens. Over e4m3 it is held against theirs, and against steep's.
    """
    bare = [row for row in rows if row["peer"] not in RUNS]
    first = [row["loss_first"] for row in bare]
    last = [row["loss_last"] for row in bare if row["peer"] not in LOSSY]
    found = []
    if len(first) > 1:
        found.append(("first losses of bare loops", max(first) - min(first), FIRST_AGREE))
    if len(last) > 1:
        found.append(("last losses of bare loops", max(last) - min(last), LAST_AGREE))
    runs = {row["peer"]: row["loss_first"] for row in rows if row["peer"] in RUNS}
    root = (rows[0]["batch"] * rows[0]["seq"]) ** 0.5 if rows else 1.0
    for peer, loss in runs.items():
        if first:
            allowed = (OTHER_BASE if "fp8" in peer else SPREAD) / root
            found.append((f"{peer}'s first loss and theirs", abs(loss - statistics.mean(first)), allowed))
        if peer != "steep" and "steep" in runs:
            found.append((f"{peer}'s first loss and steep's", abs(loss - runs["steep"]), OTHER_BASE / root))
    return found


def fastest(rows: list[dict[str, Any]], peers: Sequence[str]) -> dict[str, Any] | None:
    """The fastest row of `peers`."""
    return min((row for row in rows if row["peer"] in peers), key=lambda row: row["step_s"], default=None)


def conclude(rows: list[dict[str, Any]]) -> bool:
    """Print what the rows say of each other; whether their losses agree."""
    compared = disagreements(rows)
    for what, difference, allowed in compared:
        print(f"{what} differ by {difference:.4f} nats, {allowed:.4f} allowed")
    if not compared:
        print("no losses are compared: that takes two peers, and a bare loop among them")
    for steep in (row for row in rows if row["peer"] in STEEP):
        for row in rows:
            if row["peer"] not in STEEP:
                print(f"{steep['peer']} against {row['peer']}: {row['step_s'] / steep['step_s']:.2f} x as fast")
        library = fastest(rows, LIBRARY)
        if library is not None:
            ratio = library["step_s"] / steep["step_s"]
            print(f"{steep['peer']} against the fastest of {', '.join(LIBRARY)}: {ratio:.2f} x as fast")
    steps = {row["peer"]: row["step_s"] for row in rows if row["peer"] in RUNS}
    for peer in steps:
        if peer != "steep" and "steep" in steps:
            print(f"{peer} against steep: {steps['steep'] / steps[peer]:.2f} x as fast")
    return all(difference <= allowed for _, difference, allowed in compared)


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    if arguments.worker:
        peer, file = arguments.worker
        Path(file).write_text(json.dumps(measure(arguments, peer)))
        return
    peers = arguments.peers.split(",") if arguments.peers else usual_peers(arguments)
    refuse(arguments, peers)
    out = arguments.out or results_file("train")
    for name, folder in (("--out", out.parent), ("--weights", arguments.weights)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{name}: {folder} cannot be made: {error.strerror}.") from error
    if out.is_dir():
        raise SystemExit(f"--out: {out} is a folder; give a file.")
    if arguments.cap_gib == "hf":
        peers.sort(key=lambda peer: peer not in LIBRARY)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start = time.perf_counter()
    write(arguments.shape, Path(work_of(arguments).folder), arguments.device, in_nf4=arguments.stored == "nf4")
    print(f"weights in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    ceiling = product_flops_per_second() if arguments.device == "cuda" else None
    if arguments.device == "cuda":
        torch.cuda.empty_cache()  # the peers' processes need the memory
    call = datetime.now(UTC).isoformat(timespec="seconds")
    rows, failed = [], []
    for peer in peers:
        if peer in STEEP and arguments.cap_gib == "hf":
            library = fastest(rows, LIBRARY)
            if library is None:
                raise SystemExit(f"--cap-gib hf: none of {', '.join(LIBRARY)} ran, so there is no peak.")
            arguments.cap_gib = library["peak_allocated_gib"]
        given = [*words, "--cap-gib", str(arguments.cap_gib)] if arguments.cap_gib else words
        result = run(arguments, peer, given)
        if isinstance(result, str):
            failed.append(peer)
            print(f"{peer:11} failed: {result}", flush=True)
            append(out, {"call": call, **work_row(arguments, peer), "failed": result})
            continue
        rows.append({"call": call, **row_of(arguments, peer, result, ceiling)})
        print(shown(rows[-1]), flush=True)
        append(out, rows[-1])
    agree = conclude(rows)
    sys.exit(1 if failed or not agree else 0)


if __name__ == "__main__":
    main()
