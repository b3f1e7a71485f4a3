"""What a card did in the steps of a profile: by class of kernel, and when it did nothing."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

import steep.kernels

# Of kernels that are not steep's, by their names; the first that is found in one.
CLASSES = {
    "attention": r"fmha|sdpa|flash|attention",
    "products": r"gemm|nvjet|cutlass|xmma|gemv|cublas",
    "copies to and from the host": r"^Memcpy (HtoD|DtoH)",
    "copies": r"^Mem(cpy|set)|copy_kernel|CatArrayBatchedCopy|direct_copy",
}


class Event(NamedTuple):
    """Of the card, in microseconds."""

    name: str
    begin: float
    end: float


def events_of(profile: torch.profiler.profile) -> list[Event]:
    """Kernels and copies of a profile of CUDA's activities."""
    on_card = (each for each in profile.events() or () if each.device_type == torch.autograd.DeviceType.CUDA)
    return [Event(each.name, each.time_range.start, each.time_range.end) for each in on_card]


def account(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """What a step took, in milliseconds: `step_ms`, from the first kernel to the last; `idle_ms`, with no kernel
    running; `by_class_ms`, with kernels of other streams counted in full; and `hidden_share` of the time of copies to
    and from the host, in which a kernel ran (None: there were none).

    Args:
        events: not empty.
        steps: that they are of.
    """
    by_class, copies, kernels = defaultdict[str, float](float), list[Event](), list[Event]()
    for event in events:
        kind = class_of(event.name)
        by_class[kind] += event.end - event.begin
        (copies if event.name.startswith("Mem") else kernels).append(event)
    whole = max(event.end for event in events) - min(event.begin for event in events)
    busy = _union(kernels)
    moved = _union(event for event in copies if "HtoD" in event.name or "DtoH" in event.name)
    hidden = _length(moved) + _length(busy) - _length(_union([*moved, *busy]))
    in_ms = 1e3 * steps
    return {
        "step_ms": whole / in_ms,
        "idle_ms": (whole - _length(busy)) / in_ms,
        "by_class_ms": {kind: by_class[kind] / in_ms for kind in sorted(by_class, key=lambda kind: -by_class[kind])},
        "hidden_share": hidden / _length(moved) if moved else None,
    }


def class_of(name: str) -> str:
    """A kernel's class: the module that it is in, where it is steep's."""
    own = _modules().get(name)
    if own is not None:
        return own
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name)), "others")


@cache
def _modules() -> dict[str, str]:
    found = {}
    for place in pkgutil.iter_modules(steep.kernels.__path__):
        module = importlib.import_module(f"steep.kernels.{place.name}")
        for name, each in vars(module).items():
            if name.endswith("_kernel") and each.fn.__module__ == module.__name__:
                found[name] = place.name
    return found


def _union(events: Iterable[Event]) -> list[Event]:
    """The times in which at least one of them runs, apart from each other."""
    found: list[Event] = []
    for event in sorted(events, key=lambda each: each.begin):
        if found and event.begin <= found[-1].end:
            found[-1] = found[-1]._replace(end=max(found[-1].end, event.end))
        else:
            found.append(event)
    return found


def _length(apart: Sequence[Event]) -> float:
    return sum(event.end - event.begin for event in apart)
