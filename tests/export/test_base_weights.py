"""The base read again is the base of the run, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steep.export.base_weights import BaseWeights, Kind
from steep.model.adapters import linear_shapes
from steep.model.base_tensors import BaseTensors
from steep.model.load import DTYPES, load
from steep.model.resolve import resolve
from tests.fp8_checkpoints import FINE_GRAINED, IGNORED, compressed, publish
from tests.tiny import FAMILIES, save_tiny, tiny_model


def read(folder: Path, kind: Kind, base: str, compute: str = "fp32") -> BaseWeights:
    model = AutoModelForCausalLM.from_config(resolve(str(folder)).config)
    return BaseWeights(
        BaseTensors(str(folder)),
        kind=kind,
        base=base,
        linear={f"{name}.weight" for name in linear_shapes(model)},
        compute_dtype=DTYPES[compute],
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def quantised_layers(model: Any) -> dict[str, Any]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt", "Fp8Linear")
    }


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dequantised_base_is_the_loaded_one_to_the_bit(
    family: str, base: str, compute: str, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path)
    model, _ = load(str(folder), base=base, compute_dtype=compute)
    weights, layers = read(folder, "dequantised", base, compute), quantised_layers(model)
    assert len(layers) == 14
    assert not weights.stored_quantised
    original = read(folder, "original", base)
    for name, parameter in tiny_model(family).state_dict().items():
        if name not in weights.names:  # a tied head
            continue
        assert torch.equal(original[name].cpu(), parameter)
        if name in layers:
            assert torch.equal(weights[name], dequantize_module_weight(layers[name]))
            assert not torch.equal(weights[name].float().cpu(), parameter)
        else:
            assert torch.equal(weights[name].cpu(), parameter)


@pytest.mark.parametrize(
    "quantization",
    [
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_a_checkpoint_that_is_stored_quantised_is_dequantised(quantization: BitsAndBytesConfig, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    model.save_pretrained(tmp_path / "small")
    weights = read(tmp_path / "small", "original", "nf4")
    assert weights.stored_quantised
    for name, module in quantised_layers(model).items():
        assert torch.equal(weights[name].cpu(), dequantize_module_weight(module).cpu())
    table: Any = model.get_input_embeddings()
    assert torch.equal(weights["model.embed_tokens.weight"].cpu(), table.weight.cpu())


@pytest.mark.parametrize(
    "quantization", [FINE_GRAINED, compressed("channel"), compressed("block"), compressed("tensor")]
)
def test_a_checkpoint_in_e4m3_is_dequantised(quantization: dict[str, Any], llama_folder: Path, tmp_path: Path) -> None:
    folder = publish(llama_folder, tmp_path / "small", quantization)
    model, _ = load(str(folder), compute_dtype="fp32")
    for kind in ("original", "dequantised"):
        weights = read(folder, kind, "fp8")
        assert weights.stored_quantised
        layers = quantised_layers(model)
        assert len(layers) == 13
        for name, module in layers.items():
            assert torch.equal(weights[name], module.dequantize())
        ignored = model.get_submodule(IGNORED).weight
        assert torch.equal(weights[f"{IGNORED}.weight"].float(), ignored)
