"""Base models that are damaged, or none."""

from __future__ import annotations

import json

import torch

from tests.bad_input.damage import (
    adapter,
    both,
    cast,
    config_json,
    drop,
    encoder,
    fill,
    json_file,
    larger_tokenizer,
    model,
    model_file,
    no_tokenizer,
    sharded,
    tensors,
)
from tests.bad_input.table import row

INDEX = "model.safetensors.index.json"
DEEP = b'{"model_type": "llama", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

CONFIG = [
    row("config.json is a list", "model.name", model_file("config.json", b"[]"), "config.json is damaged", "but []"),
    row("config.json is deep", "model.name", model_file("config.json", DEEP), "config.json is", "nested too deeply"),
    row("config.json is binary", "model.name", model_file("config.json", b"\xff\xfe\0"), "config.json is damaged"),
    row("no layers", "model.name", config_json(num_hidden_layers=0), "makes no model: num_hidden_layers is 0"),
    row("fewer layers", "model.name", config_json(num_hidden_layers=-1), "makes no model: num_hidden_layers is -1"),
    row(
        "architectures as text",
        "model.name",
        config_json(architectures="LlamaForCausalLM"),
        "architectures 'LlamaForCausalLM', which is no list of names",
    ),
    row("rope as text", "model.name", config_json(rope_parameters="x"), "config.json", "'rope_parameters'"),
    row(
        "a text for a rope's factor",
        "model.name",
        config_json(rope_parameters={"rope_type": "yarn", "factor": "big", "rope_theta": 1e4}),
        "the config.json of",
    ),
    row("an odd dtype", "model.name", config_json(dtype="float99"), "the config.json of", "'float99'"),
    row("quantised by a number", "model.name", config_json(quantization_config=5), "the config.json of"),
    row("quantised by a list", "model.name", config_json(quantization_config=[1]), "the config.json of"),
    row("positions as text", "model.name", config_json(max_position_embeddings="many"), "'max_position_embeddings'"),
    row(
        "positions are null",
        "model.name",
        json_file("config.json", max_position_embeddings=None),
        "'max_position_embeddings' expected int, got NoneType",
    ),
    row(
        "a window that is a list", "model.name", config_json(sliding_window=[None]), "makes no model: 'NoneType' object"
    ),
    row("an attention that is a number", "model.name", config_json(attn_implementation=5), "the config.json of"),
    row("an attention that is a list", "model.name", config_json(attn_implementation=["x"]), "makes no model: 'list'"),
    row("no weights by name", "model.name", config_json(transformers_weights={}), "names {} as its weights"),
    row(
        "generation_config.json is no JSON",
        "model.name",
        model_file("generation_config.json", b"{"),
        "generation_config.json is damaged",
        "delete it",
    ),
    row(
        "an end token that is a text",
        "model.name",
        json_file("generation_config.json", eos_token_id="x"),
        "generation_config.json has eos_token_id 'x', which is no number of a token",
    ),
    row(
        "an end token beyond all",
        "model.name",
        json_file("generation_config.json", eos_token_id=[2, 2**70]),
        "generation_config.json has eos_token_id [2, 1180591620717411303424], which is no number of a token",
    ),
]

TOKENIZER = [
    row(
        "a truncated tokenizer",
        "model.name",
        model_file("tokenizer.json", lambda data: data[:999]),
        "tokenizer.json is damaged",
    ),
    row(
        "a deep tokenizer", "model.name", model_file("tokenizer.json", DEEP), "tokenizer.json is damaged", "too deeply"
    ),
    row("a tokenizer that is a list", "model.name", model_file("tokenizer.json", b"[]"), "tokenizer.json is damaged"),
    row(
        "merges of unknown tokens",
        "model.name",
        json_file("tokenizer.json", model__merges=[["zz", "qq"]]),
        "the tokenizer of FOLDER/model (tokenizer.json, tokenizer_config.json) cannot be read: Token `zz` out of",
    ),
    row(
        "a tokenizer's unknown model",
        "model.name",
        json_file("tokenizer.json", model__type="x"),
        "cannot be read: data",
    ),
    row(
        "a tokenizer's bad expression",
        "model.name",
        json_file(
            "tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        "cannot be read: Oniguruma error",
    ),
    row(
        "a tokenizer that panics",
        "model.name",
        json_file(
            "tokenizer.json",
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
        "cannot be read: no entry found for key",
    ),
    row(
        "a tokenizer that reads some texts only",
        "tokenizer",
        json_file(
            "tokenizer.json", model={"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
        ),
        "it cannot read a text: ",
    ),
    row(
        "tokenizer_config.json is a list",
        "model.name",
        model_file("tokenizer_config.json", b"[]"),
        "tokenizer_config.json is damaged",
    ),
    row(
        "an end token that is a number",
        "model.name",
        json_file("tokenizer_config.json", eos_token=5),
        "the tokenizer of FOLDER/model",
        "eos_token",
    ),
]

WEIGHTS = [
    row(
        "weights in 8 bits",
        "model.name",
        tensors(cast(Q_PROJ, torch.float8_e4m3fn)),
        f"{Q_PROJ} as F8_E4M3",
        "16 or 32",
    ),
    row("weights in integers", "model.name", tensors(cast(Q_PROJ, torch.int32)), f"{Q_PROJ} as I32", "no quantisation"),
    row(
        "an index without metadata",
        "model.name",
        both(
            sharded(whole=True),
            lambda scene: (scene.model / INDEX).write_text(
                json.dumps({"weight_map": json.loads((scene.model / INDEX).read_text())["weight_map"]})
            ),
        ),
        "index.json is damaged: it has no metadata",
    ),
    row("an index that is a list", "model.name", sharded(index="[]"), "index.json is damaged"),
    row("an index of a list", "model.name", sharded([["a", "b"]], whole=True), "index.json is damaged"),
    row("an index of numbers", "model.name", sharded({"a": 5}, whole=True), "index.json is damaged"),
    row("an index of nothing", "model.name", sharded({}, whole=True), "index.json is damaged: its weight_map is empty"),
]

MODEL = [
    *CONFIG,
    *TOKENIZER,
    *WEIGHTS,
    row("no folder", "model.name", model("FOLDER/none"), "there is no folder", "none"),
    row("a file", "model.name", model("FOLDER/text.jsonl"), "there is no folder", "text.jsonl"),
    row("no config.json", "model.name", model_file("config.json", None), "has no config.json"),
    row("config.json is no JSON", "model.name", model_file("config.json", b"{"), "config.json is damaged: it is no"),
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
    row("a broken tokenizer", "model.name", model_file("tokenizer.json", b"{"), "tokenizer.json is damaged"),
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
