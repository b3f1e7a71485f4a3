"""From text to token ids: the tokenizer's own convention around a document, ordinary text inside it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from steep.data.long_texts import PART, parts
from steep.errors import UserError
from steep.foreign import told_as_input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"
_REMEDY = "Give the model a whole tokenizer that reads any text: put its files back, or download them again."


class Encoder:
    """Encodes documents with a copy of a tokenizer that treats special tokens in the text as text.

    Without that, a web page that quotes "</s>" would end there and the model would learn to stop in mid-sentence. The
    copy also drops truncation and padding that a tokenizer.json may carry. The tokenizer itself is not changed.

    Attributes:
        prefix: ids that the tokenizer puts in front of a document (BOS, if it has that convention).
        eos: the id that ends each document, or None.
        workers: how many threads may call `encode` at once.

    Raises:
        UserError: the tokenizer cannot be used, or changes the text's own ids when it adds special tokens. Also from
            `encode`: it cannot read a text.
    """

    prefix: list[int]
    eos: int | None
    workers: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        with told_as_input("tokenizer", "it cannot be used", _REMEDY):
            self._fast = _literal_copy(tokenizer)
        # A fast tokenizer encodes in its own threads without the interpreter lock: a second batch under way fills the
        # cores while the last documents of the first one finish and its ids become arrays.
        self.workers = 1 if self._fast is None else 2
        with told_as_input("tokenizer", "it cannot be used", _REMEDY):
            self.prefix, self.eos = self._affixes()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, without prefix and EOS: one int32 array a text."""
        if all(len(text) <= PART for text in texts):
            return self._encode_together(texts)
        return [
            np.concatenate([ids for part in parts(text, self._ids_of) for ids in self._encode_together([part])])
            for text in texts
        ]

    def _encode_together(self, texts: list[str]) -> list[np.ndarray]:
        with told_as_input("tokenizer", "it cannot read a text", _REMEDY):
            if self._fast is not None:
                encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
                return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            rows = self._slow(texts, add_special_tokens=False)
            return [np.array(ids, dtype=np.int32) for ids in rows]

    def _ids_of(self, text: str) -> list[int]:
        return self._encode_together([text])[0].tolist()

    @cached_property
    def fingerprint(self) -> bytes:
        """Digest of everything that decides which ids a text gets, for the key of the token cache."""
        # The library's version counts too: an upgrade may read the same tokenizer.json another way.
        parts = [f"{tokenizers.__version__} {self.prefix} {self.eos} {self._tokenizer.bos_token_id}".encode()]
        if self._fast is not None:
            parts.append(self._fast.to_str().encode())
        else:
            with tempfile.TemporaryDirectory() as folder:
                self._tokenizer.save_pretrained(folder)
                files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
                parts += [part for file in files for part in (file.name.encode(), file.read_bytes())]
        return digest(parts)

    def _slow(self, texts: list[str], add_special_tokens: bool) -> Sequence[Sequence[int]]:
        # verbose=False: a document longer than the model's context is no reason to warn, it will be split into rows.
        found: Any = self._tokenizer(
            texts, add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False
        )
        return found["input_ids"]

    def _affixes(self) -> tuple[list[int], int | None]:
        if self._fast is not None:
            bare: list[int] = self._fast.encode(_PROBE, add_special_tokens=False).ids
            full: list[int] = self._fast.encode(_PROBE, add_special_tokens=True).ids
        else:
            bare = list(self._slow([_PROBE], add_special_tokens=False)[0])
            full = list(self._slow([_PROBE], add_special_tokens=True)[0])
        # What the convention puts behind is dropped: if it is EOS, EOS is added below anyway, and once.
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start], self._tokenizer.eos_token_id  # pyright: ignore[reportReturnType]
        problem = f"its ids for {_PROBE!r} are {bare} without special tokens and {full} with them"
        raise UserError("tokenizer", problem, "Use a tokenizer that only puts special tokens around a text")


def digest(parts: Iterable[bytes]) -> bytes:
    """One digest of several parts that moves when a byte goes from one part to the next."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        result.update(len(part).to_bytes(8, "big"))
        result.update(part)
    return result.digest()


def _literal_copy(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer
        return None
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy
