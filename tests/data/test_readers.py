"""Readers: documents come out as they stand in the file, and errors name file and place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steep.data.readers import read_documents
from steep.data.sources import Source
from steep.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
AWKWARD = [
    "plain",
    "two\nlines\r\nthree",
    'quo"ted, comma',
    "한국어 \U0001f600",
    " ",
    "\u2028\x85\x1c",
    "\ufeffbom",
]
NUL = "nul\0inside"  # in JSON and parquet; elsewhere it is a mark of binary files


def read(path: Path, **fields: str) -> list[str]:
    return list(read_documents(Source(path=str(path), **fields), "data.sources[0]"))  # pyright: ignore[reportArgumentType]


def failure(path: Path, **fields: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, **fields)
    return caught.value


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_the_same_documents_from_every_format(tmp_path: Path, packed: str, bom: bytes):
    jsonl = "".join(
        json.dumps({"id": 1, "text": text}, ensure_ascii=number % 2 == 0) + "\n\n"
        for number, text in enumerate([*AWKWARD, NUL])
    )
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["text", "id"], *([text, "1"] for text in AWKWARD)])
    for suffix, content, texts in (("jsonl", jsonl, [*AWKWARD, NUL]), ("csv", table.getvalue(), AWKWARD)):
        path = tmp_path / f"corpus.{suffix}{packed}"
        path.write_bytes(PACK[packed](bom + content.encode()))
        assert read(path) == texts
    for number, text in enumerate(AWKWARD[:-1]):
        path = tmp_path / f"{number}.{'md' if number % 2 else 'txt'}{packed}"
        path.write_bytes(PACK[packed](bom + text.encode()))
        assert read(path) == [text]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path: Path, kind: pa.DataType):
    texts = [*AWKWARD, NUL] * 200  # several row groups, several batches
    column = pa.array(texts).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"id": range(len(texts)), "text": column}), tmp_path / "x.parquet", row_group_size=700)
    assert read(tmp_path / "x.parquet") == texts


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8))
def test_json_lines_survive_any_text(tmp_path: Path, texts: list[str]):
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8", newline=""
    )
    assert read(path) == texts


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv.gz"])
def test_reading_is_streamed(tmp_path: Path, suffix: str):
    row = '{"text": "' + "x" * 10_000 + '"}\n' if "json" in suffix else "x" * 10_000 + "\n"
    (tmp_path / f"x{suffix}").write_bytes(
        gzip.compress((("" if "json" in suffix else "text\n") + row * 2_000).encode())
    )
    tracemalloc.start()
    count = sum(1 for _ in read_documents(Source(path=str(tmp_path / f"x{suffix}")), "s"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2_000
    assert peak < 4e6  # of 20 MB


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    ("suffix", "before"),
    [(".jsonl", b'{"text": "a"}\n{"text": "'), (".csv", b'text\n"'), (".txt", b"abc"), (".md", b"\xef\xbb\xbfabc")],
)
def test_not_utf8_names_the_byte(tmp_path: Path, packed: str, suffix: str, before: bytes):
    path = tmp_path / f"x{suffix}{packed}"
    path.write_bytes(PACK[packed](before + "조문".encode() + "조문".encode("cp949") + b'"}\n'))
    error = failure(path)
    assert error.field == "data.sources[0].path"
    assert f"{path}, byte {len(before) + 6}" in error.problem
    assert "0xc1 is not UTF-8" in error.problem
    assert "iconv" in error.remedy


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv.gz"])
def test_utf16_is_named(tmp_path: Path, suffix: str, encoding: str):
    path = tmp_path / f"x{suffix}"
    content = "\ufefftext\nlaw\n".encode(encoding)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    error = failure(path)
    assert error.field == "data.sources[0].path"
    assert error.problem == f"{path} is UTF-16 and not UTF-8"
    assert "iconv -f UTF-16 -t UTF-8" in error.remedy


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ('{"text": "x"', "path", "line 3: broken JSON"),
        ('{"text": ' + "9" * 5_000 + "}", "path", "line 3: broken JSON"),
        ("[" * 100_000, "path", "line 3: broken JSON"),
        ('["x"]', "path", "line 3: a JSON array and not an object"),
        ('"x"', "path", "line 3: a JSON string and not an object"),
        ('{"title": "x", "body": "y"}', "text_field", "line 3: no field 'text'; the fields there are 'title', 'body'"),
        ("{}", "text_field", "line 3: no field 'text'; the fields there are none"),
        ('{"text": null}', "text_field", "line 3: 'text' is null and not a string"),
        ('{"text": 1.5}', "text_field", "line 3: 'text' is number and not a string"),
        ('{"text": ["x"]}', "text_field", "line 3: 'text' is array and not a string"),
        ('{"text": "ab\\ud800"}', "path", 'line 3: "text" holds the lone surrogate \\ud800 at character 2'),
    ],
)
def test_broken_json_lines(tmp_path: Path, line: str, field: str, problem: str):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + '\n{"text": "b"}\n')
    error = failure(path)
    assert error.field == f"data.sources[0].{field}"
    assert f"{path}, {problem}" in error.problem


def test_a_surrogate_pair_is_one_character(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read(tmp_path / "x.jsonl") == ["\U0001f600"]


@pytest.mark.parametrize(
    ("content", "field", "problem"),
    [
        ("title,body\nx,y\n", "text_field", "line 1: no field 'text'; the fields there are 'title', 'body'"),
        ("text,id\nx,1\nhello, world,2\n", "path", "line 3: 3 fields where the header has 2"),
        ("text,id\nx\n", "path", "line 2: 1 fields where the header has 2"),
        ('text\n"open\nend\n', "path", "line 3: broken CSV (unexpected end of data)"),
    ],
)
def test_broken_csv(tmp_path: Path, content: str, field: str, problem: str):
    path = tmp_path / "x.csv"
    path.write_text(content)
    error = failure(path)
    assert error.field == f"data.sources[0].{field}"
    assert f"{path}, {problem}" in error.problem


def test_a_csv_field_may_be_long(tmp_path: Path):
    (tmp_path / "x.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert read(tmp_path / "x.csv") == ["x" * 200_000]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_or_mislabelled_packed_file(tmp_path: Path, suffix: str):
    rows = "".join(json.dumps({"text": f"{number} {number**7}"}) + "\n" for number in range(1_000)).encode()
    path = tmp_path / f"x.jsonl{suffix}"
    for content in (PACK[suffix](rows)[:-9], rows):
        path.write_bytes(content)
        error = failure(path)
        assert error.field == "data.sources[0].path"
        assert f"{path} is truncated or not a {suffix} file" in error.problem


def test_several_members_of_a_packed_file_are_one_text(tmp_path: Path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"x.jsonl{suffix}"
        path.write_bytes(PACK[suffix](b'{"text": "a"}\n') + PACK[suffix](b'{"text": "b"}\n'))
        assert read(path) == ["a", "b"]


def test_broken_parquet(tmp_path: Path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2], "raw": pa.array([b"ok", b"a\xff"], pa.binary())}), path)
    assert f"{path}, row 2: 'text' is null" in failure(path).problem
    assert (
        f"{path}: no field 'body'; the fields there are 'text', 'n', 'raw'" in failure(path, text_field="body").problem
    )
    assert f"{path}: 'n' is int64 and not a string" in failure(path, text_field="n").problem
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} is truncated or not a parquet file" in failure(path).problem


def test_parquet_text_that_is_not_utf8(tmp_path: Path):
    path = tmp_path / "x.parquet"
    raw = pa.array([b"ok", b"a\xff"], pa.binary())
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])}), path)
    error = failure(path)
    assert f"{path}, row 2: byte 1 of the text, 0xff, is not UTF-8" in error.problem
