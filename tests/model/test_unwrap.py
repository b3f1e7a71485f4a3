"""The model inside PEFT's wrapper is found whatever the wrapper does."""

from __future__ import annotations

import pytest
from peft import AdaptionPromptConfig, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model

from steep.model.unwrap import unwrap
from tests.tiny import tiny_model

CONFIGS = (
    LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"),
    AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),  # pyright: ignore[reportArgumentType]
    PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),  # pyright: ignore[reportArgumentType]
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_the_model_inside_is_found(config: PeftConfig) -> None:
    inside = tiny_model("llama")
    model = get_peft_model(inside, config)
    assert unwrap(model) is unwrap(inside) is inside is model.get_base_model()
