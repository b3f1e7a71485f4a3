"""From a source to its documents. One reader a file format; all of them stream, and say file and place of broken text.

Files are read as bytes and decoded here, line by line, because only then can a byte that is not UTF-8 be named by its
offset in the file (in the decompressed text, if the file is packed).
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from steep.data.files import find_files
from steep.data.hub import read_hub
from steep.data.sources import Source, file_format
from steep.errors import UserError

_ARROW_NAME = {"gz": "gzip", "zst": "zstd"}
_BUFFER = 1 << 20  # bytes; pyarrow decompresses a megabyte at a time
_ROWS = 32  # parquet rows decoded at a time; each may be the same long text, which the file holds once
MOST_BYTES = 128 * 2**20  # of one document; they are held in memory several times while they are tokenised
# Text that is worth learning packs to a third or a tenth. Zeros pack to a thousandth: a small file would fill the disk.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED = 64 * 2**20


def read_documents(source: Source, field: str, files: Iterable[Path] | None = None) -> Iterator[str]:
    """Yield the text of every document, in order, without holding more than a document (a batch of rows) in memory.

    A .txt or .md file is one document; a .jsonl line, a .csv row or a .parquet row is one.

    Args:
        source: what to read.
        field: where the source stands in the run file, e.g. "data.sources[0]".
        files: those of a source with a path, if they are known already.

    Raises:
        UserError: something cannot be read as text; the message names the file and the place in it.
    """
    if source.hub:
        yield from read_hub(source, field)
        return
    for file in find_files(source, field).read if files is None else files:
        kind, packed = file_format(file) or ("", None)
        yield from read_file(file, kind, packed, source.text_field, field)


def read_file(path: Path, kind: str, packed: str | None, text_field: str, field: str) -> Iterator[str]:
    """Yield the documents of one file.

    Args:
        path: the file.
        kind: "txt", "md", "jsonl", "csv" or "parquet".
        packed: "gz", "zst" or None.
        text_field: JSON key or column with the text.
        field: where the source stands in the run file, for messages.

    Raises:
        UserError: the file cannot be opened, unpacked, decoded or parsed, or has a row without text.
    """
    if kind == "parquet":
        yield from _read_parquet(path, text_field, field)
        return
    with _open_bytes(path, packed, field) as stream:
        if kind == "jsonl":
            yield from _read_jsonl(stream, path, text_field, field)
        elif kind == "csv":
            yield from _read_csv(stream, path, text_field, field)
        else:
            raw = stream.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise _too_long(str(path), field)
            text = _without_bom(raw)
            decoded = _decode(text, path, len(raw) - len(text), field)
            _reject_nul(decoded, str(path), field)
            yield decoded


@contextmanager
def _open_bytes(path: Path, packed: str | None, field: str) -> Iterator[io.BufferedReader]:
    # pyarrow and not gzip/zstandard: it notices a truncated stream in both formats, which zstandard's own reader does
    # not, and reads several members or frames one after the other.
    try:
        raw: Any = pa.input_stream(str(path), compression=_ARROW_NAME[packed] if packed else None)
        if packed:
            raw = _Unpacking(raw, path, field)
        with io.BufferedReader(raw, _BUFFER) as stream:
            yield stream
    except OSError as error:
        what = f"{path} is truncated or not a .{packed} file" if packed else f"{path} cannot be read"
        raise UserError(f"{field}.path", f"{what} ({error})", "Copy or download the file again") from error


class _Unpacking(io.RawIOBase):
    """The bytes of a packed file, up to a multiple of its size."""

    def __init__(self, raw: Any, path: Path, field: str) -> None:
        self._raw, self._path, self._field = raw, path, field
        self._left = _most_unpacked(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise _bomb(self._path, self._field)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _most_unpacked(path: Path) -> int:
    return max(_ALWAYS_UNPACKED, _MOST_UNPACKED * path.stat().st_size)


def _bomb(path: Path, field: str) -> UserError:
    problem = f"{path} unpacks to more than {_MOST_UNPACKED} times its size: it is no text"
    return UserError(f"{field}.path", problem, "Remove the file, or give it unpacked")


def _too_long(place: str, field: str) -> UserError:
    problem = f"{place}: a document of more than {MOST_BYTES // 2**20} MiB"
    return UserError(f"{field}.path", problem, "Write a document a line (.jsonl), or split the file")


def _without_bom(data: bytes) -> bytes:
    return data.removeprefix(codecs.BOM_UTF8)


def _decode(data: bytes, path: Path, offset: int, field: str, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            remedy = "Convert the file: iconv -f UTF-16 -t UTF-8 OLD > NEW"
            raise UserError(f"{field}.path", f"{path} is UTF-16 and not UTF-8", remedy) from error
        if b"\0" in data:
            raise _binary(f"{path}" + (f", line {line}" if line else ""), field) from error
        place = f"{path}, byte {offset + error.start}" + (f" (line {line})" if line else "")
        problem = f"{place}: byte 0x{data[error.start]:02x} is not UTF-8"
        remedy = "Convert the file, e.g. iconv -f CP949 -t UTF-8 OLD > NEW, with the encoding that it really has"
        raise UserError(f"{field}.path", problem, remedy) from error


def _binary(place: str, field: str) -> UserError:
    remedy = "Remove the file, or convert it to UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)"
    return UserError(f"{field}.path", f"{place}: a NUL byte: it is a binary file, or UTF-16", remedy)


def _reject_nul(text: str, place: str, field: str) -> None:
    """A NUL stands in text files by mistake only: UTF-16 and tar archives can be valid UTF-8. JSON has to say \\u0000,
    and parquet knows its text from its numbers: there it is a character like any other."""
    if "\0" in text:
        raise _binary(place, field)


def _lines(stream: io.BufferedReader, path: Path, field: str) -> Iterator[str]:
    """Decoded lines with their line ends; a line ends at a line feed only."""
    offset = 0
    for number in itertools.count(1):
        raw = stream.readline(MOST_BYTES + 1)
        if not raw:
            return
        if len(raw) > MOST_BYTES:
            raise _too_long(f"{path}, line {number}", field)
        line = _without_bom(raw) if number == 1 else raw
        yield _decode(line, path, offset + len(raw) - len(line), field, number)
        offset += len(raw)


def _read_jsonl(stream: io.BufferedReader, path: Path, text_field: str, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, path, field), start=1):
        if line.isspace():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4,300 digits
            remedy = "Each line must be one JSON object; mend or remove the line"
            raise UserError(f"{field}.path", f"{place}: broken JSON ({error})", remedy) from error
        if not isinstance(row, dict):
            problem = f"{place}: a JSON {_json_type(row)} and not an object"
            raise UserError(f"{field}.path", problem, f'Each line must look like {{"{text_field}": "..."}}')
        if text_field not in row:
            raise _missing(place, text_field, list(row), field)
        text = row[text_field]
        if not isinstance(text, str):
            raise _not_text(place, text_field, _json_type(text), field)
        if "\\u" in line:  # the only way to a lone surrogate, since the line itself is valid UTF-8
            _reject_surrogates(text, place, text_field, field)
        yield text


def _reject_surrogates(text: str, place: str, text_field: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        problem = f'{place}: "{text_field}" holds the lone surrogate {code} at character {error.start}'
        raise UserError(
            f"{field}.path",
            problem,
            "It is half of a character; write the file again from its source, or remove the line",
        ) from error


def _read_csv(stream: io.BufferedReader, path: Path, text_field: str, field: str) -> Iterator[str]:
    # The limit belongs to the csv module, not to a reader; the default of 128 KiB is less than a long document.
    csv.field_size_limit(sys.maxsize)
    # strict: without it an unclosed quote swallows the rest of the file into one document.
    rows = csv.reader(_lines(stream, path, field), strict=True)
    header: list[str] | None = None
    column = 0
    try:
        for row in rows:
            if not row:
                continue
            place = f"{path}, line {rows.line_num}"
            if header is None:
                header = row
                if text_field not in header:
                    raise _missing(place, text_field, header, field)
                if header.count(text_field) > 1:
                    raise _twice(place, text_field, field)
                column = header.index(text_field)
                continue
            if len(row) != len(header):
                problem = f"{place}: {len(row)} fields where the header has {len(header)}"
                raise UserError(f"{field}.path", problem, "Put text that holds a comma or a line end in double quotes")
            text = row[column]
            if len(text) > MOST_BYTES:
                raise _too_long(place, field)
            _reject_nul(text, place, field)
            yield text
    except csv.Error as error:
        problem = f"{path}, line {rows.line_num}: broken CSV ({error})"
        remedy = "Fields are separated by commas, quoted with double quotes, and a quote inside is doubled"
        raise UserError(f"{field}.path", problem, remedy) from error


def _read_parquet(path: Path, text_field: str, field: str) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        problem = f"{path} is truncated or not a parquet file ({error})"
        raise UserError(f"{field}.path", problem, "Copy or download the file again") from error
    with file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise _missing(str(path), text_field, names, field)
        if names.count(text_field) > 1:
            raise _twice(str(path), text_field, field)
        kind = file.schema_arrow.field(text_field).type
        text_types = (pa.string(), pa.large_string(), pa.string_view())
        if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in text_types:
            raise _not_text(str(path), text_field, str(kind), field)
        left = _most_unpacked(path)
        if _unpacked_bytes(file.metadata, text_field) > left:
            raise _bomb(path, field)
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    text = _parquet_text(value, f"{path}, row {number}", text_field, field)
                    if len(text) > MOST_BYTES:
                        raise _too_long(f"{path}, row {number}", field)
                    left -= len(text)
                    if left < 0:
                        raise _bomb(path, field)
                    yield text
        except (OSError, pa.ArrowInvalid) as error:
            problem = f"{path}, after row {number}: damaged ({error})"
            raise UserError(f"{field}.path", problem, "Copy or download the file again") from error


def _unpacked_bytes(metadata: pq.FileMetaData, text_field: str) -> int:
    """What the pages of a column unpack to, as the file says."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    columns = (group.column(index) for group in groups for index in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)


def _parquet_text(value: Any, place: str, text_field: str, field: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        problem = f"{place}: byte {error.start} of the text, 0x{error.object[error.start]:02x}, is not UTF-8"
        raise UserError(f"{field}.path", problem, "Write the file again with its text as UTF-8") from error
    if text is None:
        raise _not_text(place, text_field, "null", field)
    return text


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _missing(place: str, text_field: str, names: list[str], field: str) -> UserError:
    there = ", ".join(map(repr, names)) or "none"
    problem = f"{place}: no field {text_field!r}; the fields there are {there}"
    return UserError(f"{field}.text_field", problem, "Set text_field to the one that holds the text")


def _twice(place: str, text_field: str, field: str) -> UserError:
    problem = f"{place}: more than one column is called {text_field!r}"
    return UserError(f"{field}.text_field", problem, "Rename all but the one that holds the text")


def _not_text(place: str, text_field: str, kind: str, field: str) -> UserError:
    problem = f"{place}: {text_field!r} is {kind} and not a string"
    return UserError(f"{field}.text_field", problem, "Set text_field to a field of text, or remove such rows")
