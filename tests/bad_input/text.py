"""Text that cannot be read, or not be trained."""

from __future__ import annotations

import gzip

import pyarrow as pa
import zstandard

from tests.bad_input.damage import flipped, line, setting, sources, text_file, text_folder
from tests.bad_input.table import field, in_order, parquet, row

TEXT = [
    row(
        "no text", "data.sources[0].path", lambda s: s.text.unlink(), "text.jsonl does not exist", "Check the spelling"
    ),
    row("an empty file", "data.sources[0].path", text_file(""), "holds no text (no document)", "text in it"),
    row(
        "empty documents alone",
        "data.sources[0].path",
        text_file('{"text": ""}\n\n{"text": " "}\n'),
        "holds no text (2 empty documents)",
    ),
    row("an empty folder", "data.sources[0].path", text_folder(), "holds no file that steep reads", ".jsonl"),
    row("no suffix of ours", "data.sources[0].path", text_folder("a.pdf"), "1 other files there", "Supported suffixes"),
    row(
        "a glob for nothing",
        "data.sources[0].path",
        setting("data.sources.0.path", "/none/*.txt"),
        "no file matches /none/*.txt",
        "pattern",
    ),
    row(
        "a binary file",
        "data.sources[0].path",
        text_file(b"text" + bytes(range(256)), "text.txt"),
        "text.txt: a NUL byte",
        "binary file",
    ),
    row(
        "a binary file that is UTF-8",
        "data.sources[0].path",
        text_file("hello".encode("utf-16-le"), "text.txt"),
        "text.txt: a NUL byte",
        "binary",
    ),
    row("NUL in CSV", "data.sources[0].path", text_file("text\na\x00b\n", "text.csv"), "text.csv, line 2: a NUL byte"),
    row("NUL in JSON", "data.sources[0].path", line('{"text": "a\x00b"}'), "line 41", "broken JSON"),
    row(
        "Latin-1", "data.sources[0].path", text_file(b'{"text": "caf\xe9"}\n'), "byte 13", "0xe9 is not UTF-8", "iconv"
    ),
    row(
        "UTF-16 text",
        "data.sources[0].path",
        text_file('{"text": "a"}'.encode("utf-16")),
        "is UTF-16",
        "iconv -f UTF-16",
    ),
    row(
        "a broken line", "data.sources[0].path", line('{"text": '), "text.jsonl, line 41: broken JSON", "mend or remove"
    ),
    row("one array", "data.sources[0].path", text_file('[{"text": "a"}]'), "line 1: a JSON array and not an object"),
    row(
        "a lone surrogate",
        "data.sources[0].path",
        line('{"text": "a\\ud800"}'),
        "line 41",
        "the lone surrogate \\ud800 at character 1",
    ),
    row(
        "a surrogate in UTF-8",
        "data.sources[0].path",
        text_file(b'{"text": "\xed\xa0\x80"}\n'),
        "line 1",
        "0xed is not UTF-8",
    ),
    row("a number", "data.sources[0].text_field", line('{"text": 5}'), "line 41: 'text' is number", "field of text"),
    row("null", "data.sources[0].text_field", line('{"text": null}'), "line 41: 'text' is null", "field of text"),
    row(
        "no such text_field",
        "data.sources[0].text_field",
        setting("data.sources.0.text_field", "body"),
        "line 1: no field 'body'",
        "the fields there are 'text'",
    ),
    row(
        "no such column", "data.sources[0].text_field", text_file("body\nx\n", "text.csv"), "no field 'text'", "'body'"
    ),
    row("an open quote", "data.sources[0].path", text_file('text\n"open\nend\n', "text.csv"), "line 3: broken CSV"),
    row(
        "truncated parquet",
        "data.sources[0].path",
        text_file(parquet({"text": ["a"] * 50})[:-9], "text.parquet"),
        "text.parquet is truncated",
        "again",
    ),
    row(
        "damaged parquet",
        "data.sources[0].path",
        text_file(flipped(parquet({"text": [str(n) * 9 for n in range(50)]}), 0.02, 0.2), "text.parquet"),
        "text.parquet, after row 0: damaged",
    ),
    row(
        "numbers in parquet",
        "data.sources[0].text_field",
        text_file(parquet({"text": [1, 2]}), "text.parquet"),
        "'text' is int64",
    ),
    row(
        "null in parquet",
        "data.sources[0].text_field",
        text_file(parquet({"text": ["a", None]}), "text.parquet"),
        "row 2: 'text' is null",
    ),
    row(
        "truncated gzip",
        "data.sources[0].path",
        text_file(gzip.compress(b'{"text": "a"}\n')[:-5], "text.jsonl.gz"),
        "text.jsonl.gz is truncated",
        "again",
    ),
    row("no gzip", "data.sources[0].path", text_file("plain", "text.txt.gz"), "not a .gz file"),
    row(
        "two columns of one name",
        "data.sources[0].text_field",
        text_file("text,text\na,b\n", "text.csv"),
        "text.csv, line 1: more than one column is called 'text'",
        "Rename",
    ),
    row(
        "two columns of one name in parquet",
        "data.sources[0].text_field",
        text_file(parquet(pa.table([["a"], ["b"]], names=["text", "text"])), "text.parquet"),
        "text.parquet: more than one column is called 'text'",
    ),
    row(
        "a bomb of zstd",
        "data.sources[0].path",
        text_file(zstandard.compress(bytes(100 * 2**20)), "text.jsonl.zst"),
        "text.jsonl.zst unpacks to more than 200 times its size",
    ),
    row(
        "a page of parquet that is a bomb",
        "data.sources[0].path",
        text_file(parquet({"text": ["x" * 70 * 2**20]}, "zstd"), "text.parquet"),
        "text.parquet unpacks to more than 200 times its size",
    ),
    row(
        "a bomb",
        "data.sources[0].path",
        text_file(gzip.compress(bytes(100 * 2**20)), "text.txt.gz"),
        "text.txt.gz unpacks to more than 200 times its size",
    ),
    row(
        "all held out",
        "data.sources",
        setting("data.holdout", 0.999999999),
        "no document is left to train on",
        "lower data.holdout",
    ),
    row(
        "only replay",
        "data.sources",
        setting("data.sources.0.role", "replay"),
        "no document is left to train on",
        "role train",
    ),
    row(
        "no such role",
        "data.sources[0].role",
        setting("data.sources.0.role", "validation"),
        "'validation' is not valid",
        "'heldout'",
    ),
    row(
        "too small a budget",
        "data.sources[0].max_tokens",
        setting("data.sources.0.max_tokens", 3),
        "more than 3 tokens",
        "Raise it",
    ),
    row(
        "path and hub",
        "data.sources[0]",
        setting("data.sources.0.hub", "a/b"),
        "exactly one of path and hub, and has both",
    ),
    *(
        field("data.sources.0.weight", weight, f"{weight} is not valid", "Give")
        for weight in (0, -1, float("nan"), float("inf"), -1e-9)
    ),
    row(
        "a weight without data",
        "data.sources[1]",
        sources({"path": "FOLDER/text.jsonl", "weight": 1}, {"path": "FOLDER/copy.jsonl", "weight": 1}),
        "copy.jsonl has a weight, but no document of it is left",
        "Remove the source",
    ),
    row(
        "a weight on one of two",
        "data.sources[1].weight",
        sources({"path": "FOLDER/text.jsonl", "weight": 1}, {"path": "FOLDER/korean.jsonl"}),
        "korean.jsonl has no weight",
        "or none",
    ),
    row(
        "a weight that repeats too often",
        "data.sources[1].weight",
        sources(
            {"path": "FOLDER/text.jsonl", "weight": 1},
            {"path": "FOLDER/korean.jsonl", "weight": 1000000000.0, "repeat": True},
        ),
        "would stand",
        "times in an epoch",
        "1,000 times is the most",
    ),
    *(
        row(
            f"a file as train and {role}",
            "data.sources[1].path",
            sources({"path": "FOLDER/text.jsonl", "domain": "a"}, {"path": "FOLDER/te*.jsonl", "role": role}),
            f"text.jsonl is read here as {role}, and by data.sources[0] as train",
        )
        for role in ("replay", "heldout")
    ),
    row(
        "two domains of one name",
        "data.sources[1].domain",
        sources({"path": "FOLDER/text.jsonl"}, {"path": "FOLDER/other/text.jsonl", "role": "replay"}),
        "are both called 'text'",
        "Give each a domain",
    ),
    row(
        "nothing to evaluate on",
        "training.eval_steps",
        in_order,
        "no held-out text",
        "Raise data.holdout",
        words=("--data.holdout", "0", "--training.eval_steps", "1"),
    ),
]

# Of 5 MiB: what is tokenised before it is found is four of them, where that much is allowed.
A_TEXT_MANY_TIMES = row(
    "a long text many times in parquet",
    "data.sources[0].path",
    text_file(parquet({"text": ["x" * 2**16] * 80}), "text.parquet"),
    "text.parquet unpacks to more than 200 times its size",
)
