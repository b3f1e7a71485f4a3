"""A scaling of positions that the run file names, in a model's config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from steep.errors import UserError
from steep.model.install import install
from steep.model.load import load
from steep.model.positions import check_length, positions
from steep.model.rope import as_arguments, stretch
from tests.tiny import save_tiny, tiny_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    ("scaling", "reach", "in_config"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 2048, 512),  # which knows the shorter length by that name
        ({"rope_type": "yarn", "factor": 4.0}, 2048, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024, 1024),
        ({**LLAMA3, "original_max_position_embeddings": 64}, 512, 512),
        (LLAMA3, 4096, 4096),
        (LONG, 2048, 2048),
    ],
)
def test_it_reaches_so_far(scaling: dict[str, Any], reach: int, in_config: int) -> None:
    config, theta = tiny_config("llama"), tiny_config("llama").rope_parameters["rope_theta"]
    given = copy.deepcopy(scaling)
    stretch(config, scaling)
    assert scaling == given and config.rope_parameters["rope_theta"] == theta
    assert {name: config.rope_parameters[name] for name in scaling} == scaling
    assert (positions(config), config.max_position_embeddings) == (reach, in_config)
    check_length(reach, config)
    with pytest.raises(UserError, match=rf"beyond the {reach} positions"):
        check_length(reach + 1, config)
    config.validate_rope()


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({}, "rope_type is None.*linear, yarn"),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic frequencies follow the longest row"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            "4.0 times 64 positions is less",
        ),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "transformers does not",
        ),
        ({"rope_type": "default", "factor": 1.0}, "rope_type is 'default'"),
        ({"rope_type": ["yarn"], "factor": 1.0}, r"rope_type is \['yarn'\]"),
        ({"rope_type": "yarn"}, "factor is missing"),
        ({"rope_type": "yarn", "factor": "4"}, "factor is '4'"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor is 0.5"),
        ({"rope_type": "yarn", "factor": float("nan")}, "factor is nan"),
        ({"rope_type": "yarn", "factor": 1.3}, "1.3 times 512 positions is no whole number"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"}, "is 'x', of a model with 512"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "is 0, of a model with 512"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10**7}, "is 10000000, of a model"),
        ({"rope_type": "yarn", "factor": 1e12}, "factor is 1000000000000.0.*from 1 to 1024"),
        ({"type": "yarn", "factor": 4.0}, "an older name.*rope_type: 'yarn'"),
        ({"rope_type": "yarn", "factor": 2.0, "low_freq_factor": 1.0}, "transformers does not take it: Unrecognized"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}, "beta_fast field must be greater"),
        ({"rope_type": "llama3", "factor": 2.0}, "transformers does not take it: .*low_freq_factor"),
        ({**LONG, "long_factor": [1.0] * 3}, "must have length 8, got 3"),
        ({**LONG, "short_factor": "x"}, "transformers does not take it"),
    ],
)
def test_what_transformers_would_not_take_is_named(scaling: dict[str, Any], told: str) -> None:
    """Each time, and where transformers is told to be quiet."""
    verbosity = transformers_logging.get_verbosity()
    try:
        for level in (verbosity, verbosity, transformers_logging.ERROR):
            transformers_logging.set_verbosity(level)
            with pytest.raises(UserError, match=rf"model\.rope_scaling: .*{told}"):
                stretch(tiny_config("llama"), scaling)
    finally:
        transformers_logging.set_verbosity(verbosity)


def test_models_whose_positions_cannot_be_scaled() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(UserError, match="bloom has no rotary positions"):
        stretch(AutoConfig.for_model("bloom"), scaling)
    config = tiny_config("gemma3")
    config.rope_parameters = {"sliding_attention": config.rope_parameters["sliding_attention"]}
    with pytest.raises(UserError, match="none of its layers without a window"):
        stretch(config, scaling)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_of_several_ropes_that_without_a_window_is_scaled(kind: str, tmp_path: Path) -> None:
    """Gemma 3's: the frequencies of windowed layers stay, to the bit, and the others are those of the same rope alone;
    also in a fused forward."""
    scaling = {**(LLAMA3 if kind == "llama3" else {}), "rope_type": kind, "factor": 8.0}
    folder, ids = save_tiny("gemma3", tmp_path / "model"), torch.arange(3, 60)[None]
    plain, _ = load(str(folder), base="fp32")
    stretched, _ = load(str(folder), base="fp32", rope_scaling=scaling)
    local, whole = (stretched.config.rope_parameters[f"{name}_attention"] for name in ("sliding", "full"))
    theta = plain.config.rope_parameters["full_attention"]["rope_theta"]
    assert local == plain.config.rope_parameters["sliding_attention"]
    assert whole.items() >= {**scaling, "rope_theta": theta}.items()
    assert positions(stretched.config) == 8 * plain.config.max_position_embeddings
    one, other = stretched.model.rotary_emb, plain.model.rotary_emb
    assert torch.equal(one.sliding_attention_inv_freq, other.sliding_attention_inv_freq)
    if kind == "linear":
        assert torch.equal(one.full_attention_inv_freq, other.full_attention_inv_freq / 8)
    assert not torch.equal(one.full_attention_inv_freq, other.full_attention_inv_freq)
    with torch.no_grad():
        expected = stretched(ids).logits
        assert not torch.allclose(expected, plain(ids).logits, atol=1e-3)
        assert torch.allclose(install(stretched)(ids).logits, expected, atol=1e-4)
    code = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, {as_arguments(stretched.config)})"
    names: dict[str, Any] = {}
    exec(f"from transformers import AutoModelForCausalLM\nopened = {code}", names)
    with torch.no_grad():
        assert torch.equal(names["opened"](ids).logits, expected)


def test_a_second_scaling_of_gemma_3s_rope_is_made_knowingly() -> None:
    config = tiny_config("gemma3")
    stretch(config, {"rope_type": "linear", "factor": 8.0})
    with pytest.raises(UserError, match=r"a scaling of its own \(linear\)"):
        stretch(config, {"rope_type": "linear", "factor": 2.0})
    given = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512}
    stretch(config, given)
    assert config.rope_parameters["full_attention"].items() >= given.items() and positions(config) == 16 * 512


def test_a_scaling_of_the_models_own_is_replaced_knowingly() -> None:
    def scaled() -> Any:
        own = {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}
        return tiny_config("llama", rope_parameters=own)

    for kind in ("yarn", "linear"):
        with pytest.raises(UserError, match=r"a scaling of its own \(llama3\).*original_max_position_embeddings"):
            stretch(scaled(), {"rope_type": kind, "factor": 16.0})
    config = scaled()
    stretch(config, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64})
    assert config.rope_parameters["rope_type"] == "yarn" and "low_freq_factor" not in config.rope_parameters
    assert positions(config) == 1024 and config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("base", ["fp32", "nf4", "fp8"])
def test_a_model_is_loaded_with_it(base: str, tmp_path: Any) -> None:
    folder, ids = save_tiny("llama", tmp_path / "model"), torch.arange(3, 60)[None]
    scaling = {"rope_type": "yarn", "factor": 4.0}
    plain, _ = load(str(folder), base=base)
    stretched, _ = load(str(folder), base=base, rope_scaling=scaling)
    assert stretched.config.rope_parameters["rope_type"] == "yarn" and stretched.config.max_position_embeddings == 2048
    assert plain.config.rope_parameters["rope_type"] == "default"
    with torch.no_grad():
        assert not torch.allclose(stretched(ids).logits, plain(ids).logits, atol=1e-3)
    if base == "fp32":  # the lines of a README
        code = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, {as_arguments(stretched.config)})"
        names: dict[str, Any] = {}
        exec(f"from transformers import AutoModelForCausalLM\nopened = {code}", names)
        with torch.no_grad():
            assert torch.equal(names["opened"](ids).logits, stretched(ids).logits)
