"""New tokens of a model: the words of a file as tokens, and rows for new tokens in both embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from steep.errors import UserError
from steep.model.bpe import Bpe, Growth, read_bpe
from steep.model.embeddings import is_tied
from steep.model.learned_tokens import in_batches, learn
from steep.model.names import EMBEDDINGS
from steep.model.new_rows import NewRows, check_new_rows, read_new_rows
from steep.model.resolve import read_tokenizer_folder

_LONGEST = 200  # characters; how it is put together takes time that grows with their square


def read_words(file: Path, field: str) -> dict[str, int]:
    """The words of `file`, one a line, with their line numbers. A space or ▁ in front belongs to the word, which then
    is the one behind a space; lines without a letter or sign are passed over.

    Raises:
        UserError: no such file, not UTF-8, no word, one twice, or one that is no token at all.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        remedy = "Give a file with one token a line, or auto: NUMBER."
        raise UserError(field, f"{file} cannot be read: {error.strerror}", remedy) from error
    except UnicodeDecodeError as error:
        raise UserError(field, f"{file} is not UTF-8 at byte {error.start}", "Save it as UTF-8.") from error
    words: dict[str, int] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        word = " " + line[1:] if line.startswith("▁") else line
        if not word.strip():
            continue
        if len(word) > _LONGEST:
            problem = f"{file}, line {number}: a token of {len(word):,} characters"
            raise UserError(field, problem, f"Write one token a line; {_LONGEST} characters are the most.")
        if word in words:
            raise UserError(
                field, f"{file}, line {number}: {word!r} stands in line {words[word]} too", "Remove one of the two."
            )
        words[word] = number
    if not words:
        raise UserError(field, f"{file} holds no token", "Write one token a line.")
    return words


def tokens_for(bpe: Bpe, words: dict[str, int], field: str) -> Growth:
    """Entries and merges that make each word one token, with as few further tokens as that takes.

    A merge joins two, so a word of three pieces needs one token on the way, unless two of them are a word as well.

    Args:
        words: word → its line in the file.

    Raises:
        UserError: a word that is a token already, or that the tokenizer takes apart before its merges.
    """
    growth = Growth(bpe)
    spelt: dict[str, str] = {}
    for word, line in words.items():
        spelling = bpe.spell(word)
        if spelling is None:
            problem = f"line {line}: {word!r} is taken apart by the tokenizer before its merges, at spaces or signs"
            raise UserError(field, problem, "Give its parts, each in a line.")
        if spelling in bpe.vocabulary:
            raise UserError(field, f"line {line}: {word!r} is a token already", "Remove the line.")
        spelt[word] = spelling
    for spelling in sorted(spelt.values(), key=len):  # a short word may be a part of a longer one
        pieces = growth.cut(_pieces(growth, spelling))
        while len(pieces) > 1:
            pairs = Counter(pairwise(pieces))
            # One that is a token already needs none on the way; one that stands here twice saves another.
            growth.join(*max(pairs, key=lambda pair: (pair[0] + pair[1] in growth, pairs[pair])))
            pieces = growth.cut(pieces)
    growth.finish()
    for word, spelling in spelt.items():
        if growth.cut(_pieces(growth, spelling)) != [spelling]:
            problem = f"line {words[word]}: {word!r} cannot be put together from the tokenizer's pieces"
            raise UserError(field, problem, "Give a shorter one, or remove the line.")
    return growth


def _pieces(growth: Growth, spelling: str) -> list[str]:
    """What the old merges leave of `spelling`; characters that the old tokenizer has no token for become tokens."""
    bpe = growth.bpe
    if bpe.style == "byte-level":
        return bpe.cut(spelling)
    pieces: list[str] = []
    known = ""
    for character in spelling:
        if character in bpe.vocabulary:
            known += character
            continue
        if character not in growth:
            growth.add_character(character)
        pieces += [*(bpe.cut(known) if known else []), character]
        known = ""
    return [*pieces, *(bpe.cut(known) if known else [])]


def save_grown(growth: Growth, original: Any, folder: Path) -> Any:
    """Write the grown tokenizer into `folder`, with all that `original` has besides its entries, and read it back."""
    original.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(growth.tokenizer_json(), encoding="utf-8")
    grown = read_tokenizer_folder(folder)
    ids = grown.get_vocab()  # a model's own class may build it anew from entries and merges
    assert all(ids[token] == number for token, number in growth.bpe.vocabulary.items())
    assert all(token in ids for token in growth.tokens)
    return grown


def grow_tokenizer(
    tokenizer: Any,
    folder: str | Path,
    *,
    words: Iterable[str] = (),
    texts: Iterable[str] = (),
    number: int | None = None,
) -> Any:
    """A copy of a BPE tokenizer with new, ordinary tokens, saved in `folder`. `grow_embeddings` makes their rows.

    Args:
        words: tokens to add; one with a space in front is the one behind a space.
        texts, number: text to learn tokens from, and how many; not together with `words`.

    Raises:
        UserError: a tokenizer that cannot grow, or a word that is no new token.
    """
    bpe = read_bpe(tokenizer, "tokenizer")
    given = {word: line for line, word in enumerate(words, start=1)}
    if bool(given) == (number is not None):
        raise UserError("words", "tokens are given, or learned from texts", "Give words, or texts and a number.")
    growth = tokens_for(bpe, given, "words") if number is None else learn(bpe, in_batches(texts), number)
    return save_grown(growth, tokenizer, Path(folder))


def check_trained(model: Any, modules_to_save: Sequence[str], field: str = "adapter.modules_to_save") -> None:
    """Check that the rows of new tokens would be trained, in both embeddings.

    Raises:
        UserError: an embedding is left frozen.
    """
    missing = [name for name in EMBEDDINGS if name not in modules_to_save]
    if missing and not (is_tied(model) and len(missing) < len(EMBEDDINGS)):
        raise UserError(
            field,
            f"the model gets new tokens (model.new_tokens), but {' and '.join(missing)} would stay frozen",
            f"Set adapter.modules_to_save: [{', '.join(EMBEDDINGS)}].",
        )


def rows_for(tokenizer: Any, rows: int) -> int:
    """Rows that embeddings of `rows` need for all ids of `tokenizer`: as many more as are missing. Many checkpoints
    have rows to spare, and PEFT, too, enlarges them only where they are too few."""
    return max(rows, len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def grow_embeddings(model: Any, original: Any, tokenizer: Any, rows: str | Path | None = None) -> None:
    """Give `model` a row for each token that `tokenizer` has and `original` has not, in both embeddings.

    A new row is the mean of the rows of the pieces that `original` cuts the token into, in fp32, rounded once; where it
    has no piece for any of it (no byte tokens, no token for the unknown), the mean of all rows. What is tied stays
    tied. For a model without adapters; its embeddings may lie beside 4-bit layers.

    Args:
        original: the tokenizer that the model came with.
        rows: ``new_tokens.safetensors`` of a run's ``tokenizer/`` or of a checkpoint: the new rows are those that were
            trained from there, to the bit, and none is made.

    Raises:
        UserError: `rows` is not there, damaged, or of another model or other tokens; `model` was grown before.
    """
    if getattr(model, "new_rows", None) is not None:
        raise UserError(
            "model", "it was grown before", "Give one tokenizer with all new tokens, and the model as it was loaded."
        )
    old, new = original.get_vocab(), tokenizer.get_vocab()
    added = {number: token for token, number in new.items() if token not in old}
    before = model.get_input_embeddings().weight.shape[0]
    needed = rows_for(tokenizer, before)
    if needed > before:
        model.resize_token_embeddings(needed, mean_resizing=False)
    # Not of new tokens alone: some bases have fewer rows than their own tokenizer has ids.
    ids = torch.tensor(sorted({*added, *range(before, needed)}), dtype=torch.int64)
    weights = {"embed_tokens": model.get_input_embeddings().weight}
    if not is_tied(model):
        weights["lm_head"] = model.get_output_embeddings().weight
    with torch.no_grad():
        if rows is None:
            _fill(weights, original, added)
        else:
            begun = read_new_rows(Path(rows))
            check_new_rows(begun, ids, weights, Path(rows))
            for name, weight in weights.items():
                weight[ids.to(weight.device)] = begun.tables[name].to(weight)
    model.requires_grad_(False)
    model.new_rows = NewRows(ids, {name: weight[ids.to(weight.device)].cpu() for name, weight in weights.items()})


def _fill(weights: dict[str, torch.Tensor], original: Any, added: dict[int, str]) -> None:
    """Give the rows of the tokens `added`, by id, their first values."""
    bpe = read_bpe(original, "tokenizer")
    highest = max(original.get_vocab().values())
    for weight in weights.values():
        mean = weight[: highest + 1].mean(dim=0, dtype=torch.float32)
        for number, token in added.items():
            ids = [piece.id for piece in bpe.backend.model.tokenize(token)]
            weight[number] = (weight[ids].float().mean(dim=0) if ids else mean).to(weight.dtype)
