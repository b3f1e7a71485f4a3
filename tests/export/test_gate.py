"""The gate passes what is right, and a planted fault fails it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steep.errors import RunError
from steep.evaluation.score import DomainScore
from steep.export.adapter_weights import AdapterWeights
from steep.export.gate import BITS_LIMIT, Gap, Measured, compare, open_plainly
from tests.export.made import trained

FAMILIES = [("llama", False), ("gemma3", True), ("qwen2", False)]


@pytest.mark.parametrize("base", ["nf4", "int8", "fp32"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_what_is_right_passes(family: str, tied: bool, base: str, tmp_path: Path) -> None:
    made = trained(tmp_path, family, tied=tied, base=base)
    assert made.gap(made.write()).problem(logits_limit=made.limit) is None


def halve_one(name: str) -> Callable[[AdapterWeights, str], float]:
    real = AdapterWeights.scale
    return lambda self, module: real(self, module) * (0.5 if module == name else 1)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_one_layers_scale_halved_fails(
    family: str, tied: bool, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last layer, where a fault has the fewest layers to grow in."""
    made = trained(tmp_path, family, tied=tied)
    monkeypatch.setattr(AdapterWeights, "scale", halve_one(f"model.layers.1.{layer}"))
    assert made.gap(made.write()).problem(logits_limit=made.limit) is not None


def test_adapters_left_out_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained(tmp_path)
    monkeypatch.setattr(AdapterWeights, "scale", lambda self, module: 0.0)
    assert made.gap(made.write()).problem() is not None  # by the limits that a run has, too


def test_the_head_untied_fails(tmp_path: Path) -> None:
    """The trained table goes in at the input only, and the head stays the base's."""
    made = trained(tmp_path, tied=True)
    folder = made.write()
    weights, config = folder / "model.safetensors", folder / "config.json"
    base = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    save_file({**load_file(weights), "lm_head.weight": base.bfloat16()}, weights, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    assert made.gap(folder).problem() is not None


def test_a_head_that_is_not_there_fails(tmp_path: Path) -> None:
    folder = trained(tmp_path, tied=True).write()
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(RunError, match=r"does not open as a whole: .*missing.*lm_head\.weight"):
        open_plainly(folder, torch.float32, {})


def test_a_tensor_left_over_fails(tmp_path: Path) -> None:
    folder = trained(tmp_path).write()
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), "model.layers.9.x": torch.ones(1)}, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"unexpected.*layers\.9"):
        open_plainly(folder, torch.float32, {})


def measured(bits: float, logits: float = 1.0) -> Measured:
    score = DomainScore(3, "ko", 1.0, math.e, bits, 10, 20, 1)
    return Measured([score], torch.full((2, 3), logits), torch.float32)


@pytest.mark.parametrize("bits", [1.0 - 2 * BITS_LIMIT, 1.0 + 2 * BITS_LIMIT, math.nan])
def test_bits_per_byte_too_far_away_are_a_problem(bits: float) -> None:
    assert compare(measured(1.0), measured(1.0)).problem() is None
    assert "ko is" in (compare(measured(1.0), measured(bits)).problem() or "")


def test_a_model_that_may_be_better_may_not_be_worse() -> None:
    """Over int8 the adapter alone pays for activations in 8 bits."""
    assert compare(measured(1.0), measured(0.9)).problem(may_fall=True) is None
    for bits in (1.0 + 2 * BITS_LIMIT, math.nan):
        assert "ko is" in (compare(measured(1.0), measured(bits)).problem(may_fall=True) or "")


@pytest.mark.parametrize("logits", [2.0, math.nan])
def test_logits_too_far_away_are_a_problem(logits: float) -> None:
    assert "logits" in (compare(measured(1.0), measured(1.0, logits)).problem() or "")


def test_a_rise_that_is_not_a_number_is_not_hidden() -> None:
    assert math.isnan(Gap({"a": math.nan, "b": 0.1}, 0.0).rise)
    assert Gap({"a": -0.3, "b": 0.1}, 0.0).rise == 0.1
