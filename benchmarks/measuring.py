"""How the benchmarks measure: the card's own ceilings, the time of a launch, and what is written beside a figure."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LAUNCHES = 20
_PACKAGES = (
    "steep", "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "unsloth",
    "flash-attn", "flash-attn-3",
)  # fmt: skip


def milliseconds(
    launch: Callable[[], object], before: Callable[[], object] | None = None, launches: int = LAUNCHES
) -> float:
    """Median time of `launch` on the GPU, with nothing of its data in the second-level cache, between CUDA events.

    Args:
        before: called before each launch, and not timed: it puts back what a launch writes over. An op that runs on its
            own results ends with zeros and NaN, on which a card is faster.
    """
    before = before or (lambda: None)
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        before()
        launch()
    times = []
    for _ in range(launches):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        flush.zero_()
        torch.cuda._sleep(1_000_000)  # so that the host is ahead, and its time for the launch is not counted
        start.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sustained_milliseconds(launch: Callable[[], object], seconds: float) -> float:
    """Mean time of a launch that is repeated for `seconds`, after half as long that is not counted: the card's clocks
    are then those of work that goes on, which its power limits. Kernels are compiled before."""
    launch()
    torch.cuda.synchronize()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds / 2:
        launch()
        torch.cuda.synchronize()
        count += 1
    times = 2 * count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        launch()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def putting_back(*tensors: torch.Tensor) -> Callable[[], None]:
    """What writes the values that `tensors` have now into them again."""
    kept = [tensor.detach().clone() for tensor in tensors]

    def put_back() -> None:
        for tensor, was in zip(tensors, kept, strict=True):
            tensor.data.copy_(was)  # .data: a graph that runs again has saved them

    return put_back


def copy_bytes_per_second() -> float:
    """Bytes read and written by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda")
    out = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: out.copy_(source)) * 1e3


def product_flops_per_second() -> float:
    """Of a product of 8192 x 8192 matrices of random bf16 numbers: zeros would be faster."""
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b) * 1e3


def versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """How this process was called; of files and folders, without those around them: they are of one machine."""
    module = Path(sys.argv[0]).stem
    words = " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]])
    return re.sub(r"(?<![^\s=])/(?:[^/\s]+/)*(?=[^/\s])", "", words)


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def results_file(name: str) -> Path:
    """`benchmarks/results/DATE-GPU-NAME.jsonl`, of today and this machine's GPU."""
    gpu = gpu_name().removeprefix("NVIDIA ").split()[0].lower()
    return RESULTS / f"{date.today()}-{gpu}-{name}.jsonl"


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; none where it is not there.

    Raises:
        SystemExit: it cannot be read, or a line is no object of JSON, as where a write was cut off.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
    except OSError as error:
        raise SystemExit(f"{file} cannot be read: {error.strerror}.") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise SystemExit(
                f"{file}: line {number} is no result: cut off? Delete it, and what it was of is done again."
            ) from None
    return rows


def append(file: Path, row: dict[str, object]) -> None:
    """A line at a file's end, whole: other processes may append to it too."""
    with file.open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps(row) + "\n")
