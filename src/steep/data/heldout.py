"""Documents kept away from training, by domain, for measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from steep.data.mixing import Side
from steep.data.tokens import TokenizedSource


@dataclass(frozen=True)
class HeldoutDocument:
    """One document, its tokens still in the mapped file."""

    source: TokenizedSource
    index: int

    @property
    def tokens(self) -> np.ndarray:
        """All its tokens with BOS and EOS: int32, read-only, a view of the mapped file."""
        return self.source.tokens(self.index)

    @property
    def num_tokens(self) -> int:
        return int(self.source.lengths[self.index])

    @property
    def num_bytes(self) -> int:
        """Bytes of its UTF-8 text."""
        return self.source.num_bytes_of(self.index)

    @property
    def num_chars(self) -> int:
        """Characters (code points) of its text."""
        return self.source.num_chars_of(self.index)


class HeldoutDocuments(Sequence[HeldoutDocument]):
    """The held-out documents of a domain, in the order of sources and documents: 12 bytes of RAM each."""

    def __init__(self, sources: Sequence[TokenizedSource], source: np.ndarray, document: np.ndarray) -> None:
        self._sources = sources
        self._source = source
        self._document = document

    def __len__(self) -> int:
        return len(self._document)

    @overload
    def __getitem__(self, index: int) -> HeldoutDocument: ...
    @overload
    def __getitem__(self, index: slice) -> HeldoutDocuments: ...
    def __getitem__(self, index: int | slice) -> HeldoutDocument | HeldoutDocuments:
        if isinstance(index, slice):
            return HeldoutDocuments(self._sources, self._source[index], self._document[index])
        return HeldoutDocument(self._sources[int(self._source[index])], int(self._document[index]))


def heldout_by_domain(sources: Sequence[TokenizedSource], sides: Sequence[np.ndarray]) -> dict[str, HeldoutDocuments]:
    """The documents to measure on; a domain without any has no entry."""
    return _by_domain(sources, sides, Side.HELD_OUT)


def first_trained_by_domain(
    sources: Sequence[TokenizedSource], sides: Sequence[np.ndarray], count: int
) -> dict[str, HeldoutDocuments]:
    """The first `count` documents of each domain that are there to train on: what is left to compare models on where
    nothing is held out. They say nothing about how good a model is."""
    return {domain: documents[:count] for domain, documents in _by_domain(sources, sides, Side.TRAIN).items()}


def _by_domain(
    sources: Sequence[TokenizedSource], sides: Sequence[np.ndarray], wanted: Side
) -> dict[str, HeldoutDocuments]:
    picked: dict[str, list[tuple[int, np.ndarray]]] = {}
    for index, (source, side) in enumerate(zip(sources, sides, strict=True)):
        documents = np.flatnonzero(side == wanted)
        if len(documents):
            picked.setdefault(source.source.domain_name, []).append((index, documents))
    return {
        domain: HeldoutDocuments(
            sources,
            np.concatenate([np.full(len(documents), index, np.int32) for index, documents in parts]),
            np.concatenate([documents for _, documents in parts]),
        )
        for domain, parts in picked.items()
    }
