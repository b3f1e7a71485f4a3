"""Bases in e4m3: made of a checkpoint in 16 or 32 bits, or published so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from steep.errors import UserError
from steep.model import fp8_loading
from steep.model.adapters import add_adapters
from steep.model.attention import attention
from steep.model.empty import empty_model
from steep.model.fp8_linear import Fp8Linear
from steep.model.fp8_published import expanded_scale, has_blocks
from steep.model.load import DTYPES, load
from steep.model.resolve import resolve
from steep.model.stored_weights import check_finite, check_stored
from steep.ops.fp8 import fp8_reference, quantise_weight
from steep.plan import plan_run
from tests.fp8_checkpoints import FINE_GRAINED, IGNORED, compressed, publish
from tests.ops.closeness import error
from tests.test_run import run_file
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

FORMATS: dict[str, dict[str, Any]] = {
    "fine-grained": FINE_GRAINED,
    "fine-grained, whole": {**FINE_GRAINED, "weight_block_size": None},
    "rows": compressed("channel"),
    "blocks": compressed("block"),
    "whole": compressed("tensor"),
}


def ids(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 384, (1, length), generator=torch.Generator().manual_seed(0))


def linear_layers(model: Any) -> dict[str, Fp8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


# ---- from 16 or 32 bits


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_quantised_from_what_is_stored(
    family: str, compute: str, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path)
    whole: Any = tiny_model(family)
    whole.to(stored).save_pretrained(folder)
    model, _ = load(str(folder), base="fp8", compute_dtype=compute)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=stored)
    layers = linear_layers(model)
    assert len(layers) == 14 and not any("lm_head" in name for name in layers)
    for name, layer in layers.items():
        expected = quantise_weight(plain.get_submodule(name).weight)
        assert torch.equal(layer.weight.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(layer.scale, expected.scale) and layer.compute_dtype == dtype
    others = {name: p for name, p in model.named_parameters() if p.dtype != torch.float8_e4m3fn}
    theirs = dict(plain.named_parameters())
    assert len(others) == len(theirs) - 14
    assert all(torch.equal(p, theirs[name].to(dtype)) for name, p in others.items())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.name_or_path == str(folder) and model.config.use_cache is False
    assert not model.training and not any(module.training for module in model.modules())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(each, buffers[name]) for name, each in plain.named_buffers())
    # The same model as transformers' own, with the dequantised weights in it.
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_submodule(name).weight.copy_(fp8_reference(layer.stored))
        same: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **attention("auto", plain.config))
        for name, layer in layers.items():
            same.get_submodule(name).weight.copy_(fp8_reference(layer.stored).to(dtype))
        assert torch.equal(model(ids()).logits, same(ids()).logits)


@pytest.mark.parametrize("piece", [1, 100, 1000, 2**23])
def test_pieces_are_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_loading, "_PIECE", piece)
    weight = torch.randn(37, 50).bfloat16()
    pieces, whole = fp8_loading.quantised_in_pieces(weight, torch.device("cpu")), quantise_weight(weight)
    assert torch.equal(pieces.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert torch.equal(pieces.scale, whole.scale)


def test_what_it_says_beside_weights_is_taken(llama_folder: Path) -> None:
    ours, _ = load(str(llama_folder), base="fp8")
    theirs, _ = load(str(llama_folder), base="fp32")
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path == str(llama_folder)
    ours, theirs = (json.loads(model.config.to_json_string(use_diff=False)) for model in (ours, theirs))
    assert ours == theirs


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model, _ = load(str(save_tiny("llama", tmp_path, tied=True)), base="fp8")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_without_a_layer_for_it_is_refused(korean_corpus: Path, tmp_path: Path) -> None:
    """Falcon's linear layers are of its own class. The base would be called fp8 and be in 16 bits."""
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 384}
    falcon = FalconForCausalLM(FalconConfig(**shape, bos_token_id=1, eos_token_id=2))  # pyright: ignore[reportArgumentType]
    for each in (falcon, tiny_tokenizer()):
        each.save_pretrained(tmp_path / "falcon")
    refused = r"^model\.base: FalconForCausalLM has no nn\.Linear before its head.* Set model\.base: bf16"
    with pytest.raises(UserError, match=refused):
        load(str(tmp_path / "falcon"), base="fp8")
    run = {"model": {"base": "fp8"}, "adapter": {"target_modules": ["query_key_value"], "modules_to_save": []}}
    with pytest.raises(UserError, match=refused):
        plan_run(run_file(tmp_path / "falcon", korean_corpus, tmp_path / "run", **run))


def test_shards_are_read(tmp_path: Path, llama_folder: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    ours, theirs = (load(str(place), base="fp8")[0](ids()).logits for place in (folder, llama_folder))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("stored", "compute"), [("fp32", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"), ("bf16", "bf16"), ("bf16", "fp32")]
)
def test_what_the_checkpoint_has_in_pieces_is_quantised_from_what_is_stored(
    stored: str, compute: str, tmp_path: Path
) -> None:
    """A base model alone has no prefix before its names: transformers finds their places."""
    folder = save_tiny("llama", tmp_path, tied=True)
    tensors = {name: each.to(DTYPES[stored]) for name, each in load_file(folder / "model.safetensors").items()}
    save_file(
        {name.removeprefix("model."): each for name, each in tensors.items()}, folder / "model.safetensors",
        {"format": "pt"},
    )  # fmt: skip
    model, _ = load(str(folder), base="fp8", compute_dtype=compute)
    layers = linear_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        expected = quantise_weight(tensors[f"{name}.weight"])
        assert torch.equal(layer.weight.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(layer.scale, expected.scale) and layer.compute_dtype == DTYPES[compute]
    assert model.model.embed_tokens.weight.dtype == DTYPES[compute]


def test_a_gguf_file_is_a_base_too(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from steep.export.gguf import write_gguf

    folder = save_tiny("llama", tmp_path / "whole", bos=True)
    (file, *_) = (each for each in write_gguf(folder, tmp_path / "out") if "f16" in each.name)
    model, _ = load(str(file), base="fp8")
    assert len(linear_layers(model)) == 14


# ---- published in e4m3


@pytest.fixture(params=FORMATS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = save_tiny("llama", tmp_path / "whole", hidden_size=192, intermediate_size=320)
    scales = torch.bfloat16 if request.param == "rows" else torch.float32
    return publish(folder, tmp_path / "published", copy.deepcopy(FORMATS[request.param]), scales)


def test_a_published_checkpoint_loads_as_it_is_and_trains(published: Path) -> None:
    model, _ = load(str(published), compute_dtype="fp32")  # `auto` is what it is stored in
    stored = load_file(published / "model.safetensors")
    layers = linear_layers(model)
    assert len(layers) == 13 and IGNORED not in layers
    assert type(model.get_submodule(IGNORED)) is nn.Linear and type(model.lm_head) is nn.Linear
    truth = tiny_model("llama", hidden_size=192, intermediate_size=320)
    for name, layer in layers.items():
        assert torch.equal(layer.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        scale = stored.get(f"{name}.weight_scale", stored.get(f"{name}.weight_scale_inv"))
        assert scale is not None
        assert torch.equal(layer.scale, expanded_scale(scale, layer.stored.shape))
        with torch.no_grad():
            assert error(fp8_reference(layer.stored), truth.get_submodule(name).weight) < 0.03  # pyright: ignore[reportArgumentType]
    peft_model: Any = add_adapters(model, r=4)
    before = peft_model(ids(), labels=ids()).loss
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        peft_model(ids(), labels=ids()).loss.backward()
        assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert peft_model(ids(), labels=ids()).loss < 0.9 * before


def test_what_a_plan_reads_of_a_config_is_what_is_stored() -> None:
    assert [has_blocks(settings) for settings in FORMATS.values()] == [True, False, False, True, False]
    assert has_blocks({"quant_method": "fp8"}) and not has_blocks(None)  # the former as transformers reads it


def test_it_is_kept_as_it_is_stored(published: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.base: nf4 was asked for but the checkpoint is stored as fp8"):
        load(str(published), base="nf4")
    assert len(linear_layers(load(str(published), base="fp8")[0])) == 13


def changed(settings: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The settings with other values, of the top or of the group of layers."""
    settings = copy.deepcopy(settings)
    for name, value in values.items():
        place = settings
        for part in name.split("__")[:-1]:
            place = place["config_groups"]["group_0"] if part == "group" else place[part]
        place[name.split("__")[-1]] = value
    return settings


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (changed(FINE_GRAINED, weight_block_size=[64, 128]), "blocks of 64 x 128"),
        (changed(FINE_GRAINED, activation_scheme="static"), "activations whose scales are fixed"),
        (changed(FINE_GRAINED, fmt="e5m2"), "numbers in e5m2"),
        (changed(compressed(), format="pack-quantized"), "the format pack-quantized of compressed-tensors"),
        (changed(compressed(), format="int-quantized"), "the format int-quantized"),
        (changed(compressed(), kv_cache_scheme={"num_bits": 8}), "a quantised cache"),
        (changed(compressed(), group__weights__type="int"), "weights of type int in 8 bits"),
        (changed(compressed(), group__weights__num_bits=4), "weights of type float in 4 bits"),
        (changed(compressed(), group__weights__strategy="group"), "weights scaled by group"),
        (changed(compressed("block"), group__weights__block_structure=[64, 64]), "blocks of 64 x 64"),
        (changed(compressed(), group__weights__symmetric=False), "zero points"),
        (changed(compressed(), group__input_activations__dynamic=False), "activations whose scales are fixed"),
        (changed(compressed(), group__output_activations={"num_bits": 8}), "quantised outputs"),
        (changed(compressed(), sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        (changed(compressed(), transform_config={"config_groups": {"v": {"type": "hadamard"}}}), "by a transform"),
        ({"quant_method": "gptq", "bits": 4}, "stored quantised by gptq"),
    ],
)
def test_what_cannot_be_trained_over_is_refused_by_name(
    settings: dict[str, Any], problem: str, llama_folder: Path, tmp_path: Path
) -> None:
    fine = settings["quant_method"] == "fp8"
    folder = publish(llama_folder, tmp_path / "published", FINE_GRAINED if fine else compressed())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^model\.name: .*{problem}.* Give the 16-bit checkpoint"):
        load(str(folder))


def no_scale(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def other_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(3)


def head_in_e4m3(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale"] = torch.ones(384, 1)


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.int8)


def no_weight(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight"]
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def other_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(130, 64).to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(130, 1)


def all_in_16_bits(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
        tensors[name] = tensors[name].to(torch.bfloat16)
        del tensors[f"{name}_scale"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (no_scale, r"up_proj\.weight in e4m3 without model\.layers\.0\.mlp\.up_proj\.weight_scale"),
        (other_scale, r"up_proj\.weight_scale as 3 of F32, for a weight of 128 x 64"),
        (head_in_e4m3, r"lm_head\.weight in e4m3, and it is not the weight of a linear layer before the head"),
        (whole_numbers, r"up_proj\.weight as I8"),
        (no_weight, r"does not hold model\.layers\.0\.mlp\.up_proj\.weight"),
        (all_in_16_bits, r"says that it is stored in e4m3, and it holds no such tensor"),
        (other_weight, r"up_proj\.weight as 130 x 64, and its config\.json makes it 128 x 64"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    damage: Any, problem: str, llama_folder: Path, tmp_path: Path
) -> None:
    folder = publish(llama_folder, tmp_path / "published", compressed())
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"^model\.name: .*{problem}"):
        load(str(folder))


def test_e4m3_without_a_word_on_it_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = publish(llama_folder, tmp_path / "published", compressed())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"as F8_E4M3, and its config\.json names no quantisation"):
        load(str(folder), base="fp8")


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_a_code_or_a_scale_that_is_no_number_is_found(part: str, llama_folder: Path, tmp_path: Path) -> None:
    folder = publish(llama_folder, tmp_path / "published", FINE_GRAINED)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    values = tensors[name].float()
    values.view(-1)[0] = float("nan")
    tensors[name] = values.to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"1 of the .* values of {name} in .* are NaN"):
        check_finite(resolve(str(folder)))


def with_scale(folder: Path, values: Any) -> Path:
    """A published folder whose first layer's up_proj has a row of zeros, and `values` of its scales and codes."""
    tensors = load_file(folder / "model.safetensors")
    codes, scale = (tensors[f"model.layers.0.mlp.up_proj.{part}"] for part in ("weight", "weight_scale"))
    codes.view(torch.uint8)[5] = 0
    values(codes, scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (3, -0.5, r"up_proj\.weight_scale holds -0\.5, and a scale of e4m3 is above 0"),
        (5, -0.5, r"up_proj\.weight_scale holds -0\.5"),
        (3, 0.0, r"up_proj\.weight_scale holds 0 for codes of model\.layers\.0\.mlp\.up_proj\.weight that are not 0"),
    ],
)
def test_a_scale_that_is_not_above_0_is_refused(
    place: int, value: float, problem: str, llama_folder: Path, tmp_path: Path
) -> None:
    def damage(codes: torch.Tensor, scale: torch.Tensor) -> None:
        scale[place] = value

    folder = with_scale(publish(llama_folder, tmp_path / "published", compressed()), damage)
    with pytest.raises(UserError, match=rf"^model\.name: .*{problem}"):
        load(str(folder))
    with pytest.raises(UserError, match=rf"^model\.name: .*{problem}"):
        check_finite(resolve(str(folder)))


def test_a_scale_of_0_over_codes_of_0_is_a_row_of_zeros(llama_folder: Path, tmp_path: Path) -> None:
    """What some publisher makes of a row of zeros: its largest magnitude by 448."""

    def damage(codes: torch.Tensor, scale: torch.Tensor) -> None:
        scale[5] = 0.0
        codes.view(torch.uint8)[5, 3] = 0x80  # -0

    folder = with_scale(publish(llama_folder, tmp_path / "published", compressed()), damage)
    check_finite(resolve(str(folder)))
    model, _ = load(str(folder), compute_dtype="fp32")
    weight = model.model.layers[0].mlp.up_proj.dequantize()
    assert not weight[5].any() and weight[4].any()
    assert bool(model(ids()).logits.isfinite().all())


def test_scales_of_activations_that_are_dynamic_are_told_as_unused(llama_folder: Path, tmp_path: Path) -> None:
    folder = publish(llama_folder, tmp_path / "published", FINE_GRAINED)
    plain, _ = load(str(folder), compute_dtype="fp32")
    tensors = load_file(folder / "model.safetensors")
    layers = [name.removesuffix(".weight_scale_inv") for name in tensors if name.endswith(".weight_scale_inv")]
    tensors |= {f"{layer}.input_scale": torch.tensor(0.1) for layer in layers}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    resolved = resolve(str(folder))
    (told,) = check_stored(resolved, empty_model(resolved))
    assert f".input_scale (and {len(layers) - 1} more), for which its config.json has no place: unused" in told
    model, _ = load(str(folder), compute_dtype="fp32")
    assert torch.equal(model(ids()).logits, plain(ids()).logits)
