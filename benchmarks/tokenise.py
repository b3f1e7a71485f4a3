"""Is steep's tokenisation as fast as the `tokenizers` library? Reading, hashing and writing against encoding alone.

    python benchmarks/tokenise.py --tokenizer FOLDER_OR_HUB_NAME --data FILE [FILE ...] [--repeats 5]

Three works are timed in turn, on the same cores and the same text, and the median of each is printed:

- `encode_batch`: the library's own `Tokenizer.encode_batch` over a list with all texts, already in memory.
- `encode_batch and ids`: the same, and `.ids` of every encoding, which turns its ids into Python integers.
- `steep`: `steep.data.tokens.tokenize` into an empty cache: files unpacked, parsed, encoded, hashed and written to an
  Arrow file that is on the disk (fsync) at the end, and opened again; also the copy of the tokenizer that it makes.

Each time is taken once in a process of its own, as a user's is: in one process, the library's second pass over Korean
text took 0.7 of the first one's time, with a fresh tokenizer too. Loading the tokenizer is not timed and, for the
library, neither is reading the texts. TOKENIZERS_PARALLELISM is true for all. MB are 10^6 bytes of UTF-8 text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steep.data.readers import read_documents
from steep.data.sources import Source

WORKS = ("encode_batch", "encode_batch and ids", "steep")


def measure(work: str, tokenizer_name: str, sources: list[Source]) -> float:
    """Seconds of one work, in this process."""
    from transformers import AutoTokenizer

    from steep.data.encoder import Encoder
    from steep.data.tokens import tokenize

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    if work == "steep":
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            encoder = Encoder(tokenizer)
            for source in sources:
                tokenize(source, encoder, Path(folder), "--data")
            return time.perf_counter() - start
    texts = [text for source in sources for text in read_documents(source, "--data")]
    start = time.perf_counter()
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    if work == "encode_batch and ids":
        _ = [encoding.ids for encoding in encodings]
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of a fast tokenizer")
    parser.add_argument("--data", required=True, nargs="+", help="files that steep reads; JSON lines with a field text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=WORKS, help="time one work once, in this process, and print the seconds")
    arguments = parser.parse_args()
    sources = [Source(path=path) for path in arguments.data]
    if arguments.only:
        print(measure(arguments.only, arguments.tokenizer, sources))
        return

    sizes = [len(text.encode()) for source in sources for text in read_documents(source, "--data")]
    megabytes = sum(sizes) / 1e6
    print(f"{len(sizes):,} documents, {megabytes:.2f} MB, {len(os.sched_getaffinity(0))} cores")
    speeds: dict[str, list[float]] = {work: [] for work in WORKS}
    for _ in range(arguments.repeats):
        for work in WORKS:
            command = [sys.executable, __file__, "--tokenizer", arguments.tokenizer, "--only", work]
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
            done = subprocess.run(
                [*command, "--data", *arguments.data], env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            speeds[work].append(megabytes / float(done.stdout.split()[-1]))
    for work, measured in speeds.items():
        each = " ".join(f"{speed:.2f}" for speed in measured)
        print(f"{work:22} {statistics.median(measured):6.2f} MB/s   ({each})")
    own = statistics.median(speeds["steep"])
    for work in WORKS[:2]:
        print(f"steep / {work}: {own / statistics.median(speeds[work]):.2f}")


if __name__ == "__main__":
    main()
