"""Write the token cache: an Arrow IPC stream, so that `datasets.Dataset.from_file(path)` opens it too.

A batch of documents is a record batch; the last batch is empty and carries a `Summary` as its metadata. It also marks
that the file is whole. A file is written under another name and renamed when it is on the disk: a tokenisation killed
at any moment leaves nothing that a later run takes for its result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from steep.data.encoder import Encoder
from steep.data.readers import read_documents
from steep.data.sources import Source
from steep.errors import UserError
from steep.storage import naming, remove_stale, temporary_name

Progress = Callable[[int, int, "Budget | None"], None]
"""Called with the documents and UTF-8 bytes done so far, and how far a source with `max_tokens` has come."""
Stamp = tuple[int, int]
"""Size and time of change (ns) of a file."""

FORMAT_VERSION = 3
METADATA_KEY = b"steep"
COLUMNS = [
    ("input_ids", pa.list_(pa.int32())),
    ("text_hash", pa.binary(16)),
    ("num_bytes", pa.int64()),
    ("num_chars", pa.int64()),
]
# The tokenizer's own objects take about 100 bytes a token, so the batches under way stay below 200 MB.
_BATCH_DOCUMENTS = 1_000
_BATCH_CHARS = 500_000


@dataclass(frozen=True)
class Budget:
    """A source is read until it holds so many tokens, those around its texts included.

    Attributes:
        limit: `max_tokens`.
        tokens: of the documents taken so far.
    """

    limit: int
    tokens: int


@dataclass(frozen=True)
class Summary:
    """What is known of a token file when its last document is written.

    Attributes:
        empty: documents skipped because their text is blank or has no tokens.
        text_tokens: tokens as the tokenizer gave them, before BOS and EOS were put around them.
        largest_id: the largest token id, -1 without any.
        digest: of all token ids in their order.
        stopped: whether `max_tokens` ended the reading, and not the end of the text.
    """

    empty: int
    text_tokens: int
    largest_id: int
    digest: str
    stopped: bool = False


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns


def write_tokens(
    source: Source,
    files: Mapping[Path, Stamp],
    encoder: Encoder,
    path: Path,
    field: str,
    progress: Progress | None,
    documents: int | None = None,
) -> None:
    """Tokenise `source` into `path`, all or nothing.

    Args:
        source: what to read.
        files: those of a source with a path, as they were when `path` was named after their content.
        encoder: makes the ids.
        path: the file to write; its folder is made if needed, and cleared of what killed tokenisations left.
        field: where the source stands in the run file, for messages.
        progress: called after each batch.
        documents: read no more than so many.

    Raises:
        UserError: the source cannot be read, a text encodes to the id that ends documents, a file has changed, or the
            folder cannot be written into.
    """
    temporary = temporary_name(path)
    opened = _opened(temporary)
    try:
        with naming(path.parent), opened as file:
            _write_stream(source, files, encoder, file, field, progress, documents)
            file.flush()
            os.fsync(file.fileno())
        _reject_changed(files, field)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone if it was renamed


def _opened(temporary: Path) -> BinaryIO:
    folder = temporary.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        return temporary.open("xb")
    except OSError as error:
        problem = f"{folder} cannot be written into: {error.strerror}"
        raise UserError("data.cache_dir", problem, "Give a folder you may write.") from error


def _reject_changed(files: Mapping[Path, Stamp], field: str) -> None:
    for file, stamp in files.items():
        try:
            changed = stamp_of(file.stat()) != stamp
        except OSError:  # it is gone
            changed = True
        if changed:
            problem = f"{file} changed while it was read"
            raise UserError(f"{field}.path", problem, "Start again when nothing writes to it any more")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in batches of bounded size. An error comes after the documents that were read before it."""
    batch: list[str] = []
    size = 0
    failure = None
    try:
        for text in documents:
            if batch and (len(batch) == _BATCH_DOCUMENTS or size + len(text) > _BATCH_CHARS):
                yield batch
                batch, size = [], 0
            batch.append(text)
            size += len(text)
    except UserError as error:
        failure = error
    if batch:
        yield batch
    if failure is not None:
        raise failure


def _write_stream(
    source: Source,
    files: Iterable[Path],
    encoder: Encoder,
    file: Any,
    field: str,
    progress: Progress | None,
    most_documents: int | None,
) -> None:
    described = {"prefix_length": len(encoder.prefix), "has_eos": encoder.eos is not None}
    schema = pa.schema(COLUMNS, metadata={METADATA_KEY: json.dumps(described).encode()})
    taker = _Taker(source.max_tokens, most_documents, len(encoder.prefix) + (encoder.eos is not None))
    documents = size = text_tokens = 0
    largest_id = -1
    digest = hashlib.blake2b(digest_size=16)
    with pa.ipc.new_stream(file, schema) as writer:
        for batch in _encoded(_batches(read_documents(source, field, files)), encoder):
            texts, ids = taker.take(*batch)
            if texts:
                _reject_eos_inside(ids, encoder, documents, source, field)
                values, num_bytes = _write_batch(writer, texts, ids, encoder, schema)
                documents += len(texts)
                size += num_bytes
                text_tokens += sum(map(len, ids))
                largest_id = max(largest_id, int(values.max()))
                digest.update(values.data)
                if progress is not None:
                    limit = source.max_tokens
                    progress(documents, size, None if limit is None else Budget(limit, taker.tokens))
            if taker.stopped:
                break
        summary = Summary(taker.empty, text_tokens, largest_id, digest.hexdigest(), taker.stopped)
        last = pa.RecordBatch.from_pylist([], schema=schema)
        writer.write_batch(last, {METADATA_KEY: json.dumps(asdict(summary)).encode()})


class _Taker:
    """Takes documents in their order, whole, until the next one would pass a limit.

    Those that are blank or have no tokens, as when a normaliser removes all of a text, are left out and counted.

    Args:
        limit: tokens, or None to take all.
        documents: how many, or None to take all.
        around: how many tokens stand around each text.
    """

    def __init__(self, limit: int | None, documents: int | None, around: int) -> None:
        self._limit = limit
        self._documents_left = documents
        self._around = around
        self.tokens = 0
        self.empty = 0
        self.stopped = False

    def take(self, texts: list[str], ids: list[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
        """What is taken of a batch; nothing may follow when `stopped` is true then."""
        taken: list[int] = []
        for index, (text, document) in enumerate(zip(texts, ids, strict=True)):
            if not text or text.isspace() or not len(document):
                self.empty += 1
                continue
            tokens = self._around + len(document)
            if (self._limit is not None and self.tokens + tokens > self._limit) or self._documents_left == 0:
                self.stopped = True
                break
            if self._documents_left is not None:
                self._documents_left -= 1
            self.tokens += tokens
            taken.append(index)
        return [texts[index] for index in taken], [ids[index] for index in taken]


def _encoded(batches: Iterable[list[str]], encoder: Encoder) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Encode ahead: this thread reads the next batch and writes the last one while other threads encode.

    So when the consumer stops, at most `encoder.workers` batches after its last one have been read. What is wrong with
    these is not its business: an error in reading comes after the batches that were read before it.
    """
    pending: deque[tuple[list[str], Future[list[np.ndarray]]]] = deque()
    failure = None
    with ThreadPoolExecutor(encoder.workers) as pool:
        try:
            for texts in batches:
                pending.append((texts, pool.submit(encoder.encode, texts)))
                if len(pending) > encoder.workers:
                    texts, future = pending.popleft()
                    yield texts, future.result()
        except UserError as error:
            failure = error
        while pending:
            texts, future = pending.popleft()
            yield texts, future.result()
    if failure is not None:
        raise failure


def _write_batch(
    writer: Any, texts: list[str], ids: list[np.ndarray], encoder: Encoder, schema: pa.Schema
) -> tuple[np.ndarray, int]:
    """Write one record batch; return all its token ids, and the UTF-8 bytes of its texts."""
    prefix = np.array(encoder.prefix, dtype=np.int32)
    eos = np.array([] if encoder.eos is None else [encoder.eos], dtype=np.int32)
    values = np.concatenate([part for document in ids for part in (prefix, document, eos)])
    offsets = np.cumsum([0, *(len(prefix) + len(document) + len(eos) for document in ids)]).astype(np.int32)
    encoded = [text.encode() for text in texts]
    hashes = b"".join(hashlib.blake2b(data, digest_size=16).digest() for data in encoded)
    num_bytes = np.array([len(data) for data in encoded], dtype=np.int64)
    num_chars = np.array([len(text) for text in texts], dtype=np.int64)
    columns = [
        pa.ListArray.from_arrays(offsets, values),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(texts), [None, pa.py_buffer(hashes)]),
        pa.array(num_bytes),
        pa.array(num_chars),
    ]
    writer.write_batch(pa.record_batch(columns, schema=schema))
    return values, int(num_bytes.sum())


def _reject_eos_inside(ids: list[np.ndarray], encoder: Encoder, before: int, source: Source, field: str) -> None:
    # `Encoder` keeps special tokens in the text literal, but a vocabulary can hold them as ordinary pieces too (a
    # Unigram model, an unk token that is EOS as well). Trained like that, a model learns to stop in mid-sentence.
    if encoder.eos is None or not (np.concatenate(ids) == encoder.eos).any():
        return
    number = next(index for index, document in enumerate(ids, start=before + 1) if encoder.eos in document)
    problem = f"document {number} of {source.location} (empty ones not counted) encodes to the end-of-text id inside"
    remedy = "Remove the end-of-text token from the text, or give the tokenizer an EOS of its own"
    raise UserError(f"{field}.{'hub' if source.hub else 'path'}", problem, remedy)
