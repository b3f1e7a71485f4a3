"""The BPE model inside a tokenizer, and how it grows: new entries with merges that come after all the old ones.

Old merges have the lower ranks, so a text is first cut as before; then new merges join what lies side by side. A text
that holds no piece of a new token keeps its ids, no text loses or gains a character, and every new token is an ordinary
one: nothing is matched before the tokenizer's own normaliser and pre-tokeniser have run, as added tokens are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise
from typing import Any, Literal

from tokenizers import Tokenizer, decoders

from steep.errors import UserError

SPACE = {"byte-level": "Ġ", "metaspace": "▁"}
"""How each style spells a space in its vocabulary."""


@dataclass(frozen=True)
class Bpe:
    """A tokenizer's BPE model.

    Attributes:
        backend: the tokenizer, of the library `tokenizers`; special tokens in a text are text to it.
        tree: its tokenizer.json.
        style: ``byte-level`` spells bytes (GPT-2, Llama 3, Qwen); ``metaspace`` spells characters, a space as ▁, and
            falls back to bytes (SentencePiece: Llama 2, Mistral, Gemma).
    """

    backend: Any
    tree: dict[str, Any]
    style: Literal["byte-level", "metaspace"]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token → id, added tokens too."""
        added = {token["content"]: token["id"] for token in self.tree["added_tokens"]}
        return {**self.tree["model"]["vocab"], **added}

    @property
    def space(self) -> str:
        return SPACE[self.style]

    def cut(self, spelling: str) -> list[str]:
        """The pieces of a text that is spelt as the vocabulary spells it and that no pre-tokeniser cuts."""
        return [token.value for token in self.backend.model.tokenize(spelling)]

    def text(self, token: str) -> str:
        """What a reader would see of `token`."""
        if self.style == "byte-level":
            return decoders.ByteLevel().decode([token])
        return token.replace(self.space, " ")

    def spell(self, text: str) -> str | None:
        """`text` as the vocabulary would spell it inside of other text; None where the tokenizer cuts it before its
        merges, or keeps nothing of it. A space in front stands for itself."""
        inner = text.removeprefix(" ")
        if self.backend.normalizer is not None:
            inner = self.backend.normalizer.normalize_str(inner)
        words = [inner]
        if self.backend.pre_tokenizer is not None:
            words = [word for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(inner)]
        if len(words) != 1:
            return None
        bare = words[0].removeprefix(self.space)  # some tokenizers put a space before every text
        return (self.space if text.startswith(" ") else "") + bare if bare else None


def read_bpe(tokenizer: Any, field: str) -> Bpe:
    """The BPE model of a transformers tokenizer.

    Raises:
        UserError: it has another kind of model, or spells words in a way that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    remedy = "Leave it out, or take a model whose tokenizer is a BPE: Llama, Mistral, Qwen, Gemma and their like."
    if backend is None:
        raise UserError(field, f"{type(tokenizer).__name__} has no tokenizer.json that could grow", remedy)
    tree = json.loads(backend.to_str())
    model = tree["model"]
    if model.get("type") != "BPE":
        raise UserError(field, f"the tokenizer is a {model.get('type')} and not a BPE", remedy)
    parts = [*_parts(tree["normalizer"]), *_parts(tree["pre_tokenizer"])]
    if any(part["type"] == "ByteLevel" for part in parts):
        style = "byte-level"
    elif any(SPACE["metaspace"] in json.dumps(part, ensure_ascii=False) for part in parts):
        style = "metaspace"
    else:
        style = None
    if style is None or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(field, "the tokenizer's BPE is neither byte-level nor SentencePiece's", remedy)
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return Bpe(backend, tree, style)


def _parts(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normaliser or pre-tokeniser, or what it is a sequence of."""
    if step is None:
        return
    inner = step.get("normalizers") or step.get("pretokenizers")
    if inner:
        for part in inner:
            yield from _parts(part)
    else:
        yield step


@dataclass
class Growth:
    """Entries and merges that a BPE model is to get, in the order of their ids and of their ranks.

    In the metaspace style a new token gets a merge for each way to cut it into two tokens, as SentencePiece's own
    models have it: they know no merges, only which two neighbours make a token. So readers of either format agree.
    """

    bpe: Bpe
    tokens: list[str] = field(default_factory=list)
    merges: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._old_merges = {tuple(pair) for pair in self.bpe.tree["model"]["merges"]}
        self._new: set[str] = set()

    def __contains__(self, token: str) -> bool:
        """Whether it is a token, old or new."""
        return token in self._new or token in self.bpe.vocabulary

    def add_character(self, character: str) -> None:
        """A token that is made of no others: a character that was spelt in bytes."""
        self._add(character)

    def join(self, left: str, right: str) -> None:
        """Merge two tokens that stand side by side into one, which is a new token unless it is there already."""
        token = left + right
        if token not in self:
            self._add(token)
        self._merge(left, right)

    def _add(self, token: str) -> None:
        self.tokens.append(token)
        self._new.add(token)
        self._merge_all_ways(token)

    def _merge_all_ways(self, token: str) -> None:
        if self.bpe.style == "metaspace":
            for cut in range(1, len(token)):
                if token[:cut] in self and token[cut:] in self:
                    self._merge(token[:cut], token[cut:])

    def _merge(self, left: str, right: str) -> None:
        if (left, right) not in self._old_merges:
            self.merges.setdefault((left, right), len(self.merges))

    def finish(self) -> None:
        """Rank the merges anew when no token comes any more: a later token may be a part of an earlier one."""
        joined, self.merges = list(self.merges), {}
        left_out = set(self.tokens)
        for left, right in joined:
            if left + right in left_out:
                left_out.remove(left + right)
                self._merge_all_ways(left + right)
            self._merge(left, right)

    def cut(self, pieces: Sequence[str]) -> list[str]:
        """What the new merges make of the old tokenizer's `pieces`."""
        pieces = list(pieces)
        while True:
            found = [(self.merges[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in self.merges]
            if not found:
                return pieces
            place = min(found)[1]
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]

    def tokenizer_json(self) -> str:
        """The grown tokenizer. A new token gets the lowest id that is free, so that no gap is left behind."""
        tree = copy.deepcopy(self.bpe.tree)
        # An added token that is no entry of the model would get the first id behind the model's when it is read.
        vocabulary = dict(self.bpe.vocabulary)
        used = set(vocabulary.values())
        free = (number for number in count() if number not in used)
        tree["model"]["vocab"] = vocabulary | {token: next(free) for token in self.tokens}
        tree["model"]["merges"] += [list(pair) for pair in self.merges]
        return json.dumps(tree, ensure_ascii=False)
