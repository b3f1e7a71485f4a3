"""Does memory grow with the corpus? The peak of `steep.pack`, from text files to rows, on texts of several sizes.

    python benchmarks/corpus_memory.py --data FILE_OR_FOLDER [--megabytes 250 1000] [--tokenizer FOLDER_OR_HUB_NAME]

For each size a JSON-lines file is made of the documents of `--data`, over and over; a repeated document is turned
round at another place and numbered, so that no text comes twice. A process of its own then does what `steep plan` does
with the text: tokenise into an empty cache, find duplicates, mix, pack, and work out fingerprint and statistics. This
process meanwhile sums RssAnon over it and its children from /proc, 50 times a second, and takes the largest sum.
RssAnon is what a process has for itself; pages of mapped cache files, which the system takes back when it needs them,
are not in it.

Printed is, for each size, the peak and where it was, documents and rows, and between the sizes the difference, against
64 bytes a document plus 16 bytes a row. Without --tokenizer a byte-level BPE with 4,096 entries is learned from a
megabyte of the text. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from steep.data.readers import read_documents
from steep.data.sources import Source

BYTES_A_DOCUMENT, BYTES_A_ROW = 64, 16
MAX_LENGTH = 2048
VOCABULARY = 4_096


def documents(texts: list[str], size: int) -> Iterator[str]:
    """Different documents with `size` bytes of UTF-8 in all, or a little more."""
    total = 0
    for copy in itertools.count():
        for number, text in enumerate(texts):
            place = len(text) * (copy % 97) // 97
            document = f"{text[place:]} {text[:place]} {copy}.{number}"
            total += len(document.encode())
            yield document
            if total >= size:
                return


def learn_tokenizer(texts: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents(texts, 10**6), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def pack_once(tokenizer_name: str, file: str, cache: str) -> None:
    """The measured work; prints documents and rows."""
    from transformers import AutoTokenizer

    from steep.data.packing import pack

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    corpus = pack(file, tokenizer, max_length=MAX_LENGTH, cache_dir=cache)
    told = {**corpus.statistics, "fingerprint": corpus.fingerprint}
    print(json.dumps({"documents": len(corpus.sources[0]), "rows": len(corpus.train), **told}))


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process and its children, and theirs."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = [
            child
            for task in Path(f"/proc/{process}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    own = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")]
    return sum(own) + sum(anonymous_bytes(int(child)) for child in children)


def measure(tokenizer_name: str, file: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        command = [sys.executable, __file__, "--only", tokenizer_name, str(file), cache]
        start = time.perf_counter()
        with tempfile.TemporaryFile("w+") as output, subprocess.Popen(command, stdout=output) as process:
            peak = while_tokenising = 0
            while process.poll() is None:
                found = anonymous_bytes(process.pid)
                peak = max(peak, found)
                if not any(Path(cache).glob("*.arrow")):  # the file has its name when tokenising has ended
                    while_tokenising = max(while_tokenising, found)
                time.sleep(0.02)
            if process.returncode:
                raise SystemExit(process.returncode)
            output.seek(0)
            told = json.loads(output.read().splitlines()[-1])
    return {
        "peak": peak,
        "tokenising": while_tokenising,
        "documents": told["documents"],
        "rows": told["rows"],
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="files or folders that steep reads; JSON lines with a field text")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[250, 1_000])
    parser.add_argument("--tokenizer", help="folder or hub name of a tokenizer")
    parser.add_argument("--repeats", type=int, default=1, help="processes for each size; their peaks are all printed")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        pack_once(*arguments.only)
        return

    texts = [text for path in arguments.data for text in read_documents(Source(path=path), "--data") if text.strip()]
    random.Random(0).shuffle(texts)  # so that a part of the text is like the whole
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer_name = arguments.tokenizer or str(folder / "tokenizer")
        if not arguments.tokenizer:
            learn_tokenizer(texts, folder / "tokenizer")
        results = []
        for megabytes in arguments.megabytes:
            file = folder / "corpus.jsonl"
            with file.open("w", encoding="utf-8") as stream:
                for document in documents(texts, megabytes * 10**6):
                    stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            measured = [measure(tokenizer_name, file) for _ in range(arguments.repeats)]
            results.append(max(measured, key=lambda each: each["peak"]))
            for each in measured:
                print(
                    f"{megabytes:6,} MB of text: {each['documents']:9,} documents, {each['rows']:8,} rows, peak "
                    f"{each['peak'] / 1e6:6.1f} MB ({each['tokenising'] / 1e6:.1f} while tokenising), "
                    f"{each['seconds']:.0f} s",
                    flush=True,
                )
    for small, large in itertools.pairwise(results):
        more = {name: large[name] - small[name] for name in ("peak", "documents", "rows")}
        allowed = BYTES_A_DOCUMENT * more["documents"] + BYTES_A_ROW * more["rows"]
        print(
            f"difference: {more['peak'] / 1e6:.1f} MB for {more['documents']:,} documents and {more['rows']:,} rows, "
            f"{more['peak'] / more['documents']:.0f} bytes a document or {more['peak'] / more['rows']:.0f} a row; "
            f"{allowed / 1e6:.1f} MB are {BYTES_A_DOCUMENT} bytes a document plus {BYTES_A_ROW} a row"
        )


if __name__ == "__main__":
    main()
