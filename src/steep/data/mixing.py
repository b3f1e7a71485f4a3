"""Which documents are trained, how often in an epoch, and which are only measured.

Two steps. `assign_sides` looks at each document's text alone: seen before, held out, or for training. `mix` then takes
as much of each source as its weight or the replay share asks for. Both depend on the texts, the order of the sources
and the seed, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from steep.data.tokens import TokenizedSource
from steep.errors import UserError

_TOLERANCE = 0.1  # a share reached within a tenth of what was asked needs no warning
_MOST_PASSES = 1_000  # of a source in an epoch; beyond 4 repeated text teaches little (Muennighoff et al. 2023)
_PART = 1 << 16  # rows compared at a time


class Side(IntEnum):
    """What happens to a document."""

    TRAIN = 0
    DUPLICATE = 1  # its exact text came before, here or in an earlier source
    HELD_OUT = 2  # measured
    HELD_OUT_ELSEWHERE = 3  # its text stands in a source of role heldout, and is measured there
    TOO_SHORT = 4  # a single token: nothing to predict, in training as in measuring


@dataclass(frozen=True)
class Mixture:
    """The documents of an epoch.

    Attributes:
        source: unsigned [chosen], index of the source, in as few bytes as hold it.
        document: int32 [chosen], index of the document in it, in the shuffled order of packing.
        planned: for each source, int32 [documents]: how often an epoch has the document.
        summary: shares asked for and achieved, JSON-able.
        warnings: what the user should know, in plain words.
    """

    source: np.ndarray
    document: np.ndarray
    planned: list[np.ndarray]
    summary: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def assign_sides(sources: Sequence[TokenizedSource], holdout: float, keep_duplicates: bool) -> list[np.ndarray]:
    """The `Side` of every document: for each source, uint8 [documents].

    A text of a train or replay source is held out when its hash, read as a fraction of 2^64, is below `holdout`: the
    same text is on the same side in every run and in every source. It is also held out when it stands in a source of
    role heldout. Of equal texts the first one counts, among train and replay sources, and among heldout sources.
    Documents of one token are left out before all that.
    """
    measured = [index for index, source in enumerate(sources) if source.source.role == "heldout"]
    trained = [index for index, source in enumerate(sources) if source.source.role != "heldout"]
    num_measured = sum(len(sources[index]) for index in measured)
    ends = np.cumsum([len(sources[index]) for index in (*measured, *trained)])
    hashes = np.empty((ends[-1], 2), np.uint64)
    for index, end in zip((*measured, *trained), ends, strict=True):
        hashes[end - len(sources[index]) : end] = sources[index].hashes
    repeated, contaminated = _compare(hashes, num_measured)

    side = np.full(len(hashes), Side.TRAIN, np.uint8)
    side[hashes[:, 0] < np.uint64(int(holdout * 2**64))] = Side.HELD_OUT
    side[:num_measured] = Side.HELD_OUT
    side[contaminated] = Side.HELD_OUT_ELSEWHERE
    if not keep_duplicates:
        side[repeated] = Side.DUPLICATE
    sides = dict(zip((*measured, *trained), np.split(side, ends[:-1]), strict=True))
    for index, source in enumerate(sources):
        sides[index][source.lengths < 2] = Side.TOO_SHORT
    return [sides[index] for index in range(len(sources))]


def _compare(hashes: np.ndarray, num_measured: int) -> tuple[np.ndarray, np.ndarray]:
    """Find equal texts by their hashes.

    Args:
        hashes: uint64 [documents, 2], first those of heldout sources.
        num_measured: how many these are.

    Returns:
        bool [documents] each: whether an equal row came before, among the heldout ones or among the others; and whether
        one of the others equals a heldout one.
    """
    repeated, contaminated = np.zeros((2, len(hashes)), bool)
    # Sorted by the first half alone, which costs 20 bytes a document. Parts that no equal rows straddle are then sorted
    # by both: the memory for that does not grow with the corpus.
    order = np.argsort(hashes[:, 0], kind="stable")
    start = 0
    while start < len(order):
        end = _end_of_equals(hashes, order, start + _PART)
        part = order[start:end]
        part = part[np.lexsort((hashes[part, 1], hashes[part, 0]))]  # stable: equal rows stay in their order
        rows, is_measured = hashes[part], part < num_measured
        is_first = np.ones(len(part), bool)
        is_first[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        # Heldout rows stand before the others that equal them: the first of these has not been among the others before.
        before = np.concatenate([[True], is_measured[:-1]])
        repeated[part] = ~is_first & (is_measured | ~before)
        contaminated[part] = ~is_measured & is_measured[is_first][np.cumsum(is_first) - 1]
        start = end
    return repeated, contaminated


def _end_of_equals(hashes: np.ndarray, order: np.ndarray, end: int) -> int:
    """The first place in `order`, from `end` on, whose row differs in its first half from the row before."""
    while end < len(order):
        differs = np.flatnonzero(hashes[order[end : end + _PART], 0] != hashes[order[end - 1], 0])
        if len(differs):
            return end + int(differs[0])
        end += _PART
    return len(order)


def mix(sources: Sequence[TokenizedSource], sides: Sequence[np.ndarray], replay_share: float, seed: int) -> Mixture:
    """Choose the documents of an epoch and shuffle them.

    Args:
        sources: all sources, heldout ones too.
        sides: from `assign_sides`.
        replay_share: tokens of replay sources over all training tokens, in [0, 1).
        seed: of every random choice.

    Raises:
        UserError: weights on some sources of a role and not on others, or nothing left to train on or to predict.
    """
    train = [index for index, source in enumerate(sources) if source.source.role == "train"]
    replay = [index for index, source in enumerate(sources) if source.source.role == "replay"]
    pools = [np.flatnonzero(side == Side.TRAIN).astype(np.int32) for side in sides]
    tokens = [int(source.lengths[pool].sum()) for source, pool in zip(sources, pools, strict=True)]
    if not sum(tokens[index] for index in train):
        problem = "no document is left to train on: all are held out, duplicates, or of another role"
        if any((sides[index] == Side.TOO_SHORT).any() for index in train):
            problem = "there is nothing to predict: every document left to train on has a single token"
        raise UserError("data.sources", problem, "Add text with role train, or lower data.holdout")

    chosen: dict[int, np.ndarray] = {}
    quotas = _train_quotas(sources, train, tokens)
    for index in train:
        chosen[index] = _choose(sources[index], pools[index], quotas[index], _random(seed, index))
    train_tokens = _num_tokens(sources, chosen)
    quotas |= _replay_quotas(sources, replay, tokens, train_tokens * replay_share / (1 - replay_share))
    for index in replay:
        chosen[index] = _choose(sources[index], pools[index], quotas[index], _random(seed, index))

    planned = [np.zeros(len(source), np.int32) for source in sources]
    for index, documents in chosen.items():
        np.add.at(planned[index], documents, 1)
    summary = _summary(sources, train, replay, chosen, quotas, replay_share)
    warnings = _warnings(sources, replay, tokens, summary, sides)
    small = np.min_scalar_type(len(sources))
    source = np.concatenate([np.full(len(chosen[index]), index, small) for index in sorted(chosen)])
    document = np.concatenate([chosen[index] for index in sorted(chosen)])
    if not len(document):
        raise UserError("data.sources", "no document is left to train on", "Add text with role train")
    order = np.arange(len(document), dtype=np.int32)
    _random(seed, len(sources)).shuffle(order)
    return Mixture(source[order], document[order], planned, summary, warnings)


def _random(seed: int, stream: int) -> np.random.Generator:
    # Three numbers, where `epoch_order` takes two: the streams differ from those of the row orders.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, 1))))


def _num_tokens(sources: Sequence[TokenizedSource], chosen: dict[int, np.ndarray]) -> int:
    return sum(int(sources[index].lengths[documents].sum()) for index, documents in chosen.items())


def _weights(sources: Sequence[TokenizedSource], indices: list[int]) -> list[float] | None:
    given = [sources[index].source.weight for index in indices]
    weights = [weight for weight in given if weight is not None]
    if not weights:
        return None
    if len(weights) < len(given):
        missing = indices[given.index(None)]
        role = sources[missing].source.role
        problem = f"{sources[missing].source.location} has no weight, but other {role} sources have one"
        raise UserError(f"data.sources[{missing}].weight", problem, f"Give every {role} source a weight, or none")
    return weights


def _train_quotas(sources: Sequence[TokenizedSource], train: list[int], tokens: list[int]) -> dict[int, int]:
    """Tokens an epoch takes of each train source."""
    weights = _weights(sources, train)
    if weights is None:
        return {index: tokens[index] for index in train}
    for index in train:
        if not tokens[index]:
            problem = f"{sources[index].source.location} has a weight, but no document of it is left to train on"
            raise UserError(f"data.sources[{index}]", problem, "Remove the source, or lower data.holdout")
    per_weight = {index: tokens[index] / weight for index, weight in zip(train, weights, strict=True)}
    finite = [index for index in train if not sources[index].source.repeat]
    # The source that ends the epoch: the first to run out, or, where all repeat, the largest.
    last = min(finite, key=per_weight.__getitem__) if finite else max(train, key=tokens.__getitem__)
    quotas = {
        index: _quota(sources[index], tokens[index], weight * per_weight[last], f"data.sources[{index}].weight")
        for index, weight in zip(train, weights, strict=True)
    }
    return quotas | {last: tokens[last]}


def _replay_quotas(
    sources: Sequence[TokenizedSource], replay: list[int], tokens: list[int], budget: float
) -> dict[int, int]:
    """Tokens an epoch should take of each replay source; more than it has, if it is too small."""
    weights = _weights(sources, replay) or [float(tokens[index]) for index in replay]
    total = sum(weights)
    return {
        index: _quota(sources[index], tokens[index], budget * (weight / total), "data.replay_share") if total else 0
        for index, weight in zip(replay, weights, strict=True)
    }


def _quota(source: TokenizedSource, has: int, asked: float, field: str) -> int:
    """Tokens that an epoch takes of a source.

    Raises:
        UserError: it would be repeated so often that one of the numbers is a mistake.
    """
    if source.source.repeat and asked > _MOST_PASSES * has > 0:
        problem = f"{source.source.location} would stand {asked / has:,.0f} times in an epoch"
        raise UserError(field, problem, f"Lower it, or give more text: {_MOST_PASSES:,} times is the most")
    return round(asked)


def _choose(source: TokenizedSource, pool: np.ndarray, quota: int, random: np.random.Generator) -> np.ndarray:
    """Documents of `pool` worth about `quota` tokens; with `repeat`, whole passes first, if the pool is too small."""
    total = int(source.lengths[pool].sum())
    if not total:
        return pool
    passes, rest = divmod(quota, total)
    if passes and not source.source.repeat:
        passes, rest = 1, 0
    if not rest:
        return pool if passes == 1 else np.tile(pool, passes)
    shuffled = random.permutation(pool)
    return np.concatenate([np.tile(pool, passes), shuffled[_worth(source.lengths[shuffled], rest)]])


def _worth(lengths: np.ndarray, quota: int) -> np.ndarray:
    """Indices of documents with about `quota` tokens together: in order, leaving out those that no longer fit."""
    taken = np.zeros(len(lengths), bool)
    position, left = 0, quota
    while True:
        fits = position + np.flatnonzero(lengths[position:] <= left)[:1]
        if not len(fits):
            break
        position = int(fits[0])
        ends = np.cumsum(lengths[position:])
        number = int(np.searchsorted(ends, left, side="right"))
        taken[position : position + number] = True
        left -= int(ends[number - 1])
        position += number
    chosen = np.flatnonzero(taken)
    if len(chosen) < len(lengths):
        # What is left is smaller than any document; half of one is the point where adding it comes nearer.
        smallest = int(np.argmin(np.where(taken, lengths.max() + 1, lengths)))
        if 2 * left > lengths[smallest]:
            chosen = np.append(chosen, smallest)
    return chosen


def _summary(
    sources: Sequence[TokenizedSource],
    train: list[int],
    replay: list[int],
    chosen: dict[int, np.ndarray],
    quotas: dict[int, int],
    replay_share: float,
) -> dict[str, Any]:
    tokens = {index: _num_tokens(sources, {index: documents}) for index, documents in chosen.items()}
    train_tokens = sum(tokens[index] for index in train)
    replay_tokens = sum(tokens[index] for index in replay)
    return {
        "train_tokens": train_tokens,
        "replay_tokens": replay_tokens,
        "replay_share": replay_share,
        "replay_share_achieved": replay_tokens / (train_tokens + replay_tokens),
        "sources": [
            {
                "source": index,
                "domain": sources[index].source.domain_name,
                "role": sources[index].source.role,
                "tokens_asked": quotas[index],
                "tokens": tokens[index],
            }
            for index in sorted(chosen)
        ],
    }


def _warnings(
    sources: Sequence[TokenizedSource],
    replay: list[int],
    tokens: list[int],
    summary: dict[str, Any],
    sides: Sequence[np.ndarray],
) -> list[str]:
    warnings = []
    asked, achieved = summary["replay_share"], summary["replay_share_achieved"]
    if replay and not asked:
        warnings.append("data.replay_share is 0, so nothing of the replay sources is trained.")
    elif replay and abs(achieved - asked) > _TOLERANCE * asked:
        warnings.append(
            f"Replay makes up {achieved:.2%} of the training tokens and not {asked:.2%}: "
            + _why_another_share(sources, tokens, summary, sides)
        )
    for row in summary["sources"]:
        if row["role"] == "train" and abs(row["tokens"] - row["tokens_asked"]) > _TOLERANCE * row["tokens_asked"]:
            warnings.append(
                f"{row['domain']} gives {row['tokens']:,} tokens an epoch where its weight asks for "
                f"{row['tokens_asked']:,}: it consists of few long documents."
            )
    return [*warnings, *_not_measured(sources, sides)]


def _why_another_share(
    sources: Sequence[TokenizedSource], tokens: list[int], summary: dict[str, Any], sides: Sequence[np.ndarray]
) -> str:
    """Why replay has another share than the one asked for, and what to do."""
    replay = [row for row in summary["sources"] if row["role"] == "replay"]
    has = {row["source"]: tokens[row["source"]] for row in replay}
    runs_out = any(
        row["tokens_asked"] > (number := has[row["source"]]) and not (number and sources[row["source"]].source.repeat)
        for row in replay
    )
    if any(has.values()) and not runs_out:
        return (
            "its documents are taken whole, and they are too long for such a share beside the "
            f"{summary['train_tokens']:,} tokens that are learned. Add text to learn, or cut the documents of replay."
        )
    duplicates = [
        f"{left_out:,} of {len(sides[row['source']]):,} documents of {row['domain']}"
        for row in replay
        if (left_out := int((sides[row["source"]] == Side.DUPLICATE).sum()))
    ]
    why = "its sources hold too little text"
    if duplicates:
        why += f" of their own. Left out as duplicates of text that comes before: {', '.join(duplicates)}"
    return f"{why}. Add replay text{', or set repeat: true on it' if any(has.values()) else ''}."


def _not_measured(sources: Sequence[TokenizedSource], sides: Sequence[np.ndarray]) -> list[str]:
    measured = {
        source.source.domain_name for source, side in zip(sources, sides, strict=True) if (side == Side.HELD_OUT).any()
    }
    if not measured:
        return ["No document is held out, so nothing can be measured. Raise data.holdout or add a heldout source."]
    trained = dict.fromkeys(source.source.domain_name for source in sources if source.source.role != "heldout")
    only_scored = dict.fromkeys(source.source.domain_name for source in sources).keys() - trained.keys() - measured
    return [
        *(
            f"No document of {domain} is held out, so what happens to it cannot be measured. Raise data.holdout or add "
            f"a heldout source with domain: {domain}."
            for domain in trained
            if domain not in measured
        ),
        *(
            f"Nothing of {domain} is scored: each of its documents stands in a heldout source before it too, or has a "
            "single token. Give it text of its own."
            for domain in sorted(only_scored)
        ),
    ]
