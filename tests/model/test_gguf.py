"""GGUF files as base models: what comes out is what went in, and what cannot be read right is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel

from steep.errors import UserError
from steep.model.gguf import converted_folder
from steep.model.load import load
from steep.model.resolve import read_tokenizer, resolve
from tests.tiny import EOS, VOCAB_SIZE, tiny_model, tiny_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: PreTrainedModel, file: Path, scaled_rope: bool = False, window: int | None = None) -> Path:
    """`model` (Llama) in fp32 with the tests' tokenizer, as llama.cpp's converter lays it out."""
    config, tokenizer = model.config, tiny_tokenizer(bos=True)
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB_SIZE)
    if window is not None:
        writer.add_sliding_window(window)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(tokenizer.convert_ids_to_tokens(i)) for i in range(VOCAB_SIZE)])
    writer.add_token_types([3 if i < 3 else 1 for i in range(VOCAB_SIZE)])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        if stem.endswith(("q_proj", "k_proj")):  # llama.cpp keeps the two halves of a rotary pair side by side
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{layer}{NAMES[stem]}.weight", tensor.numpy())
    if scaled_rope:
        writer.add_tensor("rope_freqs.weight", np.ones(config.head_dim // 2, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return file


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", tied=False)


@pytest.fixture(scope="module")
def gguf_file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_model_is_the_one_in_the_file(model: PreTrainedModel, gguf_file: Path) -> None:
    loaded, tokenizer = load(str(gguf_file), base="fp32", compute_dtype="fp32")
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        expected, logits = model(ids).logits, loaded(ids).logits
    # The conversion rounds the weights to bf16.
    assert (logits - expected).norm() < 0.02 * expected.norm()
    text = "강물이 the river"
    assert tokenizer(text)["input_ids"][-5:] == tiny_tokenizer()(text)["input_ids"][-5:]


def test_the_end_token_is_the_files(gguf_file: Path) -> None:
    tokenizer = read_tokenizer(resolve(str(gguf_file)))
    assert (tokenizer.eos_token, tokenizer.bos_token) == (EOS, "<s>")


def test_a_converted_file_is_not_parsed_again(gguf_file: Path) -> None:
    load(str(gguf_file), base="fp32", compute_dtype="fp32")
    resolved = resolve(str(gguf_file))
    assert resolved.name == str(converted_folder(gguf_file))
    assert "gguf_file" not in resolved.arguments
    assert read_tokenizer(resolved).eos_token == EOS


def test_scaled_rope_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "scaled.gguf", scaled_rope=True)
    with pytest.raises(UserError, match=r"scales its rotary frequencies.*safetensors"):
        resolve(str(file))


def test_mistrals_window_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "window.gguf", window=64)
    with pytest.raises(UserError, match=r"is a Mistral with a sliding window.*safetensors"):
        resolve(str(file))


def test_a_file_that_is_cut_off_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    for size in (3, 1000, 100_000):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(gguf_file.read_bytes()[:size])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            resolve(str(cut))
