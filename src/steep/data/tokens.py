"""Tokenise a source once, and look at its tokens through a mapped Arrow file that is never loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from steep.data.encoder import Encoder, digest
from steep.data.files import find_files
from steep.data.hub import load_hub
from steep.data.sources import Source, file_format
from steep.data.token_file import FORMAT_VERSION, METADATA_KEY, Progress, Stamp, Summary, stamp_of, write_tokens
from steep.errors import UserError


class TokenizedSource:
    """A tokenised source: a mapped Arrow file and 40 bytes of RAM a document.

    Attributes:
        source: what was read.
        path: the Arrow file.
        cached: whether the file was there already.
        files: how many files were read; 0 for a hub data set.
        files_not_read: how many more stood there, of a kind that steep does not read.
        warnings: what the user should know of them, in plain words.
        empty: documents skipped because their text is blank or has no tokens.
        lengths: int64 [documents], tokens with BOS and EOS.
        hashes: uint64 [documents, 2], blake2b-128 of the UTF-8 text, in big-endian order.
        num_bytes: int64 [documents], bytes of the UTF-8 text.
        num_chars: int64 [documents], characters (code points) of the text.
        prefix_length: how many tokens stand in front of each document's text.
        has_eos: whether each document ends with EOS.
        text_tokens: tokens of the texts alone, as counted when they were written.
        largest_id: the largest token id.
        digest: of all token ids in their order.
    """

    def __init__(
        self,
        source: Source,
        path: Path,
        cached: bool,
        files: int = 0,
        files_not_read: int = 0,
        warnings: Iterable[str] = (),
    ) -> None:
        self.source = source
        self.path = path
        self.cached = cached
        self.files = files
        self.files_not_read = files_not_read
        self.warnings = list(warnings)
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []  # (values, offsets) of a record batch, mapped
        hashes, num_bytes, num_chars, lengths = [], [], [], []
        last: Any = None
        with _open_stream(path) as reader:
            described = json.loads(reader.schema.metadata[METADATA_KEY])
            for batch, metadata in _batches(reader, path):
                last = metadata
                if not batch.num_rows:
                    continue
                tokens = batch.column(0)
                offsets = tokens.offsets.to_numpy()
                self._chunks.append((tokens.values.to_numpy(zero_copy_only=True), offsets))
                lengths.append(np.diff(offsets).astype(np.int64))
                hashes.append(np.frombuffer(batch.column(1).buffers()[1], dtype=">u8", count=2 * batch.num_rows))
                num_bytes.append(batch.column(2).to_numpy())
                num_chars.append(batch.column(3).to_numpy())
        if last is None:
            raise _damaged(path, "it has no end")
        summary = Summary(**json.loads(last[METADATA_KEY]))
        self.empty, self.text_tokens = summary.empty, summary.text_tokens
        self.largest_id, self.digest = summary.largest_id, summary.digest
        self.prefix_length: int = described["prefix_length"]
        self.has_eos: bool = described["has_eos"]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        self.hashes = np.concatenate([np.zeros(0, np.uint64), *hashes]).astype(np.uint64).reshape(-1, 2)
        self.num_bytes = np.concatenate([np.zeros(0, np.int64), *num_bytes])
        self.num_chars = np.concatenate([np.zeros(0, np.int64), *num_chars])
        self._first = np.cumsum([0, *(len(part) for part in lengths)])  # a chunk's first document

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file itself; pickling the arrays would send the whole corpus.
        return TokenizedSource, (self.source, self.path, self.cached, self.files, self.files_not_read, self.warnings)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document: int32, a read-only view of the mapped file, nothing is copied."""
        chunk = int(np.searchsorted(self._first, document, side="right")) - 1
        values, offsets = self._chunks[chunk]
        row = document - int(self._first[chunk])
        first, end = int(offsets[row]), int(offsets[row + 1])
        return values[first + start : end if stop is None else min(first + stop, end)]


def tokenize(
    source: Source, encoder: Encoder, cache_dir: Path, field: str, progress: Progress | None = None
) -> TokenizedSource:
    """Tokenise a source, or open the result of an earlier time.

    The result is found again by the content of the files (not their names), the tokenizer and the text field.

    Args:
        source: what to read.
        encoder: decides ids and special tokens.
        cache_dir: folder of the Arrow files, made if needed.
        field: where the source stands in the run file, e.g. "data.sources[0]".
        progress: called after each batch with the documents and UTF-8 bytes done so far.

    Raises:
        UserError: the source cannot be read, holds no document but empty ones, or changes while it is read.
    """
    key = [str(FORMAT_VERSION).encode(), source.text_field.encode(), encoder.fingerprint]
    stamps: dict[Path, Stamp] = {}
    left_out: list[Path] = []
    warning = None
    if source.hub:
        key += [b"hub", load_hub(source, field)._fingerprint.encode()]  # pyright: ignore[reportAttributeAccessIssue]
    else:
        files = find_files(source, field)
        left_out, warning = files.left_out, files.warning(field)
        for file in files.read:
            content, stamps[file] = _digest_file(file, field)
            key += [str(file_format(file)).encode(), content]
    path = cache_dir / f"{digest(key).hex()}.arrow"
    cached = path.exists()
    if not cached:
        write_tokens(source, stamps, encoder, path, field, progress)
    result = TokenizedSource(source, path, cached, len(stamps), len(left_out), [warning] if warning else [])
    if not len(result):
        empty = "1 empty document" if result.empty == 1 else f"{result.empty:,} empty documents"
        problem = f"{source.location} holds no text ({empty})"
        raise UserError(f"{field}.{'hub' if source.hub else 'path'}", problem, "Give a source with text in it")
    return result


def _digest_file(file: Path, field: str) -> tuple[bytes, Stamp]:
    """Digest of a file's content, and its size and time of change before it was read."""
    try:
        with file.open("rb") as stream:
            stamp = stamp_of(os.fstat(stream.fileno()))
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest(), stamp
    except OSError as error:
        remedy = "Check its permissions, and if it is a link, where it leads"
        raise UserError(f"{field}.path", f"{file} cannot be read ({error})", remedy) from error


def _open_stream(path: Path) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)))
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
