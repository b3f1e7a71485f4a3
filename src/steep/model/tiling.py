"""How many tokens a layer computes at a time, where it computes row by row."""

from __future__ import annotations

WHOLE = 2**14  # tokens up to which all at once is the fastest
LARGE = 2**12  # as fast as any by the token: its products fill a card
SMALL = 2**10  # slower, for the least memory


def tile_sizes(tokens: int) -> list[int]:
    """Sizes of a tile, from the fastest to the leanest: even parts of the batch."""
    sizes = [max(tokens, 1)] if tokens <= WHOLE else []
    for size in (_even(tokens, LARGE), _even(tokens, SMALL)):
        if size not in sizes:
            sizes.append(size)
    return sizes


def _even(tokens: int, largest: int) -> int:
    """The size of equal parts, as few as can be with `largest` at most; a multiple of 64, but for a batch below it."""
    tokens = max(tokens, 1)
    size = -(-tokens // -(-tokens // largest))
    return min(-(-size // 64) * 64, tokens)
