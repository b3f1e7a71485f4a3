"""Tokenise a source once, and look at its tokens through a mapped Arrow file that is never loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from steep.data.encoder import Encoder, digest
from steep.data.files import find_files
from steep.data.hub import load_hub
from steep.data.sources import Source, file_format
from steep.data.streams import find_stream
from steep.data.token_file import FORMAT_VERSION, METADATA_KEY, Progress, Stamp, Summary, stamp_of, write_tokens
from steep.errors import UserError

logger = logging.getLogger("steep")

MOST_NAMED = 1000  # files of a source whose digests are kept: a plan is to be read


class TokenizedSource:
    """A tokenised source: a mapped Arrow file and 8 bytes of RAM a document.

    Attributes:
        source: what was read; if it was streamed, its revision is the commit.
        path: the Arrow file.
        cached: whether the file was there already.
        files: how many files were read; 0 for a hub data set.
        files_not_read: how many more stood there, of a kind that steep does not read.
        warnings: what the user should know of them, in plain words.
        empty: documents skipped because their text is blank or has no tokens.
        stopped: whether `max_tokens` ended the reading, and not the end of the text.
        lengths: int64 [documents], tokens with BOS and EOS.
        prefix_length: how many tokens stand in front of each document's text.
        has_eos: whether each document ends with EOS.
        text_tokens: tokens of the texts alone, as counted when they were written.
        largest_id: the largest token id.
        digest: of all token ids in their order.
        contents: digest of each file's bytes, by its place below the source's path; empty for a hub data set, and where
            there are more than `MOST_NAMED` files.
    """

    def __init__(
        self,
        source: Source,
        path: Path,
        cached: bool,
        files: int = 0,
        files_not_read: int = 0,
        warnings: Iterable[str] = (),
        contents: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        self.path = path
        self.cached = cached
        self.files = files
        self.files_not_read = files_not_read
        self.warnings = list(warnings)
        self.contents = dict(contents or {})
        try:
            self._read()
        except (ValueError, LookupError, TypeError, pa.ArrowException) as error:  # bytes have changed on the disk
            raise _damaged(path, str(error)) from error

    def _read(self) -> None:
        # The whole file as one buffer, and where in it the columns of each record batch begin: arrow's own objects, or
        # an array for each column, would take 2 KB a batch.
        self._file = _map(self.path)
        places: list[tuple[int, ...]] = []
        lengths, first = [np.zeros(0, np.int64)], [0]
        last: Any = None
        with _open_stream(self._file, self.path) as reader:
            described = json.loads(reader.schema.metadata[METADATA_KEY])
            for batch, metadata in _batches(reader, self.path):
                last = metadata
                if not batch.num_rows:
                    continue
                _, offsets, _, ids = batch.column(0).buffers()
                columns = [ids, offsets, *(batch.column(index).buffers()[1] for index in (1, 2, 3))]
                places.append(tuple(column.address - self._file.address for column in columns))
                lengths.append(np.diff(self._view(np.int32, places[-1][1], batch.num_rows + 1)).astype(np.int64))
                first.append(first[-1] + batch.num_rows)
        if last is None:
            raise _damaged(self.path, "it has no end")
        summary = Summary(**json.loads(last[METADATA_KEY]))
        self.empty, self.text_tokens, self.stopped = summary.empty, summary.text_tokens, summary.stopped
        self.largest_id, self.digest = summary.largest_id, summary.digest
        self.prefix_length: int = described["prefix_length"]
        self.has_eos: bool = described["has_eos"]
        self.lengths = np.concatenate(lengths)
        if (self.lengths < 0).any():
            raise _damaged(self.path, "its documents overlap")
        self._first = np.array(first)  # each batch's first document, and the number of documents
        self._places = np.array(places, np.int64).reshape(-1, 5)  # of ids, offsets, hashes, num_bytes, num_chars

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [documents, 2], blake2b-128 of the UTF-8 text, in big-endian order; read from the file each time."""
        result = np.empty((len(self), 2), np.uint64)
        for batch, first in enumerate(self._first[:-1]):
            end = self._first[batch + 1]
            halves = self._view(">u8", self._places[batch, 2], 2 * (end - first))
            result[first:end] = halves.reshape(-1, 2)
        return result

    @property
    def num_bytes(self) -> np.ndarray:
        """int64 [documents], bytes of the UTF-8 text; read from the file each time."""
        return self._column(3)

    @property
    def num_chars(self) -> np.ndarray:
        """int64 [documents], characters (code points) of the text; read from the file each time."""
        return self._column(4)

    def _column(self, column: int) -> np.ndarray:
        parts = [
            self._view(np.int64, self._places[batch, column], self._first[batch + 1] - first)
            for batch, first in enumerate(self._first[:-1])
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _view(self, dtype: Any, place: int, count: int) -> np.ndarray:
        """An array in the mapped file: read-only, nothing is copied."""
        return np.frombuffer(self._file, dtype, count, place)

    def num_bytes_of(self, document: int) -> int:
        """Bytes of one document's UTF-8 text."""
        batch, row = self._find(document)
        return int(self._view(np.int64, self._places[batch, 3], row + 1)[row])

    def num_chars_of(self, document: int) -> int:
        """Characters (code points) of one document's text."""
        batch, row = self._find(document)
        return int(self._view(np.int64, self._places[batch, 4], row + 1)[row])

    def _find(self, document: int) -> tuple[int, int]:
        """The record batch of a document, and its row there."""
        batch = int(np.searchsorted(self._first, document, side="right")) - 1
        return batch, document - int(self._first[batch])

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file itself; pickling the arrays would send the whole corpus.
        return TokenizedSource, (
            self.source, self.path, self.cached, self.files, self.files_not_read, self.warnings, self.contents,
        )  # fmt: skip

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document: int32, a read-only view of the mapped file, nothing is copied."""
        batch, row = self._find(document)
        first, end = self._view(np.int32, self._places[batch, 1] + 4 * row, 2).tolist()
        length = end - first if stop is None else min(end - first, stop)
        return self._view(np.int32, self._places[batch, 0] + 4 * (first + start), max(length - start, 0))

    def ids_among(self, wanted: Collection[int]) -> set[int]:
        """Those of `wanted` that stand in some document."""
        table = np.zeros(max(wanted, default=-1) + 1, bool)
        for batch, first in enumerate(self._first[:-1]):
            ids, offsets = self._places[batch, :2].tolist()
            start, *_, end = self._view(np.int32, offsets, int(self._first[batch + 1] - first) + 1).tolist()
            values = self._view(np.int32, ids + 4 * start, end - start)
            table[values[values < len(table)]] = True
        return {number for number in wanted if table[number]}


def tokenize(
    source: Source,
    encoder: Encoder,
    cache_dir: Path,
    field: str,
    progress: Progress | None = None,
    documents: int | None = None,
) -> TokenizedSource:
    """Tokenise a source, or open the result of an earlier time.

    The result is found again by the content of the files (not their names), or the commit of a streamed data set, the
    tokenizer, the text field and `max_tokens`.

    Args:
        source: what to read.
        encoder: decides ids and special tokens.
        cache_dir: folder of the Arrow files, made if needed.
        field: where the source stands in the run file, e.g. "data.sources[0]".
        progress: called after each batch.
        documents: read no more than so many.

    Raises:
        UserError: the source cannot be read, holds no document but empty ones, or changes while it is read; its stream
            breaks, or its first document alone passes `max_tokens`.
    """
    key = [str(FORMAT_VERSION).encode(), source.text_field.encode(), encoder.fingerprint]
    if source.max_tokens is not None:
        key += [b"max_tokens", str(source.max_tokens).encode()]
    if documents is not None:
        key += [b"documents", str(documents).encode()]
    stamps: dict[Path, Stamp] = {}
    contents: dict[str, str] = {}
    left_out: list[Path] = []
    warnings: list[str | None] = []
    stream = None
    if source.stream:
        stream = find_stream(source, key, cache_dir, field)
        source = stream.source
        warnings.append(stream.warning)
    elif source.hub:
        key += [b"hub", load_hub(source, field)._fingerprint.encode()]  # pyright: ignore[reportAttributeAccessIssue]
    else:
        files = find_files(source, field)
        left_out = files.left_out
        warnings.append(files.warning(field))
        for file in files.read:
            content, stamps[file] = _digest_file(file, field)
            key += [str(file_format(file)).encode(), content]
            if len(files.read) <= MOST_NAMED:
                contents[_below(file, source)] = content.hex()
    path = stream.path if stream else cache_dir / f"{digest(key).hex()}.arrow"
    cached = path.exists()
    if not cached:
        logger.info(f"tokenising {source.location}")
        write_tokens(source, stamps, encoder, path, field, progress, documents)
    if stream:
        stream.remember()
    result = TokenizedSource(source, path, cached, len(stamps), len(left_out), filter(None, warnings), contents)
    if not len(result):
        raise _nothing_read(result, field)
    if source.max_tokens is not None:
        _tell_budget(result, field)
    return result


def _nothing_read(result: TokenizedSource, field: str) -> UserError:
    source = result.source
    if result.stopped:
        problem = f"the first document of {source.location} has more than {source.max_tokens:,} tokens"
        return UserError(f"{field}.max_tokens", problem, "Raise it: documents are read whole")
    empty = "1 empty document" if result.empty == 1 else f"{result.empty:,} empty documents"
    problem = f"{source.location} holds no text ({empty if result.empty else 'no document'})"
    return UserError(f"{field}.{'hub' if source.hub else 'path'}", problem, "Give a source with text in it")


def _tell_budget(result: TokenizedSource, field: str) -> None:
    source = result.source
    read = f"{len(result):,} documents with {int(result.lengths.sum()):,} tokens of {source.location}"
    if result.stopped:
        logger.info(f"{field}: {read} are read; the next one would pass max_tokens, {source.max_tokens:,}")
    else:
        result.warnings.append(f"{field}: {read} are all there is, fewer tokens than max_tokens, {source.max_tokens:,}")


def _digest_file(file: Path, field: str) -> tuple[bytes, Stamp]:
    """Digest of a file's content, and its size and time of change before it was read."""
    try:
        with file.open("rb") as stream:
            stamp = stamp_of(os.fstat(stream.fileno()))
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest(), stamp
    except OSError as error:
        remedy = "Check its permissions, and if it is a link, where it leads"
        raise UserError(f"{field}.path", f"{file} cannot be read ({error})", remedy) from error


def _below(file: Path, source: Source) -> str:
    """A file's place below the path of its source, so that a corpus that moved is still the same."""
    root = Path(source.location).expanduser()
    if file == root:
        return file.name
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _map(path: Path) -> Any:
    try:
        with pa.memory_map(str(path)) as file:
            return file.read_buffer()
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, str(error)) from error


def _open_stream(buffer: Any, path: Path) -> Any:
    try:
        return pa.ipc.open_stream(buffer)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, str(error)) from error


def _batches(reader: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    while True:
        try:
            yield reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            return
        except (OSError, pa.ArrowInvalid) as error:
            raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError("cache_dir", f"the token cache {path} is damaged ({why})", "Delete it; the next run makes it anew")
