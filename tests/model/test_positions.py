from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from steep.errors import UserError
from steep.model.positions import check_length, positions
from steep.model.rope import stretch
from tests.tiny import tiny_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        # Qwen's YaRN leaves the positions at those of the pretraining; Llama 3.1 has raised them already.
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 2048),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}, 512),
    ],
)
def test_a_scaled_rope_reaches_further(settings: dict[str, Any], limit: int) -> None:
    config = tiny_config("llama", **settings)
    assert positions(config) == limit
    check_length(limit, config)
    with pytest.raises(UserError, match=rf"{limit + 1} tokens are beyond the {limit} positions") as caught:
        check_length(limit + 1, config)
    proposed = re.search(r"model.rope_scaling, such as (\{.*\})", str(caught.value))
    assert proposed is not None
    again = tiny_config("llama", **settings)
    stretch(again, yaml.safe_load(proposed[1]))
    check_length(limit + 1, again)
    with pytest.raises(UserError) as beyond:
        check_length(1024 * limit + 1, config)
    assert "model.rope_scaling" not in str(beyond.value)  # which would refuse it


def test_ropes_by_kind_of_layer() -> None:
    """Gemma 3's own scaling is in its length already, and what it stretches is not known."""
    config = tiny_config("gemma3")
    assert positions(config) == 512
    scaled = {**config.rope_parameters["full_attention"], "rope_type": "linear", "factor": 8.0}
    config.rope_parameters = {**config.rope_parameters, "full_attention": scaled}
    assert positions(config) == 512
    with pytest.raises(UserError, match=r"Give 512 or less\.$"):
        check_length(513, config)


def test_a_config_without_a_limit() -> None:
    config = AutoConfig.for_model("bloom")
    assert positions(config) is None
    check_length(10**6, config)
