"""The tokenizer in a GGUF file: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama"), built as llama.cpp reads it.

transformers has a reader too, but none that asks which rule cuts text into words, whether a word that is a token skips
the merges, and whether a text gets a space in front: "2024" became other tokens than the model was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from steep.errors import UserError
from steep.model.gguf_fidelity import REMEDY
from steep.model.gguf_file import GgufFile
from steep.model.pre_tokenizers import pre_tokenizer_called

# gguf.TokenType, which is optional
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "▁"
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # of a file that says nothing


def tokenizer_in(file: GgufFile, field: str) -> Any:
    """The tokenizer that `file` holds.

    Raises:
        UserError: the file does not say how text is cut, or in a way that is not known here.
    """
    kind = file.tokenizer["model"]
    if kind not in ("gpt2", "llama"):
        raise UserError(field, f"{file.path} has a tokenizer of the kind {kind!r}, which is not read here", REMEDY)
    keys: dict[str, Any] = file.tokenizer if kind == "gpt2" else {**_SENTENCEPIECE_IDS, **file.tokenizer}
    tokens: list[str] = keys["tokens"]
    special = {role: tokens[keys[key]] for role, key in _ROLES.items() if key in keys}
    if kind == "gpt2":
        backend, adds_bos = _byte_level(file, field)
    else:
        backend, adds_bos = _sentencepiece(file, special["unk"], field), True
    before = [special["bos"]] if keys.get("add_bos_token", adds_bos) else []
    behind = [special["eos"]] if keys.get("add_eos_token", False) else []
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *before, "$B:1", *behind],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *behind}],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.chat_template,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": token for role, token in special.items()},
    )


def _byte_level(file: GgufFile, field: str) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it puts BOS in front of a text where the file says nothing of that."""
    keys = file.tokenizer
    name = keys.get("pre")
    rule = None if name is None else pre_tokenizer_called(name)
    if rule is None:
        how = f"by the rule {name!r}, which is not known here" if name else "by a rule that it does not name"
        raise UserError(field, f"{file.path} has a tokenizer that cuts text into words {how}", REMEDY)
    pre_tokenizer, ignore_merges = rule
    vocab = {token: number for number, token in enumerate(keys["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    _add(backend, keys["tokens"], keys["token_type"])
    return backend, name == "llama-bpe"


def _sentencepiece(file: GgufFile, unk: str, field: str) -> Tokenizer:
    keys = file.tokenizer
    tokens, types, adds_space = keys["tokens"], keys["token_type"], keys.get("add_space_prefix", True)
    merges = _merges(tokens, keys["scores"], types)
    if merges is None:
        problem = f"{file.path} gives every piece of its tokenizer one score, so that no merge comes before another"
        raise UserError(field, problem, REMEDY)
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space:
        replace, back = normalizers.Sequence([normalizers.Prepend(SPACE), replace]), [*back, decoders.Strip(" ", 1, 0)]
    backend.normalizer, backend.decoder = replace, decoders.Sequence(back)  # pyright: ignore[reportAttributeAccessIssue]
    _add(backend, tokens, types)
    return backend


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]] | None:
    """Every way to make a piece of two, best score first; None where all pieces have one score.

    llama.cpp looks at the score of what two neighbours would become, whichever two they are.
    """
    pieces = {token: number for number, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    if len({scores[number] for number in pieces.values()}) == 1:
        return None
    ordered = sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece]))
    return [
        (piece[:cut], piece[cut:])
        for piece in ordered
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def _add(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tell `backend` which tokens are found in a text before anything else."""
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == USER_DEFINED:  # in Gemma runs of spaces too, written as such and not as "▁"
            plain.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
