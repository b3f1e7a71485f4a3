"""How far a model's loading has come, told as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.logging import set_tqdm_hook

Progress = Callable[[int, int], None]  # how many are done, and of how many

_DESCRIPTION = "Loading weights"  # of transformers' bar over the tensors of a checkpoint (5.17 to 5.23)


@contextmanager
def tensors_told(progress: Progress | None) -> Iterator[None]:
    """Within, transformers' loading calls `progress` after each tensor in place of showing a bar of its own.

    Args:
        progress: None: nothing is changed.
    """
    if progress is None:
        yield
        return

    def hook(factory: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if named.get("desc") != _DESCRIPTION:
            return factory(*given, **named)
        return told_of(given[0], len(given[0]), progress)

    before = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def told_of(items: Iterable[Any], total: int, progress: Progress) -> Iterator[Any]:
    """`items`, and `progress` is called when one was worked on."""
    for done, item in enumerate(items, 1):
        yield item
        progress(done, total)
