from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steep.evaluation.mode import inference_mode
from steep.evaluation.perplexity import evaluate
from steep.evaluation.separation import keeps_documents_apart
from tests.evaluation.oracle import oracle, random_documents
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_model

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP: dict[str, Any] = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
SEEN: dict[str, dict[str, Any]] = {  # their masks, states or convolutions go along the whole row
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "gpt_oss": {**MLP, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2},
    "lfm2": {**MLP, "layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {**MLP, **LINEAR},
}
APART: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {**SIZES, "intermediate_size": 128},
    "phi3": MLP,
    "olmo2": MLP,
    "granite": MLP,
    "mixtral": {**MLP, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def model_of(family: str, fields: dict[str, Any]) -> PreTrainedModel:
    """Random, with weights as large as those of a model that heeds its context."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def apart(model: torch.nn.Module) -> bool:
    with inference_mode(model):
        return keeps_documents_apart(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SEEN)
def test_documents_that_see_each_other(family: str, dtype: torch.dtype) -> None:
    assert not apart(model_of(family, SEEN[family]).to(dtype))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *APART])
def test_documents_that_do_not(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, APART[family]) if family in APART else tiny_model(family, initializer_range=0.3)
    assert apart(model.to(dtype))  # pyright: ignore[reportArgumentType]


def test_rounding_of_a_deep_model_is_not_taken_for_sight() -> None:
    """32 layers in bf16: beside the document alone, whose attention takes another kernel, this one fails."""
    assert apart(tiny_model("llama", num_hidden_layers=32, initializer_range=0.3).to(torch.bfloat16))  # pyright: ignore[reportArgumentType]


def test_it_leaves_everything_as_it_was() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    random_state, weights = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    assert apart(model)  # dropout would make its two rows differ
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["opt", "mamba", "qwen3_5_text"])
def test_each_document_is_scored_in_a_row_of_its_own(family: str) -> None:
    model = model_of(family, SEEN[family])
    documents = random_documents(20, 17, 9, 60, 31)
    expected, _ = oracle(model, documents, 32, 12)
    with pytest.warns(UserWarning, match="lets the documents of a row see each other") as told:
        [score] = evaluate(model, {"d": documents}, max_length=32, stride=12, batch_tokens=96)
    assert score.loss == pytest.approx(expected, rel=1e-5)
    assert len([one for one in told if "see each other" in str(one.message)]) == 1


def test_documents_that_do_not_see_each_other_share_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(tiny_model("llama"), {"d": random_documents(9, 9)}, max_length=32)
