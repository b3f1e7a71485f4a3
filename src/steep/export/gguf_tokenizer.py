"""A transformers tokenizer in the terms of GGUF: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

llama.cpp merges a byte-level BPE's pieces by the order of the merges, as the tokenizers library does. SentencePiece's
it merges by a score for each piece, whichever two parts it is made of; there is no list of merges. A tokenizer.json has
the list alone, so a piece's score is minus the rank of its first merge. That says the same when every way to cut a
piece into two pieces is a merge, as it is in a list made from a SentencePiece model. A merge that is missing does no
harm to a piece that its own text is made into: two neighbours that wait for it would wait in that text too. Other
missing ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.export.gguf_refusals import refused
from steep.model.gguf_vocabulary import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from steep.model.pre_tokenizers import pre_tokenizer_name

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_UNREACHABLE = -1e9  # the score of a piece that no merge makes; single characters need none


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        pre_tokenizer: the name of the rule that cuts text into words; "default" for "llama", which has none.
        tokens: text by id, as many as the embeddings have rows; byte-level BPE writes bytes as its 256 letters.
        types: a gguf.TokenType by id.
        merges: "left right", best first ("gpt2" only).
        scores: by id ("llama" only).
        special: id by role (bos, eos, unk, pad).
        adds_bos, adds_eos: whether text gets them.
        adds_space: whether a text that follows nothing or a special token gets a space in front ("llama" only).
    """

    model: str
    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adds_space: bool = False
    chat_template: str | None = None


def read_vocabulary(tokenizer: Any, config: Any) -> Vocabulary:
    """`tokenizer` for the `config.vocab_size` rows of its model's embeddings; rows without a token get an unused one.

    Raises:
        UserError: llama.cpp would cut some text otherwise than this tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused("the tokenizer has no tokenizer.json")
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise refused(f"llama.cpp's tokenizers here are BPE, and this one is {model['type']}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise refused(f"the tokenizer's BPE has {option} {model[option]!r}, which llama.cpp lacks")
    pieces: dict[str, int] = dict(model["vocab"])
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    special = _special_ids(tokenizer, config)
    adds_bos, adds_eos = _adds(tokenizer, special)
    shared = {
        "special": special,
        "adds_bos": adds_bos,
        "adds_eos": adds_eos,
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    }
    if model["byte_fallback"]:
        adds_space, prepends = _sentencepiece_space(description)
        added = _added(description, {piece for pair in merges for piece in ("".join(pair),)})
        if adds_space and any(kind == USER_DEFINED for _, kind in added.values()):
            _check_text_after_added(description, prepends)
        _check_missing_merges(backend, pieces, merges, added)
        tokens, types = _by_id(pieces, added, config.vocab_size, special.get("unk"))
        missing = set(_BYTES) - set(pieces)
        if missing:
            raise refused(f"the tokenizer has no token for {len(missing)} bytes ({min(missing)} …)")
        rank = {}
        for number, pair in enumerate(merges):
            rank.setdefault("".join(pair), number)
        scores = [-float(rank[token]) if token in rank else _UNREACHABLE for token in tokens]
        return Vocabulary("llama", "default", tokens, types, scores=scores, adds_space=adds_space, **shared)
    name = pre_tokenizer_name(description["pre_tokenizer"], bool(model.get("ignore_merges")))
    if name is None:
        raise refused(
            "how this tokenizer cuts text into words is none of the ways that steep knows llama.cpp's name of: "
            f"{json.dumps(description['pre_tokenizer'])}"
        )
    if description["normalizer"] not in (None, {"type": "NFC"}):  # llama.cpp composes nothing; text mostly is in NFC
        raise refused(f"the tokenizer changes its text first, which llama.cpp does not: {description['normalizer']}")
    tokens, types = _by_id(pieces, _added(description, set()), config.vocab_size, None)
    return Vocabulary("gpt2", name, tokens, types, merges=[" ".join(pair) for pair in merges], **shared)


def is_misread_by_converter(folder: Path) -> bool:
    """Whether llama.cpp's converter would give every piece of the tokenizer in `folder` one score.

    It reads SentencePiece's scores from `tokenizer.model` and nowhere else. That file is missing where a base came
    without it, and where the vocabulary grew.
    """
    file = folder / "tokenizer.json"
    if (folder / "tokenizer.model").is_file() or not file.is_file():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8"))["model"].get("byte_fallback"))


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)  # an empty list is left out
    writer.add_token_scores(vocabulary.scores)
    for role, number in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _special_ids(tokenizer: Any, config: Any) -> dict[str, int]:
    if tokenizer.eos_token_id is None:
        raise refused("the tokenizer has no end-of-sequence token")
    # Without a beginning token llama.cpp takes token 11 for it, whatever that is.
    ids = {
        "bos": next(i for i in (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id) if i is not None),
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {role: number for role, number in ids.items() if number is not None and number < config.vocab_size}


def _adds(tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text and EOS after it."""
    bare, whole = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    for adds_bos in (False, True):
        for adds_eos in (False, True):
            if whole == [special["bos"]] * adds_bos + bare + [special["eos"]] * adds_eos:
                return adds_bos, adds_eos
    raise refused(f"the tokenizer adds other tokens to a text than BOS and EOS: {whole} for {bare}")


def _added(description: dict[str, Any], merged: set[str]) -> dict[int, tuple[str, int]]:
    """Id → (text, type) of the added tokens, which are found in the text before anything else.

    A normalised one is looked for in text whose spaces are "▁" already, so its own stand for spaces. In Gemma's
    tokenizer runs of "▁" are added *and* made by merges: the merges do the work there, since "▁" is rare in text.
    """
    spaces_replaced = any(
        part["type"] == "Replace" and part["content"] == SPACE for part in _parts(description["normalizer"])
    )
    added: dict[int, tuple[str, int]] = {}
    for token in description["added_tokens"]:
        text, kind = token["content"], CONTROL if token["special"] else USER_DEFINED
        if kind == USER_DEFINED:
            if token["single_word"] or token["lstrip"] or token["rstrip"]:
                raise refused(f"the added token {text!r} takes the spaces around it, which llama.cpp does not")
            if SPACE in text and not token["normalized"] and text in merged:
                kind = NORMAL
            elif token["normalized"] and spaces_replaced:
                text = text.replace(SPACE, " ")
        added[token["id"]] = (text, kind)
    return added


def _by_id(
    pieces: dict[str, int], added: dict[int, tuple[str, int]], rows: int, unk: int | None
) -> tuple[list[str], list[int]]:
    bytes_ = set(_BYTES) if unk is not None else set()
    by_id = {number: (text, BYTE if text in bytes_ else NORMAL) for text, number in pieces.items()} | added
    if unk is not None:
        by_id[unk] = (by_id[unk][0], UNKNOWN)
    beyond = [text for number, (text, kind) in by_id.items() if number >= rows and kind != CONTROL]
    if beyond:
        raise refused(f"{len(beyond)} tokens have no row in the embeddings ({beyond[0]!r} …)")
    # Gemma 3's tokenizer marks images by a token that the text model has no row for.
    filled = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    tokens = [text for text, _ in filled]
    if len(set(tokens)) != rows or "" in tokens:
        raise refused("two tokens have the same text, or one has none")
    return tokens, [kind for _, kind in filled]


def _sentencepiece_space(description: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a text gets a space in front, and whether each part of it between added tokens does."""
    normalizer = [_bare(part) for part in _parts(description["normalizer"])]
    pre_tokenizer = [_bare(part) for part in _parts(description["pre_tokenizer"])]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    # Gemma's cuts at spaces, of which its normaliser leaves none.
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if pre_tokenizer in ([], [at_spaces]) and normalizer in ([replace], [prepend, replace]):
        return prepend in normalizer, prepend in normalizer
    if not normalizer and len(pre_tokenizer) == 1 and pre_tokenizer[0]["type"] == "Metaspace":
        metaspace = pre_tokenizer[0]
        if metaspace["replacement"] == SPACE and not metaspace["split"]:
            return metaspace["prepend_scheme"] != "never", metaspace["prepend_scheme"] == "always"
    raise refused(
        "the tokenizer treats spaces in none of the ways that llama.cpp has: "
        f"{json.dumps({'normalizer': description['normalizer'], 'pre_tokenizer': description['pre_tokenizer']})}"
    )


def _check_text_after_added(description: dict[str, Any], prepends: bool) -> None:
    """llama.cpp puts a space in front of the text that follows an added token, if it does so at the beginning."""
    normalized = any(token["normalized"] and not token["special"] for token in description["added_tokens"])
    if not prepends or normalized:
        raise refused("the tokenizer has added ordinary tokens, and llama.cpp would put a space after each of them")


def _check_missing_merges(
    backend: Any, pieces: dict[str, int], merges: list[tuple[str, ...]], added: dict[int, tuple[str, int]]
) -> None:
    known, fixed = set(merges), {text for text, kind in added.values() if kind != NORMAL} | set(_BYTES)
    parts = pieces.keys() - fixed
    for piece in parts:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left not in parts or right not in parts or (left, right) in known:
                continue
            if len(backend.model.tokenize(piece)) > 1:
                raise refused(
                    f"llama.cpp would merge {left!r} and {right!r} into {piece!r}, which this tokenizer does not"
                )


def _parts(step: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    if step is None:
        return []
    return step.get("normalizers", step.get("pretokenizers", [])) if step["type"] == "Sequence" else [step]


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value is not None}
