"""The account of a run: where every document and every token went.

Two independent sums meet here. From the documents: lengths, sides and how often an epoch was meant to have each. From
the rows: what really stands in them, and how often the trainer saw each. `check_ledger` compares the two and re-adds
every line, so a row index that lost, doubled or shifted a piece does not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from steep.data.mixing import Mixture, Side
from steep.data.tokens import TokenizedSource

if TYPE_CHECKING:
    from steep.data.packing import PackedDataset

_PARTS = ("duplicates", "held_out", "trained", "not_reached")


def describe_sources(
    sources: Sequence[TokenizedSource], sides: Sequence[np.ndarray], mixture: Mixture
) -> list[dict[str, Any]]:
    """For each source its names and sizes, JSON-able. `planned` is what an epoch has of it, repetitions included."""
    result = []
    for item, side, planned in zip(sources, sides, mixture.planned, strict=True):
        tokens, characters, size = int(item.lengths.sum()), int(item.num_chars.sum()), int(item.num_bytes.sum())
        text_tokens = tokens - len(item) * (item.prefix_length + item.has_eos)
        result.append(
            _names(item)
            | {
                "documents": len(item),
                "empty": item.empty,
                "tokens": tokens,
                "bytes": size,
                "characters": characters,
                "characters_per_token": characters / max(text_tokens, 1),
                "bytes_per_token": size / max(text_tokens, 1),
                "longest": int(item.lengths.max()),
                "cached": item.cached,
                "duplicates": _count(item, side == Side.DUPLICATE),
                "held_out": _count(item, _is_held_out(side)),
                "planned": _planned(item, planned),
            }
        )
    return result


def build_ledger(
    sources: Sequence[TokenizedSource],
    sides: Sequence[np.ndarray],
    mixture: Mixture,
    rows: PackedDataset,
    times_trained: np.ndarray,
) -> dict[str, Any]:
    """Account for every document and token.

    A piece accounts for its tokens except the first, which the piece before accounts for; a document's first token,
    which is never a target, goes with its first piece. So each token of a document belongs to exactly one piece. A
    document is trained when all its tokens are, each at least once; else it is not reached, and the tokens of it that
    were trained still count as trained.

    Args:
        sources: the tokenised sources.
        sides: for each source, uint8 [documents], from `assign_sides`.
        mixture: the documents of an epoch.
        rows: the rows of an epoch.
        times_trained: int [rows], how often each row was trained.

    Returns:
        A JSON-able dict. In `sources`, for each source: `documents` and `tokens`, each with read = duplicates +
        held_out + trained + not_reached, `planned` (an epoch's, with repetitions) and `repeated_within_an_epoch`;
        `empty` documents, `partly_trained` documents, `truncated` tokens (of planned documents, but in no row),
        `stray` tokens (in a row, of documents not planned), `bos_added` and `eos_added` (tokens among those read).
        Beside it: `rows`, `max_length`, `pieces`, `padding`, `targets` (of an epoch), `targets_reached` (at least
        once), `first_tokens_reached` (of documents, repetitions counted), `targets_trained` (every time counted),
        `times_trained` (times → how many targets were trained that often), `epochs` (targets trained over targets);
        `problems` from `check_ledger`, and `adds_up`, which says that there are none.

    Raises:
        ValueError: `times_trained` has not one count, 0 or more, for each row.
    """
    times = np.asarray(times_trained)
    if times.shape != (len(rows),) or times.dtype.kind not in "iu" or (times < 0).any():
        raise ValueError(
            f"times_trained must hold a count for each of {len(rows)} rows, not {times.shape} {times.dtype}"
        )
    targets = _row_sums(rows.length - 1, rows.row_first)
    counts, number = np.unique(times, return_inverse=True)
    histogram = np.bincount(number, weights=targets, minlength=len(counts)).astype(np.int64)
    piece_trained = np.repeat(times > 0, np.diff(rows.row_first))
    everything = np.ones(len(rows.length), bool)
    total = int(targets.sum())
    targets_trained = int((targets * times.astype(np.int64)).sum())
    ledger: dict[str, Any] = {
        "sources": [
            _account(
                item,
                sides[index],
                mixture.planned[index],
                _covered(rows, index, item, everything),
                _covered(rows, index, item, piece_trained),
            )
            for index, item in enumerate(sources)
        ],
        "rows": len(rows),
        "max_length": rows.max_length,
        "pieces": len(rows.length),
        "padding": len(rows) * rows.max_length - int(rows.length.sum(dtype=np.int64)),
        "targets": total,
        "targets_reached": int(targets[times > 0].sum()),
        "first_tokens_reached": int((piece_trained & (rows.start == 0)).sum()),
        "targets_trained": targets_trained,
        "times_trained": {str(count): int(part) for count, part in zip(counts, histogram, strict=True)},
        "epochs": targets_trained / total if total else 0.0,
    }
    problems = check_ledger(ledger)
    return ledger | {"adds_up": not problems, "problems": problems}


def _row_sums(values: np.ndarray, row_first: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[row_first[1:]] - sums[row_first[:-1]]


def _covered(rows: PackedDataset, index: int, item: TokenizedSource, chosen: np.ndarray) -> np.ndarray:
    """How many different tokens of each document stand in the chosen pieces: int64 [documents].

    A repeated document is split at other places each time, so that pieces overlap; what counts is their union. Each
    document gets its own stretch of one long line of tokens, and the union is taken along the line.
    """
    pieces = np.flatnonzero(chosen & (rows.source == index))
    document = rows.document[pieces]
    line = np.concatenate([[0], np.cumsum(item.lengths)])[document]
    start = rows.start[pieces]
    begin = line + start + (start > 0)  # the token that a later piece starts with belongs to the piece before
    end = line + start + rows.length[pieces]
    order = np.argsort(begin, kind="stable")
    begin, end, document = begin[order], end[order], document[order]
    reached = np.concatenate([[0], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    new = np.maximum(end - np.maximum(begin, reached), 0)
    return np.bincount(document, weights=new, minlength=len(item)).astype(np.int64)


def _account(
    item: TokenizedSource, side: np.ndarray, planned: np.ndarray, in_rows: np.ndarray, trained: np.ndarray
) -> dict[str, Any]:
    available = side == Side.TRAIN
    whole = available & (trained == item.lengths)
    read = _count(item, np.ones(len(item), bool))
    parts = {
        "duplicates": _count(item, side == Side.DUPLICATE),
        "held_out": _count(item, _is_held_out(side)),
        "trained": {"documents": int(whole.sum()), "tokens": int(trained[available].sum())},
        "not_reached": {
            "documents": int((available & ~whole).sum()),
            "tokens": int((item.lengths - trained)[available].sum()),
        },
    }
    again = np.maximum(planned - 1, 0)
    all_parts = (
        {"read": read} | parts | {"planned": _planned(item, planned), "repeated_within_an_epoch": _planned(item, again)}
    )
    return _names(item) | {
        "documents": {name: part["documents"] for name, part in all_parts.items()},
        "tokens": {name: part["tokens"] for name, part in all_parts.items()},
        "empty": item.empty,
        "truncated": int((item.lengths - in_rows)[planned > 0].sum()),
        "stray": int(in_rows[planned == 0].sum()),
        "partly_trained": int(((trained > 0) & ~whole).sum()),
        "bos_added": len(item) * item.prefix_length,
        "eos_added": len(item) * item.has_eos,
    }


def _names(item: TokenizedSource) -> dict[str, Any]:
    source = item.source
    return {
        "name": source.location.rstrip("/").split("/")[-1],
        "domain": source.domain_name,
        "role": source.role,
        "path": source.location,
        "repeat": source.repeat,
    }


def _is_held_out(side: np.ndarray) -> np.ndarray:
    return (side == Side.HELD_OUT) | (side == Side.HELD_OUT_ELSEWHERE)


def _count(item: TokenizedSource, documents: np.ndarray) -> dict[str, int]:
    return {"documents": int(documents.sum()), "tokens": int(item.lengths[documents].sum())}


def _planned(item: TokenizedSource, times: np.ndarray) -> dict[str, int]:
    return {"documents": int(times.sum()), "tokens": int((item.lengths * times).sum())}


def check_ledger(ledger: dict[str, Any]) -> list[str]:
    """Re-add a ledger, and compare what the documents say with what the rows say; the list of what does not agree."""
    problems: list[str] = []

    def expect(what: str, found: int, expected: int) -> None:
        if found != expected:
            problems.append(f"{what}: {found:,} and not {expected:,}")

    planned_documents = planned_tokens = repeated = trained_tokens = 0
    for source in ledger["sources"]:
        name = source["domain"]
        for unit in ("documents", "tokens"):
            line = source[unit]
            expect(f"{name}, {unit} read", line["read"], sum(line[part] for part in _PARTS))
            if min(line.values()) < 0:
                problems.append(f"{name}, {unit}: a negative number")
            if line["repeated_within_an_epoch"] and not source["repeat"]:
                problems.append(f"{name}, {unit}: repeated within an epoch without repeat: true")
        expect(f"{name}, tokens truncated", source["truncated"], 0)
        expect(f"{name}, tokens in rows of documents that are not planned", source["stray"], 0)
        if source["role"] == "heldout":
            expect(f"{name}, tokens of a heldout source planned", source["tokens"]["planned"], 0)
        planned_documents += source["documents"]["planned"]
        planned_tokens += source["tokens"]["planned"]
        repeated += source["tokens"]["repeated_within_an_epoch"]
        trained_tokens += source["tokens"]["trained"]

    # An epoch's targets are all tokens of its documents but the first of each.
    expect("targets in the rows", ledger["targets"], planned_tokens - planned_documents)
    # Every piece after the first of its document holds one token a second time.
    overlaps = ledger["pieces"] - planned_documents
    places = ledger["rows"] * ledger["max_length"]
    expect("places in the rows", places, planned_tokens + overlaps + ledger["padding"])
    histogram = {int(times): targets for times, targets in ledger["times_trained"].items()}
    expect("targets by times trained", sum(histogram.values()), ledger["targets"])
    expect("targets trained", ledger["targets_trained"], sum(times * targets for times, targets in histogram.items()))
    reached = sum(targets for times, targets in histogram.items() if times)
    expect("targets reached", ledger["targets_reached"], reached)
    # The tokens of the trained pieces; those of repeated documents can be trained twice and count once.
    most = reached + ledger["first_tokens_reached"]
    if not most - repeated <= trained_tokens <= most:
        problems.append(f"tokens trained: {trained_tokens:,} and not {most - repeated:,} to {most:,}")
    if reached == ledger["targets"] and ledger["first_tokens_reached"] == planned_documents:
        sources = ledger["sources"]
        available = sum(s["tokens"]["read"] - s["tokens"]["held_out"] - s["tokens"]["duplicates"] for s in sources)
        not_reached = sum(s["tokens"]["not_reached"] for s in sources)
        expect("tokens not reached after a whole epoch", not_reached, available - (planned_tokens - repeated))
    return problems
