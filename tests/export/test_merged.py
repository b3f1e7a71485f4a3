"""The merged folder: its tensors are W + s·BA rounded once, and plain transformers opens it."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from steep.errors import RunError, UserError
from steep.export import merged
from steep.export.adapter_weights import AdapterWeights
from steep.export.merged import Merger
from steep.model.adapters import add_adapters, is_tied
from steep.model.load import load_resolved
from steep.model.resolve import read_tokenizer, resolve
from steep.tensor_files import write_tensors
from tests.export.made import Trained, grown, saved, trained
from tests.tiny import save_tiny, tiny_tokenizer


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def expected(model: Any, name: str) -> torch.Tensor:
    """fp32: what the adapter over its base computes with, by PEFT's own parts."""
    model = model.requires_grad_(False)
    module = model.get_base_model().get_submodule(name.removesuffix(".weight").removesuffix(".bias"))
    if name.endswith(".bias"):
        return module.bias.cpu()
    if hasattr(module, "lora_A"):
        base = dequantize_module_weight(module.get_base_layer()).float()
        return (base + module.get_delta_weight("default").float()).cpu()
    return module.weight.float().cpu()  # through PEFT's wrapper the trained copy


@pytest.mark.parametrize("base", ["nf4", "int8", "fp8", "bf16", "fp32"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma3", True), ("qwen2", False), ("gemma2", True)])
def test_the_merged_model_is_the_trained_one(family: str, tied: bool, base: str, tmp_path: Path) -> None:
    made = trained(tmp_path, family, tied=tied, base=base, compute="bf16" if base == "bf16" else "fp32")
    folder = made.write()
    written = tensors(folder)
    for name, tensor in written.items():
        exact = expected(made.model, name)
        assert tensor.dtype == torch.bfloat16
        # bf16 has 8 bits: half a unit in the last place is 2^-8 of a value at most. A bf16 base rounded W before.
        rounding = 2**-8 * exact.abs() + (2**-8 * exact.abs().max() if base == "bf16" else 1e-6)
        assert bool(((tensor.float() - exact).abs() <= rounding).all()), name
    assert ("lm_head.weight" in written) is not tied
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.dtype == torch.bfloat16 and is_tied(opened) is tied
    assert opened.config.tie_word_embeddings is tied
    assert made.problem(folder) is None


def test_a_sum_is_rounded_once(tmp_path: Path) -> None:
    """bf16(W) + bf16(BA), the usual way, gives other bits in many places."""
    made = trained(tmp_path, base="fp32")
    name, written = "model.layers.0.mlp.down_proj.weight", tensors(made.write())
    layer = made.model.get_base_model().get_submodule(name.removesuffix(".weight"))
    exact = expected(made.model, name)
    twice = (layer.get_base_layer().weight.bfloat16() + layer.get_delta_weight("default").bfloat16()).cpu()
    assert (written[name] != exact.bfloat16()).float().mean() < 1e-3  # fp32 sums in another order
    assert (twice != exact.bfloat16()).float().mean() > 0.1


@pytest.mark.parametrize(
    ("stored", "written"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_the_dtype_is_the_checkpoints_own(stored: torch.dtype, written: torch.dtype, tmp_path: Path) -> None:
    made = trained(tmp_path, stored=stored, adapter={"trained_dtype": "bf16"}, compute="bf16")
    folder = made.write()
    assert {tensor.dtype for tensor in tensors(folder).values()} == {written}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(written).removeprefix("torch.")


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    made = trained(tmp_path)
    one, many = made.write("one"), made.write("many", shard_bytes=60_000)
    files = sorted(many.glob("*.safetensors"))
    assert [file.name for file in one.glob("*.safetensors")] == ["model.safetensors"]
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made.merger().num_bytes
    for file in files:
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == set(load_file(file))
    whole = tensors(one)
    assert tensors(many).keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(many).items())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(many).lm_head.weight, whole["lm_head.weight"])


def test_only_one_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, peaks = trained(tmp_path), []
    del made.model

    def living() -> int:
        found = {x.untyped_storage().data_ptr(): x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor}
        return sum(found.values())

    def weigh(shard: dict[str, torch.Tensor], *given: Any, **named: Any) -> None:
        peaks.append(living() - before)
        write_tensors(shard, *given, **named)

    gc.collect()
    before = living()
    monkeypatch.setattr(merged, "write_tensors", weigh)
    made.write("one")
    made.write("many", shard_bytes=60_000)
    assert peaks[0] >= made.merger().num_bytes  # the count sees what is held
    # A shard, the one before it until its name is bound anew, and a layer of 64 x 128 in fp32 with its parts.
    assert max(peaks[1:]) < 2 * 60_000 + 4 * 64 * 128 * 4
    assert len(peaks) > 4


@pytest.mark.parametrize("only", ["embed_tokens", "lm_head"])
def test_an_embedding_trained_alone(only: str, tmp_path: Path) -> None:
    made = trained(tmp_path, base="fp32", adapter={"modules_to_save": [only]})
    assert made.problem(made.write()) is None


@pytest.mark.parametrize("trained_copies", [["embed_tokens", "lm_head"], ["lm_head"]])
def test_an_untied_copy_of_a_tied_head(trained_copies: list[str], tmp_path: Path) -> None:
    """What PEFT makes of a tied base when it is not told to keep the tie."""
    from peft import LoraConfig, get_peft_model

    resolved = resolve(str(save_tiny("llama", tmp_path / "base", tied=True)))
    base = load_resolved(
        resolved, read_tokenizer(resolved), base="nf4", compute_dtype="fp32", attn_implementation="auto"
    )
    config = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=trained_copies, task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="tie"):
        made = saved(tmp_path, grown(get_peft_model(base, config, autocast_adapter_dtype=False)))
    folder = made.write()
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    opened: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(opened.lm_head.weight, opened.get_input_embeddings().weight)
    assert made.problem(folder) is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grew(tied: bool, tmp_path: Path) -> None:
    resolved = resolve(str(save_tiny("llama", tmp_path / "base", tied=tied)))
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_tokens(["강물이", "선생님이"])
    base = load_resolved(resolved, tokenizer, base="nf4", compute_dtype="fp32", attn_implementation="auto")
    base.resize_token_embeddings(386, mean_resizing=False)
    made = saved(tmp_path, grown(add_adapters(base, r=8)))
    tokenizer.save_pretrained(made.final)
    folder = made.write()
    opened: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.config.vocab_size == opened.get_input_embeddings().weight.shape[0] == 386
    assert opened.lm_head.weight.shape[0] == 386
    assert len(AutoTokenizer.from_pretrained(folder)) == 386
    assert made.problem(folder) is None


def test_the_plain_files_are_the_checkpoints_own(tmp_path: Path) -> None:
    made = trained(tmp_path)
    base = tmp_path / "base"
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.5}')
    (base / "tokenizer.model").write_bytes(b"sentencepiece")  # llama.cpp's converter looks for it
    folder = made.write()
    for name in ("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    ours, theirs = (json.loads((at / "config.json").read_text()) for at in (folder, base))
    changed = {name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}
    assert changed <= {"torch_dtype", "dtype", "tie_word_embeddings", "vocab_size", "architectures"}
    assert (ours["vocab_size"], ours["architectures"]) == (384, ["LlamaForCausalLM"])


def test_a_base_that_is_stored_in_4_bits(tmp_path: Path) -> None:
    whole = save_tiny("llama", tmp_path / "whole")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    small = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, quantization_config=quantization)
    small.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    resolved = resolve(str(tmp_path / "base"))
    model = load_resolved(resolved, tiny_tokenizer(), base="auto", compute_dtype="fp32", attn_implementation="auto")
    made = saved(tmp_path, grown(add_adapters(model, r=8)))
    assert made.merger().stored_quantised
    folder = made.write()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {tensor.dtype for tensor in tensors(folder).values()} == {torch.bfloat16}
    assert made.problem(folder) is None


def test_a_value_beyond_16_bits_stops_it(tmp_path: Path) -> None:
    made = trained(tmp_path, stored=torch.float16)
    file = made.final / "adapter_model.safetensors"
    stored = load_file(file)
    stored["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] *= 1e8
    save_file(stored, file)
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite in torch\.f"):
        made.write()


def change(made: Trained, *names: str, **edits: Any) -> None:
    """Rewrite `final/` with tensors by those names replaced, or left out where None."""
    file = made.final / "adapter_model.safetensors"
    stored = load_file(file)
    for name, tensor in edits.items():
        stored[f"base_model.model.{name}"] = tensor
    for name in names:
        del stored[f"base_model.model.{name}"]
    save_file(stored, file)


def test_two_copies_of_a_tied_table_that_differ_are_refused(tmp_path: Path) -> None:
    made = trained(tmp_path, tied=True)
    change(made, **{"lm_head.weight": torch.ones(384, 64)})
    with pytest.raises(UserError, match="copies of a tied embedding differ"):
        made.merger()
    change(made, "lm_head.weight")
    with pytest.raises(UserError, match="copies of a tied embedding differ"):
        made.merger()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"model.embed_tokens.weight": torch.ones(380, 64)}, "embed_tokens.weight is 380 x 64"),
        ({"model.embed_tokens.weight": torch.ones(390, 64)}, "390 and 384 tokens"),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(8, 64)}, r"layers\.7"),
    ],
    ids=["fewer", "one grew", "layer"],
)
def test_an_adapter_of_another_base_is_refused(edits: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = trained(tmp_path)
    if "layers.7" in message.replace("\\", ""):
        edits = {**edits, "model.layers.7.mlp.up_proj.lora_B.weight": torch.ones(128, 8)}
    change(made, **edits)
    with pytest.raises(UserError, match=message):
        made.merger()


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path: Path) -> None:
    made = trained(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    del stored["model.norm.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor model\.norm\.weight.*--to adapter"):
        made.merger()


def test_code_of_its_own_is_refused(tmp_path: Path) -> None:
    made = trained(tmp_path)
    resolved = resolve(str(tmp_path / "base"))
    resolved.arguments["trust_remote_code"] = True
    resolved.config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    with pytest.raises(UserError, match="code of its own"):
        Merger(resolved, AdapterWeights(made.final), base="nf4", compute_dtype=torch.float32)
