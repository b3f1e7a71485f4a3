"""The memory of the card, and of the host, that a plan may fill."""

from __future__ import annotations

import math
from collections.abc import Mapping

from steep import ranks
from steep.amounts import human_bytes
from steep.errors import UserError
from steep.model.machine import Card, available_on_host, room_on_host
from steep.schema import VRAM, TrainingSection

SHARE = 0.9  # of the card: allocations of odd sizes leave gaps (`steep.planning.memory.gaps`)
_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def vram_budget(vram: str, card: Card | None) -> int | None:
    """Bytes that `training.vram` stands for on `card`, never more than it has; None without one, unless it is an
    amount, which can be planned for.

    ``auto`` leaves out what is not free there.
    """
    if card is None:
        return None if vram == "auto" or "%" in vram else asked_bytes(vram, card)
    if vram == "auto":
        return max(round(SHARE * card.memory) - (card.memory - card.free), 0)
    return min(asked_bytes(vram, card), card.memory)


def host_budget(host_memory: str, card: Card | None) -> int:
    """Bytes that `training.host_memory` stands for, of all processes of this machine. ``auto`` knows nothing of the
    host of a card that is not here."""
    if host_memory != "auto":
        return asked_bytes(host_memory, card)
    return room_on_host() * ranks.processes_here() if card is not None and card.is_here else 0


def host_limit(host_memory: str, card: Card | None, budget: int | None = None) -> float:
    """Bytes above which a run is refused. Without a card all that it has is there, and of another card's host nothing
    is known.

    Args:
        budget: of a new run, by `host_budget`. None: the run goes on. It filled ``auto`` as that was when it began, and
            may have all that is available now.
    """
    if host_memory != "auto":
        return asked_bytes(host_memory, card)
    if card is None or not card.is_here:
        return math.inf
    return available_on_host() if budget is None else budget


def host_lacks(host: Mapping[str, int], limit: float) -> bool:
    """Whether what is locked in host memory, with the copy of a checkpoint, needs more than may be filled; that copy
    alone is memory like any other.

    Args:
        host: bytes by item.
        limit: of `host_limit`.
    """
    return bool(_locked(host)) and sum(host.values()) > limit


def _locked(host: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in host.items() if name != "copy of a checkpoint" and size}


def check_host(host: Mapping[str, int], limit: float, *, goes_on: bool) -> None:
    """That states and what layers keep have room in host memory, also where a run goes on on another machine.

    Args:
        host: bytes by item.
        limit: of `host_limit`.
        goes_on: the run was begun before.

    Raises:
        UserError: they have not.
    """
    if host_lacks(host, limit):
        again = ", and gradient_checkpointing: true, with --allow training.gradient_checkpointing, chooses again"
        parts = " and ".join(f"{human_bytes(size)} of {name}" for name, size in _locked(host).items())
        raise UserError(
            "training.host_memory",
            f"the run has {parts} in host memory, and with a copy of a checkpoint needs "
            f"{human_bytes(sum(host.values()))} there; {human_bytes(limit)} may be filled",
            "Free some, or give the amount that there is; training.offload_optimizer: none leaves the states on the "
            f"card{again if goes_on else ''}.",
        )


def remarks(training: TrainingSection, card: Card | None, host: Mapping[str, int]) -> list[str]:
    """What a user should know of the amounts of memory that are given.

    Args:
        host: bytes in host memory, by item.
    """
    if card is None and vram_budget(training.vram, None) is None:
        usual = {"vram": "auto", "host_memory": "auto", "offload_optimizer": "none"}
        given = [f"training.{name}" for name, value in usual.items() if getattr(training, name) != value]
        if given:
            return [f"there is no GPU, and without one nothing is done by {' and '.join(given)}."]
    elif card is not None and card.is_here and training.host_memory != "auto":
        needed, there = sum(host.values()), available_on_host()
        if needed > there:
            return [
                f"the run fills {human_bytes(needed)} of host memory, and the system reports {human_bytes(there)} "
                f"available: training.host_memory: {training.host_memory} is taken at its word, and where there "
                "is less the system ends the run."
            ]
    return []


def remarks_on_gaps(step: int, gaps: int, left: int | None) -> list[str]:
    """What a user should know where a step fits, and gaps between its allocations may not.

    Args:
        step: bytes of its peak.
        gaps: bytes that may be reserved beyond it.
        left: bytes that the card has beyond it; None: not known.
    """
    if left is None or gaps <= left:
        return []
    return [
        f"a step has {human_bytes(step)}, and gaps between allocations may take up to {human_bytes(gaps)} more, where "
        f"the card has {human_bytes(left)}: most runs have far fewer. If memory runs out, the step is computed again "
        "and keeps less; a smaller training.vram leaves room."
    ]


def asked_bytes(vram: str, card: Card | None) -> int:
    """What is set by hand, though a card may have less."""
    number, unit = as_amount(vram)
    if unit != "%":
        return round(number * _UNITS[unit])
    assert card is not None  # a share is of one
    return round(number / 100 * card.memory)


def as_amount(vram: str) -> tuple[float, str]:
    """Number and unit, in lower case, of what the schema let pass."""
    found = VRAM.fullmatch(vram.strip())
    assert found is not None, vram
    return float(found["number"]), found["unit"].lower()
