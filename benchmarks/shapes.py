"""Models of known shapes with random weights: speed and memory need no download.

`write` makes the weights on the device, shard by shard, into a folder that every library loads as a 16-bit model. Its
tokenizer gives one token a word, so that a document has as many tokens as are asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REST = "model-rest.safetensors"  # what is of no layer
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
NF4_BYTES = 0.53  # of a weight, with its scales
STD, RESIDUAL_STD = 0.02, 0.02 / 8  # the second of what is added to the residual stream

_LLAMA = {"model_type": "llama", "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA |= {"vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": False}
_LLAMA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}


def _sizes(hidden: int, intermediate: int, layers: int) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA | _sizes(4096, 14336, 32),
    "llama-3-70b": _LLAMA | _sizes(8192, 28672, 80) | {"num_attention_heads": 64},
    "mistral-7b": _LLAMA
    | _sizes(4096, 14336, 32)
    | {"model_type": "mistral", "vocab_size": 32768, "sliding_window": None, "max_position_embeddings": 32768},
    "qwen3-8b": _LLAMA
    | _sizes(4096, 12288, 36)
    | {"model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960},
    "gemma-3-4b": {
        "model_type": "gemma3_text", "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "sliding_window": 1024, "query_pre_attn_scalar": 256, "max_position_embeddings": 131072,
        **_sizes(2560, 10240, 34),
    },
    "llama-3.2-1b": _LLAMA | _sizes(2048, 8192, 16) | {"head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA | _sizes(3072, 8192, 28) | {"num_attention_heads": 24, "tie_word_embeddings": True},
    "tiny": _LLAMA
    | _sizes(64, 128, 2)
    | {"vocab_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip


def config_of(shape: str, layers: int | None = None) -> PreTrainedConfig:
    """
    Args:
        layers: in place of the shape's own number.
    """
    fields = dict(SHAPES[shape])
    if layers is not None:
        fields["num_hidden_layers"] = layers
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(fields.pop("model_type"), **fields, **tokens)


def empty_model(shape: str, layers: int | None = None) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(shape, layers), dtype=torch.bfloat16)


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """Word `17` is token 17."""
    vocabulary = {name: number for number, name in enumerate(SPECIAL)}
    vocabulary |= {str(number): number for number in range(len(SPECIAL), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def folder_of(weights: Path, shape: str, device: str, *, in_nf4: bool) -> Path:
    """Where the weights of a whole shape are, as `write` makes them on that device."""
    return weights / f"{shape}-{device}{'-nf4' if in_nf4 else ''}"


def weight_bytes(shape: str, layers: int | None = None, *, in_nf4: bool = False) -> int:
    """Bytes of the files that `write` makes, about."""
    return sum(
        round(tensor.numel() * (NF4_BYTES if in_nf4 and _is_quantised(name, tensor) else 2))
        for name, tensor in empty_model(shape, layers).named_parameters()
    )


def _is_quantised(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and ".layers." in name


def is_written(folder: Path) -> bool:
    """Whether `write` has come to its end there."""
    return (folder / "model.safetensors.index.json").exists()


def write(shape: str, folder: Path, device: str, layers: int | None = None, *, in_nf4: bool = False) -> Path:
    """A folder with config, tokenizer and random bf16 weights, the same for the same device; one there stays. A layer
    at a time is in memory, beside the embeddings.

    Args:
        in_nf4: linear layers are quantised as they are made, as bitsandbytes has them in a checkpoint.
    """
    if is_written(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model = empty_model(shape, layers)
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    if in_nf4:
        config.quantization_config = nf4_config().to_dict()
    config.save_pretrained(folder)
    tokenizer_of(config.vocab_size).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    one = 0.0 if "gemma" in config.model_type else 1.0  # what a norm's weight begins with
    shards: dict[str, dict[str, torch.Tensor]] = {}
    index: dict[str, str] = {}
    total = 0

    def save(file: str) -> int:
        tensors = shards.pop(file)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return sum(tensor.nbytes for tensor in tensors.values())

    for name, empty in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if empty.ndim == 1:
            tensor = torch.full(empty.shape, one, dtype=torch.bfloat16)
        else:
            std = RESIDUAL_STD if "o_proj" in name or "down_proj" in name else STD
            noise = torch.randn(empty.shape, generator=generator, device=device, dtype=torch.bfloat16)
            tensor = noise.mul_(std)
        file = f"model-{name.split('.')[2]}.safetensors" if ".layers." in name else REST
        total += sum(save(other) for other in list(shards) if other not in (file, REST))
        made = _in_nf4(name, tensor) if in_nf4 and _is_quantised(name, empty) else {name: tensor}
        index |= dict.fromkeys(made, file)
        shards.setdefault(file, {}).update((each, value.cpu()) for each, value in made.items())
    total += sum(save(file) for file in list(shards))
    told = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))  # last: the folder is whole
    return folder


def nf4_config() -> BitsAndBytesConfig:
    """As QLoRA has its base."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def _in_nf4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight's tensors in a checkpoint of bitsandbytes."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {name: codes, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def flops_a_step(shape: str, batch: int, seq: int, r: int) -> float:
    """What a step has to compute, without any recomputing: y and dX of every product, dW of what is trained, and causal
    attention, as if every row were one document without a window."""
    model = empty_model(shape)
    config, tokens = model.config, batch * seq
    base = adapters = 0
    for name, module in model.named_modules():
        if name.endswith(LINEAR_LAYERS):
            base += module.weight.numel()
            adapters += r * sum(module.weight.shape)
    head = config.vocab_size * config.hidden_size
    products = tokens * (4 * base + 6 * adapters + 6 * head)
    attention = 3.5 * 4 * batch * seq**2 / 2 * config.num_attention_heads * config.head_dim
    return products + attention * config.num_hidden_layers
