"""Multimodal checkpoints: refused with the line that helps, and their text model written as a folder of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2AudioConfig,
)

from steep.config import parse_config
from steep.errors import UserError
from steep.model import text_model
from steep.model.resolve import resolve
from steep.model.text_model import extract_text_model
from steep.plan import plan_run
from tests.tiny import tiny_config, tiny_tokenizer

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def multimodal(kind: str, folder: Path, **fields: Any) -> Path:
    """A whole random checkpoint of Gemma 3 or Mistral 3 with its vision tower, saved as the hub has them."""
    torch.manual_seed(0)
    if kind == "gemma3":
        text, vision = tiny_config("gemma3"), {**_VISION, "model_type": "siglip_vision_model"}
        tokens = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}
        sections = {"text_config": text.to_dict(), "vision_config": vision}
        config = Gemma3Config(**sections, **tokens, mm_tokens_per_image=4, **fields)
        model: Any = Gemma3ForConditionalGeneration(config)
    else:
        text, vision = tiny_config("mistral"), {**_VISION, "model_type": "pixtral"}
        config = Mistral3Config(
            text_config=text.to_dict(), vision_config=vision, image_token_index=300, spatial_merge_size=2, **fields
        )
        model = Mistral3ForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "text_type", "tied"),
    [("gemma3", "gemma3_text", True), ("mistral3", "mistral", True), ("mistral3", "mistral", False)],
)
def test_the_line_of_the_refusal_writes_a_folder_that_trains(
    kind: str, text_type: str, tied: bool, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {} if tied else {"tie_word_embeddings": False}
    whole = multimodal(kind, tmp_path / "whole", **fields)
    with pytest.raises(UserError) as refused:
        resolve(str(whole))
    message = str(refused.value)
    assert f"is a multimodal model ({kind}); its text model ({text_type}) can be trained" in message
    (line,) = re.findall(r'python -c "(.+)"$', message)
    exec(line, {})
    folder = tmp_path / "whole-text"

    cls = {"gemma3": Gemma3ForConditionalGeneration, "mistral3": Mistral3ForConditionalGeneration}[kind]
    expected, got = cls.from_pretrained(whole).eval(), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert got.dtype == torch.bfloat16
    assert (got.lm_head.weight is got.get_input_embeddings().weight) is tied
    assert not [name for name, _ in got.named_parameters() if "vision" in name or "projector" in name]
    tokens = torch.randint(3, 290, (2, 40))
    with torch.no_grad():
        logits, whole_logits = got(tokens).logits, expected(input_ids=tokens).logits
    assert torch.equal(logits, whole_logits)
    assert logits.float().std() > 0.01

    training = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "gradient_accumulation_steps": 1}
    data = {"sources": [{"path": str(korean_corpus)}], "max_length": 64}
    tree = {"model": {"name": str(folder)}, "adapter": {"r": 8}, "data": data, "training": training}
    assert plan_run(parse_config(tree)).steps == 2


def test_a_text_model_that_says_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = multimodal("gemma3", tmp_path / "whole")
    build = text_model._text_model

    def halved(*given: Any) -> Any:
        model = build(*given)
        model.lm_head = torch.nn.Linear(64, 384, bias=False, dtype=torch.bfloat16)
        return model

    monkeypatch.setattr(text_model, "_text_model", halved)
    with pytest.raises(UserError, match="taken out, is not what it is inside"):
        extract_text_model(str(whole), tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_a_checkpoint_without_some_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills them with random numbers, in both models that are compared."""
    whole = multimodal("mistral3", tmp_path / "whole", tie_word_embeddings=False)
    tensors = load_file(whole / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "language_model" not in name or "1.mlp" not in name}
    assert len(kept) == len(tensors) - 3
    save_file(kept, whole / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"whole lacks .*layers\.1\.mlp\.down_proj\.weight, .*which the model has"):
        extract_text_model(str(whole), tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_what_extraction_refuses(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no text model that can stand alone"):
        extract_text_model(str(llama_folder), tmp_path / "text")
    with pytest.raises(UserError, match="is not empty"):
        extract_text_model(str(llama_folder), llama_folder)
    with pytest.raises(UserError, match="is not in the local cache"):
        extract_text_model("nobody/nothing-at-all", tmp_path / "text")


@pytest.mark.parametrize(
    ("config", "text"), [(CLIPConfig(), "clip_text_model"), (Qwen2AudioConfig(), "qwen2")], ids=["clip", "audio"]
)
def test_a_text_model_that_cannot_stand_alone(config: Any, text: str, tmp_path: Path) -> None:
    config.architectures = ["SomeForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"a multimodal model .* its text model \({text}\) cannot stand alone"):
        resolve(str(tmp_path))


def test_the_whole_model_without_architectures_is_refused_too(tmp_path: Path) -> None:
    """transformers' list of causal models holds Gemma 3's multimodal type as well."""
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a multimodal model \(gemma3\)"):
        resolve(str(tmp_path))
