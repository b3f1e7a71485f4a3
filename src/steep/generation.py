"""Plain text completion with the model as it stands, streamed, and base against trained side by side.

No chat template: continued pretraining makes base models, and what they do is continue a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from steep.errors import UserError, shown
from steep.evaluation.adapters import base_model
from steep.evaluation.mode import inference_mode, input_device
from steep.foreign import told_as_input
from steep.model.unwrap import unwrap

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    stream: Callable[[str], None] | None = None,
) -> str:
    """Continue `prompt` with the library's `generate()` and return what was added.

    The model's modes, its generation config and torch's random state are left as they were. What the model's own
    generation config says about sampling is not used, only its end tokens, next to the tokenizer's.

    Args:
        model: a transformers causal LM or a PeftModel around one.
        tokenizer: its tokenizer, which decides on the beginning token.
        prompt: any text; empty if the tokenizer has a beginning token to start from.
        max_new_tokens: tokens to add at most.
        temperature: 0 takes the likeliest token each time; above, tokens are sampled.
        top_p: sample from the likeliest tokens that hold this much probability, in (0, 1].
        repetition_penalty: above 1, tokens that occurred become less likely.
        seed: of the sampling.
        autocast_dtype: run the model under `torch.autocast` with this dtype, as one with fp32 masters needs.
        stream: called with each piece of text once it is final, in this thread: what it raises, this raises. The
            pieces joined are the returned text, and no character is split between two of them.

    Raises:
        UserError: a setting is out of range, or an empty prompt without a beginning token.
    """
    check_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    base = unwrap(model)
    prompt_ids = prompt_ids_of(tokenizer, prompt, rows=cast(Any, base).get_input_embeddings().num_embeddings)
    device = input_device(model)
    input_ids = torch.tensor([prompt_ids], dtype=torch.int64, device=device)
    config = _generation_config(base, tokenizer, max_new_tokens, temperature, top_p, repetition_penalty)
    text = TextPieces(tokenizer, prompt_ids, stream)
    with (
        inference_mode(model, autocast_dtype),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        _without_own_settings(base),
    ):
        torch.manual_seed(seed)
        # PeftModel.generate() would rebind methods on the base model; the adapters sit in its layers either way.
        cast(Any, base).generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=text,
        )
    return text.text


def generate_side_by_side(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    base_tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    stream: Callable[[str, str], None] | None = None,
) -> dict[str, str]:
    """Continue `prompt` with the base model, then with the trained one, under the keys "base" and "trained".

    `base_tokenizer` is the base model's own where `tokenizer` has new tokens; the base then reads and writes as it did
    without them. `stream` is called with such a key and a piece of text; the other arguments and the errors are
    `generate`'s.
    """

    def run(which: str, tokenizer: PreTrainedTokenizerBase) -> str:
        pieces = None if stream is None else partial(stream, which)
        return generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            autocast_dtype=autocast_dtype,
            stream=pieces,
        )

    own = tokenizer if base_tokenizer is None else base_tokenizer
    with base_model(model, None if own is tokenizer else max(own.get_vocab().values()) + 1):
        base = run("base", own)
    return {"base": base, "trained": run("trained", tokenizer)}


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    step: int,
    max_new_tokens: int,
    autocast_dtype: torch.dtype | None = None,
) -> list[dict[str, object]]:
    """Greedy completions as rows of `samples.jsonl`: step, prompt, completion."""
    return [
        {
            "step": step,
            "prompt": prompt,
            "completion": generate(
                model, tokenizer, prompt, max_new_tokens=max_new_tokens, autocast_dtype=autocast_dtype
            ),
        }
        for prompt in prompts
    ]


class TextPieces(BaseStreamer):
    """Tokens in, text out, as soon as it is final.

    A character of several bytes may be spread over tokens, and a decoder shows U+FFFD for its beginning; so nothing is
    passed on while the text ends in one. A token's text can depend on the one before (SentencePiece drops a leading
    space, joins bytes), so each piece is decoded together with the piece before it and is what comes after that.
    Only at the end does a character that the token limit cut in two show as U+FFFD.
    transformers' TextStreamer holds text back until a space, and loses a space after a line break.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], stream: Callable[[str], None] | None
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = stream
        self._prompt_is_next = True
        self._previous = list(prompt_ids)  # tokens of the last piece: context only
        self._pending: list[int] = []  # tokens whose text was not passed on
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that was passed on."""
        return "".join(self._pieces)

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens that `generate()` hands over: first the prompt, then new ones."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._pending.extend(value.reshape(-1).tolist())
        piece = self._new_text()
        if piece and not piece.endswith(_UNFINISHED):
            self._pass_on(piece)

    def end(self) -> None:
        """Pass on what is left."""
        if piece := self._new_text():
            self._pass_on(piece)

    def _pass_on(self, piece: str) -> None:
        self._previous, self._pending = self._pending, []
        self._pieces.append(piece)
        if self._stream is not None:
            self._stream(piece)

    def _new_text(self) -> str:
        return self._decode(self._previous + self._pending)[len(self._decode(self._previous)) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)


def prompt_ids_of(tokenizer: PreTrainedTokenizerBase, prompt: str, *, rows: int, field: str = "prompt") -> list[int]:
    """The prompt as the tokenizer opens a text, but not closed by an end token, which would leave nothing to continue.

    Args:
        rows: entries of the model's vocabulary.

    Raises:
        UserError: nothing to start from, half a character (a lone surrogate), or a token that the model does not have.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(field, f"{prompt!a} holds half a character, a lone surrogate", "Write it as UTF-8.")
    with told_as_input(field, f"the tokenizer cannot read {shown(prompt)}", "Put the tokenizer's files back."):
        ids: list[int] = list(tokenizer(prompt)["input_ids"]) if prompt else []  # pyright: ignore[reportArgumentType]
        text_ids: list[int] = list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else []  # pyright: ignore[reportArgumentType]
    if ids and ids[-1] == tokenizer.eos_token_id and text_ids[-1:] != ids[-1:]:
        ids.pop()
    if not ids and tokenizer.bos_token_id is not None:
        ids = [cast(int, tokenizer.bos_token_id)]
    if not ids:
        raise UserError(field, "it is empty, and the tokenizer has no beginning token to start from", "Write a word")
    if max(ids) >= rows:
        problem = f"it has the token id {max(ids)}, and the model's ids end at {rows - 1}"
        raise UserError(
            field, problem, "The tokenizer has more tokens than the model: use the two that belong together"
        )
    return ids


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
) -> GenerationConfig:
    """Every field that shapes the text, spelled out: fields left None would be the model's own (an instruct sibling's
    temperature 0.6, top-k 20), and those of sampling are at their defaults when greedy, or generate() warns."""
    sampling = temperature > 0
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = own if isinstance(own, list) else [own]
    ends = sorted({int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None})  # pyright: ignore[reportArgumentType]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else None)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        temperature=temperature if sampling else 1.0,
        top_p=top_p if sampling else 1.0,
        top_k=0 if sampling else 50,  # 0: no limit
        min_p=0.0 if sampling else None,
        typical_p=1.0,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=0,
        num_beams=1,
        min_length=0,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """generate() fills what it was not told from the model's own generation config, which may hold anything."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def check_settings(
    max_new_tokens: int, temperature: float, top_p: float = 1.0, repetition_penalty: float = 1.0
) -> None:
    """Check what `generate` is given.

    Raises:
        UserError: a setting is out of range.
    """
    if max_new_tokens < 1:
        raise UserError("max_new_tokens", f"{max_new_tokens} is not positive", "Use at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError("temperature", f"{temperature} is not a temperature", "Use 0 for greedy, about 0.8 to sample")
    if not 0 < top_p <= 1:
        raise UserError("top_p", f"{top_p} is not in (0, 1]", "Use 1 to sample from all tokens")
    if not 0 < repetition_penalty < float("inf"):
        raise UserError("repetition_penalty", f"{repetition_penalty} is not positive", "Use 1 for none")
