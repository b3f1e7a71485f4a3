"""From sources to rows for training: `pack` reads, tokenises, splits off held-out text, mixes and packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch.utils.data import Dataset

from steep.data.heldout import HeldoutDocuments, heldout_by_domain
from steep.data.ledger import build_ledger, describe_sources
from steep.data.mixing import Mixture, assign_sides, mix
from steep.data.rows import Pieces, pack_best_fit, pack_sequential
from steep.data.sampler import EpochSampler as EpochSampler
from steep.data.sampler import epoch_order as epoch_order
from steep.data.sources import Source
from steep.data.token_file import Progress
from steep.data.tokens import TokenizedSource, tokenize
from steep.errors import UserError
from steep.storage import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceLike = str | Path | Source | Mapping[str, Any]

IGNORE = -100
MIN_LENGTH = 8


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows of `max_length` tokens, put together from the mapped token files when they are asked for.

    Attributes:
        sources: where the tokens are.
        max_length: tokens in a row.
        pad_id: what fills a row behind its last piece.
        source: int32 [pieces], index of the source of each piece.
        document: int32 [pieces], index of the document in that source.
        start: int64 [pieces], the first token of the piece in the document.
        length: int32 [pieces], tokens.
        row_first: int64 [rows + 1], the first piece of each row.
    """

    def __init__(
        self, sources: Sequence[TokenizedSource], mixture: Mixture, pieces: Pieces, max_length: int, pad_id: int
    ) -> None:
        self.sources = sources
        self.max_length = max_length
        self.pad_id = pad_id
        self.source = mixture.source[pieces.item]
        self.document = mixture.document[pieces.item]
        self.start = pieces.start
        self.length = pieces.length
        self.row_first = pieces.row_first

    def __len__(self) -> int:
        return len(self.row_first) - 1

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """Places of each row that are not padding: int64 [rows]."""
        return np.add.reduceat(self.length, self.row_first[:-1], dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row.

        Returns:
            int64 tensors `input_ids`, `labels` and `position_ids` [max_length], and the scalar `row`. Labels are not
            shifted: -100 at the first token of each piece and in the padding, else the token itself. Positions start
            at 0 in each piece and in the padding, which so counts as a document of its own.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        input_ids = np.full(self.max_length, self.pad_id, np.int64)
        labels = np.full(self.max_length, IGNORE, np.int64)
        position_ids = np.empty(self.max_length, np.int64)
        place = 0
        for piece in range(int(self.row_first[index]), int(self.row_first[index + 1])):
            first, length = int(self.start[piece]), int(self.length[piece])
            end = place + length
            source = self.sources[int(self.source[piece])]
            input_ids[place:end] = source.tokens(int(self.document[piece]), first, first + length)
            labels[place + 1 : end] = input_ids[place + 1 : end]
            position_ids[place:end] = np.arange(length)
            place = end
        position_ids[place:] = np.arange(self.max_length - place)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "row": torch.tensor(index, dtype=torch.int64),
        }


@dataclass(frozen=True)
class Corpus:
    """What `pack` made of the sources.

    Attributes:
        train: the rows of an epoch.
        heldout: documents to measure on, by domain.
        sources: the tokenised sources, in the order given.
        sides: for each source, uint8 [documents]: the `mixing.Side` of each document.
        mixture: the documents of an epoch.
        strategy: how rows were filled.
        seed: of the row orders (see `EpochSampler`) and all choices.
    """

    train: PackedDataset
    heldout: dict[str, HeldoutDocuments]
    sources: list[TokenizedSource]
    sides: list[np.ndarray]
    mixture: Mixture
    strategy: str
    seed: int

    @property
    def mixing(self) -> dict[str, Any]:
        """Shares asked for and achieved, JSON-able: `replay_share`, `replay_share_achieved`, tokens by source."""
        return self.mixture.summary

    @property
    def warnings(self) -> list[str]:
        """What the user should know, in plain words."""
        return self.mixture.warnings

    @cached_property
    def roles(self) -> dict[str, str]:
        """The role of each domain. One that is trained and held out has role train."""
        order = ("heldout", "replay", "train")
        roles: dict[str, str] = {}
        for item in self.sources:
            name, role = item.source.domain_name, item.source.role
            roles[name] = max(role, roles.get(name, role), key=order.index)
        return roles

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Figures for the plan, JSON-able: rows, targets and padding of an epoch, and a list `sources`."""
        lengths = self.train.length
        return {
            "strategy": self.strategy,
            "max_length": self.train.max_length,
            "rows": len(self.train),
            "targets": int(lengths.sum(dtype=np.int64)) - len(lengths),
            "padding": len(self.train) * self.train.max_length - int(lengths.sum(dtype=np.int64)),
            "heldout_documents": {domain: len(documents) for domain, documents in self.heldout.items()},
            "sources": describe_sources(self.sources, self.sides, self.mixture),
        }

    def ledger(self, times_trained: np.ndarray) -> dict[str, Any]:
        """Where every document and token went.

        Args:
            times_trained: int [rows], how often the trainer saw each row.

        Returns:
            A JSON-able account; `ledger.build_ledger` describes it.
        """
        return build_ledger(self.sources, self.sides, self.mixture, self.train, times_trained)


def pack(
    sources: SourceLike | Sequence[SourceLike],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    strategy: Literal["sequential", "best_fit"] = "sequential",
    replay_share: float = 0.05,
    holdout: float = 0.01,
    keep_duplicates: bool = False,
    seed: int = 42,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Read, tokenise, mix and pack text.

    Args:
        sources: a path, a `Source`, a dict of its fields, or several of these.
        tokenizer: of the model to train; not changed.
        max_length: tokens in a row, at least 8.
        strategy: "sequential" fills every row and splits documents where it ends. "best_fit" splits only documents
            longer than a row, and pads.
        replay_share: tokens from replay sources over all training tokens, in [0, 1). Without such sources it has no
            effect.
        holdout: share of the documents of train and replay sources to hold out, in [0, 1).
        keep_duplicates: train documents whose exact text came before.
        seed: of all choices and orders, at least 0.
        cache_dir: folder of the token files; default ``tokens`` under `steep.storage.cache_folder()`.
        progress: called with the documents and UTF-8 bytes tokenised so far, over all sources.

    Raises:
        UserError: a setting out of range, text that cannot be read, or nothing left to train on.
    """
    _check(max_length, strategy, replay_share, holdout, seed)
    folder = Path(cache_dir).expanduser() if cache_dir else cache_folder() / "tokens"
    tokenized: list[TokenizedSource] = []
    for index, source in enumerate(_as_sources(sources)):
        tokenized.append(tokenize(source, tokenizer, folder, f"data.sources[{index}]", _after(tokenized, progress)))

    sides = assign_sides(tokenized, holdout, keep_duplicates)
    mixture = mix(tokenized, sides, replay_share, seed)
    lengths = np.empty(len(mixture.document), np.int64)
    for index, source in enumerate(tokenized):
        here = mixture.source == index
        lengths[here] = source.lengths[mixture.document[here]]
    pieces = (pack_sequential if strategy == "sequential" else pack_best_fit)(lengths, max_length)
    rows = PackedDataset(tokenized, mixture, pieces, max_length, _pad_id(tokenizer))
    return Corpus(rows, heldout_by_domain(tokenized, sides), tokenized, sides, mixture, strategy, seed)


def _check(max_length: int, strategy: str, replay_share: float, holdout: float, seed: int) -> None:
    if max_length < MIN_LENGTH:
        raise UserError("data.max_length", f"{max_length} is less than {MIN_LENGTH}", "Use e.g. 2048")
    if strategy not in ("sequential", "best_fit"):
        raise UserError("data.packing", f"{strategy!r} is unknown", "Use sequential or best_fit")
    for name, share in (("replay_share", replay_share), ("holdout", holdout)):
        if not 0 <= share < 1:  # false for NaN too
            raise UserError(f"data.{name}", f"{share} is not a share", "Use a number from 0 to less than 1")
    if seed < 0:
        raise UserError("seed", f"{seed} is negative", "Use 0 or more")


def _as_sources(given: SourceLike | Sequence[SourceLike]) -> list[Source]:
    items = [given] if isinstance(given, (str, Path, Source, Mapping)) else list(given)
    if not items:
        raise UserError("data.sources", "there is no source", "Give at least one file, folder or data set")
    sources = []
    for index, item in enumerate(items):
        if isinstance(item, (str, Path)):
            item = {"path": str(item)}
        try:
            sources.append(item if isinstance(item, Source) else Source.model_validate(item))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join([f"data.sources[{index}]", *map(str, first["loc"])])
            raise UserError(field, first["msg"], "Correct the source") from error
    return sources


def _after(done: list[TokenizedSource], progress: Progress | None) -> Progress | None:
    """`progress` with the documents and bytes of the sources before added."""
    if progress is None:
        return None
    documents, size = sum(map(len, done)), sum(int(source.num_bytes.sum()) for source in done)
    return lambda more, more_size: progress(documents + more, size + more_size)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):  # 0 is an id like any other
            return token
    return 0
