"""Rows, from text files to tensors: what a trainer sees, checked against the documents."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data import mixing, packing, rows
from steep.data.encoder import Encoder
from steep.data.packed_dataset import IGNORE
from steep.data.packing import Corpus, pack
from steep.data.sources import Source
from steep.errors import UserError

MAX_LENGTH = 16


def write_sources(folder: Path, drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sources = []
    for index, source in enumerate(drawn):
        path = folder / f"{index}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in source["texts"]))
        sources.append({"path": str(path)} | {name: value for name, value in source.items() if name != "texts"})
    return sources


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sources with documents of 1 to 3 rows, and options for `pack`."""
    weighted = draw(st.booleans())
    sources = []
    for index, role in enumerate(
        ["train", *draw(st.lists(st.sampled_from(["train", "replay", "heldout"]), max_size=3))]
    ):
        lengths = draw(st.lists(st.integers(0, 3 * MAX_LENGTH), min_size=1, max_size=12))
        # Texts that differ, but for a few that repeat one of the first source's.
        texts = [
            f"{'d' if draw(st.integers(0, 5)) == 0 else index}{n}" + "x" * length for n, length in enumerate(lengths)
        ]
        # A character alone: without BOS and EOS it is a single token, and cannot be trained.
        texts += draw(st.lists(st.sampled_from("abc"), max_size=3))
        sources.append({"texts": texts, "role": role})
        if role == "replay" or (role == "train" and weighted):
            sources[-1]["repeat"] = draw(st.booleans())
        if role != "heldout" and weighted:
            sources[-1]["weight"] = draw(st.floats(0.2, 5))
    options = {
        "max_length": MAX_LENGTH,
        "strategy": draw(st.sampled_from(["sequential", "best_fit"])),
        "replay_share": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "holdout": draw(st.sampled_from([0.0, 0.2])),
        "keep_duplicates": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }
    return sources, options


def pack_drawn(drawn: list[dict[str, Any]], options: dict[str, Any], tokenizer: Any, folder: Path) -> Corpus | None:
    try:
        return pack(write_sources(folder, drawn), tokenizer, cache_dir=folder, **options)
    except UserError as error:
        assert "left to train on" in error.problem or "times in an epoch" in error.problem  # 1,000 are the most
        return None


def split_row(row: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    """The pieces of a row, cut where positions start at 0."""
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], len(row["position_ids"])]
    return [
        {name: row[name][a:b].tolist() for name in ("input_ids", "labels", "position_ids")}
        for a, b in zip(starts, ends, strict=True)
    ]


@settings(max_examples=80, deadline=None)
@given(corpora())
def test_documents_are_rebuilt_from_the_rows(byte_tokenizer, no_eos_tokenizer, drawn):
    sources, options = drawn
    tokenizer = no_eos_tokenizer if options["seed"] == 3 else byte_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        corpus = pack_drawn(sources, options, tokenizer, Path(folder))
        if corpus is None:
            return
        rows = corpus.train
        expected: Counter[tuple[int, ...]] = Counter()
        for source, planned in zip(corpus.sources, corpus.mixture.planned, strict=True):
            for document, times in enumerate(planned.tolist()):
                if times:
                    expected[tuple(source.tokens(document).tolist())] += times
        # Pieces by the document that the index names; each time an epoch has it, its pieces follow from 0 to its end.
        found: Counter[tuple[int, ...]] = Counter()
        open_documents: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
        num_targets = padding = 0
        for index, row in enumerate(rows[i] for i in range(len(rows))):
            assert row["row"] == index
            assert all(value.dtype == torch.int64 for name, value in row.items() if name != "row")
            assert all(row[name].shape == (MAX_LENGTH,) for name in ("input_ids", "labels", "position_ids"))
            pieces = split_row(row)
            first, last = int(rows.row_first[index]), int(rows.row_first[index + 1])
            assert len(pieces) - (last - first) in (0, 1)
            for piece in pieces[last - first :]:
                assert piece["labels"] == [IGNORE] * len(piece["labels"])
                assert set(piece["input_ids"]) == {tokenizer.pad_token_id}
                padding += len(piece["labels"])
            for number, piece in zip(range(first, last), pieces, strict=False):
                assert piece["position_ids"] == list(range(len(piece["input_ids"])))
                assert piece["labels"] == [IGNORE, *piece["input_ids"][1:]]
                num_targets += len(piece["labels"]) - 1
                name = (int(rows.source[number]), int(rows.document[number]))
                open_documents.setdefault(name, []).append((int(rows.start[number]), piece["input_ids"]))
        for (source, document), parts in open_documents.items():
            whole = corpus.sources[source].tokens(document).tolist()
            covered = np.zeros(len(whole), int)
            for start, ids in parts:
                assert whole[start : start + len(ids)] == ids
                covered[start + (start > 0) : start + len(ids)] += 1
            assert len(set(covered)) == 1  # every token of it equally often: once for each time in the epoch
            found[tuple(whole)] += int(covered[0])
        assert found == expected
        assert num_targets == corpus.statistics["targets"] == sum((len(ids) - 1) * n for ids, n in expected.items())
        assert padding == corpus.statistics["padding"]
        if options["strategy"] == "sequential":
            assert padding <= len(rows) + MAX_LENGTH

        trained = set(expected)
        held = {tuple(document.tokens.tolist()) for documents in corpus.heldout.values() for document in documents}
        assert not trained & held


@settings(max_examples=15, deadline=None)
@given(corpora())
def test_the_same_seed_gives_the_same_rows(byte_tokenizer, drawn):
    sources, options = drawn
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first = pack_drawn(sources, options, byte_tokenizer, Path(one))
        second = pack_drawn(
            [dict(reversed(source.items())) for source in sources], options, byte_tokenizer, Path(other)
        )
        assert (first is None) == (second is None)
        if first is None or second is None:
            return
        assert len(first.train) == len(second.train)
        for index in range(len(first.train)):
            assert all(
                np.array_equal(first.train[index][name], second.train[index][name]) for name in first.train[index]
            )


def test_a_row_by_hand(tmp_path: Path, byte_tokenizer):
    (tmp_path / "x.txt").write_text("abcdefghij")  # 12 tokens
    row = pack(tmp_path / "x.txt", byte_tokenizer, max_length=8, cache_dir=tmp_path / "c", holdout=0)
    a, j = byte_tokenizer.convert_tokens_to_ids(["a", "j"])
    letters = list(range(a, j + 1))
    assert len(row.train) == 2
    assert row.train[0]["input_ids"].tolist() == [1, *letters[:7]]
    assert row.train[0]["labels"].tolist() == [IGNORE, *letters[:7]]
    assert row.train[0]["position_ids"].tolist() == [*range(8)]
    # g is seen again to predict h; </s> is 2; three places of padding follow.
    assert row.train[1]["input_ids"].tolist() == [*letters[6:], 2, 0, 0, 0]
    assert row.train[1]["labels"].tolist() == [IGNORE, *letters[7:], 2, IGNORE, IGNORE, IGNORE]
    assert row.train[1]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


@pytest.mark.parametrize(
    ("names", "pad"),
    [({"pad_token": "<pad>"}, 0), ({"pad_token": None}, 2), ({"pad_token": None, "eos_token": None}, 0)],
)
def test_padding_token(tmp_path: Path, byte_tokenizer, names: dict[str, str | None], pad: int):
    tokenizer = copy.deepcopy(byte_tokenizer)
    for name, token in names.items():
        setattr(tokenizer, name, token)
    (tmp_path / "x.txt").write_text("a")
    corpus = pack(tmp_path / "x.txt", tokenizer, max_length=8, cache_dir=tmp_path / "c", holdout=0)
    assert corpus.train[0]["input_ids"][-1] == pad


def pack_text(tmp_path: Path, tokenizer: Any, text: str = "a", **options: Any) -> Corpus:
    (tmp_path / "x.txt").write_text(text)
    return pack(tmp_path / "x.txt", tokenizer, max_length=8, cache_dir=tmp_path / "c", holdout=0, **options)


def test_padding_stays_inside_the_vocabulary(tmp_path: Path, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as many recipes do, without a row of the embeddings for it
    assert tokenizer.pad_token_id == size
    for vocab_size, pad in ((None, size), (size + 1, size), (size, 2)):
        assert pack_text(tmp_path, tokenizer, vocab_size=vocab_size).train[0]["input_ids"][-1] == pad
    tokenizer.eos_token = None
    tokenizer.eos_token_id = None
    assert pack_text(tmp_path, tokenizer, vocab_size=size).train[0]["input_ids"][-1] == 0


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, byte_tokenizer):
    largest = max(byte_tokenizer("az").input_ids)
    pack_text(tmp_path, byte_tokenizer, "az", vocab_size=largest + 1)
    for _ in range(2):  # from the cache too
        with pytest.raises(UserError, match=f"token id {largest}, and the model's ids end at {largest - 1}") as caught:
            pack_text(tmp_path, byte_tokenizer, "az", vocab_size=largest)
        assert caught.value.field == "model.name"
        assert "more tokens than the model" in caught.value.remedy


def test_a_tokenizer_without_eos_is_told_once(tmp_path: Path, byte_tokenizer, no_eos_tokenizer):
    told = "the tokenizer has no end token: documents will not be separated by one"
    sources = write_sources(tmp_path, [{"texts": ["ab"]}, {"texts": ["cd"]}])
    for tokenizer, times in ((byte_tokenizer, 0), (no_eos_tokenizer, 1)):
        assert pack(sources, tokenizer, cache_dir=tmp_path / "c", max_length=8).warnings.count(told) == times


def test_files_not_read_are_told(tmp_path: Path, byte_tokenizer):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.json", "c.pdf"):
        (tmp_path / "in" / name).write_text(name)
    corpus = pack(tmp_path / "in", byte_tokenizer, cache_dir=tmp_path / "c", max_length=8)
    told = "data.sources[0]: 2 files are of a kind that steep does not read (.json, .pdf): they were left out"
    assert corpus.warnings[0] == told
    [source] = corpus.statistics["sources"]
    assert (source["files"], source["files_not_read"]) == (1, 2)


@pytest.mark.parametrize("roles", [("train",), ("train", "heldout", "replay")])
def test_nothing_to_predict(tmp_path: Path, no_eos_tokenizer, roles: tuple[str, ...]):
    sources = write_sources(tmp_path, [{"texts": list("abc"), "role": role} for role in roles])
    with pytest.raises(UserError, match="nothing to predict") as caught:
        pack(sources, no_eos_tokenizer, cache_dir=tmp_path / "c", max_length=8, holdout=0)
    assert caught.value.field == "data.sources"


def test_rows_always_have_a_target(tmp_path: Path, no_eos_tokenizer):
    texts = [*"abcdefghijkl", "mn"]  # alone, the twelve letters would fill a row without a target
    [source] = write_sources(tmp_path, [{"texts": texts}])
    for strategy in ("sequential", "best_fit"):
        corpus = pack(source, no_eos_tokenizer, cache_dir=tmp_path / "c", max_length=8, holdout=0, strategy=strategy)
        assert len(corpus.train) == corpus.statistics["targets"] == 1


def test_train_and_replay_of_the_same_default_domain(tmp_path: Path, byte_tokenizer):
    for name in ("ko", "en"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "corpus.jsonl").write_text(json.dumps({"text": name}) + "\n")

    def packed(train: str | None, replay: str | None, role: str = "replay") -> Corpus:
        sources = [Source(path=str(tmp_path / "ko/corpus.jsonl"), domain=train)]
        sources.append(Source(path=str(tmp_path / "en/corpus.jsonl"), domain=replay, role=role))  # pyright: ignore[reportArgumentType]
        return pack(sources, byte_tokenizer, cache_dir=tmp_path / "c", max_length=8, holdout=0)

    for names in ((None, None), ("corpus", None), (None, "corpus")):
        with pytest.raises(UserError, match=r"\(train\) and .* \(replay\) are both called 'corpus'") as caught:
            packed(*names)
        assert caught.value.field == "data.sources[1].domain"
        assert "Give each a domain" in caught.value.remedy
    assert packed("both", "both").roles == {"both": "train"}
    assert packed("ko", None).roles == {"ko": "train", "corpus": "replay"}
    assert packed(None, None, "heldout").roles == {"corpus": "train"}  # what is trained, measured
    assert packed(None, None, "train").roles == {"corpus": "train"}


def test_held_out_text_of_a_trained_domain_by_its_name_alone(tmp_path: Path, byte_tokenizer):
    for name in ("ko/corpus", "en/corpus", "ko/corpus.heldout"):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"text": name}) + "\n")
    ko, en = str(tmp_path / "ko/corpus.jsonl"), str(tmp_path / "en/corpus.jsonl")

    def warnings(*sources: Source) -> list[str]:
        corpus = pack(sources, byte_tokenizer, cache_dir=tmp_path / "c", max_length=8, holdout=0)
        return [warning for warning in corpus.warnings if "measured as part of" in warning]

    for role in ("train", "replay"):
        trained = [Source(path=ko, role=role)] + [Source(path=str(tmp_path / "*/*heldout.jsonl"), domain="x")] * (
            role == "replay"
        )
        [warning] = warnings(*trained, Source(path=en, role="heldout"))
        assert warning.startswith(f"{en} (heldout) is measured as part of corpus, which {ko} ({role}) is called too")
        assert "domain: corpus if they belong together" in warning
    assert not warnings(Source(path=ko), Source(path=en, role="heldout", domain="corpus"))
    assert not warnings(Source(path=ko), Source(path=en, role="heldout", domain="en"))
    assert not warnings(Source(path=ko), Source(path=str(tmp_path / "ko/corpus.heldout.jsonl"), role="heldout"))


def test_one_encoder_reads_all_sources(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []

    class Counted(Encoder):
        def __init__(self, tokenizer: Any) -> None:
            made.append(tokenizer)
            super().__init__(tokenizer)

    monkeypatch.setattr(packing, "Encoder", Counted)
    sources = write_sources(tmp_path, [{"texts": ["ab"]}, {"texts": ["cd"]}, {"texts": ["ef"]}])
    pack(sources, byte_tokenizer, cache_dir=tmp_path / "c", max_length=8)
    assert made == [byte_tokenizer]


def test_fingerprint_follows_the_tokens_and_the_rows(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch):
    base = pack_text(tmp_path, byte_tokenizer, "abcdefghij").fingerprint
    assert pack_text(tmp_path, byte_tokenizer, "abcdefghij", seed=1).fingerprint != base
    assert pack_text(tmp_path, byte_tokenizer, "abcdefghik").fingerprint != base
    # A library of another version reads the text anew, and a run may go on where that gives the same tokens.
    monkeypatch.setattr(tokenizers, "__version__", "0.0.1")
    anew = pack_text(tmp_path, byte_tokenizer, "abcdefghij")
    assert not anew.sources[0].cached
    assert anew.fingerprint == base


def test_sources_in_every_form(tmp_path: Path, byte_tokenizer):
    (tmp_path / "x.txt").write_text("abc")
    (tmp_path / "y.txt").write_text("defg")
    one, two = tmp_path / "x.txt", str(tmp_path / "y.txt")
    options: dict[str, Any] = {"cache_dir": tmp_path / "c", "holdout": 0, "max_length": 8}
    for form in (one, str(one), Source(path=str(one)), {"path": str(one)}):
        assert pack(form, byte_tokenizer, **options).statistics["targets"] == 4
    for form in ([one, two], (Source(path=str(one)), {"path": two})):
        assert pack(form, byte_tokenizer, **options).statistics["targets"] == 9


@pytest.mark.parametrize(
    ("options", "field", "problem"),
    [
        ({"max_length": 7}, "data.max_length", "7 is less than 8"),
        ({"replay_share": 1.0}, "data.replay_share", "1.0 is not a share"),
        ({"replay_share": -0.1}, "data.replay_share", "-0.1 is not a share"),
        ({"holdout": float("nan")}, "data.holdout", "nan is not a share"),
        ({"strategy": "random"}, "data.packing", "'random' is unknown"),
        ({"seed": -1}, "training.seed", "-1 is negative"),
        ({"sources": []}, "data.sources", "there is no source"),
        ({"max_length": "64"}, "data.max_length", "'64' is not a whole number"),
        ({"seed": 4.2}, "training.seed", "4.2 is not a whole number"),
        ({"holdout": None}, "data.holdout", "None is not a number"),
        ({"sources": [{"path": "x", "weight": -1}]}, "data.sources[0].weight", "Give a number above 0"),
        ({"sources": ["x", {}]}, "data.sources[1]", "exactly one of path and hub"),
        ({"sources": {"pth": "x"}}, "data.sources[0].pth", "not a field of the run file. Did you mean 'path'?"),
        ({"sources": {"path": "x", "role": "trian"}}, "data.sources[0].role", "Give one of 'train', 'replay' or 'held"),
        ({"sources": "nowhere.txt"}, "data.sources[0].path", "nowhere.txt does not exist"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, byte_tokenizer, options: dict[str, Any], field: str, problem: str):
    sources = options.pop("sources", "x")
    with pytest.raises(UserError) as caught:
        pack(sources, byte_tokenizer, cache_dir=tmp_path, **options)
    assert caught.value.field == field
    assert problem in str(caught.value)


def test_cache_dir_and_progress(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "env"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen: list[tuple[int, int]] = []
    for name, text in (("x", "abc"), ("y", "defg")):
        (tmp_path / f"{name}.txt").write_text(text)
    sources = [tmp_path / "x.txt", tmp_path / "y.txt"]
    pack(sources, byte_tokenizer, progress=lambda documents, size, _: seen.append((documents, size)))
    assert seen == [(1, 3), (2, 7)]
    assert len(list((tmp_path / "env" / "tokens").glob("*.arrow"))) == 2
    monkeypatch.delenv("STEEP_CACHE")
    pack(sources[0], byte_tokenizer)
    assert len(list((tmp_path / "home/.cache/steep/tokens").glob("*.arrow"))) == 1


def test_statistics(tmp_path: Path, byte_tokenizer):
    sources = write_sources(
        tmp_path, [{"texts": ["abcd", "", "abcd", "efghij"]}, {"texts": ["held"], "role": "heldout"}]
    )
    figures = pack(sources, byte_tokenizer, cache_dir=tmp_path, max_length=8, holdout=0).statistics
    assert figures["heldout_documents"] == {"1": 1}
    first = figures["sources"][0]
    assert first["domain"] == "0"
    assert (first["files"], first["files_not_read"]) == (1, 0)
    assert (first["documents"], first["tokens"], first["characters"], first["bytes"]) == (3, 20, 14, 14)
    assert first["characters_per_token"] == first["bytes_per_token"] == 1
    assert first["duplicates"] == {"documents": 1, "tokens": 6}
    assert first["planned"] == {"documents": 2, "tokens": 14}
    assert figures["targets"] == 12


def test_rows_that_are_one_document_are_counted(tmp_path: Path, byte_tokenizer):
    """One that fills a row, one that fills two, two in one row, and one with padding behind it: of 5 rows 3."""
    sources = write_sources(tmp_path, [{"texts": ["efghij", "k" * 13, "ab", "cd", "abc"]}])
    rows = pack(sources, byte_tokenizer, cache_dir=tmp_path, max_length=8, holdout=0, strategy="best_fit").train
    assert len(rows) == 5
    assert rows.whole_rows == 3 / 5


def test_rows_reach_worker_processes(tmp_path: Path, byte_tokenizer):
    (tmp_path / "x.txt").write_text("abc" * 50)
    rows = pack(tmp_path / "x.txt", byte_tokenizer, cache_dir=tmp_path / "c", holdout=0, max_length=8).train
    copied = pickle.loads(pickle.dumps(rows))
    assert all(np.array_equal(copied[3][name], rows[3][name]) for name in rows[3])
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("strategy", ["sequential", "best_fit"])
def test_memory_grows_by_little_a_document_and_row(tmp_path: Path, byte_tokenizer, monkeypatch, strategy: str):
    """The largest memory of numpy and Python on the way from token files to a plan: 64 bytes a document, 16 a row."""
    for module in (mixing, packing, rows):
        monkeypatch.setattr(module, "_PART", 500)  # what is held of a part does not grow

    def peak(documents: int) -> np.ndarray:
        texts = [f"{number} text" + "x" * (number % 40) for number in range(documents)]
        texts[1::10] = texts[::10]  # a tenth comes twice
        sources = write_sources(tmp_path, [{"texts": texts}])
        options = {"cache_dir": tmp_path / "c", "max_length": MAX_LENGTH, "strategy": strategy}
        pack(sources, byte_tokenizer, **options)
        tracemalloc.start()
        corpus = pack(sources, byte_tokenizer, **options)
        assert corpus.fingerprint and corpus.statistics
        measured = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return np.array([measured, documents, len(corpus.train)])

    more = peak(9_000) - peak(3_000)
    assert more[0] <= 64 * more[1] + 16 * more[2]
