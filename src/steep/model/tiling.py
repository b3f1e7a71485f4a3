"""How many tokens a layer computes at a time, where it computes row by row."""

from __future__ import annotations

WHOLE = 2**14  # tokens up to which all at once is the fastest
LARGE = 2**12  # as fast as any by the token: its products fill a card
SLOWER = 2**11, 2**10  # the host launches as much for each as for a large one


def tile_sizes(tokens: int) -> list[int]:
    """Sizes of a tile, from the fastest to the leanest: even parts of the batch."""
    fast, slower = fast_and_slower(tokens)
    return fast + slower


def fast_and_slower(tokens: int) -> tuple[list[int], list[int]]:
    """The sizes that are as fast as any, and those that are slower, both from the largest on."""
    fast: list[int] = []
    slower: list[int] = []
    if tokens <= WHOLE:
        fast.append(max(tokens, 1))
    for sizes, largest in ((fast, LARGE), *((slower, most) for most in SLOWER)):
        size = _even(tokens, largest)
        if size not in (*fast, *slower):
            sizes.append(size)
    return fast, slower


def _even(tokens: int, largest: int) -> int:
    """The size of equal parts, as few as can be with `largest` at most; a multiple of 64, but for a batch below it."""
    tokens = max(tokens, 1)
    size = -(-tokens // -(-tokens // largest))
    return min(-(-size // 64) * 64, tokens)
