"""What stands in for the hub in tests: one data set, whose commits are local folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

NAME = "someone/corpus"


class Hub:
    """One data set of the hub.

    Attributes:
        head: the commit that every revision without a commit's name is at.
        offline: whether the hub cannot be reached.
        opened: how often the data set was opened.
        pulled: rows that were pulled from its stream.
        lost_after: the connection is lost for good after so many rows.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._load_dataset = datasets.load_dataset
        self.head = ""
        self.offline = False
        self.opened = self.pulled = 0
        self.lost_after: int | None = None
        patch.setattr(datasets, "load_dataset", self._load)
        patch.setattr(HfApi, "dataset_info", self._dataset_info)

    def commit(self, *files: list[dict[str, Any]] | str, readme: str = "") -> str:
        """A new commit with these JSON-lines files; its name."""
        self.head = f"{int(self.head or '0', 16) + 1:040x}"
        (self._folder / self.head).mkdir(parents=True)
        for index, rows in enumerate(files):
            lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (self._folder / self.head / f"train-{index:02}.jsonl").write_text(lines)
        (self._folder / self.head / "README.md").write_text(readme)
        return self.head

    def folder(self, commit: str) -> Path:
        return self._folder / commit

    def _dataset_info(self, name: str, *, revision: str | None, timeout: float) -> Any:
        if self.offline:
            raise OfflineModeIsEnabled("offline")
        return SimpleNamespace(sha=self.head)

    def _load(self, name: str, subset: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        if self.offline:
            raise ConnectionError("offline")
        self.opened += 1
        folder = str(self._folder / (revision or self.head)) if name == NAME else name
        data = self._load_dataset(folder, subset, split=split, streaming=streaming)
        return _Watched(data, self) if streaming else data


class _Watched:
    """A stream whose rows are counted, and that may break."""

    def __init__(self, data: Any, hub: Hub) -> None:
        self._data, self._hub = data, hub
        self.info, self.column_names = data.info, data.column_names

    def select_columns(self, names: list[str]) -> _Watched:
        return _Watched(self._data.select_columns(names), self._hub)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._data:
            if self._hub.pulled == self._hub.lost_after:
                raise ConnectionError("Server Disconnected")
            self._hub.pulled += 1
            yield row
