"""The account of a run: where every document and every token went.

Independent sums meet here. From the documents: lengths, sides and how often an epoch was meant to have each. From the
rows: what really stands in them. From the trainer: how often each row had its turn, and how often its step was applied,
or skipped. `check_ledger` compares them, so a row index that lost, doubled or shifted a piece does not add up, and
neither does a run that handed out a row twice in an epoch or left one out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from steep.data.mixing import Mixture, Side
from steep.data.packed_dataset import PackedDataset
from steep.data.tokens import TokenizedSource

_PARTS = ("duplicates", "held_out", "too_short", "trained", "skipped", "not_reached")


def describe_sources(
    sources: Sequence[TokenizedSource], sides: Sequence[np.ndarray], mixture: Mixture
) -> list[dict[str, Any]]:
    """For each source its names and sizes, JSON-able. `planned` is what an epoch has of it, repetitions included."""
    result = []
    for item, side, planned in zip(sources, sides, mixture.planned, strict=True):
        tokens, characters, size = int(item.lengths.sum()), int(item.num_chars.sum()), int(item.num_bytes.sum())
        result.append(
            names_of(item)
            | {
                "files": item.files,
                "files_not_read": item.files_not_read,
                "streamed": item.source.stream,
                "max_tokens": item.source.max_tokens,
                "stopped": item.stopped,
                "documents": len(item),
                "empty": item.empty,
                "tokens": tokens,
                "bytes": size,
                "characters": characters,
                "characters_per_token": characters / item.text_tokens,
                "bytes_per_token": size / item.text_tokens,
                "longest": int(item.lengths.max()),
                "digest": item.digest,
                "file_digests": item.contents,
                "cached": item.cached,
                "duplicates": _count(item, side == Side.DUPLICATE),
                "held_out": _count(item, _is_held_out(side)),
                "too_short": _count(item, side == Side.TOO_SHORT),
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
    times_seen: np.ndarray,
    times_seen_before: np.ndarray | None = None,
    times_skipped: np.ndarray | None = None,
) -> dict[str, Any]:
    """Account for every document and token.

    A piece accounts for its tokens except the first, which the piece before accounts for; a document's first token,
    which is never a target, goes with its first piece. So each token of a document belongs to exactly one piece. A
    document is trained when all its tokens are, each at least once; else it is skipped if a token of it was skipped and
    never trained, and not reached if not. The tokens of it that were trained still count as trained.

    Args:
        sources: the tokenised sources.
        sides: for each source, uint8 [documents], from `assign_sides`.
        mixture: the documents of an epoch.
        rows: the rows of an epoch.
        times_trained: int [rows], how often a step that was applied had each row.
        times_seen: int [rows], how often each row had its turn, its step applied or not.
        times_seen_before: int [rows], the same of the runs that this one is a branch of. The order of the rows goes
            through them all, so what may not be handed out twice in an epoch is counted over all; the rest is not.
        times_skipped: int [rows], how often each row was in a step that was skipped as a spike; default: never.

    Returns:
        A JSON-able dict. `sources` holds one for each source, see `_account`. Of the rows: `rows`, `max_length`,
        `overfull_rows` (with more tokens than that), `pieces`, `overlaps` (pieces that go on with a document, and so
        hold a token a second time), `padding`, `targets` (of an epoch). Of the trainer: `times_seen` (times → how many
        rows were seen that often), `rows_seen`, `rows_trained` (every time counted), `rows_skipped` (in a step that was
        skipped), `rows_refused` (in one that was not applied for another reason), `times_trained` (times → how many
        targets were trained that often), `targets_reached` (at least once), `first_tokens_reached` (of documents,
        repetitions counted), the same two of rows that were skipped and never trained (`targets_skipped`,
        `first_tokens_skipped`), `targets_trained` (every time counted), `epochs` (targets trained over targets). In a
        branch that goes on with its parent's rows also `rows_seen_before` (every time counted) and
        `times_seen_with_parents` (as `times_seen`). `problems` from `check_ledger`, and `adds_up`, which says that
        there are none.

    Raises:
        ValueError: `times_trained` or `times_seen` has not one count, 0 or more, for each row.
    """
    trained, seen = _counts("times_trained", times_trained, rows), _counts("times_seen", times_seen, rows)
    before = None if times_seen_before is None else _counts("times_seen_before", times_seen_before, rows)
    skipped = np.zeros_like(seen) if times_skipped is None else _counts("times_skipped", times_skipped, rows)
    lost = (skipped > 0) & (trained == 0)
    length = rows.length.astype(np.int64)
    row_tokens, row_targets = _row_sums(length, rows), _row_sums(length - 1, rows)
    piece_times, piece_lost = (np.repeat(counts, np.diff(rows.row_first)) for counts in (trained, lost))
    targets, targets_trained = int((length - 1).sum()), int((row_targets * trained).sum())
    ledger: dict[str, Any] = {
        "sources": [
            _account(item, sides[index], mixture.planned[index], rows, rows.source == index, piece_times, piece_lost)
            for index, item in enumerate(sources)
        ],
        "rows": len(rows),
        "max_length": rows.max_length,
        "overfull_rows": int((row_tokens > rows.max_length).sum()),
        "pieces": len(length),
        "overlaps": int((rows.start > 0).sum()),
        # By row, none below 0: where one row holds too much, the padding of the others does not make up for it.
        "padding": int(np.maximum(rows.max_length - row_tokens, 0).sum()),
        "targets": targets,
        "times_seen": _histogram(seen, np.ones(len(rows), np.int64)),
        "rows_seen": int(seen.sum()),
        "rows_trained": int(trained.sum()),
        "rows_skipped": int(skipped.sum()),
        # By row, none below 0: a row that was trained without being seen does not make up for one that was refused.
        "rows_refused": int(np.maximum(seen - trained - skipped, 0).sum()),
        "times_trained": _histogram(trained, row_targets),
        "targets_reached": int(row_targets[trained > 0].sum()),
        "first_tokens_reached": int(((piece_times > 0) & (rows.start == 0)).sum()),
        "targets_skipped": int(row_targets[lost].sum()),
        "first_tokens_skipped": int((piece_lost & (rows.start == 0)).sum()),
        "targets_trained": targets_trained,
        "epochs": targets_trained / targets if targets else 0.0,
    }
    if before is not None and before.any():
        ledger["rows_seen_before"] = int(before.sum())
        ledger["times_seen_with_parents"] = _histogram(seen + before, np.ones(len(rows), np.int64))
    problems = check_ledger(ledger)
    return ledger | {"adds_up": not problems, "problems": problems}


def _counts(name: str, given: np.ndarray, rows: PackedDataset) -> np.ndarray:
    counts = np.asarray(given)
    if counts.shape != (len(rows),) or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(f"{name} must hold a count for each of {len(rows)} rows, not {counts.shape} {counts.dtype}")
    return counts.astype(np.int64)


def _histogram(times: np.ndarray, weights: np.ndarray) -> dict[str, int]:
    """times → the sum of the weights that have it."""
    counts, number = np.unique(times, return_inverse=True)
    sums = np.zeros(len(counts), np.int64)
    np.add.at(sums, number, weights)
    return {str(count): int(part) for count, part in zip(counts, sums, strict=True)}


def _row_sums(values: np.ndarray, rows: PackedDataset) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[rows.row_first[1:]] - sums[rows.row_first[:-1]]


def _account(
    item: TokenizedSource,
    side: np.ndarray,
    planned: np.ndarray,
    rows: PackedDataset,
    chosen: np.ndarray,
    piece_times: np.ndarray,
    piece_lost: np.ndarray,
) -> dict[str, Any]:
    """A source's part of the ledger.

    Args:
        item: the source.
        side: the side of each document.
        planned: how often an epoch was meant to have each document.
        rows: the rows of an epoch.
        chosen: bool [pieces], which pieces are the source's.
        piece_times: int64 [pieces], how often each piece was trained.
        piece_lost: bool [pieces], which pieces were skipped and never trained.

    Returns:
        `documents` and `tokens`, each with read = duplicates + held_out + too_short + trained + skipped + not_reached,
        `planned` (an epoch's, with repetitions), `not_planned` (to train, but not in an epoch) and
        `repeated_within_an_epoch` (in the rows once more than once). `targets_trained`, every time counted;
        `repeated_in_trained_rows`, tokens that stand there once more than once; `trained_or_repeated_in_skipped_rows`,
        tokens of rows that were skipped and never trained, but for those that count as skipped; `touched` documents,
        with a piece in a trained row, and `partly_trained` ones; `truncated` tokens (of planned documents, but in no
        row) and `stray` ones (in a row, of documents not planned); `empty` documents; and of the tokens read
        `text_tokens`, `bos_added` and `eos_added`.
    """
    document, start = rows.document[chosen], rows.start[chosen]
    length, times, lost = rows.length[chosen].astype(np.int64), piece_times[chosen], piece_lost[chosen]
    own, hit = length - (start > 0), times > 0
    in_rows = _covered(item, document, start, length)
    trained = _covered(item, document[hit], start[hit], length[hit])
    either = _covered(item, document[hit | lost], start[hit | lost], length[hit | lost])
    skipped = either - trained
    whole = trained == item.lengths
    copies = np.bincount(document[start == 0], minlength=len(item))  # each time a document stands in the rows
    not_planned = (side == Side.TRAIN) & (planned == 0)
    # What stands in the rows and was not trained: not the rest of what was read, or `read` would add up by itself.
    left = {
        "documents": int(((trained < in_rows) & (skipped == 0)).sum()),
        "tokens": int((in_rows - either).sum()),
    }
    outside = _count(item, not_planned)
    parts = {
        "read": _count(item, np.ones(len(item), bool)),
        "duplicates": _count(item, side == Side.DUPLICATE),
        "held_out": _count(item, _is_held_out(side)),
        "too_short": _count(item, side == Side.TOO_SHORT),
        "trained": {"documents": int(whole.sum()), "tokens": int(trained.sum())},
        "skipped": {"documents": int((skipped > 0).sum()), "tokens": int(skipped.sum())},
        "not_reached": {unit: outside[unit] + left[unit] for unit in left},
        "planned": _planned(item, planned),
        "not_planned": outside,
        "repeated_within_an_epoch": {
            "documents": int(np.maximum(copies - 1, 0).sum()),
            "tokens": int(own.sum() - in_rows.sum()),
        },
    }
    return names_of(item) | {
        "documents": {name: part["documents"] for name, part in parts.items()},
        "tokens": {name: part["tokens"] for name, part in parts.items()},
        "targets_trained": int(((length - 1) * times).sum()),
        "repeated_in_trained_rows": int(own[hit].sum() - trained.sum()),
        "trained_or_repeated_in_skipped_rows": int(own[lost].sum() - skipped.sum()),
        "touched": int(np.count_nonzero(np.bincount(document[hit], minlength=len(item)))),
        "partly_trained": int(((trained > 0) & ~whole).sum()),
        "truncated": int((item.lengths - in_rows)[planned > 0].sum()),
        "stray": int(in_rows[planned == 0].sum()),
        "empty": item.empty,
        "text_tokens": item.text_tokens,
        "bos_added": len(item) * item.prefix_length,
        "eos_added": len(item) * item.has_eos,
    }


def _covered(item: TokenizedSource, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """How many different tokens of each document stand in the pieces: int64 [documents].

    A repeated document is split at other places each time, so that pieces overlap; what counts is their union. Each
    document gets its own stretch of one long line of tokens, and the union is taken along the line.
    """
    line = np.concatenate([[0], np.cumsum(item.lengths)])[document]
    begin = line + start + (start > 0)  # the token that a later piece starts with belongs to the piece before
    end = line + start + length
    order = np.argsort(begin, kind="stable")
    begin, end, document = begin[order], end[order], document[order]
    reached = np.concatenate([[0], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    new = np.maximum(end - np.maximum(begin, reached), 0)
    return np.bincount(document, weights=new, minlength=len(item)).astype(np.int64)


def names_of(item: TokenizedSource) -> dict[str, Any]:
    """A source by its names, as the ledger has them."""
    source = item.source
    return {
        "name": source.location.rstrip("/").split("/")[-1],
        "domain": source.domain_name,
        "role": source.role,
        "path": source.location,
        "revision": source.revision,
        "repeat": source.repeat,
    }


def _is_held_out(side: np.ndarray) -> np.ndarray:
    return (side == Side.HELD_OUT) | (side == Side.HELD_OUT_ELSEWHERE)


def _count(item: TokenizedSource, documents: np.ndarray) -> dict[str, int]:
    return {"documents": int(documents.sum()), "tokens": int(item.lengths[documents].sum())}


def _planned(item: TokenizedSource, times: np.ndarray) -> dict[str, int]:
    return {"documents": int(times.sum()), "tokens": int((item.lengths * times).sum())}


def check_ledger(ledger: dict[str, Any]) -> list[str]:
    """Compare what documents, rows and trainer say; the list of what does not agree."""
    problems: list[str] = []

    def expect(what: str, found: int, expected: int) -> None:
        if found != expected:
            problems.append(f"{what}: {found:,} and not {expected:,}")

    for source in ledger["sources"]:
        _check_source(source, expect, problems)

    def total(name: str, unit: str | None = None) -> int:
        return sum((source[unit] if unit else source)[name] for source in ledger["sources"])

    # Rows against documents. An epoch's targets are all tokens of its documents but the first of each.
    planned_documents, planned_tokens = total("planned", "documents"), total("planned", "tokens")
    expect("rows with more tokens than max_length", ledger["overfull_rows"], 0)
    expect("targets in the rows", ledger["targets"], planned_tokens - planned_documents)
    expect("pieces that begin a document", ledger["pieces"] - ledger["overlaps"], planned_documents)
    places = ledger["rows"] * ledger["max_length"]
    expect("places in the rows", places, planned_tokens + ledger["overlaps"] + ledger["padding"])

    # The trainer: within a run, and the branch that goes on with it, the order goes epoch by epoch, so no row is handed
    # out twice before all are once.
    times_seen = {int(times): number for times, number in ledger["times_seen"].items()}
    expect("rows by times seen", sum(times_seen.values()), ledger["rows"])
    if "times_seen_with_parents" in ledger:
        times_seen = {int(times): number for times, number in ledger["times_seen_with_parents"].items()}
        expect("rows by times seen, parents included", sum(times_seen.values()), ledger["rows"])
        handed_out = sum(times * number for times, number in times_seen.items())
        expect("rows seen, parents included", handed_out, ledger["rows_seen"] + ledger["rows_seen_before"])
    if max(times_seen) - min(times_seen) > 1:
        problems.append(
            f"rows were handed to the model {min(times_seen)} to {max(times_seen)} times: some twice in an epoch, or "
            "not at all"
        )
    treated = ledger["rows_trained"] + ledger["rows_skipped"] + ledger["rows_refused"]
    expect("rows seen", ledger["rows_seen"], treated)

    # Rows that were trained against documents that were trained.
    times_trained = {int(times): targets for times, targets in ledger["times_trained"].items()}
    expect("targets by times trained", sum(times_trained.values()), ledger["targets"])
    by_source = total("targets_trained")
    expect("targets trained", ledger["targets_trained"], by_source)
    expect("times trained", sum(times * targets for times, targets in times_trained.items()), by_source)
    reached = total("trained", "tokens") + total("repeated_in_trained_rows")
    expect("tokens in trained rows", ledger["targets_reached"] + ledger["first_tokens_reached"], reached)
    lost = total("skipped", "tokens") + total("trained_or_repeated_in_skipped_rows")
    expect("tokens in skipped rows", ledger["targets_skipped"] + ledger["first_tokens_skipped"], lost)
    if ledger["targets_reached"] + ledger["targets_skipped"] == ledger["targets"]:
        not_planned = total("not_planned", "tokens")
        expect("tokens not reached after a whole epoch", total("not_reached", "tokens"), not_planned)
    return problems


def _check_source(source: dict[str, Any], expect: Callable[[str, int, int], None], problems: list[str]) -> None:
    name = source["domain"]
    for unit in ("documents", "tokens"):
        line = source[unit]
        expect(f"{name}, {unit} read", line["read"], sum(line[part] for part in _PARTS))
        once = line["planned"] - line["repeated_within_an_epoch"]
        to_train = line["trained"] + line["skipped"] + line["not_reached"]
        expect(f"{name}, {unit} planned, each once", once, to_train - line["not_planned"])
        if min(line.values()) < 0:
            problems.append(f"{name}, {unit}: a negative number")
        if line["repeated_within_an_epoch"] and not source["repeat"]:
            problems.append(f"{name}, {unit}: repeated within an epoch without repeat: true")
    expect(f"{name}, tokens truncated", source["truncated"], 0)
    expect(f"{name}, tokens in rows of documents that are not planned", source["stray"], 0)
    expect(f"{name}, tokens of documents of one token", source["tokens"]["too_short"], source["documents"]["too_short"])
    if source["role"] == "heldout":
        expect(f"{name}, tokens of a heldout source planned", source["tokens"]["planned"], 0)
    whole_or_part = source["documents"]["trained"] + source["partly_trained"]
    expect(f"{name}, documents with a piece in a trained row", source["touched"], whole_or_part)
    with_ends = source["text_tokens"] + source["bos_added"] + source["eos_added"]
    expect(f"{name}, tokens read, of the text and around it", source["tokens"]["read"], with_ends)
