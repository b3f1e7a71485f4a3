"""From sources to rows for training: `pack` reads, tokenises, splits off held-out text, mixes and packs."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

from steep.data.encoder import Encoder
from steep.data.files import find_files
from steep.data.heldout import HeldoutDocuments, heldout_by_domain
from steep.data.ledger import build_ledger, describe_sources
from steep.data.mixing import Mixture, assign_sides, mix
from steep.data.packed_dataset import PackedDataset
from steep.data.rows import pack_best_fit, pack_sequential
from steep.data.sources import MIN_LENGTH, Source
from steep.data.token_file import Progress
from steep.data.tokens import TokenizedSource, tokenize
from steep.errors import UserError, shown
from steep.invalid import explained
from steep.storage import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART = 1 << 16  # entries of the index that are digested at a time

SourceLike = str | Path | Source | Mapping[str, Any]


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
        found = [warning for item in self.sources for warning in item.warnings]
        if not self.sources[0].has_eos:  # one tokenizer read them all
            found.append("the tokenizer has no end token: documents will not be separated by one")
        return [*found, *_measured_with_others([item.source for item in self.sources]), *self.mixture.warnings]

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
    def fingerprint(self) -> str:
        """Digest of which tokens stand in which row: two corpora that share it train the same."""
        digest = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            digest.update(source.digest.encode())
        train = self.train
        # In these types whatever the index is stored in.
        for array, dtype in (
            (train.source, np.int32),
            (train.document, np.int32),
            (train.start, np.int64),
            (train.length, np.int32),
            (train.row_first, np.int64),
        ):
            for first in range(0, len(array), _PART):
                digest.update(array[first : first + _PART].astype(dtype).data)
        digest.update(f"{train.max_length} {self.seed}".encode())
        return digest.hexdigest()

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

    def ledger(
        self,
        times_trained: np.ndarray,
        times_seen: np.ndarray,
        times_seen_before: np.ndarray | None = None,
        times_skipped: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Where every document and token went.

        Args:
            times_trained: int [rows], how often a step that was applied had each row.
            times_seen: int [rows], how often each row had its turn, its step applied or not.
            times_seen_before: int [rows], the same of the runs that this one is a branch of; default: none.
            times_skipped: int [rows], how often each row was in a step that was skipped as a spike; default: never.

        Returns:
            A JSON-able account; `ledger.build_ledger` describes it.
        """
        return build_ledger(
            self.sources,
            self.sides,
            self.mixture,
            self.train,
            times_trained,
            times_seen,
            times_seen_before,
            times_skipped,
        )


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
    vocab_size: int | None = None,
    progress: Progress | None = None,
    documents: Mapping[int, int] | None = None,
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
        vocab_size: entries of the model's vocabulary, if known: no token may lie outside.
        progress: called with the documents and UTF-8 bytes tokenised so far, over all sources, and how far the one that
            is read has come with its `max_tokens` (`token_file.Budget`), or None.
        documents: how many documents of a source are read at the most, by its number.

    Raises:
        UserError: a setting out of range, text that cannot be read, a token outside the vocabulary, or nothing left to
            train on.
    """
    _check(max_length, strategy, replay_share, holdout, seed)
    given = _as_sources(sources)
    _reject_shared_files(given)
    _reject_shared_default_domains(given)
    tokenized = tokenize_sources(given, tokenizer, cache_dir, progress, documents)
    if vocab_size is not None:
        _reject_ids_outside(tokenized, vocab_size)

    sides = assign_sides(tokenized, holdout, keep_duplicates)
    mixture = mix(tokenized, sides, replay_share, seed)
    lengths = np.empty(len(mixture.document), np.int32)
    for index, source in enumerate(tokenized):
        here = mixture.source == index
        lengths[here] = source.lengths[mixture.document[here]]
    pieces = (pack_sequential if strategy == "sequential" else pack_best_fit)(lengths, max_length)
    del lengths
    rows = PackedDataset(tokenized, mixture, pieces, max_length, _pad_id(tokenizer, vocab_size))
    return Corpus(rows, heldout_by_domain(tokenized, sides), tokenized, sides, mixture, strategy, seed)


def tokenize_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    documents: Mapping[int, int] | None = None,
) -> list[TokenizedSource]:
    """Tokenise each source, or open what is in the cache; `pack` says what the arguments are."""
    folder = Path(cache_dir).expanduser() if cache_dir else cache_folder() / "tokens"
    encoder = Encoder(tokenizer)
    tokenized: list[TokenizedSource] = []
    for index, source in enumerate(sources):
        most = (documents or {}).get(index)
        field = f"data.sources[{index}]"
        tokenized.append(tokenize(source, encoder, folder, field, _after(tokenized, progress), most))
    return tokenized


def _check(max_length: int, strategy: str, replay_share: float, holdout: float, seed: int) -> None:
    for field, number in (("data.max_length", max_length), ("training.seed", seed)):
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise UserError(field, f"{shown(number)} is not a whole number", "Give it as an int")
    for name, share in (("replay_share", replay_share), ("holdout", holdout)):
        if not isinstance(share, Real):
            raise UserError(f"data.{name}", f"{shown(share)} is not a number", "Give it as a float")
    if max_length < MIN_LENGTH:
        raise UserError("data.max_length", f"{max_length} is less than {MIN_LENGTH}", "Use e.g. 2048")
    if strategy not in ("sequential", "best_fit"):
        raise UserError("data.packing", f"{strategy!r} is unknown", "Use sequential or best_fit")
    for name, share in (("replay_share", replay_share), ("holdout", holdout)):
        if not 0 <= share < 1:  # false for NaN too
            raise UserError(f"data.{name}", f"{share} is not a share", "Use a number from 0 to less than 1")
    if seed < 0:
        raise UserError("training.seed", f"{seed} is negative", "Use 0 or more")


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
            raise explained(error, lambda _: list(Source.model_fields), ("data", "sources", index)) from error
    return sources


def _reject_shared_files(sources: list[Source]) -> None:
    """A file has one role: read as two, its documents would be left out of one of them as duplicates."""
    first: dict[Any, tuple[int, Source]] = {}
    for index, source in enumerate(sources):
        if source.hub:
            places: list[Any] = [(source.hub, source.subset, source.split, source.revision)]
        else:
            places = [os.path.realpath(file) for file in find_files(source, f"data.sources[{index}]").read]
        for place in places:
            before, other = first.setdefault(place, (index, source))
            if other.role != source.role:
                what = source.location if source.hub else place
                problem = f"{what} is read here as {source.role}, and by data.sources[{before}] as {other.role}"
                field = f"data.sources[{index}].{'hub' if source.hub else 'path'}"
                raise UserError(field, problem, "Give each role text of its own")


def _reject_shared_default_domains(sources: list[Source]) -> None:
    """Text of one domain is measured as one. For train and replay text a user may want that, but should have said so:
    by default ko/corpus.jsonl and en/corpus.jsonl are both called "corpus"."""
    for (_, one), (index, other) in itertools.combinations(enumerate(sources), 2):
        if one.domain_name != other.domain_name or {one.role, other.role} != {"train", "replay"}:
            continue
        if not (one.domain and other.domain):
            raise UserError(
                f"data.sources[{index}].domain",
                f"{one.location} ({one.role}) and {other.location} ({other.role}) are both called {one.domain_name!r}",
                "Give each a domain, the same one if they shall be measured together",
            )


def _measured_with_others(sources: list[Source]) -> Iterator[str]:
    """Held-out text that is of a trained domain by its default name alone: ko/corpus.jsonl and en/corpus.jsonl are both
    "corpus". Of one folder that is meant (ko.train.jsonl, ko.heldout.jsonl), and so it is where the name was given."""
    trained = [source for source in sources if source.role != "heldout"]
    for heldout in sources:
        if heldout.role != "heldout" or heldout.domain:
            continue
        alike = [source for source in trained if source.domain_name == heldout.domain_name]
        if alike and _place(heldout) not in map(_place, alike):
            other, name = alike[0], heldout.domain_name
            yield (
                f"{heldout.location} (heldout) is measured as part of {name}, which {other.location} ({other.role}) is "
                f"called too: by its name alone. Give it a domain, domain: {name} if they belong together."
            )


def _place(source: Source) -> str:
    """The folder that a source lies in, or its name on the hub."""
    return source.hub or str(Path(source.location).expanduser().absolute().parent)


def _reject_ids_outside(tokenized: list[TokenizedSource], vocab_size: int) -> None:
    largest = max(source.largest_id for source in tokenized)
    if largest >= vocab_size:
        problem = f"the text has the token id {largest}, and the model's ids end at {vocab_size - 1}"
        remedy = "The tokenizer has more tokens than the model: use the two that belong together"
        raise UserError("model.name", problem, remedy)


def _after(done: list[TokenizedSource], progress: Progress | None) -> Progress | None:
    """`progress` with the documents and bytes of the sources before added."""
    if progress is None:
        return None
    documents, size = sum(map(len, done)), sum(int(source.num_bytes.sum()) for source in done)
    return lambda more, more_size, budget: progress(documents + more, size + more_size, budget)


def _pad_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> int:
    """An id that the model can look up; which one does not matter, as nothing is predicted from or at padding."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        # 0 is an id like any other. A pad token that was added to the tokenizer alone lies outside the vocabulary.
        if isinstance(token, int) and (vocab_size is None or token < vocab_size):
            return token
    return 0
