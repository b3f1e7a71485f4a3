"""Base models that are damaged, or none."""

from __future__ import annotations

import torch

from tests.bad_input.damage import (
    adapter,
    config_json,
    drop,
    encoder,
    fill,
    larger_tokenizer,
    model,
    model_file,
    no_tokenizer,
    sharded,
    tensors,
)
from tests.bad_input.table import row

MODEL = [
    row("no folder", "model.name", model("FOLDER/none"), "there is no folder", "none"),
    row("a file", "model.name", model("FOLDER/text.jsonl"), "there is no folder", "text.jsonl"),
    row("no config.json", "model.name", model_file("config.json", None), "has no config.json"),
    row("config.json is no JSON", "model.name", model_file("config.json", b"{"), "not a valid JSON file"),
    row("an unknown family", "model.name", config_json(model_type="xyz"), "`xyz`", "does not recognize"),
    row("a text for a size", "model.name", config_json(hidden_size="big"), "'hidden_size' expected int, got str"),
    row("no heads", "model.name", config_json(num_attention_heads=0), "cannot be read: integer modulo by zero"),
    row("no such activation", "model.name", config_json(hidden_act="swosh"), "makes no model: KeyError: 'swosh'"),
    row(
        "code of its own",
        "model.name",
        config_json(model_type="xyz", auto_map={"AutoConfig": "c.C"}),
        "needs code",
        "trust_remote_code: true",
    ),
    row("an encoder", "model.name", encoder, "not a causal language model (BertForMaskedLM)", "needs a decoder"),
    row(
        "quantised by others",
        "model.name",
        config_json(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised by gptq",
        "16-bit checkpoint",
    ),
    row("an adapter", "model.name", adapter, "holds an adapter (adapter_config.json)", "base model alone"),
    row("no tokenizer", "model.name", no_tokenizer, "has no tokenizer", "tokenizer.json"),
    row("a broken tokenizer", "model.name", model_file("tokenizer.json", b"{"), "cannot be read"),
    row("a tokenizer too large", "model.name", larger_tokenizer, "token id 433", "ids end at 383", "belong together"),
    row("no weights", "model.name", model_file("model.safetensors", None), "has no weights"),
    row(
        "truncated weights",
        "model.name",
        model_file("model.safetensors", lambda data: data[:-1000]),
        "model.safetensors is damaged",
        "Download it again",
    ),
    row("empty weights", "model.name", model_file("model.safetensors", b""), "model.safetensors is damaged"),
    row(
        "a missing tensor",
        "model.name",
        tensors(drop("model.norm.weight")),
        "does not hold model.norm.weight",
        "belong together",
    ),
    row(
        "missing layers",
        "model.name",
        config_json(num_hidden_layers=3),
        "does not hold model.layers.2.",
        "(and 8 more)",
    ),
    row(
        "a mis-shaped tensor",
        "model.name",
        tensors(lambda stored: stored.update({"model.norm.weight": torch.ones(3)})),
        "model.norm.weight as 3, and its config.json makes it 64",
    ),
    row("another vocabulary", "model.name", config_json(vocab_size=400), "as 384 x 64", "makes it 400 x 64"),
    row("a missing shard", "model.name", sharded(), "has no model-00002-of-00002.safetensors, which its index names"),
    row("a broken index", "model.name", sharded(index="{"), "index.json is damaged"),
    row(
        "an index that climbs",
        "model.name",
        sharded({"a": "../../x.safetensors"}),
        "a shard outside of its folder, '../../x.safetensors'",
    ),
    row(
        "NaN",
        "model.name",
        tensors(fill("model.norm.weight", float("nan"))),
        "1 of the 64 values of model.norm.weight",
        "NaN or infinite",
        command="train",
    ),
    row(
        "infinity",
        "model.name",
        tensors(fill("model.layers.0.self_attn.q_proj.weight", float("-inf"))),
        "1 of the 4,096 values of model.layers.0.self_attn.q_proj.weight",
        command="train",
    ),
]
