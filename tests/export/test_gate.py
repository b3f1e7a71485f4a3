"""The gate passes what is right, and a planted fault fails it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steep.errors import RunError
from steep.evaluation.score import DomainScore
from steep.export.adapter_weights import AdapterWeights
from steep.export.gate import BITS_LIMIT, LOGITS_LIMIT, Gap, Measured, compare, open_plainly
from tests.export.made import saved, trained

FAMILIES = [("llama", False), ("gemma2", True), ("gemma3", True), ("qwen2", False)]


@pytest.mark.parametrize(
    ("base", "compute"),
    [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "fp32"), ("fp8", "fp32"), ("fp8", "bf16"), ("bf16", "bf16")],
)
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_what_is_right_passes(family: str, tied: bool, base: str, compute: str, tmp_path: Path) -> None:
    made = trained(tmp_path, family, tied=tied, base=base, compute=compute)
    assert made.problem(made.write()) is None
    assert made.exact == "original" or made.wrong_weight(made.write("other", "original"), "original") is None


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"r": 40}], ids=["dora", "lowered ranks"])
def test_what_is_right_passes_with_each_option(adapter: dict[str, Any], tmp_path: Path) -> None:
    made = trained(tmp_path, adapter=adapter)
    assert made.problem(made.write()) is None


def scale(monkeypatch: pytest.MonkeyPatch, factor: float, part: str = "") -> None:
    """Plant it in what is merged, in each layer whose name has `part`."""
    real = AdapterWeights.scale
    monkeypatch.setattr(
        AdapterWeights, "scale", lambda self, module: real(self, module) * (factor if part in module else 1)
    )


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_each_layers_scale_halved_fails(
    family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(tmp_path, family, tied=tied)
    modules = sorted(AdapterWeights(made.final).modules)
    assert len(modules) == 14
    for module in modules:
        with monkeypatch.context() as planted:
            scale(planted, 0.5, module)
            assert f"{module}.weight is " in (made.problem(made.write(module)) or "")


@pytest.mark.parametrize("part", ["", "layers.1.", "layers.1.self_attn.v_proj"])
def test_adapters_left_out_fail(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained(tmp_path)
    scale(monkeypatch, 0.0, part)
    assert "roundings from the trained one" in (made.problem(made.write()) or "")


def test_half_of_a_small_adapter_fails_that_loss_and_logits_do_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tmp_path).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 1e-3  # 2e-4 of the weight, far below a rounding to bf16
    made = saved(tmp_path, model)
    assert made.problem(made.write("right")) is None
    scale(monkeypatch, 0.5, "layers.1.mlp.down_proj")
    folder = made.write()
    assert made.gap(folder).problem() is None
    assert "layers.1.mlp.down_proj.weight is 1.00" in (made.wrong_weight(folder) or "")


def edit(folder: Path, **edits: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **edits}, file, metadata={"format": "pt"})


def test_the_other_bases_weights_fail(tmp_path: Path) -> None:
    made = trained(tmp_path)
    assert "proj.weight is " in (made.wrong_weight(made.write("one", "original"), "dequantised") or "")
    assert "proj.weight is " in (made.wrong_weight(made.write("two", "dequantised"), "original") or "")


def test_a_value_a_norm_and_an_embedding_that_are_others_fail(tmp_path: Path) -> None:
    made = trained(tmp_path)
    stored = load_file(made.write("right") / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        folder, other = made.write(name), stored[name].clone()
        other.view(-1)[5] += 0.1
        edit(folder, **{name: other})
        assert f"{name} is " in (made.wrong_weight(folder) or "")
    edit(folder, **{"lm_head.weight": stored["lm_head.weight"][:380].clone()})
    assert made.wrong_weight(folder) == "lm_head.weight is (380, 64), and the trained one (384, 64)"


def test_the_head_untied_fails(tmp_path: Path) -> None:
    """The trained table goes in at the input only, and the head stays the base's."""
    made = trained(tmp_path, tied=True)
    folder = made.write()
    config = folder / "config.json"
    base = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, **{"lm_head.weight": base.bfloat16()})
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    assert made.wrong_weight(folder) == "lm_head.weight is a weight of its own, and the trained one is tied"
    assert made.gap(folder).problem() is not None


def test_a_head_of_its_own_left_out_fails(tmp_path: Path) -> None:
    made = trained(tmp_path)
    folder = made.write()
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert made.wrong_weight(folder) == "lm_head.weight is missing"


@pytest.mark.parametrize(
    ("family", "other"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("gemma2", {"attn_logit_softcapping": 1.0}),
        ("gemma3", {"sliding_window": 4}),
    ],
)
def test_right_weights_under_another_config_fail(family: str, other: dict[str, Any], tmp_path: Path) -> None:
    made = trained(tmp_path, family)
    folder = made.write()
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **other}))
    assert made.wrong_weight(folder) is None
    gap = made.gap(folder)
    assert gap.problem() is not None and gap.logits > 2 * LOGITS_LIMIT


def test_a_head_that_is_not_there_fails(tmp_path: Path) -> None:
    folder = trained(tmp_path, tied=True).write()
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(RunError, match=r"does not open as a whole: .*missing.*lm_head\.weight"):
        open_plainly(folder, torch.float32, {})


def test_a_tensor_left_over_fails(tmp_path: Path) -> None:
    folder = trained(tmp_path).write()
    edit(folder, **{"model.layers.9.x": torch.ones(1)})
    with pytest.raises(RunError, match=r"unexpected.*layers\.9"):
        open_plainly(folder, torch.float32, {})


def test_what_does_not_fit_onto_the_gpu_is_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    loading = {"missing_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _, **named: (given.update(named), loading))
    open_plainly(Path("folder"), "auto", {})
    assert (given["device_map"], given["dtype"]) == ("auto", "auto")


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
