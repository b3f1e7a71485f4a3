"""What was allocated while torch's profiler looked."""

from __future__ import annotations

from typing import Any


def allocations(prof: Any, name: str) -> list[int]:
    """Bytes that were taken, or given back (below 0), one by one inside of what was recorded as `name`."""

    def nodes(some: Any) -> Any:
        for node in some:
            yield node
            yield from nodes(node.children)

    (span,) = (each for each in nodes(prof.profiler.kineto_results.experimental_event_tree()) if each.name == name)
    found = [each for each in nodes([span]) if each.typed[0].name == "Allocation"]
    return [each.typed[1].alloc_size for each in sorted(found, key=lambda each: each.start_time_ns)]
