"""Of how many rows each forward of a step is, where the run file says only how many a step has."""

from __future__ import annotations

from dataclasses import replace

from steep import ranks
from steep.errors import UserError
from steep.planning.computation import Ground, Sizes
from steep.planning.duration import Pace
from steep.planning.fitting import changed, forwards_of, tried
from steep.planning.rates import rates_of
from steep.schema import RunConfig
from steep.settings import MOST_TOKENS

# Tokens of a forward whose time is not known, and on a CPU not its memory either: what a run has that leaves all at its
# defaults. The products of an 8B are as fast by then, and whole logits over 128,000 words take some GiB.
UNTIMED = 4096
AS_FAST = 1.03  # times the shortest: what predicted times are worth. Smaller forwards leave more of a large card.


def with_micro_batch(config: RunConfig, ground: Ground) -> tuple[RunConfig, str | None]:
    """`config` with `training.rows_per_step` cut into forwards of equally many rows, and why so: of the ways that fit
    the smallest forward whose predicted step is nearly as short as any (`AS_FAST`), by the makers' figures, since no
    timer has a part in a run's bits; where no time is known the largest up to `UNTIMED` tokens; where none fits that
    which needs least. As it is, and without a reason, where the run file says how a step is cut.

    Raises:
        UserError: updates inside backward need all rows in one forward, and those are more than any card holds.
    """
    if config.training.rows_per_step is None:
        return config, None
    rows, length = config.training.rows_per_step // ranks.world_size(), config.data.max_length
    in_one = config.training.optimizer_in_backward
    if in_one and rows * length > MOST_TOKENS:
        raise UserError(
            "training.rows_per_step",
            f"{rows:,} rows of {length:,} tokens are {rows * length:,} in one forward, which training."
            "optimizer_in_backward needs: more than a card holds",
            f"Give {MOST_TOKENS // length * ranks.world_size():,} at most, or set optimizer_in_backward: false.",
        )
    if in_one:
        return _cut(config, rows, rows), "with updates inside backward a step is one forward"
    rates = rates_of(ground.card)
    ground = replace(ground, rates=rates)
    parts = [part for part in range(1, min(rows, MOST_TOKENS // length) + 1) if rows % part == 0]
    found = {part: tried(_cut(config, rows, part), ground) for part in parts}
    possible = {part: sizes for part, sizes in found.items() if sizes is not None}
    fitting = {part: sizes for part, sizes in possible.items() if ground.budget is None or sizes.peak <= ground.budget}
    if not fitting:  # which `steep.planning.fitting` then says, or what forbids each of them
        part = min(possible, key=lambda part: possible[part].peak, default=1)
        reason = "the one that needs least of the card, and does not fit" if possible else None
    elif rates is None or (seconds := _seconds(Pace(config, rates, length), fitting)) is None:
        part = max((part for part in fitting if part * length <= UNTIMED), default=min(fitting))
        most = f"the most up to {UNTIMED:,} tokens" if part * length <= UNTIMED else "the fewest that fit"
        reason = f"{most}: the time of a step is not known"
    else:
        part = min(part for part in fitting if seconds[part] <= AS_FAST * min(seconds.values()))
        ways = f"{len(fitting)} of {len(parts)} ways to cut {rows:,} rows fit" if len(parts) > 1 else "the only way"
        reason = f"the smallest whose predicted step is within {AS_FAST - 1:.0%} of the shortest: {ways}"
    return _cut(config, rows, part), reason


def _cut(config: RunConfig, rows: int, part: int) -> RunConfig:
    return changed(config, forwards_of(part, rows // part))


def _seconds(pace: Pace, found: dict[int, Sizes]) -> dict[int, float] | None:
    """Of a step, by the rows of a forward; None: not known. The text is not read yet, so each row is taken for one
    document: what attention takes by its documents is the same however rows are cut."""
    seconds = {part: pace.seconds(sizes) for part, sizes in found.items()}
    known = {part: each for part, each in seconds.items() if each is not None}
    return known if len(known) == len(seconds) else None
