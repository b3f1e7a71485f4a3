"""Which documents are trained: sides by text, quotas by weight and replay share, all by the seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steep.data import mixing
from steep.data.mixing import Side
from steep.data.packing import Corpus, pack
from steep.errors import UserError

Pack = Callable[..., Corpus]


@pytest.fixture
def pack_texts(tmp_path: Path, byte_tokenizer) -> Pack:
    """Pack sources given as (texts, fields); a text of n ASCII characters has n + 2 tokens."""

    def run(*sources: tuple[list[str], dict[str, Any]], **options: Any) -> Corpus:
        given = []
        for index, (texts, fields) in enumerate(sources):
            path = tmp_path / f"source{index}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            given.append({"path": str(path)} | fields)
        return pack(
            given, byte_tokenizer, **{"max_length": 16, "cache_dir": tmp_path / "cache", "holdout": 0.0} | options
        )

    return run


def texts(name: str, count: int, length: int = 20) -> list[str]:
    return [f"{name}{number}".ljust(length, ".") for number in range(count)]


def tokens(corpus: Corpus) -> dict[str, int]:
    return {row["domain"]: row["tokens"] for row in corpus.mixing["sources"]}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_holdout_is_a_share_decided_by_the_text(pack_texts: Pack, share: float):
    documents = texts("a", 2_000)
    corpus = pack_texts((documents, {}), holdout=share)
    side = corpus.sides[0]
    assert set(side) <= {Side.TRAIN, Side.HELD_OUT}
    assert abs((side == Side.HELD_OUT).mean() - share) < 0.04
    # The same text falls on the same side, whatever stands around it and whatever the seed.
    backwards = pack_texts((documents[::-1], {}), (["another"], {}), holdout=share, seed=1)
    assert backwards.sides[0][::-1].tolist() == side.tolist()


def test_a_larger_holdout_contains_a_smaller_one(pack_texts: Pack):
    small, large = (pack_texts((texts("a", 500), {}), holdout=share).sides[0] for share in (0.1, 0.3))
    assert ((small == Side.HELD_OUT) <= (large == Side.HELD_OUT)).all()


def test_exact_duplicates_over_all_sources(pack_texts: Pack):
    sources = [(["a", "b", "a"], {}), (["b", "c"], {"role": "replay"})]
    corpus = pack_texts(*sources, replay_share=0.5)
    keep, drop = Side.TRAIN, Side.DUPLICATE
    assert [side.tolist() for side in corpus.sides] == [[keep, keep, drop], [drop, keep]]
    kept = pack_texts(*sources, replay_share=0.5, keep_duplicates=True)
    assert [side.tolist() for side in kept.sides] == [[keep] * 3, [keep] * 2]


def test_text_of_a_heldout_source_is_never_trained(pack_texts: Pack):
    corpus = pack_texts((["a", "b", "a", "c"], {"domain": "t"}), (["a", "h", "h"], {"role": "heldout", "domain": "h"}))
    assert corpus.sides[0].tolist() == [Side.HELD_OUT_ELSEWHERE, Side.TRAIN, Side.DUPLICATE, Side.TRAIN]
    assert corpus.sides[1].tolist() == [Side.HELD_OUT, Side.HELD_OUT, Side.DUPLICATE]
    assert set(corpus.heldout) == {"h"}
    assert [document.num_bytes for document in corpus.heldout["h"]] == [1, 1]
    assert corpus.roles == {"t": "train", "h": "heldout"}
    kept = pack_texts((["a", "b", "a"], {}), (["a"], {"role": "heldout"}), keep_duplicates=True)
    assert kept.sides[0].tolist() == [Side.HELD_OUT_ELSEWHERE, Side.TRAIN, Side.HELD_OUT_ELSEWHERE]


def test_a_domain_that_is_trained_and_held_out(pack_texts: Pack):
    corpus = pack_texts(
        (["a"], {"domain": "d"}), (["h"], {"role": "heldout", "domain": "d"}), (["r"], {"role": "replay"})
    )
    assert corpus.roles == {"d": "train", "source2": "replay"}


def test_heldout_documents(pack_texts: Pack, byte_tokenizer):
    documents = texts("a", 300)
    corpus = pack_texts((documents, {"domain": "d"}), holdout=0.2)
    held = corpus.heldout["d"]
    expected = [text for text, side in zip(documents, corpus.sides[0], strict=True) if side == Side.HELD_OUT]
    assert [byte_tokenizer.decode(document.tokens, skip_special_tokens=True) for document in held] == expected
    assert held[0].tokens.dtype == np.int32
    assert (held[0].num_tokens, held[0].num_bytes, held[0].num_chars) == (22, 20, 20)
    assert [document.index for document in held[-3:]] == [document.index for document in list(held)[-3:]]
    with pytest.raises(IndexError):
        held[len(held)]


def test_without_weights_every_document_once(pack_texts: Pack):
    corpus = pack_texts((texts("a", 30), {}), (texts("b", 5), {}))
    assert [planned.tolist() for planned in corpus.mixture.planned] == [[1] * 30, [1] * 5]


def test_weights_are_token_shares_and_the_first_to_run_out_ends_the_epoch(pack_texts: Pack):
    corpus = pack_texts((texts("a", 100), {"weight": 1}), (texts("b", 100), {"weight": 3, "domain": "b"}))
    # b runs out: 100 documents of 22 tokens are 3/4, so a gives 33 or 34 documents.
    assert tokens(corpus)["b"] == 2_200
    assert abs(tokens(corpus)["source0"] - 2_200 / 3) <= 11
    assert corpus.mixture.planned[1].tolist() == [1] * 100
    assert corpus.mixture.planned[0].max() == 1


def test_a_repeating_source_does_not_end_the_epoch(pack_texts: Pack):
    corpus = pack_texts(
        (texts("a", 10), {"weight": 1, "repeat": True}), (texts("b", 100), {"weight": 2, "domain": "b"})
    )
    assert tokens(corpus) == {"source0": 1_100, "b": 2_200}
    assert corpus.mixture.planned[0].tolist() == [5] * 10


def test_where_all_repeat_the_largest_is_read_once(pack_texts: Pack):
    corpus = pack_texts(
        (texts("a", 10), {"weight": 1, "repeat": True}),
        (texts("b", 40), {"weight": 1, "repeat": True}),
        (texts("c", 20), {"weight": 0.25, "repeat": True}),
    )
    assert [planned.sum() for planned in corpus.mixture.planned] == [40, 40, 10]
    assert corpus.mixture.planned[2].max() == 1


def test_some_weights_are_an_error(pack_texts: Pack):
    with pytest.raises(UserError, match="has no weight, but other train sources have one") as caught:
        pack_texts((["a"], {"weight": 1}), (["b"], {}))
    assert caught.value.field == "data.sources[1].weight"
    # Replay sources have weights of their own.
    pack_texts((["a"], {}), (["b"], {"role": "replay", "weight": 1}))


def test_a_weighted_source_with_nothing_left_is_an_error(pack_texts: Pack):
    with pytest.raises(UserError, match="no document of it is left") as caught:
        pack_texts((["a", "b"], {"weight": 1}), (["a"], {"weight": 1}))
    assert caught.value.field == "data.sources[1]"


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_replay_share_is_of_all_training_tokens(pack_texts: Pack, share: float):
    corpus = pack_texts((texts("a", 100), {}), (texts("r", 500), {"role": "replay"}), replay_share=share)
    assert corpus.mixing["replay_share"] == share
    assert abs(corpus.mixing["replay_share_achieved"] - share) < 0.004
    assert corpus.warnings == [
        "No document is held out, so nothing can be measured. Raise data.holdout or add a heldout source."
    ]


def test_replay_keeps_its_share_with_documents_of_uneven_length(pack_texts: Pack):
    uneven = ["r" * length + str(length) for length in range(10, 3_000, 17)]
    corpus = pack_texts((texts("a", 500), {}), (uneven, {"role": "replay"}), replay_share=0.2)
    assert abs(corpus.mixing["replay_share_achieved"] - 0.2) < 0.002


def test_replay_sources_share_by_size_or_by_weight(pack_texts: Pack):
    sources = [(texts("a", 100), {}), (texts("r", 300), {"role": "replay"}), (texts("s", 100), {"role": "replay"})]
    by_size = tokens(pack_texts(*sources, replay_share=0.5))
    assert by_size == {"source0": 2_200, "source1": 1_650, "source2": 550}
    for source, weight in zip(sources[1:], (1, 4), strict=True):
        source[1]["weight"] = weight
    by_weight = tokens(pack_texts(*sources, replay_share=0.5))
    assert by_weight == {"source0": 2_200, "source1": 440, "source2": 1_760}


def test_replay_that_runs_out_is_reported_or_repeated(pack_texts: Pack):
    train = (texts("a", 100), {})
    short = pack_texts(train, (texts("r", 10), {"role": "replay"}), replay_share=0.5)
    assert short.mixing["replay_share_achieved"] == pytest.approx(1 / 11)
    assert short.warnings[0] == (
        "Replay makes up 9.09% of the training tokens and not 50.00%: its sources hold too little text. Add replay "
        "text, or set repeat: true on it."
    )
    assert short.mixture.planned[1].tolist() == [1] * 10
    repeated = pack_texts(train, (texts("r", 10), {"role": "replay", "repeat": True}), replay_share=0.5)
    assert repeated.mixing["replay_share_achieved"] == 0.5
    assert repeated.mixture.planned[1].tolist() == [10] * 10


def test_replay_that_is_a_copy_of_trained_text_is_named(pack_texts: Pack):
    copied, own = texts("a", 100), texts("r", 5)
    replay = {"role": "replay", "domain": "en"}
    copy = pack_texts((copied, {}), (copied, replay), replay_share=0.1)
    assert copy.warnings[0] == (
        "Replay makes up 0.00% of the training tokens and not 10.00%: its sources hold too little text of their own. "
        "Left out as duplicates of text that comes before: 100 of 100 documents of en. Add replay text."
    )
    repeated = pack_texts((copied, {}), (copied, {**replay, "repeat": True}), replay_share=0.1)
    assert repeated.warnings[0] == copy.warnings[0]  # nothing is there to repeat
    part = pack_texts((copied, {}), (copied[:3], {**replay, "domain": "de"}), (own + own, replay), replay_share=0.1)
    assert part.warnings[0].endswith(
        "comes before: 3 of 3 documents of de, 5 of 10 documents of en. Add replay text, or set repeat: true on it."
    )
    enough = pack_texts((copied, {}), (copied + texts("r", 20), replay), replay_share=0.1)
    assert not any("Replay makes up" in warning for warning in enough.warnings)


@pytest.mark.parametrize("repeat", [False, True])
def test_replay_in_documents_too_long_for_the_text_that_is_learned(repeat: bool, pack_texts: Pack):
    long = (texts("r", 9, length=400), {"role": "replay", "domain": "en", "repeat": repeat})
    for learned, achieved in ((["a"], "0.00%"), (texts("a", 100), "15.45%")):
        warning = pack_texts((learned, {}), long, replay_share=0.1).warnings[0]
        assert warning == (
            f"Replay makes up {achieved} of the training tokens and not 10.00%: its documents are taken whole, and "
            f"they are too long for such a share beside the {sum(len(text) + 2 for text in learned):,} tokens that are "
            "learned. Add text to learn, or cut the documents of replay."
        )
    fitting = pack_texts((texts("a", 330), {}), long, replay_share=0.1)
    assert not any("Replay makes up" in warning for warning in fitting.warnings)


def test_no_replay_wanted_and_no_replay_given(pack_texts: Pack):
    corpus = pack_texts((["a"], {}), (["r"], {"role": "replay"}), replay_share=0)
    assert "data.replay_share is 0, so nothing of the replay sources is trained." in corpus.warnings
    assert corpus.mixture.planned[1].tolist() == [0]
    assert pack_texts((["a"], {}), replay_share=0.5).mixing["replay_share_achieved"] == 0


def test_nothing_left_to_train_on(pack_texts: Pack):
    for sources in (
        [(["a"], {"role": "heldout"})],
        [(["a"], {}), (["a"], {"role": "heldout"})],
        [(["a"], {"role": "replay"})],
    ):
        with pytest.raises(UserError, match="no document is left to train on") as caught:
            pack_texts(*sources)
        assert caught.value.field == "data.sources"


def test_the_seed_decides_and_nothing_else(pack_texts: Pack):
    sources = [(texts("a", 50), {"weight": 1}), (texts("b", 50), {"weight": 2}), (texts("r", 50), {"role": "replay"})]
    one, same, other = (pack_texts(*sources, seed=seed).mixture for seed in (1, 1, 2))
    assert one.source.tolist() == same.source.tolist()
    assert one.document.tolist() == same.document.tolist()
    assert one.document.tolist() != other.document.tolist()
    # Train and replay stand among each other.
    assert 0 < (np.diff(one.source) != 0).sum() < len(one.source)


def test_every_domain_without_held_out_text_is_named(pack_texts: Pack):
    corpus = pack_texts(
        (["a", "b"], {"domain": "ko"}),
        (["h"], {"domain": "ko", "role": "heldout"}),
        (["r"], {"domain": "en", "role": "replay"}),
        (["s"], {"domain": "de", "role": "replay"}),
        replay_share=0.5,
    )
    assert [warning for warning in corpus.warnings if "held out" in warning] == [
        f"No document of {domain} is held out, so what happens to it cannot be measured. Raise data.holdout or add a "
        f"heldout source with domain: {domain}."
        for domain in ("en", "de")
    ]
    measured = pack_texts((["a"], {"domain": "ko"}), (["h"], {"domain": "ko", "role": "heldout"}))
    assert measured.warnings == []


def test_a_domain_whose_held_out_text_another_source_has_is_named(pack_texts: Pack):
    corpus = pack_texts(
        (["a", "b"], {"domain": "ko"}),
        (["h", "i"], {"domain": "ko", "role": "heldout"}),
        (["i", "h", "i"], {"domain": "same", "role": "heldout"}),
        (["h", "j"], {"domain": "other", "role": "heldout"}),
    )
    assert corpus.warnings == [
        "Nothing of same is scored: each of its documents stands in a heldout source before it too, or has a single "
        "token. Give it text of its own."
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=3, max_size=30), min_size=2, max_size=3),
    weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    repeats=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_weighted_shares_are_met_to_a_document(pack_texts: Pack, lengths, weights, repeats):
    sources = [
        (
            [f"{index}-{number}-" + "x" * length for number, length in enumerate(column)],
            {"weight": weights[index], "repeat": repeats[index]},
        )
        for index, column in enumerate(lengths)
    ]
    corpus = pack_texts(*sources)
    for row, source, planned in zip(corpus.mixing["sources"], corpus.sources, corpus.mixture.planned, strict=True):
        assert abs(row["tokens"] - row["tokens_asked"]) <= source.lengths.max()
        assert row["tokens"] == (planned * source.lengths).sum()
        if not source.source.repeat:
            assert planned.max() <= 1
    finite = [index for index in range(len(lengths)) if not repeats[index]]
    ended = [index for index in finite or range(len(lengths)) if (corpus.mixture.planned[index] == 1).all()]
    assert ended  # some source ends the epoch, and all of it is read


@settings(max_examples=200, deadline=None)
@given(
    halves=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30),
    measured=st.integers(0, 30),
    part=st.integers(1, 40),
)
def test_equal_hashes_are_found_part_by_part(halves: list[tuple[int, int]], measured: int, part: int):
    """Many rows agree in their first halves alone, and equal ones would straddle the parts."""
    measured = min(measured, len(halves))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "_PART", part)
        repeated, contaminated = mixing._compare(np.array(halves, np.uint64), measured)
    for index, row in enumerate(halves):
        assert repeated[index] == (row in (halves[:index] if index < measured else halves[measured:index]))
        assert contaminated[index] == (index >= measured and row in halves[:measured])
