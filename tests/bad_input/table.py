"""What a row of the table of wrong inputs is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input.damage import Scene, Spoil, setting


@dataclass(frozen=True)
class Row:
    """A wrong input.

    Attributes:
        name: of the test.
        field: what the line names, behind ``error: ``; FOLDER is the scene's.
        spoil: what is done to a run that was in order.
        says: parts of the line: what is wrong with which value, what to do.
        words: of the command, behind the run file; FOLDER is the scene's.
        command: ``plan``, unless only a training run looks that closely.
    """

    name: str
    field: str
    spoil: Spoil
    says: tuple[str, ...]
    words: tuple[str, ...]
    command: str


def row(name: str, field: str, spoil: Spoil, *says: str, words: Sequence[str] = (), command: str = "plan") -> Row:
    return Row(name, field, spoil, says, tuple(words), command)


def field(path: str, value: Any, *says: str) -> Row:
    """A field of the run file with a value that it cannot have."""
    name = f"{path}={str(value)[:20]}".replace("\0", "NUL")
    return row(name, path.replace(".0.", "[0]."), setting(path, value), *says)


def words(given: str, field: str, *says: str) -> Row:
    """Words behind the run file that cannot stand there."""
    return row(given, field, in_order, *says, words=given.split(" "))


def in_order(scene: Scene) -> None:
    """Nothing is wrong with the run itself."""


def parquet(table: dict[str, Any] | pa.Table, compression: str = "snappy") -> bytes:
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink, compression=compression)
    return sink.getvalue()
