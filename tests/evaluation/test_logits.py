from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from steep.evaluation import logits
from steep.evaluation.logits import agrees, find_head, losses_from_hidden, tile_size
from steep.evaluation.perplexity import evaluate
from steep.ops import linear_cross_entropy
from tests.evaluation.oracle import oracle, random_document, random_documents
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_config, tiny_model

UNKNOWN = "in a way that is not known here"


class BiasedLlama(LlamaForCausalLM):
    """A family that does something of its own to its logits."""

    def forward(self, *args, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        output = super().forward(*args, **kwargs)
        bias = torch.linspace(-1, 1, VOCAB_SIZE)
        assert output.logits is not None
        output.logits = 1.5 * output.logits + bias
        return output


def scaled_model(model_type: str, **fields: object) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **fields,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def probe(length: int = 32) -> torch.Tensor:
    return torch.from_numpy(random_document(length).tokens)[None].long()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_half_the_logits_do_not_agree(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype).eval()  # pyright: ignore[reportArgumentType]
    head = find_head(model)
    assert head is not None
    assert agrees(head, model, probe())
    assert not agrees(replace(head, scale=0.5 * head.scale), model, probe())
    assert not agrees(replace(head, scale=1.05 * head.scale), model, probe())


@pytest.mark.parametrize(
    ("model_type", "fields", "scale"),
    [("cohere", {"logit_scale": 0.25}, 0.25), ("granite", {"logits_scaling": 8.0}, 0.125)],
)
def test_scaled_families_go_by_tiles(model_type: str, fields: dict[str, object], scale: float) -> None:
    model = scaled_model(model_type, **fields)
    head = find_head(model)
    assert head is not None and head.scale == scale
    documents = random_documents(20, 50)
    expected, _ = oracle(model, documents, 32, 16)
    [score] = evaluate(model, {"d": documents}, max_length=32)  # a warning would be an error
    assert score.loss == pytest.approx(expected, rel=2e-6)
    # Half the scale is another loss, at a hundred times that tolerance.
    tokens = probe()[0]
    hidden = head.decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    where = torch.arange(len(tokens) - 1)
    right = losses_from_hidden(head, hidden, where, tokens[1:]).mean().item()
    halved = losses_from_hidden(replace(head, scale=scale / 2), hidden, where, tokens[1:]).mean().item()
    assert halved != pytest.approx(right, rel=2e-4)


def test_softcap_is_found_and_counts() -> None:
    model = tiny_model("gemma2", initializer_range=1.0, final_logit_softcapping=5.0).eval()
    head = find_head(model)
    assert head is not None and head.softcap == 5.0
    with torch.no_grad():
        assert agrees(head, model, probe())
        assert not agrees(replace(head, softcap=None), model, probe())


@pytest.mark.parametrize("batch_tokens", [32, 128])
def test_unknown_logits_go_through_the_models_own_forward(batch_tokens: int) -> None:
    torch.manual_seed(0)
    model = BiasedLlama(tiny_config("llama"))  # pyright: ignore[reportArgumentType]
    documents = random_documents(1, 2, 31, 32, 33, 96, 7)
    expected, count = oracle(model, documents, 32, 16)
    with pytest.warns(UserWarning, match=UNKNOWN) as caught:
        first, second = evaluate(model, {"a": documents, "b": documents}, max_length=32, batch_tokens=batch_tokens)
    assert len(caught) == 1
    assert first.loss == second.loss == pytest.approx(expected, rel=2e-6)
    assert first.tokens == count


def test_parts_under_other_names_go_through_the_models_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    documents = {"d": random_documents(40)}
    [expected] = evaluate(model, documents, max_length=32)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.warns(UserWarning, match=UNKNOWN):
        [score] = evaluate(model, documents, max_length=32)
    assert score.loss == pytest.approx(expected.loss, rel=2e-6)


def test_no_logits_are_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the head's output nor what cross-entropy reads; and only scored positions pass through the head."""
    monkeypatch.setattr(logits, "TILE_BYTES", 4 * VOCAB_SIZE * (1024 + 63))
    model = tiny_model("llama", tied=False)
    head_rows: list[int] = []
    loss_rows: list[tuple[int, torch.dtype]] = []
    own_cross_entropy = F.cross_entropy

    def cross_entropy(values: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        loss_rows.append((len(values), values.dtype))
        return own_cross_entropy(values, *args, **kwargs)

    def spy(_: nn.Module, __: object, output: torch.Tensor) -> None:
        head_rows.append(output.shape[:-1].numel())

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    model.get_output_embeddings().register_forward_hook(spy)  # pyright: ignore[reportOptionalMemberAccess]
    documents = random_documents(*[500] * 9, 300)
    [score] = evaluate(model, {"d": documents}, max_length=500, batch_tokens=5000)
    scored = 9 * 499 + 299
    assert score.tokens == scored
    assert head_rows[:4] == [32, 32, 16, 16]  # the probes: both ways, and of documents that see each other
    assert max(head_rows) == tile_size(VOCAB_SIZE) == 1024
    assert sum(head_rows[4:]) == scored
    assert loss_rows == [(rows, torch.float32) for rows in head_rows[4:]]


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 262_208])
def test_a_tile_takes_no_more_than_a_trainings_loss(vocabulary: int) -> None:
    size = tile_size(vocabulary)
    assert size * vocabulary * 4 <= min(linear_cross_entropy.TILE_BYTES, linear_cross_entropy.CHUNK_BYTES) / 2
    assert size >= 192
