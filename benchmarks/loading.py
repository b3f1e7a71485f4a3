"""How long does a 16-bit model take from local disk into a base, against plainly reading its files?

    python -m benchmarks.loading [--shape llama-3-8b] [--layers N] [--bases nf4 fp8 bf16] [--repeats 3] [--warm]
                                 [--out FILE]

Each load is `steep.load` in a process of its own, from the call to the model's last byte on the GPU. The process has
loaded a tiny model before: imports, the GPU's start and the building of kernels are not counted. Plain reading is one
pass over all weight files with one thread, 16 MiB at a time, into memory that is there already. The random weights are
made once (--weights): put them on the disk that is meant.

Beside the seconds stands what the load needed: the peak of the process's own host memory (RssAnon, looked at every 5
milliseconds; pages of the files do not count) above what it had before; and the peak of the GPU, which should not be
above what stays there (`kept`, without the scales of bitsandbytes' bases) and the largest layer in 16 bits. --layers
takes so many of a shape that the disk cannot hold as a whole: --shape llama-3-70b --layers 24 is 42 GiB, and asks for
--bases fp8 --repeats 1 where time is short. What does not fit on the disk is refused before it is made.

Files are cold: before each, the system is asked to drop their pages (posix_fadvise, which needs no rights), and what
still is in memory is asked for (mincore) and stands in the line as `resident`: 0 is cold, and a system that does not
drop, or does not say, has 1. With --warm the files have been read just before.

Reads and loads take turns --repeats times. A line of JSON each goes to `benchmarks/results/DATE-GPU-loading.jsonl`, and
printed are medians, and their ratio to reading.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import append, command, gpu_name, results_file, versions
from benchmarks.shapes import SHAPES, is_written, weight_bytes, write

BASES = ("nf4", "fp8", "bf16")
PIECE = 2**24
GIB = 2**30
READ = "read"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="of the shape; default: all")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="files that have just been read")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--weights", type=Path, help="folder for the weights; default: in the system's temporary one")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-loading.jsonl")
    parser.add_argument("--worker", nargs=3, metavar=("BASE", "FOLDER", "TINY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.weights = arguments.weights or Path(tempfile.gettempdir()) / "steep-benchmarks"
    return arguments


def refuse_full_disk(shape: str, layers: int | None, folder: Path) -> None:
    """
    Raises:
        SystemExit: the weights, which are not there yet, would not fit.
    """
    if is_written(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    needed = weight_bytes(shape, layers)
    there = sum(file.stat().st_size for file in weight_files(folder))  # of a process that was ended
    free = shutil.disk_usage(folder).free + there
    if needed > free:
        raise SystemExit(
            f"{folder} needs {needed / GIB:.1f} GiB, and its disk has {free / GIB:.1f} free: delete what "
            f"{folder.parent} holds of other shapes, or give --weights another disk or fewer --layers."
        )


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop(files: list[Path]) -> None:
    """Ask the system to keep nothing of the files in memory."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # pages that are not on the disk yet stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(files: list[Path]) -> float:
    """Share of the files' pages that are in memory, as the system says."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = found = 0
    for file in files:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE,
                                                  flags=mmap.MAP_PRIVATE) as mapped:  # fmt: skip
            size = len(mapped)
            of_page = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.addressof(start), size, of_page):
                raise OSError(ctypes.get_errno(), "mincore")
            del start  # the map cannot be closed before
            pages += len(of_page)
            found += sum(each & 1 for each in of_page)
    return found / pages


def read(files: list[Path]) -> float:
    """Seconds of one pass."""
    piece = memoryview(bytearray(PIECE))
    begun = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(piece):
                pass
    return time.perf_counter() - begun


def anonymous() -> int:
    """Bytes of this process's own memory: not those of files that it has mapped."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


@contextmanager
def peak_of_host(found: list[int]) -> Iterator[None]:
    """Puts into `found` how far the own memory of this process rises within."""
    before, over = anonymous(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        found.append(max(peak, anonymous()) - before)


def layer_bytes(model: Any) -> int:
    """Of the largest decoder layer in 16 bits, or of an embedding, if that is larger."""
    config = model.config
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = config.hidden_size * (2 * heads * config.head_dim + 3 * config.intermediate_size)
    return 2 * max(layer, config.vocab_size * config.hidden_size)


def load_once(base: str, folder: Path, tiny: Path) -> dict[str, Any]:
    """In a process of its own."""
    from steep import load

    on_gpu = torch.cuda.is_available()
    load(str(tiny), base=base, compute_dtype="bf16")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    host: list[int] = []
    with peak_of_host(host):
        begun = time.perf_counter()
        model, _ = load(str(folder), base=base, compute_dtype="bf16")
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    kept = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / GIB
    found = {"seconds": seconds, "kept_gib": kept, "layer_gib": layer_bytes(model) / GIB}
    return found | {"peak_allocated_gib": peak, "peak_host_gib": host[0] / GIB}


def loaded(base: str, folder: Path, tiny: Path) -> dict[str, Any]:
    """`load_once`, from its process.

    Raises:
        SystemExit: it failed.
    """
    process = [sys.executable, "-m", "benchmarks.loading", "--worker", base, str(folder), str(tiny)]
    done = subprocess.run(process, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{base} was not loaded: see above")
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if words is None else words)
    if arguments.worker:
        base, *folders = arguments.worker
        print(json.dumps(load_once(base, *map(Path, folders))))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU. To try the command on a CPU: --device cpu --shape tiny.")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    shapes = ((arguments.shape, arguments.layers), ("tiny", None))
    places = [arguments.weights / f"{_name(shape, layers)}-{arguments.device}" for shape, layers in shapes]
    refuse_full_disk(*shapes[0], places[0])
    folder, tiny = (
        write(shape, place, arguments.device, layers) for (shape, layers), place in zip(shapes, places, strict=True)
    )
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    files, out = weight_files(folder), arguments.out or results_file("loading")
    gib = sum(file.stat().st_size for file in files) / GIB
    said = {
        "shape": arguments.shape,
        "layers": arguments.layers,
        "gib": gib,
        "gpu": gpu_name() if arguments.device == "cuda" else "none",
    }
    said |= {"warm": arguments.warm, "versions": versions(), "command": command()}
    seconds: dict[str, list[float]] = {}
    needed: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.repeats):
        for what in (READ, *arguments.bases):
            if arguments.warm:
                read(files)
            else:
                drop(files)
            in_memory = resident(files)
            found = {"seconds": read(files)} if what == READ else loaded(what, folder, tiny)
            seconds.setdefault(what, []).append(found["seconds"])
            needed.setdefault(what, []).append(found)
            found = {**found, "gib_per_second": gib / found["seconds"]}
            append(out, {"what": what, **found, "resident": in_memory, **said})
            print(f"{what:5} {found['seconds']:8.2f} s, {in_memory:.0%} of the files were in memory", flush=True)
    median = {what: statistics.median(each) for what, each in seconds.items()}
    print(f"{gib:.2f} GiB read in {median[READ]:.2f} s, {gib / median[READ]:.2f} GiB/s")
    for base in arguments.bases:
        told = f"{median[base]:8.2f} s, {median[base] / median[READ]:.2f} x reading, {gib / median[base]:.2f} GiB/s"
        print(f"{base:5} {told}; {_needs(needed[base])}")


def _name(shape: str, layers: int | None) -> str:
    return shape if layers is None else f"{shape}-{layers}-layers"


def _needs(loads: list[dict[str, Any]]) -> str:
    """The most of several loads, in words."""
    host, kept, layer = (max(each[name] for each in loads) for name in ("peak_host_gib", "kept_gib", "layer_gib"))
    told = f"host {host:.2f} GiB at its peak, {kept:.2f} GiB kept"
    peaks = [each["peak_allocated_gib"] for each in loads if each["peak_allocated_gib"] is not None]
    return f"{told}, GPU {max(peaks):.2f} of {kept + layer:.2f} GiB with a layer" if peaks else told


if __name__ == "__main__":
    main()
