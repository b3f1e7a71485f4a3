from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from steep.errors import UserError
from steep.model.positions import check_length, positions
from tests.tiny import tiny_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        # Qwen's YaRN leaves the positions at those of the pretraining; Llama 3.1 has raised them already.
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 2048),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}, 512),
    ],
)
def test_a_scaled_rope_reaches_further(settings: dict[str, Any], limit: int) -> None:
    config = tiny_config("llama", **settings)
    assert positions(config) == limit
    check_length(limit, config)
    with pytest.raises(
        UserError,
        match=rf"{limit + 1} tokens are beyond the {limit} positions .*model.rope_scaling, such as .*factor: 2.0",
    ):
        check_length(limit + 1, config)


def test_ropes_by_kind_of_layer() -> None:
    assert positions(tiny_config("gemma3")) == 512


def test_a_config_without_a_limit() -> None:
    config = AutoConfig.for_model("bloom")
    assert positions(config) is None
    check_length(10**6, config)
