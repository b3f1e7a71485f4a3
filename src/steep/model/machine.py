"""The card and the memory of this machine, and whether the kernels of the fused forward run on a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from steep import ranks
from steep.kernels import OLDEST_CARD, OLDEST_FP8_CARD

HOST_SHARE = 0.8
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of either version: its root, the files of limit and use, and what of the use can be freed.
_VERSIONS = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}
OLDEST_BF16_CARD = (8, 0)  # torch also calls emulated bf16 supported, at a tenth of the speed
LACKS_FP8_UNITS = "the card has no fp8 units: those of compute capability 8.9 and newer have"


@dataclass(frozen=True)
class Card:
    """A GPU that steps are planned for.

    Attributes:
        name: the maker's, or that in `steep.planning.cards`.
        capability: its compute capability.
        memory: bytes, as CUDA counts them.
        free: those of them that a run may take: neither others hold them, nor CUDA itself.
        is_here: it is this machine's.
        processors: its multiprocessors; 0: not known.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    free: int
    is_here: bool = True
    processors: int = 0

    def as_dict(self) -> dict[str, Any]:
        """In `plan.json`."""
        capability = ".".join(map(str, self.capability))
        return {
            "name": self.name,
            "compute_capability": capability,
            "memory_bytes": self.memory,
            "is_here": self.is_here,
        }

    @property
    def has_bf16(self) -> bool:
        return self.capability >= OLDEST_BF16_CARD

    @property
    def has_fp8_units(self) -> bool:
        """Whether products in e4m3 run on it by itself: Ada (compute capability 8.9), Hopper, Blackwell."""
        return self.capability >= OLDEST_FP8_CARD


def card_here() -> Card | None:
    """The card that this process computes on, as full as it is now; None: there is none."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    capability, properties = torch.cuda.get_device_capability(), torch.cuda.get_device_properties()
    free += torch.cuda.memory_reserved()
    return Card(torch.cuda.get_device_name(), capability, total, free, processors=properties.multi_processor_count)


def available_on_host() -> int:
    """Bytes of the host that are free, or can be freed at once; within a container, or a job of a cluster, no more than
    that may take."""
    return min([_meminfo()["MemAvailable"], *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """Bytes that each group with a limit may still take, of those that this process is in."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        place, *files, freeable = _VERSIONS[version]
        root = _CGROUPS / place
        own = root / path.lstrip("/")  # in a container its name is that outside: only the root is there then
        for group in (own, *own.parents):
            try:
                limit, used = ((group / name).read_text().strip() for name in files)
                cached = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())[freeable]
            except (OSError, KeyError):
                limit, used, cached = "max", "0", "0"
            if limit != "max":
                yield max(int(limit) - int(used) + int(cached), 0)
            if group == root:
                break


def room_on_host() -> int:
    """Those of them that a process may fill for long: the others are for what it loads, and for those beside it."""
    return round(HOST_SHARE * available_on_host()) // ranks.processes_here()


def _meminfo() -> dict[str, int]:
    """In bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(number) * 1024 for name, number, *_ in lines}


def why_not_on(card: Card | None) -> str | None:
    """Why they do not run on `card`; None: they do, or there is none, where plain torch computes the same. On a card of
    another machine whatever they need beside it is taken to be there."""
    if card is None:
        return None
    return why_not_here() if card.is_here else _too_old(card.capability)


def why_not_here() -> str | None:
    """The same of the card that is here."""
    if not torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "its kernels are for NVIDIA's cards"
    if reason := _too_old(torch.cuda.get_device_capability()):
        return reason
    return None if find_spec("triton") else "triton is not installed"


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability >= OLDEST_CARD:
        return None
    oldest, has = (".".join(map(str, each)) for each in (OLDEST_CARD, capability))
    return f"its kernels need compute capability {oldest}, and the card has {has}"


def has_fp8_units(device: torch.device) -> bool:
    """Whether products in e4m3 run on that device by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_FP8_CARD


def lacks_fp8_units() -> bool:
    """Whether there is a card, and it has none. Without a card plain torch computes the same."""
    return torch.cuda.is_available() and not has_fp8_units(torch.device("cuda", torch.cuda.current_device()))
