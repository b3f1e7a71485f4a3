"""Small tokenizers of the two kinds that GGUF knows, made like those of real families."""

from __future__ import annotations

import io
import json
from functools import cache

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.export.gguf_texts import TEXTS
from tests.tiny import BOS, EOS, PAD, documents

SPACE = "▁"
UNK = "<unk>"

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2_WORDS = LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _words(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@cache
def _merges_across_words() -> str:
    """The JSON of a BPE trained on uncut text, so that any other cut shows; every tenth merge of it is missing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents("en", 40), *documents("ko", 40), *TEXTS, *TEXTS], trainer)
    description = json.loads(tokenizer.to_str())
    del description["model"]["merges"][200::10]
    return json.dumps(description)


def byte_level(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts text as the model family does that llama.cpp calls `name`."""
    description = json.loads(_merges_across_words())
    description["model"]["ignore_merges"] = name == "llama-bpe"
    tokenizer = Tokenizer.from_str(json.dumps(description))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = {
        "gpt-2": bytes_,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_]),
        "llama-bpe": _words(LLAMA_3_WORDS),
        "smaug-bpe": _words(LLAMA_3_WORDS),
        "qwen2": _words(QWEN_2_WORDS),
    }[name]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if name == "llama-bpe":  # Llama 3 has BOS, Qwen and SmolLM have none
        bos = [(BOS, tokenizer.token_to_id(BOS))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS} $B", bos)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


@cache
def _sentencepiece_pieces() -> list[tuple[str, float]]:
    """(piece, score) by id, of a SentencePiece BPE with byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([*documents("en", 60), *documents("ko", 60)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]


def sentencepiece_json(kind: str) -> Tokenizer:
    """Those pieces with every merge that they allow, best score first, as transformers makes a list of them.

    kind: "llama" puts a space in front of each part of a text, "mistral" in front of the first, "gemma" nowhere.
    """
    pieces = _sentencepiece_pieces()
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = Tokenizer(
        models.BPE(
            vocab, [(left, right) for _, left, right in merges], unk_token=UNK, fuse_unk=True, byte_fallback=True
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    if kind == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)  # pyright: ignore[reportAttributeAccessIssue]
    elif kind == "gemma":
        tokenizer.normalizer = replace  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # pyright: ignore[reportAttributeAccessIssue]
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        f"{BOS} $A", f"{BOS} $A {BOS} $B", [(BOS, vocab[BOS])]
    )
    return tokenizer


def sentencepiece_style(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_json(kind), bos_token=BOS, eos_token=EOS, unk_token=UNK
    )
