"""Tokenise a source once, and look at its tokens through a mapped Arrow file that is never loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from steep.data.encoder import Encoder
from steep.data.encoder import special_affixes as special_affixes
from steep.data.sources import Source, file_format, list_files
from steep.data.token_file import FORMAT_VERSION, METADATA_KEY, Progress, write_tokens
from steep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizedSource:
    """A tokenised source: a mapped Arrow file and 40 bytes of RAM a document.

    Attributes:
        source: what was read.
        path: the Arrow file.
        cached: whether the file was there already.
        empty: documents skipped because they held nothing but white space.
        lengths: int64 [documents], tokens with BOS and EOS.
        hashes: uint64 [documents, 2], blake2b-128 of the UTF-8 text, in big-endian order.
        num_bytes: int64 [documents], bytes of the UTF-8 text.
        num_chars: int64 [documents], characters (code points) of the text.
        prefix_length: how many tokens stand in front of each document's text.
        has_eos: whether each document ends with EOS.
    """

    def __init__(self, source: Source, path: Path, cached: bool) -> None:
        self.source = source
        self.path = path
        self.cached = cached
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
        self.empty = int(last[b"empty"])
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
        return TokenizedSource, (self.source, self.path, self.cached)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document: int32, a read-only view of the mapped file, nothing is copied."""
        chunk = int(np.searchsorted(self._first, document, side="right")) - 1
        values, offsets = self._chunks[chunk]
        row = document - int(self._first[chunk])
        first, end = int(offsets[row]), int(offsets[row + 1])
        return values[first + start : end if stop is None else min(first + stop, end)]


def tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    field: str,
    progress: Progress | None = None,
) -> TokenizedSource:
    """Tokenise a source, or open the result of an earlier time.

    The result is found again by the content of the files (not their names), the tokenizer and the text field.

    Args:
        source: what to read.
        tokenizer: decides ids and special tokens; not changed.
        cache_dir: folder of the Arrow files, made if needed.
        field: where the source stands in the run file, e.g. "data.sources[0]".
        progress: called after each batch with the documents and UTF-8 bytes done so far.

    Raises:
        UserError: the source cannot be read, or holds no document but empty ones.
    """
    encoder = Encoder(tokenizer)
    path = cache_dir / f"{_cache_key(source, encoder, field)}.arrow"
    cached = path.exists()
    if not cached:
        write_tokens(source, encoder, path, field, progress)
    result = TokenizedSource(source, path, cached)
    if not len(result):
        problem = f"{source.location} holds no text ({result.empty} empty documents)"
        raise UserError(f"{field}.{'hub' if source.hub else 'path'}", problem, "Give a source with text in it")
    return result


def _cache_key(source: Source, encoder: Encoder, field: str) -> str:
    key = hashlib.blake2b(digest_size=16)
    parts = [str(FORMAT_VERSION).encode(), source.text_field.encode(), *encoder.fingerprint()]
    if source.hub:
        from steep.data.hub import load_hub

        parts += [b"hub", load_hub(source, field)._fingerprint.encode()]  # pyright: ignore[reportAttributeAccessIssue]
    else:
        for file in list_files(source, field):
            try:
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()
            except OSError as error:
                raise UserError(f"{field}.path", f"{file} cannot be read ({error})", "Check its permissions") from error
            parts += [str(file_format(file)).encode(), content]
    for part in parts:
        key.update(len(part).to_bytes(8, "big"))
        key.update(part)
    return key.hexdigest()


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
