from __future__ import annotations

import copy
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steep.errors import UserError
from steep.generation import TextPieces, generate, generate_side_by_side, sample
from steep.model.unwrap import unwrap
from tests.evaluation.oracle import ignore_pefts_warning, with_adapters
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

KOREAN = "강물이 북쪽 다리를 건넌다. 한글 쓰기, 값진 뷁!\n  다음 줄"


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def library_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.eval().generate(**inputs, max_new_tokens=count, do_sample=False)  # pyright: ignore[reportCallIssue]
    return text_of(tokenizer, output[0, inputs["input_ids"].shape[1] :].tolist())  # pyright: ignore


def loud(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A model whose continuations wander instead of repeating one token."""
    return tiny_model(family, tied=False, seed=seed, initializer_range=0.5)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's SentencePiece: spaces are ▁, bytes are tokens, and a first space is dropped."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁hello": 4, "▁world": 5, "한": 6, "\n": 7}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def pieces(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> list[str]:
    streamed: list[str] = []
    text = TextPieces(tokenizer, prompt, streamed.append)
    text.put(torch.tensor([prompt]))
    for token in new:
        text.put(torch.tensor([token]))
    text.end()
    assert text.text == "".join(streamed)
    return streamed


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_librarys_and_deterministic(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = loud(family)
    streamed: list[str] = []
    text = generate(model, tokenizer, "the river", max_new_tokens=24, stream=streamed.append)
    assert text == "".join(streamed)
    assert text == generate(model, tokenizer, "the river", max_new_tokens=24, seed=5)
    assert text == library_text(model, tokenizer, "the river", 24)
    assert len(set(text)) > 3


def test_beginning_token_is_the_tokenizers_own() -> None:
    model = loud()
    with_bos, without = tiny_tokenizer(bos=True), tiny_tokenizer()
    assert generate(model, with_bos, "산길을", max_new_tokens=12) == library_text(model, with_bos, "산길을", 12)
    assert generate(model, with_bos, "산길을", max_new_tokens=12) != generate(
        model, without, "산길을", max_new_tokens=12
    )
    assert generate(model, with_bos, "", max_new_tokens=8)
    with pytest.raises(UserError, match="no beginning token"):
        generate(model, without, "")


def test_an_end_token_that_the_tokenizer_appends_is_not_continued() -> None:
    from tokenizers import processors

    model = loud()
    plain, closing = tiny_tokenizer(), tiny_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    assert closing("a")["input_ids"][-1] == 2  # pyright: ignore[reportIndexIssue]
    assert generate(model, closing, "a", max_new_tokens=8) == generate(model, plain, "a", max_new_tokens=8)


def test_end_tokens_of_model_and_tokenizer_both_stop(tokenizer: PreTrainedTokenizerFast) -> None:
    model = loud()
    ids = model.eval().generate(torch.tensor([[40, 41]]), max_new_tokens=12, do_sample=False)[0, 2:].tolist()  # pyright: ignore
    prompt = text_of(tokenizer, [40, 41])
    assert tokenizer(prompt)["input_ids"] == [40, 41]
    whole = generate(model, tokenizer, prompt, max_new_tokens=12)
    stop = next(token for token in ids[2:] if text_of(tokenizer, [token]).isascii() and token not in ids[:2])
    model.generation_config.eos_token_id = [2, stop]  # pyright: ignore[reportOptionalMemberAccess]
    stopped = generate(model, tokenizer, prompt, max_new_tokens=12)
    assert stopped == text_of(tokenizer, ids[: ids.index(stop) + 1]) and len(stopped) < len(whole)


def test_sampling_follows_the_seed_and_leaves_the_random_state(tokenizer: PreTrainedTokenizerFast) -> None:
    model = loud()
    state = torch.get_rng_state()

    def sampled(seed: int, **settings: float) -> str:
        return generate(model, tokenizer, "a teacher", max_new_tokens=16, temperature=1.0, seed=seed, **settings)  # pyright: ignore[reportArgumentType]

    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled(1, top_p=1e-6) == generate(model, tokenizer, "a teacher", max_new_tokens=16)
    assert sampled(1, repetition_penalty=5.0) != sampled(1)


def test_the_models_own_sampling_settings_are_not_used(tokenizer: PreTrainedTokenizerFast) -> None:
    model, other = loud(), loud()
    other.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.2, min_p=0.9, max_length=3)  # pyright: ignore
    for temperature in (0.0, 1.5):
        assert generate(model, tokenizer, "a", max_new_tokens=16, temperature=temperature) == generate(
            other, tokenizer, "a", max_new_tokens=16, temperature=temperature
        )


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_nothing_of_the_model_changes(tokenizer: PreTrainedTokenizerFast) -> None:
    model = with_adapters(tied=False)
    base = unwrap(model)
    model.train()
    base.get_submodule("model.layers.1").eval()
    base.gradient_checkpointing_enable()
    base.config.use_cache = False  # as the Trainer leaves it

    def state() -> tuple[object, ...]:
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            base.config.to_dict(),
            base.generation_config.to_dict(),  # pyright: ignore
            sorted(vars(base)),
            sorted(vars(model)),
        )

    before, threads = copy.deepcopy(state()), threading.active_count()
    generate_side_by_side(model, tokenizer, "a", max_new_tokens=3)

    def fail(piece: str) -> None:
        raise KeyboardInterrupt(piece)

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, "a", max_new_tokens=8, stream=fail)
    assert state() == before
    assert threading.active_count() == threads


def test_errors_of_the_model_surface(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.get_submodule("model.norm"), "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, "a", stream=lambda piece: None)


@ignore_pefts_warning
@pytest.mark.parametrize("tied", [True, False])
def test_base_against_trained(tied: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    model = with_adapters(tied)
    streamed: list[tuple[str, str]] = []
    texts = generate_side_by_side(
        model, tokenizer, "낡은 기계가", max_new_tokens=16, stream=lambda *call: streamed.append(call)
    )
    assert list(texts) == ["base", "trained"]
    assert texts["base"] == generate(tiny_model("llama", tied=tied), tokenizer, "낡은 기계가", max_new_tokens=16)
    assert texts["trained"] == generate(model, tokenizer, "낡은 기계가", max_new_tokens=16)
    assert texts["base"] != texts["trained"]
    for which in texts:
        assert "".join(piece for key, piece in streamed if key == which) == texts[which]
    untrained = with_adapters(tied, trained=False)
    same = generate_side_by_side(untrained, tokenizer, "낡은 기계가", max_new_tokens=16)
    assert same["base"] == same["trained"] == texts["base"]


def test_side_by_side_needs_adapters(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="has no adapters"):
        generate_side_by_side(tiny_model("llama"), tokenizer, "a")


def test_samples_are_greedy_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    model = loud()
    rows = sample(model, tokenizer, ["the market", "시장이"], step=40, max_new_tokens=6)
    assert [list(row) for row in rows] == [["step", "prompt", "completion"]] * 2
    assert [row["step"] for row in rows] == [40, 40]
    assert rows[1]["completion"] == generate(model, tokenizer, "시장이", max_new_tokens=6)


@ignore_pefts_warning
def test_fp32_masters_of_a_bf16_model_need_autocast(tokenizer: PreTrainedTokenizerFast) -> None:
    model = with_adapters(tied=False)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        generate(model, tokenizer, "a", max_new_tokens=4)
    texts = generate_side_by_side(model, tokenizer, "a", max_new_tokens=4, autocast_dtype=torch.bfloat16)
    assert texts["trained"] == generate(model, tokenizer, "a", max_new_tokens=4, autocast_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "setting",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}],
)
def test_settings_out_of_range(setting: dict[str, float], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as raised:
        generate(tiny_model("llama"), tokenizer, "a", **setting)  # pyright: ignore[reportArgumentType]
    assert raised.value.field in setting


def test_korean_streams_whole_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer("오늘은").input_ids
    new = tokenizer(KOREAN).input_ids
    assert len(new) > len(KOREAN)  # characters do lie across tokens
    streamed = pieces(tokenizer, prompt, new)
    assert "".join(streamed) == KOREAN
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in streamed)
    assert len(streamed) > len(KOREAN) / 2  # piece by piece, not held back to the next space


def test_bytes_that_are_no_text_are_shown_as_the_library_shows_them(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        new = torch.randint(0, 384, (30,), generator=generator).tolist()
        assert "".join(pieces(tokenizer, tokenizer("the").input_ids, new)) == text_of(tokenizer, new)
    cut = tokenizer("뷁").input_ids[:-1]
    assert pieces(tokenizer, [40], cut) == ["\N{REPLACEMENT CHARACTER}"]


def test_sentencepiece_spaces_and_bytes() -> None:
    tokenizer = byte_fallback_tokenizer()
    hello, world, han, line_end, space = 4, 5, 6, 7, 3
    two = [tokenizer.get_vocab()[f"<0x{byte:02X}>"] for byte in "글뷁".encode()]
    assert pieces(tokenizer, [1, hello], [world, han, *two, line_end, space, world]) == [
        " world", "한", "글", "뷁", "\n", " ", " world",
    ]  # fmt: skip
    assert pieces(tokenizer, [1], [hello, world]) == ["hello", " world"]
    # A byte that is never completed: the library shows every byte of such a run as U+FFFD.
    assert "".join(pieces(tokenizer, [1, hello], [han, two[0], world])) == "한\N{REPLACEMENT CHARACTER} world"
