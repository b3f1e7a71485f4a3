"""Tokens: special tokens around a text and not in it, and a cache that is whole or not there."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from datasets import config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from steep.data import token_file, tokens
from steep.data.encoder import Encoder
from steep.data.sources import Source
from steep.data.tokens import TokenizedSource, tokenize
from steep.errors import UserError

Write = Callable[..., Path]
Make = Callable[..., PreTrainedTokenizerFast]


def run(path: Path, tokenizer: PreTrainedTokenizerFast | PythonBackend, cache: Path, **fields: str) -> TokenizedSource:
    source = Source(path=str(path), **fields)  # pyright: ignore[reportArgumentType]
    return tokenize(source, Encoder(tokenizer), cache, "data.sources[0]")


class Slow(PythonBackend):
    """A tokenizer without the `tokenizers` library: a character is a token."""

    def __init__(self, **names: str) -> None:
        self._ids = {name: index for index, name in enumerate(["<s>", "</s>", "<unk>"])}
        super().__init__(**names)

    @property
    def vocab_size(self) -> int:
        return 400

    def get_vocab(self) -> dict[str, int]:
        return self._ids | dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 100 + ord(token[0]) % 300)

    def _convert_id_to_token(self, index: int) -> str:
        return str(index)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize(
    ("options", "prefix", "eos"),
    [
        ({"bos": True}, [1], 2),
        ({"bos": False}, [], 2),
        ({"bos": True, "appends_eos": True}, [1], 2),
        ({"bos": True, "eos": False}, [1], None),
    ],
)
def test_affixes_follow_the_tokenizer(make_tokenizer: Make, options: dict[str, bool], prefix: list[int], eos: int):
    encoder = Encoder(make_tokenizer(**options))
    assert (encoder.prefix, encoder.eos) == (prefix, eos)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("appends_eos", [True, False])
def test_one_eos_at_the_end_of_each_document(
    make_tokenizer: Make, tmp_path: Path, write_jsonl: Write, bos: bool, appends_eos: bool
):
    tokenizer = make_tokenizer(bos=bos, appends_eos=appends_eos)
    result = run(write_jsonl(["the cat", "조문 sat"]), tokenizer, tmp_path)
    for index, text in enumerate(["the cat", "조문 sat"]):
        inside = tokenizer(text, add_special_tokens=False).input_ids
        assert result.tokens(index).tolist() == [1] * bos + inside + [2]
    assert (result.prefix_length, result.has_eos) == (int(bos), True)


@pytest.mark.parametrize("slow", [False, True])
def test_special_tokens_in_the_text_are_text(make_tokenizer: Make, tmp_path: Path, write_jsonl: Write, slow: bool):
    tokenizer = Slow(bos_token="<s>", eos_token="</s>", unk_token="<unk>") if slow else make_tokenizer()
    before = None if isinstance(tokenizer, Slow) else tokenizer.backend_tokenizer.to_str()
    text = "the cat</s> sat<s> on <pad>"
    assert 2 - slow in tokenizer(text).input_ids  # the tokenizer itself would end the document here
    result = run(write_jsonl([text]), tokenizer, tmp_path)
    ids = result.tokens(0).tolist()
    assert ids.count(2 - slow) == 1
    assert ids[-1] == 2 - slow
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        assert tokenizer.decode(ids[1:-1]) == text
        assert tokenizer.backend_tokenizer.to_str() == before
        assert tokenizer.backend_tokenizer.encode_special_tokens is False
    else:
        assert len(ids) == len(text) + 1


def test_the_ids_of_a_slow_tokenizer_are_those_of_the_text() -> None:
    tokenizer = ByT5Tokenizer()
    assert tokenizer("ab").input_ids == [100, 101, 1]  # it appends EOS
    encoder = Encoder(tokenizer)
    assert [row.tolist() for row in encoder.encode(["ab", "b"])] == [[100, 101], [101]]
    assert (encoder.prefix, encoder.eos) == ([], 1)


def test_a_tokenizer_that_changes_ids_when_it_adds_special_tokens_is_refused() -> None:
    class Replacing(Slow):
        def build_inputs_with_special_tokens(
            self, token_ids_0: list[int], token_ids_1: list[int] | None = None
        ) -> list[int]:
            return [0, *(number + 1 for number in token_ids_0)]

    with pytest.raises(UserError, match=r"ids for 'a' are \[197\] without special tokens and \[0, 198\] with them"):
        Encoder(Replacing(bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


def test_a_vocabulary_that_holds_eos_as_a_word_is_refused(tmp_path: Path, write_jsonl: Write):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "END": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="END")
    with pytest.raises(UserError, match=r"document 2 of .* encodes to the end-of-text id inside") as caught:
        run(write_jsonl(["a a", " ", "a END a"]), tokenizer, tmp_path)
    assert caught.value.field == "data.sources[0].path"


def test_truncation_and_padding_of_the_tokenizer_do_not_apply(make_tokenizer: Make, tmp_path: Path, write_jsonl: Write):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    result = run(write_jsonl(["x" * 50, "y"]), tokenizer, tmp_path)
    assert result.lengths.tolist() == [52, 3]


def test_columns(tmp_path: Path, write_jsonl: Write, tokenizer: PreTrainedTokenizerFast):
    texts = ["the cat", "", "법령", " \n", "nul\0"]
    result = run(write_jsonl(texts), tokenizer, tmp_path)
    kept = [text for text in texts if text.strip()]
    assert (len(result), result.empty, result.cached) == (3, 2, False)
    assert result.num_bytes.tolist() == [len(text.encode()) for text in kept]
    assert result.num_chars.tolist() == [len(text) for text in kept]
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in kept]
    assert [b"".join(int(half).to_bytes(8, "big") for half in row) for row in result.hashes] == digests
    assert result.lengths.dtype == result.num_bytes.dtype == np.int64
    assert [result.num_bytes_of(index) for index in range(3)] == result.num_bytes.tolist()
    assert [result.num_chars_of(index) for index in range(3)] == result.num_chars.tolist()
    kept_in_memory = [value for value in vars(result).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in kept_in_memory) == 8 * len(result) + 56  # and 48 a batch

    opened = datasets.Dataset.from_file(str(result.path))
    assert opened.column_names == ["input_ids", "text_hash", "num_bytes", "num_chars"]
    assert opened["text_hash"][:] == digests
    assert [row["input_ids"] for row in opened.to_list()] == [result.tokens(index).tolist() for index in range(3)]


def test_tokens_are_views_of_the_mapped_file(tmp_path: Path, write_jsonl: Write, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(token_file, "_BATCH_DOCUMENTS", 2)
    texts = ["a" * 5, "b" * 300_000, "c", "d" * 7, "e"]
    result = run(write_jsonl(texts), byte_tokenizer, tmp_path)
    before = pa.total_allocated_bytes()
    part = result.tokens(1, 100_000, 100_010)
    assert part.dtype == np.int32
    assert not part.flags.owndata
    assert not part.flags.writeable
    assert part.tolist() == byte_tokenizer("b" * 10, add_special_tokens=False).input_ids
    assert pa.total_allocated_bytes() == before
    for index, text in enumerate(texts):
        assert result.tokens(index).tolist() == [*byte_tokenizer(text).input_ids, 2]
    assert result.tokens(4, 1).tolist() == [*byte_tokenizer("e", add_special_tokens=False).input_ids, 2]
    assert result.tokens(0, 3, 99).tolist() == result.tokens(0).tolist()[3:]


def test_pickles_by_path(tmp_path: Path, write_jsonl: Write, tokenizer: PreTrainedTokenizerFast):
    result = run(write_jsonl(["the cat " * 5_000]), tokenizer, tmp_path)
    data = pickle.dumps(result)
    assert len(data) < 2_000
    assert pickle.loads(data).tokens(0).tolist() == result.tokens(0).tolist()


def test_the_cache_is_found_again_by_content(tmp_path: Path, write_jsonl: Write, tokenizer: PreTrainedTokenizerFast):
    cache = tmp_path / "cache"
    one, renamed = write_jsonl(["a", "b"], "one.jsonl"), write_jsonl(["a", "b"], "renamed.jsonl")
    first = run(one, tokenizer, cache)
    again = run(renamed, tokenizer, cache)
    assert (first.cached, again.cached) == (False, True)
    assert again.path == first.path
    assert again.hashes.tolist() == first.hashes.tolist()


def test_any_change_makes_a_new_cache(make_tokenizer: Make, tmp_path: Path, tokenizer, monkeypatch):
    cache = tmp_path / "cache"
    path = tmp_path / "x.jsonl"
    row = '{"text": "the cat", "other": "sat"}\n'
    path.write_text(row)
    base = run(path, tokenizer, cache)
    more_tokens = make_tokenizer()
    more_tokens.add_tokens(["cat"])
    other_eos = make_tokenizer()
    other_eos.eos_token = "<pad>"
    for changed in (more_tokens, other_eos, make_tokenizer(merges=False), make_tokenizer(bos=False)):
        assert not run(path, changed, cache).cached
    assert not run(path, tokenizer, cache, text_field="other").cached
    path.write_text(row + row)
    assert not run(path, tokenizer, cache).cached
    path.rename(tmp_path / "x.txt")
    assert not run(tmp_path / "x.txt", tokenizer, cache).cached
    assert len(list(cache.iterdir())) == 8
    monkeypatch.setattr(tokenizers, "__version__", "0.0.1")
    assert not run(tmp_path / "x.txt", tokenizer, cache).cached
    assert base.path in cache.iterdir()


def test_order_of_files_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    for folder, first, second in (("p", "one", "two"), ("q", "two", "one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.txt").write_text(first)
        (tmp_path / folder / "2.txt").write_text(second)
    assert run(tmp_path / "p", tokenizer, tmp_path / "c").path != run(tmp_path / "q", tokenizer, tmp_path / "c").path


def test_slow_tokenizers_are_cached_too(tmp_path: Path, write_jsonl: Write):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    path = write_jsonl(["abc"])
    assert [run(path, Slow(**names), tmp_path / "c").cached for _ in range(2)] == [False, True]


def test_a_hub_data_set_is_cached_by_its_fingerprint(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n')
    source = Source(hub=str(tmp_path / "set"))
    encoder = Encoder(tokenizer)
    assert [tokenize(source, encoder, tmp_path / "c", "s").cached for _ in range(2)] == [False, True]
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "another"}\n')
    assert not tokenize(source, encoder, tmp_path / "c", "s").cached


def test_nothing_but_empty_documents(tmp_path: Path, write_jsonl: Write, tokenizer: PreTrainedTokenizerFast):
    for _ in range(2):  # from the cache too
        with pytest.raises(UserError, match=r"holds no text \(2 empty documents\)") as caught:
            run(write_jsonl(["", "\t"]), tokenizer, tmp_path / "c")
        assert caught.value.field == "data.sources[0].path"
    with pytest.raises(UserError, match=r"holds no text \(1 empty document\)"):
        run(write_jsonl([""]), tokenizer, tmp_path / "c")


@pytest.mark.parametrize("around", [True, False])
def test_a_text_without_tokens_is_empty(make_tokenizer: Make, tmp_path: Path, write_jsonl: Write, around: bool):
    tokenizer = make_tokenizer(bos=around, eos=around)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")  # pyright: ignore[reportAttributeAccessIssue]
    path = write_jsonl(["the", "\u200b", "cat"])
    for _ in range(2):  # from the cache too
        result = run(path, tokenizer, tmp_path / "c")
        assert (len(result), result.empty) == (2, 1)
        assert result.lengths.min() > 2 * around
    with pytest.raises(UserError, match="holds no text"):
        run(write_jsonl(["\u200b"]), tokenizer, tmp_path / "c")


@pytest.mark.parametrize("around", [True, False])
def test_what_is_counted_on_the_way(make_tokenizer: Make, tmp_path: Path, write_jsonl: Write, around: bool):
    tokenizer = make_tokenizer(merges=False, bos=around, eos=around)
    result = run(write_jsonl(["abc", "법", ""]), tokenizer, tmp_path)
    assert result.text_tokens == 6
    assert result.largest_id == max(result.tokens(0).max(), result.tokens(1).max())
    same = run(write_jsonl(["", "abc", "법"]), tokenizer, tmp_path)
    assert same.path != result.path
    assert same.digest == result.digest
    assert run(write_jsonl(["abc", "뱁"]), tokenizer, tmp_path).digest != result.digest


def test_files_not_read_are_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt", "c.json", "d.pdf", "e.PDF"):
        (tmp_path / "in" / name).write_text(name)
    for _ in range(2):  # from the cache too
        result = run(tmp_path / "in", tokenizer, tmp_path / "c")
        assert (result.files, result.files_not_read) == (2, 3)
        assert result.warnings == [
            "data.sources[0]: 3 files are of a kind that steep does not read (.json, .pdf): they were left out"
        ]
    assert pickle.loads(pickle.dumps(result)).warnings == result.warnings
    single = run(tmp_path / "in" / "a.txt", tokenizer, tmp_path / "c")
    assert (single.files, single.files_not_read, single.warnings) == (1, 0, [])


@pytest.mark.parametrize("change", ["append", "rewrite", "remove"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, write_jsonl: Write, tokenizer, change: str):
    path, cache = write_jsonl(["old", "one"]), tmp_path / "c"
    content = path.read_bytes()
    os.utime(path, (1, 1))  # a clock may not tick between two writes of a test

    def touch(documents: int, size: int, budget: object) -> None:
        if change == "remove":
            path.unlink()
        else:
            path.write_bytes(content * 2 if change == "append" else content.replace(b"old", b"new"))

    with pytest.raises(UserError, match=r"corpus.jsonl changed while it was read") as caught:
        tokenize(Source(path=str(path)), Encoder(tokenizer), cache, "data.sources[0]", touch)
    assert caught.value.field == "data.sources[0].path"
    assert list(cache.iterdir()) == []
    path.write_bytes(content)
    assert not run(path, tokenizer, cache).cached


def test_a_change_between_naming_and_reading_is_seen(tmp_path: Path, write_jsonl: Write, tokenizer, monkeypatch):
    path, cache = write_jsonl(["old"]), tmp_path / "c"
    write_tokens = tokens.write_tokens

    def late(*arguments: object) -> None:
        write_jsonl(["new", "text"])
        write_tokens(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(tokens, "write_tokens", late)
    with pytest.raises(UserError, match="changed while it was read"):
        run(path, tokenizer, cache)
    monkeypatch.undo()
    assert len(run(write_jsonl(["old"]), tokenizer, cache)) == 1


def test_progress(tmp_path: Path, write_jsonl: Write, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_file, "_BATCH_DOCUMENTS", 2)
    seen: list[tuple[int, int]] = []
    source = Source(path=str(write_jsonl(["a", "법", "c", "", "d", "e"])))
    tokenize(source, Encoder(tokenizer), tmp_path, "s", lambda documents, size, _: seen.append((documents, size)))
    assert seen == [(2, 4), (3, 5), (5, 7)]


def test_a_cache_that_cannot_be_written_is_named_before_a_text_is_read(
    tmp_path: Path, write_jsonl: Write, tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """Also as root, whom permissions do not stop."""
    file = write_jsonl(["하나"])
    monkeypatch.setattr(token_file, "read_documents", lambda *_: pytest.fail("it was read"))
    for place in (file, file / "tokens", Path("/proc/x"), Path("/proc")):
        with pytest.raises(
            UserError, match=f"^data.cache_dir: {place} cannot be written into: .* folder you may write"
        ):
            run(file, tokenizer, place)


def test_an_error_midway_leaves_nothing(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_file, "_BATCH_DOCUMENTS", 2)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' * 50 + "broken\n")
    cache = tmp_path / "c"
    with pytest.raises(UserError, match="line 51"):
        run(path, tokenizer, cache)
    assert list(cache.iterdir()) == []


def test_a_killed_tokenisation_leaves_nothing_taken_for_whole(make_tokenizer: Make, tmp_path: Path, write_jsonl: Write):
    path, cache = write_jsonl(["the cat"] * 100), tmp_path / "c"
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(f"""
        import time
        from pathlib import Path
        from transformers import PreTrainedTokenizerFast
        from steep.data import token_file
        from steep.data.encoder import Encoder
        from steep.data.sources import Source
        from steep.data.tokens import tokenize
        token_file._BATCH_DOCUMENTS = 10
        def stop(documents, size, budget):
            if documents == 50:
                print("half", flush=True)
                time.sleep(60)
        tokenizer = PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tokenizer")!r})
        tokenize(Source(path={str(path)!r}), Encoder(tokenizer), Path({str(cache)!r}), "s", stop)
        """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        left = list(cache.iterdir())
        assert len(left) == 1 and left[0].name.startswith(".writing-")
        # While it runs, its file is left alone.
        assert not run(write_jsonl(["other"], "other.jsonl"), make_tokenizer(), cache).cached
        assert left[0].exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = run(path, make_tokenizer(), cache)
    assert not result.cached
    assert len(result) == 100
    assert not left[0].exists()
    assert {file.suffix for file in cache.iterdir()} == {".arrow"}


def test_temporary_files_of_other_hosts_are_left_alone(tmp_path: Path, write_jsonl: Write, tokenizer):
    other = tmp_path / ".writing-another-host-999999-abc"
    other.write_bytes(b"")
    run(write_jsonl(["a"]), tokenizer, tmp_path)
    assert other.exists()


@pytest.mark.parametrize(
    ("of", "to"),
    [
        (b'"prefix_length"', b'"prefix_lengtX"'),
        (b'"largest_id"', b'"largest_iX"'),
        (b'{"empty"', b'\xff"empty"'),
        (b"input_ids", b"\xff" * 9),
    ],
)
def test_a_cache_that_lies_is_damaged(
    of: bytes, to: bytes, tmp_path: Path, write_jsonl: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    refuse_changed(of, to, Source(path=str(write_jsonl(["a", "b", "c"]))), tokenizer, tmp_path)


def test_a_cache_whose_documents_overlap_is_damaged(
    tmp_path: Path, write_jsonl: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = Source(path=str(write_jsonl(["a", "bb", "ccc"])))
    lengths = tokenize(source, Encoder(tokenizer), tmp_path / "cache", "data.sources[0]").lengths
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    refuse_changed(offsets.tobytes(), offsets[[0, 2, 1, 3]].tobytes(), source, tokenizer, tmp_path)


def refuse_changed(of: bytes, to: bytes, source: Source, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    path = tokenize(source, Encoder(tokenizer), folder / "cache", "data.sources[0]").path
    content = path.read_bytes()
    assert content.count(of) == 1
    path.write_bytes(content.replace(of, to))
    with pytest.raises(UserError, match=r"cache .*\.arrow is damaged"):
        TokenizedSource(source, path, cached=True)


def test_a_damaged_cache_is_named(tmp_path: Path, write_jsonl: Write, tokenizer: PreTrainedTokenizerFast):
    path = write_jsonl(["the cat " * 100] * 50)
    result = run(path, tokenizer, tmp_path / "c")
    content = result.path.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 300):
        os.truncate(result.path, 0)
        result.path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged") as caught:
            run(path, tokenizer, tmp_path / "c")
        assert str(result.path) in caught.value.problem
        assert "Delete it" in caught.value.remedy


def test_batches_are_bounded_by_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_file, "_BATCH_CHARS", 10)
    batches = token_file._batches(["a" * 4, "b" * 5, " ", "c" * 2, "d" * 30, "e"])
    assert [[len(text) for text in batch] for batch in batches] == [[4, 5, 1], [2], [30], [1]]


def test_the_caller_works_while_threads_encode(tokenizer: PreTrainedTokenizerFast):
    """The next batch is read before the result of the one before is waited for."""
    events: list[str] = []

    class Watched:
        workers = 1

        def encode(self, texts: list[str]) -> list[np.ndarray]:
            time.sleep(0.05)
            events.append(f"encoded {texts[0]}")
            return [np.zeros(1, np.int32)]

    def texts():
        for name in "abc":
            events.append(f"read {name}")
            yield [name]

    assert [batch for batch, _ in token_file._encoded(texts(), Watched())] == [["a"], ["b"], ["c"]]  # pyright: ignore[reportArgumentType]
    assert events.index("read b") < events.index("encoded a")
