"""What an adapter's folder says of each weight, held against PEFT's own reading of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from steep.errors import UserError
from steep.export.adapter_weights import AdapterWeights
from tests.export.made import grown
from tests.tiny import tiny_model


def adapter(folder: Path, **settings: Any) -> Any:
    """A LoRA adapter with those settings in `folder`, and PEFT's model of it."""
    given = {"r": 8, "lora_alpha": 24, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = grown(get_peft_model(tiny_model("llama"), LoraConfig(**{**given, **settings})))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 2}},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 7}},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 4}},
    ],
    ids=["plain", "rslora", "rank pattern", "alpha pattern", "dora"],
)
def test_each_layer_is_merged_as_peft_merges_it(settings: dict[str, Any], tmp_path: Path) -> None:
    model, base = adapter(tmp_path, **settings), tiny_model("llama")
    weights = AdapterWeights(tmp_path)
    merged = model.merge_and_unload().state_dict()
    assert weights.modules == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    for module in weights.modules:
        weight = base.state_dict()[f"{module}.weight"]
        ours, theirs = weights.merged(module, weight), merged[f"{module}.weight"]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the order of two fp32 sums
        assert (ours - weight).norm() > 0.1 * weight.norm()


def test_embeddings_are_whole(tmp_path: Path) -> None:
    model = adapter(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    weights = AdapterWeights(tmp_path)
    assert weights.whole == {"model.embed_tokens.weight", "lm_head.weight"}
    assert weights.embedding_shape("lm_head.weight") == (384, 64)
    assert torch.equal(weights.embedding("lm_head.weight"), model.get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bias": "all"}, "bias: 'all'"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding"),
        ({"modules_to_save": ["norm"]}, r"norm\.weight. It cannot be merged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about such adapters
def test_what_is_not_understood_is_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    adapter(tmp_path, **settings)
    with pytest.raises(UserError, match=named):
        AdapterWeights(tmp_path)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UserError, match=r"type .*IA3.*Only LoRA"):
        AdapterWeights(tmp_path)


def _without_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def _with_magnitude(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(64)


def _with_stranger(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.stranger.weight"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without_b, r"lacks model\.layers\.0\.self_attn\.q_proj\.lora_B"),
        (_with_magnitude, "has, though use_dora is off, .*lora_magnitude_vector"),
        (_with_stranger, "unknown tensor model.stranger.weight"),
        (dict.clear, "holds no tensors"),
    ],
    ids=["no B", "magnitude", "stranger", "empty"],
)
def test_a_tensor_too_few_or_too_many_is_named(
    change: Callable[[dict[str, torch.Tensor]], None], named: str, tmp_path: Path
) -> None:
    adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=named):
        AdapterWeights(tmp_path)


def test_a_rank_that_the_config_does_not_say_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))
    with pytest.raises(UserError, match="rank 4"):
        AdapterWeights(tmp_path).merged("model.layers.0.self_attn.q_proj", torch.ones(64, 64))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_or_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / name).write_bytes(b"\x10{")
    with pytest.raises(UserError, match=name):
        AdapterWeights(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"holds no adapter \({name}\)"):
        AdapterWeights(tmp_path)
