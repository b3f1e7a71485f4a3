"""Where everything stands in the buffers of a group of LoRA projections (`steep.ops.lora` draws them).

It depends on shapes alone, which are the same for all layers of most models, and so is worked out once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

ALIGNMENT = 8  # elements

Shape = tuple[int, ...]


class Member(NamedTuple):
    """The shapes of one projection: its weight's (out_features, in_features), and those of each adapter's a and b."""

    weight: Shape
    has_bias: bool
    adapters: tuple[tuple[Shape, Shape], ...]


@dataclass(frozen=True)
class Part:
    """Projections whose outputs one product gives.

    Attributes:
        outputs: rows of the buffer, and columns of y and dy.
        inputs: columns of the input rows and of the buffer which that product reads.
        low: columns of x·Aᵀ in the input rows, and of s·B in the buffer.
        low_rows: rows of A in the buffer, and columns of dy·s·B in the gradient rows.
    """

    outputs: slice
    inputs: slice
    low: slice
    low_rows: slice


@dataclass(frozen=True)
class Place:
    """Where an adapter stands: its slices as in `Part`, with no padding."""

    outputs: slice
    low: slice
    low_rows: slice


@dataclass(frozen=True)
class Piece:
    """A rectangle of the weight buffer with at most one tensor in it, and zeros around that.

    Attributes:
        source: number of the tensor, or None.
        own_rows, own_columns: where the tensor stands, in the buffer too; empty where there is none.
    """

    rows: slice
    columns: slice
    source: int | None
    own_rows: slice
    own_columns: slice

    def numbers(self) -> tuple[int, int, int, int, int, int, int, int]:
        """Row, column, height and width in the buffer; then those of the tensor in the piece."""
        row, column, own_row, own_column = self.rows, self.columns, self.own_rows, self.own_columns
        return (
            *(row.start, column.start, _size(row), _size(column)),
            *(own_row.start - row.start, own_column.start - column.start, _size(own_row), _size(own_column)),
        )


@dataclass(frozen=True, eq=False)
class Pieces:
    """What is filled in beside weights.

    Attributes:
        matrices: pieces with A or s·B; sources are a and b of each adapter in turn.
        biases: pieces of the padding; sources are the projections' biases.
    """

    matrices: tuple[Piece, ...]
    biases: tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class Layout(Pieces):
    """All slices of a group.

    Attributes:
        outputs: N, the features of all outputs.
        gradient_width, input_width: of the gradient rows and of the input rows.
        x_columns: of x in the input rows.
        padding: columns behind x; the first is that of biases, where there are any.
        parts: the first projection, and all others together.
        rows: of each projection in the buffer.
        places: of each adapter, those of the first projection first.
    """

    outputs: int
    gradient_width: int
    input_width: int
    x_columns: slice
    padding: slice
    parts: tuple[Part, ...]
    rows: tuple[slice, ...]
    places: tuple[Place, ...]


@cache
def layout_of(members: tuple[Member, ...]) -> Layout:
    in_features = _in_features(members)
    ranks = [[a[0] for a, _ in member.adapters] for member in members]
    widths = [_aligned(sum(own)) for own in ranks]
    with_bias = in_features + any(member.has_bias for member in members)
    x_columns = slice(widths[0], widths[0] + in_features)
    padding = slice(x_columns.stop, widths[0] + _aligned(with_bias))
    rows = _slices(0, [member.weight[0] for member in members])
    outputs = rows[-1].stop
    lows = [slice(0, widths[0]), *_slices(padding.stop, widths[1:])]
    low_rows = _slices(_aligned(outputs), widths)

    parts = [Part(rows[0], slice(0, padding.stop), lows[0], low_rows[0])]
    if len(members) > 1:
        others = [slice(own[1].start, own[-1].stop) for own in (rows, lows, low_rows)]
        parts.append(Part(others[0], slice(x_columns.start, others[1].stop), *others[1:]))

    places: list[Place] = []
    matrices: list[Piece] = []
    for index, own in enumerate(ranks):
        place = zip(_slices(lows[index].start, own), _slices(low_rows[index].start, own), strict=True)
        first = len(places)
        places += [Place(rows[index], *slices) for slices in place]
        tenants = [(2 * number + 1, places[number].low) for number in range(first, len(places))]
        for columns, source, own_columns in _cut(parts[min(index, 1)].low, tenants):
            matrices.append(Piece(rows[index], columns, source, rows[index], own_columns))
    tenants = [(2 * number, place.low_rows) for number, place in enumerate(places)]
    for of_a, source, own_rows in _cut(slice(outputs, low_rows[-1].stop), tenants):
        matrices.append(Piece(of_a, x_columns, source, own_rows, x_columns))
    biases = [
        Piece(own, padding, index, own, slice(padding.start, padding.start + member.has_bias))
        for index, (own, member) in enumerate(zip(rows, members, strict=True))
        if _size(padding)
    ]
    return Layout(
        outputs=outputs,
        gradient_width=low_rows[-1].stop,
        input_width=max(lows[-1].stop, padding.stop),
        x_columns=x_columns,
        padding=padding,
        parts=tuple(parts),
        rows=tuple(rows),
        places=tuple(places),
        matrices=tuple(matrices),
        biases=tuple(biases),
    )


@dataclass(frozen=True, eq=False)
class BesideLayout:
    """All slices of a group whose weights stay where they are stored: [T, input_width] of x | x·A₁ᵀ | x·A₂ᵀ ...,
    [T, gradient_width] of dy₁ | dy₂ ... | dy₁·s·B₁ | dy₂·s·B₂ ..., and two buffers, s·B and A.

    Attributes:
        outputs: N, the features of all outputs.
        gradient_width, input_width: of the gradient rows and of the input rows.
        x_columns: of x in the input rows.
        rows: of each projection, in s·B; columns of y and dy.
        lows: of each projection, columns of x·Aᵀ in the input rows.
        low_rows: of each projection, columns of dy·s·B in the gradient rows.
        places: of each adapter, those of the first projection first.
        b_shape, a_shape: of the buffers: that of s·B is as wide as the widest, each projection's at its left.
        b, a: what is filled into them.
    """

    outputs: int
    gradient_width: int
    input_width: int
    x_columns: slice
    rows: tuple[slice, ...]
    lows: tuple[slice, ...]
    low_rows: tuple[slice, ...]
    places: tuple[Place, ...]
    b_shape: tuple[int, int]
    a_shape: tuple[int, int]
    b: Pieces
    a: Pieces


@cache
def beside_layout_of(members: tuple[Member, ...]) -> BesideLayout:
    in_features = _in_features(members)
    ranks = [[a[0] for a, _ in member.adapters] for member in members]
    widths = [_aligned(sum(own)) for own in ranks]
    rows = _slices(0, [member.weight[0] for member in members])
    outputs = rows[-1].stop
    lows = _slices(_aligned(in_features), widths)
    low_rows = _slices(_aligned(outputs), widths)

    places: list[Place] = []
    of_b: list[Piece] = []
    of_a: list[Piece] = []
    whole = slice(0, in_features)
    for index, (own, in_a) in enumerate(zip(ranks, _slices(0, widths), strict=True)):
        numbers = range(len(places), len(places) + len(own))
        place = zip(_slices(lows[index].start, own), _slices(low_rows[index].start, own), strict=True)
        places += [Place(rows[index], *slices) for slices in place]
        tenants = zip([2 * number + 1 for number in numbers], _slices(0, own), strict=True)
        for columns, source, own_columns in _cut(slice(0, widths[index]), list(tenants)):
            of_b.append(Piece(rows[index], columns, source, rows[index], own_columns))
        tenants = zip([2 * number for number in numbers], _slices(in_a.start, own), strict=True)
        for of_projection, source, own_rows in _cut(in_a, list(tenants)):
            of_a.append(Piece(of_projection, whole, source, own_rows, whole))
    return BesideLayout(
        outputs=outputs,
        gradient_width=low_rows[-1].stop,
        input_width=lows[-1].stop,
        x_columns=whole,
        rows=tuple(rows),
        lows=tuple(lows),
        low_rows=tuple(low_rows),
        places=tuple(places),
        b_shape=(outputs, max(widths)),
        a_shape=(sum(widths), in_features),
        b=Pieces(tuple(of_b), ()),
        a=Pieces(tuple(of_a), ()),
    )


def _in_features(members: Sequence[Member]) -> int:
    """That of all projections, whose adapters fit."""
    in_features = {member.weight[1] for member in members}
    assert len(in_features) == 1, f"projections of one group read the same input: {in_features}"
    (in_features,) = in_features
    for (out_features, _), _, adapters in members:
        for a, b in adapters:
            assert a[1] == in_features and b == (out_features, a[0]), (a, b, out_features, in_features)
    return in_features


def _slices(start: int, sizes: Sequence[int]) -> list[slice]:
    """Slices of these sizes, one behind the other."""
    ends = list(accumulate(sizes, initial=start))
    return [slice(*each) for each in pairwise(ends)]


def _cut(whole: slice, tenants: Sequence[tuple[int, slice]]) -> Iterator[tuple[slice, int | None, slice]]:
    """`whole` in slices that hold one tenant each, (slice, source, slice of the source); in one without any."""
    if not tenants and _size(whole):
        yield whole, None, slice(whole.start, whole.start)
    start = whole.start
    stops = [*(at.start for _, at in tenants[1:]), whole.stop]
    for (source, at), stop in zip(tenants, stops, strict=False):
        yield slice(start, stop), source, at
        start = stop


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _size(part: slice) -> int:
    return part.stop - part.start
