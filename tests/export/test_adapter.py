"""The adapter handed on computes what it computed, in a form that is read in one way only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from steep.export.adapter import write_adapter
from steep.export.adapter_weights import AdapterWeights
from steep.model.adapters import add_adapters, save_adapter
from tests.export.made import grown
from tests.tiny import tiny_model

IDS = torch.randint(3, 384, (1, 40), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def handed_on(place: Path, **settings: Any) -> tuple[Path, Path]:
    """`final/` of an adapter without trained embeddings, and what is handed on of it."""
    given: dict[str, Any] = {"r": 40, "lora_alpha": 24, "modules_to_save": [], **settings}
    save_adapter(grown(add_adapters(tiny_model("llama"), **given)), place / "final")
    write_adapter(AdapterWeights(place / "final"), place / "out", "ada/base", None)
    return place / "final", place / "out"


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, 40),
        ({"use_rslora": False}, 40),
        ({"init_lora_weights": "pissa"}, 80),
        ({"use_dora": True}, 40),
        ({"trained_dtype": "bf16"}, 40),
    ],
    ids=["rslora", "alpha / r", "pissa", "dora", "bf16"],
)
def test_its_scale_is_folded(settings: dict[str, Any], rank: int, tmp_path: Path) -> None:
    final, out = handed_on(tmp_path, **settings)
    before, after = (json.loads((place / "adapter_config.json").read_text()) for place in (final, out))
    assert before["rank_pattern"]  # k and v have 32 outputs
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    changed = {**plain, "base_model_name_or_path": "ada/base", "revision": None}
    assert after == {**before, **changed}
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors.keys() == load_file(final / "adapter_model.safetensors").keys()
    ranks = {
        len(tensor) if "lora_A" in name else tensor.shape[1] for name, tensor in tensors.items() if "_mag" not in name
    }
    assert ranks == {rank}
    ours, theirs = (PeftModel.from_pretrained(tiny_model("llama"), str(place)) for place in (out, final))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)  # fp32
    assert (logits(ours) - logits(tiny_model("llama"))).norm() > 0.1 * logits(ours).norm()


def test_a_reader_that_knows_alpha_over_r_alone_reads_it_right(tmp_path: Path) -> None:
    final, out = handed_on(tmp_path)
    naive, name = {}, "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    for place in (final, out):
        config, tensors = (
            json.loads((place / "adapter_config.json").read_text()),
            load_file(place / "adapter_model.safetensors"),
        )
        naive[place] = config["lora_alpha"] / config["r"] * tensors[name.format("B")] @ tensors[name.format("A")]
    exact = PeftModel.from_pretrained(tiny_model("llama"), str(final)).get_submodule(
        name.removesuffix(".lora_{}.weight")
    )
    delta: Any = exact.get_delta_weight("default")  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(naive[out], delta, rtol=1e-5, atol=1e-6)
    assert (naive[final] - delta).norm() > 0.5 * delta.norm()  # what it would read of the run's own


def test_trained_embeddings_leave_the_folder_as_it_is(tmp_path: Path) -> None:
    final, out = handed_on(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (final / name).read_bytes()
    assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is True
