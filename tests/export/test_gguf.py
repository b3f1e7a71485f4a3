"""GGUF files of every family: llama.cpp computes what transformers computes, and a fault in the file is seen."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from steep.errors import UserError
from steep.export import gguf, gguf_check
from steep.export.gguf import check_convertible, open_model, write_gguf
from steep.export.gguf_check import GgufJudge, other_tokens, read_back
from steep.model import gguf_families
from steep.model.gguf_families import FAMILIES
from steep.model.resolve import resolve
from tests.export.llama_cpp_judge import logits, relative_error, token_ids
from tests.export.tokenizers_of_kinds import byte_level, sentencepiece_style
from tests.tiny import SLIDING_WINDOW, documents, save_tiny, tiny_config, tiny_tokenizer

F16, Q8_0 = 5e-3, 5e-2
LENGTH = 60
assert LENGTH > 3 * SLIDING_WINDOW

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
_SEVEN_LAYERS = {"num_hidden_layers": 7, "layer_types": None}  # Gemma 3's own pattern: the sixth sees everything

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tied": True}),
    "llama, rope of 3.1": ("llama", {"rope_parameters": _LLAMA_3_ROPE}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {}),
    "mistral, window as long as its context": ("mistral", {"sliding_window": 512}),
    "qwen2": ("qwen2", {"tied": False}),
    "qwen2, tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2, its own caps and scale": (
        "gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 5},
    ),
    "gemma2, windows elsewhere": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma3": ("gemma3", {}),
    "gemma3, its own cap, scale and rope": (
        "gemma3", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 5, "rope_parameters": _GEMMA_3_ROPE},
    ),
    "gemma3, seven layers": ("gemma3", _SEVEN_LAYERS),
    "gemma3, untied": ("gemma3", {"tied": False}),
}  # fmt: skip


def reference(model: PreTrainedModel | Path, ids: list[int]) -> torch.Tensor:
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")  # has every soft cap
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]  # pyright: ignore[reportCallIssue]


def some_ids(length: int = LENGTH) -> list[int]:
    return torch.randint(3, 384, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def saved(case: str, folder: Path) -> Path:
    family, overrides = CASES[case]
    return save_tiny(family, folder / "model", bos=True, **overrides)


def error_of(folder: Path, out: Path, file: int = 0) -> float:
    return relative_error(logits(write_gguf(folder, out)[file], some_ids()), reference(folder, some_ids()))


# --- llama.cpp is the judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.llama_cpp
def test_llama_cpp_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    folder = saved(case, tmp_path)
    f16, q8_0, modelfile = write_gguf(folder, tmp_path / "out", "ko")
    assert [path.name for path in (f16, q8_0, modelfile)] == ["ko-f16.gguf", "ko-q8_0.gguf", "Modelfile"]
    expected = reference(folder, some_ids())
    assert relative_error(logits(f16, some_ids()), expected) < F16
    assert relative_error(logits(q8_0, some_ids()), expected) < Q8_0


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("llama", "rotary_pairs_adjacent", False),
        ("mistral", "rotary_pairs_adjacent", False),
        ("llama, biases", "rotary_pairs_adjacent", False),
        ("qwen2", "rotary_pairs_adjacent", True),
        ("gemma", "norm_offset", 0.0),
        ("gemma2", "norm_offset", 0.0),
        ("gemma3", "norm_offset", 0.0),
    ],
)
@pytest.mark.llama_cpp
def test_a_wrong_layout_is_seen(
    case: str, field: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(case, tmp_path)
    kind = resolve(str(folder)).config.model_type
    monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], **{field: value}))
    assert error_of(folder, tmp_path / "out") > 10 * F16


@pytest.mark.llama_cpp
def test_a_biass_own_layout_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama, biases", tmp_path)
    laid_out = gguf_families.layout
    monkeypatch.setattr(gguf, "layout", lambda name, *rest: laid_out(name.replace("_proj.bias", "_proj.b"), *rest))
    assert error_of(folder, tmp_path / "out") > 2 * F16


@pytest.mark.llama_cpp
def test_a_missing_rotary_scale_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama, rope of 3.1", tmp_path)
    monkeypatch.setattr(gguf, "rotary_factors", lambda _: None)
    assert error_of(folder, tmp_path / "out") > 10 * F16


@pytest.mark.parametrize("case", ["gemma2, its own caps and scale", "gemma3, its own cap, scale and rope"])
@pytest.mark.llama_cpp
def test_a_query_scale_left_out_is_seen(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(case, tmp_path)
    monkeypatch.setattr(gguf_families, "query_scale", lambda *_: 1.0)
    assert error_of(folder, tmp_path / "out") > 2 * F16


def as_deep_as_27b(family: str, folder: Path) -> Path:
    """llama.cpp knows the 27B models by their layers, and scales their attention by hidden size over heads: 32 here."""
    shape: dict[str, Any] = {
        "head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
    }
    layers = {"gemma2": 46, "gemma3": 62}[family]
    return save_tiny(family, folder / "model", bos=True, num_hidden_layers=layers, layer_types=None, **shape)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.llama_cpp
def test_the_attention_of_27b_has_a_scale_of_its_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = as_deep_as_27b(family, tmp_path)
    assert error_of(folder, tmp_path / "out") < F16
    kind = resolve(str(folder)).config.model_type
    monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], layers_of_27b=None))
    assert error_of(folder, tmp_path / "other") > 10 * F16


@pytest.mark.parametrize(("family", "name"), [("gemma2", "self_attn.q_proj"), ("gemma3", "self_attn.q_norm")])
def test_the_scale_of_27b_is_in_the_weights(family: str, name: str, tmp_path: Path) -> None:
    model = open_model(as_deep_as_27b(family, tmp_path))
    assert model.config.query_pre_attn_scalar == 16
    ours = next(gguf_name for gguf_name, stored in model.names.items() if stored == f"model.layers.3.{name}.weight")
    stored = model.tensors[model.names[ours]] + (1 if family == "gemma3" else 0)
    torch.testing.assert_close(model.expected(ours), stored * (32 / 16) ** 0.5)


@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        ("gemma2", {"sliding_window": 256}),
        ("gemma2, windows elsewhere", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma2, its own caps and scale", {"attn_logit_softcapping": 50.0}),
        ("gemma2, its own caps and scale", {"final_logit_softcapping": 30.0}),
        ("gemma3", {"sliding_window": 256}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gemma3, its own cap, scale and rope", {"final_logit_softcapping": None}),
        ("gemma3, its own cap, scale and rope", {"rope_parameters": None}),
        ("llama, linear rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", {"rms_norm_eps": 0.1}),
    ],
)
@pytest.mark.llama_cpp
def test_a_wrong_setting_is_seen(case: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """The same weights under another config make another file, and llama.cpp tells them apart."""
    folder = saved(case, tmp_path)
    expected = reference(folder, some_ids())
    family, own = CASES[case]
    other = {name: value for name, value in {**own, **overrides}.items() if name != "tied"}
    tiny_config(family, **other).save_pretrained(folder)
    assert relative_error(logits(write_gguf(folder, tmp_path / "out")[0], some_ids()), expected) > 2 * F16


@pytest.mark.llama_cpp
def test_the_tokens_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    texts = [*documents("ko", 5), *documents("en", 5)]
    ids = [tiny_tokenizer(bos=True)(text)["input_ids"] for text in texts]
    for file in write_gguf(folder, tmp_path / "out")[:2]:
        assert token_ids(file, texts) == ids


# --- the file itself ------------------------------------------------------------------------------------------


def contents(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def by_hand(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """`tensor` as llama.cpp wants it, told apart from the exporter: rows by number, and Gemma's arithmetic."""
    kind, size = config.model_type, gguf_families.head_dim(config)
    if kind in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        heads, pairs, halves = range(len(tensor) // size), range(size // 2), range(2)
        return tensor[[head * size + half * size // 2 + pair for head in heads for pair in pairs for half in halves]]
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        tensor = 1 + tensor
    if name.endswith({"gemma2": "q_proj.weight", "gemma3_text": "q_norm.weight"}.get(kind, "nothing")):
        tensor = tensor * (size / config.query_pre_attn_scalar) ** 0.5
    return tensor


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_setting_is_the_checkpoints(case: str, tmp_path: Path) -> None:
    folder = saved(case, tmp_path)
    config, stored = resolve(str(folder)).config, load_file(folder / "model.safetensors")
    f16, q8_0, _ = write_gguf(folder, tmp_path / "out")
    names = open_model(folder).names
    assert set(names.values()) - {""} == set(stored)
    for file, allowed in ((f16, 4e-4), (q8_0, 1e-2)):
        keys, tensors = contents(file)
        assert tensors.keys() == names.keys()
        for name, ours in names.items():
            if ours:
                expected = by_hand(ours, stored[ours], config)
                assert relative_error(tensors[name].copy(), expected) < (allowed if expected.ndim > 1 else 1e-6), name
        assert read_back(file, open_model(folder)) == []
        prefix = keys["general.architecture"]
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        settings = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": gguf_families.head_dim(config),
            "attention.value_length": gguf_families.head_dim(config),
            "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
            "rope.dimension_count": gguf_families.head_dim(config),
            "rope.freq_base": pytest.approx(rope["rope_theta"]),
            "rope.scaling.factor": rope["factor"] if rope["rope_type"] == "linear" else None,
            "attention.sliding_window": config.sliding_window if prefix in ("gemma2", "gemma3") else None,
            "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
            "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        }
        assert {name: keys.get(f"{prefix}.{name}") for name in settings} == settings


def test_metadata_of_gemma3(tmp_path: Path) -> None:
    folder = saved("gemma3, its own cap, scale and rope", tmp_path)
    keys, _ = contents(write_gguf(folder, tmp_path / "out", "ko")[1])
    model = {name.removeprefix("gemma3."): value for name, value in keys.items() if name.startswith("gemma3.")}
    assert model == {
        "vocab_size": 384,
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.sliding_window": SLIDING_WINDOW,
        "attention.sliding_window_pattern": [True, False],
        "final_logit_softcapping": 3.0,
        "rope.dimension_count": 16,
        "rope.freq_base": 100_000.0,
        "rope.freq_base_swa": 500.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    general = {name: value for name, value in keys.items() if name.startswith("general.")}
    assert general == {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "ko",
        "general.file_type": 7,
        "general.quantization_version": 2,
    }


def test_tensors_of_llama_are_the_checkpoints(tmp_path: Path) -> None:
    folder = saved("llama, rope of 3.1", tmp_path)
    stored = load_file(folder / "model.safetensors")
    f16, q8_0, _ = write_gguf(folder, tmp_path / "out")
    _, tensors = contents(f16)
    assert len(tensors) == len(stored) + 1
    for name, ours in [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ]:
        rounded = stored[ours] if stored[ours].ndim == 1 else stored[ours].half().float()
        assert torch.equal(torch.from_numpy(tensors[name].copy()), rounded)
    heads = stored["model.layers.0.self_attn.k_proj.weight"].view(2, 16, 64)
    ours = torch.from_numpy(tensors["blk.0.attn_k.weight"].copy()).view(2, 16, 64)
    assert torch.equal(ours[:, 0::2], heads[:, :8].half().float())  # of each pair first the one, then the other
    assert torch.equal(ours[:, 1::2], heads[:, 8:].half().float())
    factors = tensors["rope_freqs.weight"]  # wavelengths of 2π · 10000^(i/8); 64 / 4 is left alone, 64 / 1 divided by 8
    assert factors.shape == (8,) and factors[0] == 1.0 and factors[-1] == pytest.approx(8.0)
    assert 1.0 < factors[2] < 8.0
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(q8_0).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == GGMLQuantizationType.Q8_0
    assert kinds["output_norm.weight"] == kinds["rope_freqs.weight"] == GGMLQuantizationType.F32
    _, eight = contents(q8_0)
    assert 1e-3 < relative_error(eight["token_embd.weight"], stored["model.embed_tokens.weight"]) < 1e-2


@pytest.mark.llama_cpp
def test_rows_that_fill_no_block_stay_in_f16(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", bos=True, intermediate_size=72)
    assert error_of(folder, tmp_path / "out", file=1) < Q8_0
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "out" / "model-q8_0.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert kinds["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0


@pytest.mark.llama_cpp
def test_more_shards_and_bf16_and_more_rows_than_tokens(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny("llama", tmp_path / "fp32", vocab_size=416), dtype="bfloat16"
    )
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    file = write_gguf(tmp_path / "model", tmp_path / "out")[0]
    expected = reference(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32"), some_ids())
    assert relative_error(logits(file, some_ids()), expected) < F16
    keys, tensors = contents(file)
    assert len(keys["tokenizer.ggml.tokens"]) == len(tensors["token_embd.weight"]) == 416


def test_the_modelfile_continues_the_prompt(tmp_path: Path) -> None:
    write_gguf(saved("llama", tmp_path), tmp_path / "out", "ko")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "FROM ./ko-q8_0.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        "PARAMETER num_ctx 512",
    ]


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "it sees 64 tokens back, fewer than its context of 512"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "it sees 64 tokens back"),
        ("qwen2", {"head_dim": 32}, "heads of 32 do not add up to its hidden size 64"),
        ("qwen3", {"attention_bias": True}, "its linear layers have biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its rotary frequencies are scaled by 'dynamic'",
        ),
        ("qwen2", {"rope_parameters": _LLAMA_3_ROPE}, "its rotary frequencies are scaled by 'llama3'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "only a part of each head is rotated",
        ),
        ("gemma2", {"tie_word_embeddings": False}, "its output embeddings are separate"),
        ("gemma2", {"final_logit_softcapping": None}, "a soft cap is switched off"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "its attention has a soft cap"),
        ("gemma3", {"use_bidirectional_attention": True}, "it attends in both directions"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, overrides: dict[str, Any], reason: str) -> None:
    config = tiny_config(family, **overrides)
    with pytest.raises(UserError, match=rf"{reason}.*convert_hf_to_gguf\.py"):
        check_convertible(config, tiny_tokenizer())


def test_another_family_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"llama"', '"phi3"').replace("LlamaForCausalLM", "Phi3ForCausalLM")
    )
    with pytest.raises(UserError, match="this model is a phi3"):
        write_gguf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "reason"), [(70000.0, "70000, and f16 ends"), (float("nan"), "a value of nan")])
def test_a_weight_out_of_range_is_refused_and_no_file_is_left(value: float, reason: str, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"blk\.1\.ffn_up\.weight has a value of .*{reason.split()[-1]}"):
        write_gguf(folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tensor_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.gate.weight"] = torch.ones(4, 4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has model\.layers\.0\.self_attn\.gate\.weight, which GGUF has no name for"):
        write_gguf(folder, tmp_path / "out")


# --- the check that a user gets -------------------------------------------------------------------------------


@pytest.mark.llama_cpp
def test_the_check_scores_in_llama_cpp(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    texts = [*documents("ko", 3), *documents("en", 3)]
    check = GgufJudge(folder, texts).check(write_gguf(folder, tmp_path / "out")[0])
    assert (check.judge, check.problems) == ("llama.cpp", [])
    ids = [tiny_tokenizer(bos=True)(text)["input_ids"] for text in texts]
    assert check.tokens == sum(len(each) - 1 for each in ids)
    total = sum(
        torch.nn.functional.cross_entropy(reference(folder, each)[:-1], torch.tensor(each[1:]), reduction="sum").item()
        for each in ids
    )
    assert check.merged_loss == pytest.approx(total / check.tokens, rel=1e-5)
    assert check.loss == pytest.approx(check.merged_loss, rel=1e-4) and check.loss != check.merged_loss
    assert 0 < check.logit_error < F16
    assert "bits per byte" in str(check)


@pytest.mark.llama_cpp
def test_the_check_sees_other_weights_and_other_tokens(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    file = write_gguf(folder, tmp_path / "out")[0]
    text = documents("ko", 1)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = tiny_tokenizer(bos=True)(text[0])["input_ids"]
        model.lm_head.weight[ids] += 0.2 * model.lm_head.weight[ids].sign()
        model.lm_head.weight[ids] += 0.1 * model.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    model.save_pretrained(folder)
    worse = GgufJudge(folder, text).check(file)
    assert worse.logit_error > F16 and worse.bits_per_byte_gap > 0.005
    read_back, logits_found, loss_found = worse.problems
    assert re.match(r"output\.weight differs by [\d.e-]+ at \(\d+, \d+\)", read_back)
    assert logits_found == f"logits in llama.cpp differ by {worse.logit_error:.1%}"
    assert loss_found == f"the loss in llama.cpp is {worse.bits_per_byte_gap:.4f} bits per byte higher"
    tiny_tokenizer(bos=False).save_pretrained(folder)
    other = GgufJudge(folder, [text[0], ""]).check(file)
    assert other.remarks == []
    for each in (text[0], ""):
        assert f"llama.cpp makes other tokens of {each[:60]!r}" in other.problems


DECOMPOSED = unicodedata.normalize("NFD", "강물이 흐른다")


@pytest.mark.parametrize(
    ("text", "adds_space", "composes", "known"),
    [
        (" the river", True, False, True),
        ("▁the river", True, False, True),
        (" the river", False, True, False),
        (DECOMPOSED, False, True, True),
        (DECOMPOSED, True, False, False),
        ("강물이 흐른다", True, True, False),
        ("", True, True, False),
    ],
)
def test_only_known_kinds_of_text_may_have_other_tokens(
    text: str, adds_space: bool, composes: bool, known: bool
) -> None:
    problems, remarks = other_tokens([text], adds_space=adds_space, composes=composes)
    said = [f"llama.cpp makes other tokens of {text!r}"]
    assert (problems, remarks) == (([], said) if known else (said, []))


def _composing() -> PreTrainedTokenizerFast:
    tokenizer: Any = byte_level("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "known"),
    [
        (sentencepiece_style("mistral"), "   leading and trailing   "),
        (_composing(), DECOMPOSED),
    ],
    ids=["begins with a space", "not composed"],
)
@pytest.mark.llama_cpp
def test_text_that_llama_cpp_is_known_to_read_otherwise_is_remarked(
    tokenizer: PreTrainedTokenizerFast, known: str, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path / "model", tokenizer=tokenizer, vocab_size=len(tokenizer))
    file = write_gguf(folder, tmp_path / "out")[0]
    check = GgufJudge(folder, [*documents("ko", 2), known]).check(file)
    assert (check.problems, check.remarks) == ([], [f"llama.cpp makes other tokens of {known!r}"])


@pytest.mark.llama_cpp
def test_the_check_opens_the_folder_as_the_gate_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was trained in 4 bits may not fit onto the GPU in 16, and the gate has a place for it."""
    folder, opened = saved("llama", tmp_path), []
    real = gguf_check.open_plainly
    monkeypatch.setattr(gguf_check, "open_plainly", lambda *given: opened.append(given[0]) or real(*given))
    files, judge = write_gguf(folder, tmp_path / "out")[:2], GgufJudge(folder, documents("ko", 1))
    assert [judge.check(file).problems for file in files] == [[], []]
    assert opened == [folder]  # once for both files


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5, 0.0])
def test_small_weights_are_read_back_too(size: float, tmp_path: Path) -> None:
    """Below 6e-5 fp16 has fewer digits, and Q8_0 keeps the scale of a block in it."""
    folder = save_tiny("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    table.normal_(std=size, generator=torch.Generator().manual_seed(0)) if size else table[:50].zero_()
    table[7] *= 1e-4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in write_gguf(folder, tmp_path / "out", "tiny"):
        if file.suffix == ".gguf":
            assert read_back(file, open_model(folder)) == []
    table[3, 5] += 1e-2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (problem,) = read_back(tmp_path / "out" / "tiny-q8_0.gguf", open_model(folder))
    assert problem.startswith("token_embd.weight differs by 0.0") and problem.endswith("at (3, 5)")


def test_without_llama_cpp_the_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("gemma3", tmp_path)
    file = write_gguf(folder, tmp_path / "out")[1]
    monkeypatch.setattr("steep.export.gguf_check.find_spec", lambda _: None)
    check = GgufJudge(folder, documents("ko", 2)).check(file)
    assert (check.judge, check.problems, check.tokens) == ("the file read back", [], 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 0.5
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace(f'"sliding_window": {SLIDING_WINDOW}', '"sliding_window": 17'))
    problems = GgufJudge(folder, []).check(file).problems
    assert [problem.split()[0] for problem in sorted(problems)] == [
        "blk.1.ffn_up.weight",
        "gemma3.attention.sliding_window",
        "output_norm.weight",
    ]
