"""Tiny causal LMs, tokenizers and corpora that the tests make for themselves: seeded, on the CPU, in milliseconds.

Every hidden size is a multiple of 64, the block of bitsandbytes' 4-bit storage. The Gemma models have a local and a
global layer, with a window that is shorter than a test's sequence. Norm weights and biases are moved off their initial
ones and zeros, so that a forward that forgets one of them gives another answer.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]

VOCAB_SIZE = 384
SLIDING_WINDOW = 16
EOS, PAD, BOS = "</s>", "<pad>", "<s>"

_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]
_FAMILY_FIELDS: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"layer_types": _LOCAL_AND_GLOBAL, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3": {"layer_types": _LOCAL_AND_GLOBAL, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16},
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}

_ENGLISH = (
    "the river", "a teacher", "my neighbour", "the old engine", "a small bird", "the library", "one engineer",
    "the market", "a sailor", "the winter wind",
), (
    "crosses", "remembers", "repairs", "describes", "follows", "measures", "paints", "opens", "carries", "waits for",
), (
    "the northern bridge", "a letter from home", "the broken clock", "a field of rice", "the last train",
    "an open window", "the mountain road", "a bowl of soup", "the morning news", "a quiet garden",
)  # fmt: skip
_KOREAN = (
    "강물이", "선생님이", "우리 이웃이", "낡은 기계가", "작은 새가", "도서관이", "기술자가", "시장이", "뱃사람이",
    "겨울바람이",
), (
    "북쪽 다리를", "고향에서 온 편지를", "고장 난 시계를", "논을", "마지막 기차를", "열린 창문을", "산길을",
    "국 한 그릇을", "아침 소식을", "조용한 정원을",
), (
    "건넌다", "기억한다", "고친다", "설명한다", "따라간다", "잰다", "그린다", "연다", "나른다", "기다린다",
)  # fmt: skip


def documents(language: str, count: int) -> list[str]:
    """`count` distinct short documents (at most 1,000) in "en" or "ko", always the same ones."""
    first, second, third = {"en": _ENGLISH, "ko": _KOREAN}[language]
    texts: list[str] = []
    for number in range(count):
        tens, ones = divmod(number, 10)
        sentences = [
            f"{first[ones]} {second[(tens + step) % 10]} {third[(tens // 10 + ones + step) % 10]}."
            for step in range(2 + number % 3)
        ]
        texts.append(" ".join(sentences))
    return texts


def write_corpus(folder: Path, documents_per_language: int = 100) -> Path:
    """Write `corpus.jsonl` with the fields "text" and "language" ("en", "ko", alternating) and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = zip(documents("en", documents_per_language), documents("ko", documents_per_language), strict=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for english, korean in pairs:
            for language, text in (("en", english), ("ko", korean)):
                file.write(json.dumps({"text": text, "language": language}, ensure_ascii=False) + "\n")
    return folder


@cache
def _trained_tokenizer() -> str:
    """The JSON of a byte-level BPE with exactly `VOCAB_SIZE` entries, trained on part of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents("en", 60) + documents("ko", 60), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 entries; with `bos`, each text is opened by `<s>` as Llama's and Gemma's are."""
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    special = {"eos_token": EOS, "pad_token": PAD}
    if bos:
        special["bos_token"] = BOS
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


@cache
def _sentencepiece_json() -> str:
    """The JSON of a BPE as SentencePiece's are: spaces are ▁, no pre-tokeniser, English letters, bytes for the rest."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_and_specials = [PAD, BOS, EOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=bytes_and_specials, initial_alphabet=["\n"], show_progress=False
    )
    trained.train_from_iterator([*documents("en", 60), *"0123456789"], trainer)
    tree = json.loads(trained.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < 4]
    tree["model"] |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    return json.dumps(tree)


def sentencepiece_tokenizer(prepend: str = "first") -> PreTrainedTokenizerFast:
    """A tokenizer of 384 entries like Llama 2's, Mistral's and Gemma's.

    Args:
        prepend: which text gets a space in front. ``first``: one that begins a document (Llama 2's today).
            ``normalizer``: each stretch between special tokens (Llama 2's first tokenizer.json). ``never``: none
            (Gemma's).
    """
    tokenizer = Tokenizer.from_str(_sentencepiece_json())
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    if prepend == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        both = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        tokenizer.normalizer = replace if prepend == "never" else both
        tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token="<unk>"
    )


def tiny_config(family: str, **overrides: object) -> PreTrainedConfig:
    """The configuration of a two-layer model of that family; `overrides` are fields of its config class."""
    fields: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_FAMILY_FIELDS[family],
        **overrides,
    }
    return AutoConfig.for_model(_MODEL_TYPES.get(family, family), **fields)


def tiny_model(family: str, tied: bool | None = None, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random fp32 model, the same for the same arguments. `tied` None keeps the family's own choice."""
    if tied is not None:
        overrides["tie_word_embeddings"] = tied
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_tiny(
    family: str,
    folder: Path,
    tied: bool | None = None,
    seed: int = 0,
    bos: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **overrides: object,
) -> Path:
    """Write model and tokenizer so that `from_pretrained` opens the folder, and return the folder."""
    tiny_model(family, tied, seed, **overrides).save_pretrained(folder)
    (tokenizer or tiny_tokenizer(bos)).save_pretrained(folder)
    return folder
