from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from steep.errors import UserError
from steep.evaluation.perplexity import Scorer, choose, evaluate
from steep.evaluation.windows import pack, windows
from tests.evaluation.oracle import (
    TokenDocument,
    ignore_pefts_warning,
    oracle,
    oracle_nats,
    random_document,
    random_documents,
    with_adapters,
)
from tests.tiny import FAMILIES, tiny_model

MAX_LENGTH, STRIDE = 32, 12
LENGTHS = (1, 2, 31, 32, 33, 96, 7, 50)
ROUNDING = 2e-6  # relative, of a mean of fp32 losses whose rows were packed otherwise


def loud(family: str, tied: bool | None = None) -> PreTrainedModel:
    """A model whose predictions depend on all of its context."""
    return tiny_model(family, tied=tied, initializer_range=0.3)


def loss(model: torch.nn.Module, *documents: TokenDocument, **limits: int) -> float:
    [score] = evaluate(model, {"d": documents}, **{"max_length": MAX_LENGTH, "stride": STRIDE, **limits})  # pyright: ignore[reportArgumentType]
    return score.loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_plain_loop_over_windows(family: str, tied: bool) -> None:
    model = loud(family, tied)
    documents = random_documents(*LENGTHS)
    expected, count = oracle(model, documents, MAX_LENGTH, STRIDE)
    [score] = evaluate(model, {"d": documents}, max_length=MAX_LENGTH, stride=STRIDE, batch_tokens=3 * MAX_LENGTH)
    assert score.loss == pytest.approx(expected, rel=ROUNDING)
    assert score.tokens == count == sum(length - 1 for length in LENGTHS)
    assert score.documents == len(LENGTHS) - 1
    assert score.bytes == sum(document.num_bytes for document in documents[1:])
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(expected * count / math.log(2) / score.bytes, rel=ROUNDING)


def test_the_comparison_bites() -> None:
    """A context that is one token shorter, or half a softcap, is seen at a hundred times that tolerance."""
    model = loud("gemma2")
    documents = random_documents(96, 50)
    expected, _ = oracle(model, documents, MAX_LENGTH, STRIDE)
    other_stride, _ = oracle(model, documents, MAX_LENGTH, STRIDE + 1)
    assert other_stride != pytest.approx(expected, rel=100 * ROUNDING)
    model.config.final_logit_softcapping = 15.0
    assert oracle(model, documents, MAX_LENGTH, STRIDE)[0] != pytest.approx(expected, rel=100 * ROUNDING)


@pytest.mark.parametrize("length", [2, 31, 32, 33, 96])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_length_at_the_edge_of_a_window(family: str, length: int) -> None:
    model = loud(family)
    document = random_document(length)
    nats, count = oracle_nats(model, document, MAX_LENGTH, STRIDE)
    assert loss(model, document) == pytest.approx(nats / count, rel=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_a_row_do_not_see_each_other(family: str) -> None:
    model = loud(family)
    document = random_document(11)
    alone = loss(model, document) * 10
    for seed in (1, 2):
        other = random_document(20, seed)
        both = loss(model, document, other) * 29
        assert both - loss(model, other) * 19 == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, MAX_LENGTH, 5 * MAX_LENGTH, 10**6])
def test_batch_size_only_changes_rounding(batch_tokens: int) -> None:
    model = loud("qwen3")
    documents = random_documents(*LENGTHS)
    expected, _ = oracle(model, documents, MAX_LENGTH, STRIDE)
    assert loss(model, *documents, batch_tokens=batch_tokens) == pytest.approx(expected, rel=ROUNDING)


@torch.no_grad()
def test_a_batch_as_one_row_is_the_same_batch() -> None:
    """Flash attention reads packed documents only from a single row."""
    model = loud("gemma2").eval()
    rows = pack((w for d in random_documents(*LENGTHS) for w in windows(d.tokens, MAX_LENGTH, STRIDE)), MAX_LENGTH)
    scorer = Scorer(model, rows[0])
    [batch] = scorer.batches(rows, len(rows))
    assert scorer.losses(batch.as_one_row()).numpy() == pytest.approx(scorer.losses(batch).numpy(), rel=1e-4)
    scorer.flatten = True
    assert [len(flat.input_ids) for flat in scorer.batches(rows, len(rows))] == [1]


def test_default_stride_is_half_a_window() -> None:
    model = tiny_model("llama")
    documents = {"d": random_documents(80)}
    assert evaluate(model, documents, max_length=32) == evaluate(model, documents, max_length=32, stride=16)


def test_max_tokens_takes_whole_documents_and_at_least_one() -> None:
    model = tiny_model("llama")
    lengths = (20, 11, 30, 2)
    documents = random_documents(*lengths)

    def taken(max_tokens: int | None) -> tuple[int, int]:
        [score] = evaluate(model, {"d": documents}, max_length=32, max_tokens=max_tokens)
        return score.documents, score.tokens

    picked = choose("d", documents, 5)
    assert len(picked) == 1
    first = lengths[picked[0]] - 1
    assert taken(1) == taken(first) == (1, first)
    assert taken(59) == taken(None) == (4, 59)
    assert taken(58)[0] < 4


def test_max_tokens_takes_from_everywhere_and_always_the_same() -> None:
    """A domain's sources stand one after the other: the first tokens of it would be of the first source alone."""
    documents = random_documents(*[11] * 100)

    numbers = choose("d", documents, 400)
    assert len(numbers) == 40
    assert numbers == sorted(numbers)  # scored in their own order
    assert 10 < sum(number < 50 for number in numbers) < 30
    assert choose("d", random_documents(*[11] * 100), 400) == numbers
    assert choose("d", list(reversed(documents)), 400) == numbers  # the count decides, not the content


def test_domains_keep_their_order_and_progress_is_told() -> None:
    calls: list[tuple[str, int, int]] = []
    scores = evaluate(
        tiny_model("llama"),
        {"ko": random_documents(40, 40), "en": random_documents(9)},
        max_length=32,
        batch_tokens=32,
        step=7,
        progress=lambda *call: calls.append(call),
    )
    assert [(score.step, score.domain, score.tokens) for score in scores] == [(7, "ko", 78), (7, "en", 8)]
    assert calls[-1] == ("en", 8, 8)
    assert [call for call in calls if call[0] == "ko"][-1] == ("ko", 78, 78)
    assert [done for domain, done, _ in calls if domain == "ko"] == sorted({done for _, done, _ in calls[:-1]})


@ignore_pefts_warning
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_adapters_and_trained_embeddings_are_used(family: str, tied: bool) -> None:
    model = with_adapters(tied, family)
    documents = random_documents(*LENGTHS)
    expected, _ = oracle(model, documents, MAX_LENGTH, STRIDE)
    untouched, _ = oracle(tiny_model(family, tied=tied), documents, MAX_LENGTH, STRIDE)
    assert abs(expected - untouched) > 1e-3
    assert loss(model, *documents) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")  # renamed within the range of transformers
def test_modes_and_checkpointing_are_left_alone() -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    document = random_document(40)
    model.eval()
    expected = loss(model, document)
    model.train()
    frozen = model.get_submodule("model.layers.0")
    frozen.eval()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    before = [module.training for module in model.modules()]
    assert loss(model, document) == expected
    assert [module.training for module in model.modules()] == before
    assert model.is_gradient_checkpointing


def test_modes_come_back_after_an_error() -> None:
    model = tiny_model("llama").train()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, {"d": random_documents(5)}, progress=fail)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_autocast_is_used_and_training_goes_on_inside_it() -> None:
    model = tiny_model("llama", tied=False)
    documents = random_documents(*LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = oracle(model, documents, MAX_LENGTH, STRIDE)
        [inside] = evaluate(model, {"d": documents}, max_length=MAX_LENGTH, stride=STRIDE)
        # Cast copies made without gradients must not serve this forward.
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.ndim == 2)
    fp32 = loss(model, *documents)
    [score] = evaluate(model, {"d": documents}, max_length=MAX_LENGTH, stride=STRIDE, autocast_dtype=torch.bfloat16)
    assert score.loss == inside.loss != fp32
    assert score.loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_go_by_tiles(dtype: torch.dtype) -> None:
    model = tiny_model("gemma2").to(dtype)  # pyright: ignore[reportArgumentType]
    documents = random_documents(*LENGTHS)
    expected, _ = oracle(model, documents, MAX_LENGTH, STRIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(model, *documents) == pytest.approx(expected, rel=2e-3)


def test_nan_is_reported() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.norm").weight[0] = math.nan  # pyright: ignore[reportIndexIssue]
    [score] = evaluate(model, {"d": random_documents(20)}, max_length=32)
    assert math.isnan(score.loss) and math.isnan(score.perplexity) and math.isnan(score.bits_per_byte)
    assert score.as_dict()["loss"] is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_four_bit_weights_are_not_changed(llama_folder: Path) -> None:
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=quantization)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    packed = [layer.weight.detach().clone() for layer in layers]
    documents = random_documents(*LENGTHS)
    measured = loss(model, *documents)
    assert measured == pytest.approx(oracle(model, documents, MAX_LENGTH, STRIDE)[0], rel=1e-5)
    assert all(torch.equal(layer.weight, before) for layer, before in zip(layers, packed, strict=True))


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"max_length": 1}, "max_length"),
        ({"stride": 0}, "stride"),
        ({"stride": MAX_LENGTH}, "stride"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_limits_out_of_range(limits: dict[str, int], field: str) -> None:
    with pytest.raises(UserError) as raised:
        loss(tiny_model("llama"), random_document(9), **limits)
    assert raised.value.field == field


def test_nothing_to_score() -> None:
    empty = TokenDocument(np.array([1, 2], dtype=np.int32), num_bytes=0)
    for documents in ([], random_documents(1), [empty]):
        with pytest.raises(UserError, match="no document has text to score"):
            evaluate(tiny_model("llama"), {"ko": documents})


def test_tokens_of_another_vocabulary() -> None:
    document = TokenDocument(np.array([1, 384], dtype=np.int32), num_bytes=3)
    with pytest.raises(UserError, match="outside the model's vocabulary of 384"):
        evaluate(tiny_model("llama"), {"ko": [document]})
