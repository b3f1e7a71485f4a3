"""Cards by name, for `steep plan --card`: what a run would find there.

Memory is what CUDA counts (`torch.cuda.mem_get_info`, also in torch's own messages), which is less than what is sold:
ECC and the driver take some. Drivers differ by 0.1 GiB, and the least is taken.
"""

from __future__ import annotations

from steep.errors import UserError, did_you_mean
from steep.model.machine import Card

CONTEXT = 2**29  # bytes that CUDA itself holds for a process with its kernels: 0.3 to 0.6 GiB

# GiB, compute capability, and multiprocessors.
CARDS: dict[str, tuple[float, tuple[int, int], int]] = {
    "T4": (14.56, (7, 5), 40),
    "3060": (11.7, (8, 6), 28),
    "3090": (23.5, (8, 6), 82),
    "4080": (15.5, (8, 9), 76),
    "4090": (23.5, (8, 9), 128),
    "5090": (31.3, (12, 0), 170),
    "A10": (21.9, (8, 6), 72),
    "A6000": (47.3, (8, 6), 84),
    "L4": (22.0, (8, 9), 58),
    "L40S": (44.3, (8, 9), 142),
    "PRO-6000": (94.9, (12, 0), 188),
    "A100-40": (39.3, (8, 0), 108),
    "A100-80": (79.1, (8, 0), 108),
    "H100": (79.1, (9, 0), 132),
    "H200": (139.7, (9, 0), 132),
    "B200": (178.3, (10, 0), 148),
}

MOST_PROCESSORS = max(processors for _, _, processors in CARDS.values())


def card_named(name: str, field: str = "--card") -> Card:
    """The card of that name, in capitals or not, with nothing on it.

    Raises:
        UserError: it is not in the list.
    """
    names = {known.casefold(): known for known in CARDS}
    known = names.get(name.strip().casefold())
    if known is None:
        of_that_name = [each for each in CARDS if each.startswith(f"{name.strip().upper()}-")]
        near = (
            f"Did you mean {' or '.join(of_that_name)}?" if of_that_name else did_you_mean(name.strip().upper(), CARDS)
        )
        raise UserError(field, f"{name!r} is unknown", f"{near} Known are: {', '.join(CARDS)}.".lstrip())
    gib, capability, processors = CARDS[known]
    memory = round(gib * 2**30)
    return Card(known, capability, memory, memory - CONTEXT, is_here=False, processors=processors)
