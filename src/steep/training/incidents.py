"""`incidents.jsonl`: a line for each step that was out of the ordinary, with the text that it was about to learn.

A line is on the disk before the step is over, so a checkpoint never holds a step whose line is missing. A run that goes
back to a checkpoint drops the lines behind it, and writes them again where the steps come out as they did. What stays
are the lines of steps that are passed over: nothing would write those a second time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from steep import ranks
from steep.data.ledger import names_of
from steep.data.packing import Corpus
from steep.recorded import read_lines
from steep.storage import sync, write_file

FILE = "incidents.jsonl"
_CHARACTERS = 200
_TOKENS = 2 * _CHARACTERS  # enough for so many characters, also where one takes several tokens


class Incidents:
    """The file in a run's folder.

    Args:
        folder: `output_dir`; made with the first line.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def add(self, incident: Mapping[str, Any]) -> None:
        """Add a line, and wait until it is on the disk. One of several processes does."""
        if not ranks.is_main():
            return
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(incident))
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            sync(self.path.parent)

    def rewind(self, step: int, passed_over: Container[int]) -> None:
        """Drop what was written after `step`, but for the steps that are passed over; and a line that a kill cut."""
        if not ranks.is_main() or not self.path.exists():
            return
        kept = [row for row in read_lines(self.path) if row["step"] <= step or row["step"] in passed_over]
        write_file(self.path, "".join(map(_line, kept)))


def _line(incident: Mapping[str, Any]) -> str:
    return json.dumps(incident, ensure_ascii=False, allow_nan=False) + "\n"


def described(corpus: Corpus, rows: Iterable[int], tokenizer: Any) -> list[dict[str, Any]]:
    """What stands in rows: for each `row` its `pieces`, with `source`, `domain` and `role` as in the ledger, the number
    of the `document` in that source, `first_token` and `tokens` of the piece in it, and the beginning of its `text`."""
    train = corpus.train
    found = []
    for row in rows:
        pieces = []
        for piece in range(int(train.row_first[row]), int(train.row_first[row + 1])):
            item = train.sources[int(train.source[piece])]
            document, start, length = int(train.document[piece]), int(train.start[piece]), int(train.length[piece])
            ids = item.tokens(document, start, start + min(length, _TOKENS)).tolist()
            names = names_of(item)
            pieces.append(
                {
                    "source": names["name"],
                    "domain": names["domain"],
                    "role": names["role"],
                    "document": document,
                    "first_token": start,
                    "tokens": length,
                    "text": None if tokenizer is None else tokenizer.decode(ids)[:_CHARACTERS],
                }
            )
        found.append({"row": int(row), "pieces": pieces})
    return found
