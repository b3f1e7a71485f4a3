"""The names under which llama.cpp knows how a byte-level BPE tokenizer cuts text into words before it merges.

A GGUF file holds a name, not the rule; llama.cpp has the rules in its source. Here each name stands beside the rule as
`tokenizer.json` writes it, and the rule as a whole is compared, so that a tokenizer with another rule is never given a
name that is nearly right. The tests hold each entry against llama.cpp, on text in several scripts.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA_3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN_2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

# (the steps, whether words that are whole tokens skip the merges) → llama.cpp's name

_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2 words",), False): "gpt-2",
    (("single digits", "gpt2 words"), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "smaug-bpe",
    ((_QWEN_2,), False): "qwen2",
}


def pre_tokenizer_name(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """llama.cpp's name for the `pre_tokenizer` of a `tokenizer.json`; None if it has none, or it is not in the table.

    Args:
        pre_tokenizer: that part of the file.
        ignore_merges: `model.ignore_merges` of the same file.
    """
    steps = _steps(pre_tokenizer)
    return None if steps is None else _NAMES.get((steps, ignore_merges))


def pre_tokenizer_called(name: str) -> tuple[pre_tokenizers.PreTokenizer, bool] | None:
    """The rule that llama.cpp calls `name`, and whether words that are whole tokens skip the merges; None: unknown."""
    rules = [rule for rule, known in _NAMES.items() if known == name]
    if not rules:
        return None
    ((steps, ignore_merges),) = rules
    parts = [_part(step) for step in steps]
    if "gpt2 words" not in steps:
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(parts), ignore_merges  # pyright: ignore[reportReturnType]


def _part(step: str) -> Any:
    if step == "gpt2 words":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return (
        pre_tokenizers.Digits(individual_digits=True)
        if step == "single digits"
        else pre_tokenizers.Split(Regex(step), "isolated")
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The steps by name, or by their regular expression; None if one is of another kind or the last is not bytes."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    steps: list[str] = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part["type"] == "ByteLevel" and last and not part["add_prefix_space"]:
            steps += ["gpt2 words"] if part["use_regex"] else []
        elif part["type"] == "Digits" and part["individual_digits"] and not last:
            steps.append("single digits")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and not last:
            steps.append(part["pattern"].get("Regex", ""))
        else:
            return None
    return tuple(steps)
