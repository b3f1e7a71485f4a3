"""Data sets that are streamed: the tokens of a download, up to a budget, read once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import config
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import ValidationError

from steep.data import token_file
from steep.data.encoder import Encoder
from steep.data.packing import pack
from steep.data.sources import Source
from steep.data.tokens import TokenizedSource, tokenize
from steep.errors import UserError
from tests.hub import NAME, Hub

FIELD = "data.sources[0]"
LENGTHS = (3, 50, 7, 0, 20, 1, 9, 33)
ROWS = [{"text": "x" * length, "n": length} for length in LENGTHS]  # a byte is a token, with two around: 137 in all


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "downloads")
    datasets.disable_progress_bars()
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def read(tmp_path: Path, byte_tokenizer: Any) -> Any:
    def tokenized(cache: str = "cache", **fields: Any) -> TokenizedSource:
        source = Source.model_validate({"hub": NAME, "stream": True, "max_tokens": 1_000, **fields})
        return tokenize(source, Encoder(byte_tokenizer), tmp_path / cache, FIELD)

    return tokenized


def token_lists(result: TokenizedSource) -> list[list[int]]:
    return [result.tokens(index).tolist() for index in range(len(result))]


@pytest.mark.parametrize("max_tokens", [5, 60, 65, 137, 1_000])
def test_the_same_tokens_as_those_of_a_download(hub: Hub, read: Any, max_tokens: int):
    hub.commit(ROWS[:3], ROWS[3:])
    streamed = read(max_tokens=max_tokens)
    stored = read(stream=False, max_tokens=max_tokens)
    assert streamed.path != stored.path
    assert (streamed.digest, streamed.stopped, streamed.empty) == (stored.digest, stored.stopped, stored.empty)
    assert token_lists(streamed) == token_lists(stored)
    assert np.array_equal(streamed.hashes, stored.hashes)
    whole = token_lists(read(stream=False, max_tokens=None))
    assert token_lists(streamed) == whole[: len(streamed)]


@pytest.mark.parametrize(
    ("max_tokens", "documents", "tokens", "empty", "stopped"),
    [
        (5, 1, 5, 0, True),
        (56, 1, 5, 0, True),  # the second would pass it, and is left out whole
        (57, 2, 57, 0, True),
        (66, 3, 66, 1, True),
        (87, 3, 66, 1, True),  # the last one that is taken fits to the token, or not at all
        (136, 6, 102, 1, True),
        (137, 7, 137, 1, False),
        (500, 7, 137, 1, False),
    ],
)
def test_documents_are_whole_up_to_the_budget(
    hub: Hub, read: Any, monkeypatch: pytest.MonkeyPatch, max_tokens, documents, tokens, empty, stopped
):
    hub.commit(ROWS)
    found = []
    for batch in (1, 2, 1_000):
        monkeypatch.setattr(token_file, "_BATCH_DOCUMENTS", batch)
        result = read(f"cache-{batch}", max_tokens=max_tokens)
        found.append((len(result), int(result.lengths.sum()), result.empty, result.stopped))
    assert found == [(documents, tokens, empty, stopped)] * 3


def test_what_the_budget_did_is_said(hub: Hub, read: Any, caplog: pytest.LogCaptureFixture):
    hub.commit(ROWS)
    with caplog.at_level("INFO", "steep"):
        assert read(max_tokens=60).warnings == []
    messages = [record.getMessage() for record in caplog.records if record.name == "steep"]
    assert messages == [
        f"tokenising {NAME}",
        f"{FIELD}: 2 documents with 57 tokens of {NAME} are read; the next one would pass max_tokens, 60",
    ]
    [warning] = read(max_tokens=1_000).warnings
    assert (
        warning
        == f"{FIELD}: 7 documents with 137 tokens of {NAME} are all there is, fewer tokens than max_tokens, 1,000"
    )


def test_files_have_a_budget_too(tmp_path: Path, byte_tokenizer: Any, write_jsonl: Any):
    path = write_jsonl(["abc", "defgh"])
    encoder = Encoder(byte_tokenizer)
    part, whole = (tokenize(Source(path=str(path), max_tokens=limit), encoder, tmp_path, FIELD) for limit in (6, None))
    assert (len(part), part.stopped) == (1, True)
    assert (len(whole), whole.stopped, whole.warnings) == (2, False, [])


def test_a_first_document_beyond_the_budget(hub: Hub, read: Any):
    hub.commit(ROWS[1:])
    for _ in range(2):  # from the cache too
        with pytest.raises(UserError, match="first document of someone/corpus has more than 51 tokens") as caught:
            read(max_tokens=51)
        assert caught.value.field == f"{FIELD}.max_tokens"


def test_no_more_is_pulled_than_the_batches_under_way(hub: Hub, read: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_file, "_BATCH_DOCUMENTS", 4)
    hub.commit([{"text": "abc"}] * 500, "this is no JSON\n")
    result = read(max_tokens=5 * 10)
    assert len(result) == 10
    assert hub.pulled <= 4 * (3 + 2) + 1  # three batches with the first that is left out, two ahead, and a row
    assert len(read(max_tokens=5 * 499)) == 499  # what is wrong behind the budget is not looked at
    with pytest.raises(UserError, match="broke off after 500 rows"):
        read(max_tokens=5 * 501)


def test_a_second_start_reads_no_stream(hub: Hub, read: Any):
    commit = hub.commit(ROWS)
    first = read()
    assert (first.cached, first.source.revision, hub.opened) == (False, commit, 1)
    again = read()
    assert (again.cached, again.source.revision, hub.opened) == (True, commit, 1)
    assert again.path == first.path
    assert "cannot be reached" not in str(again.warnings)


def test_a_second_start_offline(hub: Hub, read: Any):
    commit = hub.commit(ROWS)
    first = read()
    hub.offline = True
    again = read()
    assert (again.cached, again.source.revision, again.path) == (True, commit, first.path)
    assert again.warnings[0] == (
        f"{FIELD}: the hub cannot be reached; {NAME} is taken as it was read before, at commit {commit}"
    )
    for other in ({"max_tokens": 999}, {"text_field": "n"}, {"revision": "v1"}, {"split": "test"}, {"subset": "ko"}):
        with pytest.raises(UserError, match="the hub cannot be reached, and the cache holds no tokens of") as caught:
            read(**other)
        assert caught.value.field == f"{FIELD}.hub"
    assert hub.opened == 1


def test_offline_it_is_the_commit_that_was_read_last(hub: Hub, read: Any):
    old = hub.commit(ROWS)
    first = read()
    new = hub.commit(ROWS[:2])
    second = read()
    assert (first.path != second.path, len(first), len(second)) == (True, 7, 2)
    hub.offline = True
    assert read().source.revision == new
    # A commit that is named is found without the hub, and without a word about it.
    pinned = read(revision=old)
    assert (pinned.cached, pinned.path, len(pinned.warnings)) == (True, first.path, 1)
    with pytest.raises(UserError, match="offline"):
        read(revision="f" * 40)
    second.path.unlink()
    with pytest.raises(UserError, match="the cache holds no tokens"):
        read()


def test_the_revision_is_part_of_the_key(hub: Hub, read: Any):
    hub.commit(ROWS)
    main, tag = read(), read(revision="v1")
    assert (tag.path, tag.cached) == (main.path, True)  # the same commit under another name
    hub.commit(ROWS)
    assert not read().cached


def test_a_connection_that_is_lost_leaves_nothing(hub: Hub, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_file, "_BATCH_DOCUMENTS", 1)
    hub.commit(ROWS)
    hub.lost_after = 5
    with pytest.raises(UserError, match=r"broke off after 5 rows \(Server Disconnected\)") as caught:
        read()
    assert caught.value.field == f"{FIELD}.hub"
    assert "Start again" in caught.value.remedy
    assert list((tmp_path / "cache").iterdir()) == []
    hub.offline = True
    with pytest.raises(UserError, match="the cache holds no tokens"):
        read()
    hub.offline, hub.lost_after = False, None
    result = read()
    assert (result.cached, len(result)) == (False, 7)


def test_a_stream_that_ends_early(hub: Hub, read: Any):
    told = "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - {name: n, dtype: int64}\n"
    told += "  splits:\n  - {name: train, num_bytes: 100, num_examples: 9}\n---\n"
    hub.commit(ROWS, readme=told)
    with pytest.raises(UserError, match="ended after 8 of 9 rows"):
        read()
    assert len(read(max_tokens=60)) == 2  # what is asked for is there
    hub.commit(ROWS, readme=told.replace("num_examples: 9", "num_examples: 8"))
    assert len(read()) == 7


@pytest.mark.parametrize("known", [True, False])
def test_fields_without_text(hub: Hub, read: Any, monkeypatch: pytest.MonkeyPatch, known: bool):
    hub.commit([*ROWS, {"text": None, "n": 1}])
    if not known:  # as when `datasets` does not look at the files first
        monkeypatch.setattr(datasets.IterableDataset, "column_names", property(lambda _: None))
    with pytest.raises(UserError, match="no field 'body'; the fields there are 'text', 'n'") as caught:
        read(text_field="body")
    assert caught.value.field == f"{FIELD}.text_field"
    with pytest.raises(UserError, match=r"row 1: 'n' is int and not a string"):
        read(text_field="n")
    with pytest.raises(UserError, match=r"row 9: 'text' is null and not a string"):
        read()


def test_an_unknown_split(hub: Hub, read: Any):
    hub.commit(ROWS)
    with pytest.raises(UserError, match="Bad split: test") as caught:
        read(split="test")
    assert caught.value.remedy == "Correct subset or split"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"hub": "a/b", "stream": True}, "Stream needs max_tokens"),
        ({"path": "x.txt", "stream": True, "max_tokens": 5}, "Stream belongs to a hub data set"),
        ({"hub": "a/b", "max_tokens": 0}, "Give a number above 0"),
        ({"hub": "a/b", "max_tokens": True}, "Give a whole number"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, byte_tokenizer: Any, fields: dict[str, Any], problem: str):
    with pytest.raises(ValidationError):
        Source.model_validate(fields)
    with pytest.raises(UserError, match=problem):
        pack(fields, byte_tokenizer, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (lambda: HFValidationError("Repo id must be"), "is no name of a data set on the hub"),
        (lambda: http_error(404), "is not to be had at revision main"),
        (lambda: http_error(401), "is not to be had at revision main"),
        (lambda: http_error(503), "the hub cannot be reached"),
        (lambda: http_error(429), "the hub cannot be reached"),
        (lambda: ConnectionError("no network"), "the hub cannot be reached"),
    ],
)
def test_what_the_hub_answers(hub: Hub, read: Any, monkeypatch: pytest.MonkeyPatch, error: Any, problem: str):
    def refuse(*_: object, **__: object) -> None:
        raise error()

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(UserError, match=problem) as caught:
        read()
    assert caught.value.field == f"{FIELD}.hub"
    assert hub.opened == 0


def http_error(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, request=None, headers={})
    return HfHubHTTPError("no", response=response)


def test_the_downloads_of_another_revision_are_not_taken(hub: Hub, read: Any, monkeypatch: pytest.MonkeyPatch):
    """Without a connection `datasets` opens what it has, with a log line only."""
    commit = hub.commit(ROWS)
    load = datasets.load_dataset

    def from_its_cache(*arguments: Any, **options: Any) -> Any:
        data = load(*arguments, **options)
        data.info.builder_name = "cache"
        return data

    monkeypatch.setattr(datasets, "load_dataset", from_its_cache)
    with pytest.raises(UserError, match="cannot be streamed"):
        read(revision=commit)


def test_offline_for_real(tmp_path: Path):
    code = (
        "from pathlib import Path\n"
        "from steep.data.encoder import Encoder\n"
        "from steep.data.sources import Source\n"
        "from steep.data.tokens import tokenize\n"
        "from steep.errors import UserError\n"
        "from tests.data.conftest import make_tokenizer\n"
        "for revision in (None, 'a' * 40):\n"
        "    source = Source(hub='nobody/nothing', stream=True, max_tokens=9, revision=revision)\n"
        f"    try:\n        tokenize(source, Encoder(make_tokenizer()), Path({str(tmp_path)!r}), 's')\n"
        "    except UserError as error:\n        print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    asked, pinned = done.stdout.splitlines()
    assert asked.startswith("s.hub: the hub cannot be reached, and the cache holds no tokens of nobody/nothing")
    assert pinned.startswith("s.hub: nobody/nothing cannot be loaded")


def test_what_is_recorded(hub: Hub, tmp_path: Path, byte_tokenizer: Any):
    commit = hub.commit([{"text": f"{number} text"} for number in range(40)])
    sources = [{"hub": NAME, "stream": True, "max_tokens": 200, "domain": "a"}]
    corpus = pack(sources, byte_tokenizer, cache_dir=tmp_path, max_length=16)
    [source] = corpus.statistics["sources"]
    assert (source["path"], source["revision"], source["streamed"]) == (NAME, commit, True)
    assert (source["max_tokens"], source["stopped"], source["files"]) == (200, True, 0)
    assert 190 < source["tokens"] <= 200
    none = np.zeros(len(corpus.train), int)
    assert corpus.ledger(none, none)["sources"][0]["revision"] == commit
