from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, BertConfig, T5Config

from steep.errors import UserError
from steep.model.adapters import add_adapters
from steep.model.resolve import ResolvedModel, looks_like_chat, read_tokenizer, resolve
from tests.tiny import tiny_model


def test_a_causal_model_resolves(llama_folder: Path) -> None:
    model = resolve(str(llama_folder))
    assert model.name == str(llama_folder)
    assert model.config.model_type == "llama"
    assert model.quantization is None
    tokenizer = read_tokenizer(model)
    assert len(tokenizer) == 384
    assert not looks_like_chat(model, tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert looks_like_chat(model, tokenizer)


@pytest.mark.parametrize("architecture", [None, "BertForMaskedLM", "BertModel"])
def test_an_encoder_is_refused(architecture: str | None, tmp_path: Path) -> None:
    BertConfig(architectures=[architecture] if architecture else None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"causal language model .*needs a decoder"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "T5EncoderModel", None])
def test_an_encoder_decoder_is_refused(architecture: str | None, tmp_path: Path) -> None:
    T5Config(architectures=[architecture] if architecture else None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is an encoder-decoder model \(t5\)\. Continued pretraining needs a decoder"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "models/"])
def test_a_missing_folder_is_not_asked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no folder {name}"):
        resolve(name)


def test_a_file_is_no_folder_and_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*model\.bin"):
        resolve(str(tmp_path / "model.bin"))
    with pytest.raises(UserError, match=r"there is no file .*model\.gguf"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve(str(tmp_path))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    add_adapters(tiny_model("llama"), r=4).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "nothing-at-all"])
def test_a_hub_name_offline(name: str) -> None:
    with pytest.raises(UserError, match=r"is not in the local cache, and the hub is off \(HF_HUB_OFFLINE\)"):
        resolve(name)


def test_a_misspelt_folder_that_could_be_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Did you mean 'models/tiny-llama'\?"):
        resolve("models/tiny-lama")


def test_a_missing_gguf_file() -> None:
    with pytest.raises(UserError, match=r"there is no file models/x\.gguf"):
        resolve("models/x.gguf")


def test_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(UserError, match=r"config\.json is damaged: it is no JSON"):
        resolve(str(tmp_path))


def test_a_model_without_tokenizer(llama_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_folder / name, tmp_path / name)
    with pytest.raises(UserError, match=r"has no tokenizer\. .*tokenizer\.json"):
        read_tokenizer(resolve(str(tmp_path)))


def test_weights_quantised_by_others_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    config = resolve(str(llama_folder)).config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="quantised by gptq"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "model_type", "template", "chat"),
    [
        ("Llama-3.2-1B-Instruct", "llama", False, True),
        ("gemma-3-1b-it", "gemma3", False, True),
        ("Minerva-7B-italian", "llama", False, False),
        ("phi-iterated", "phi3", False, False),
        ("Qwen3-0.6B-Base", "qwen3", True, False),
        ("Qwen2.5-0.5B", "qwen2", True, False),
        ("Qwen2.5-0.5B-Instruct", "qwen2", True, True),
        ("gemma-3-1b-pt", "gemma3", True, False),
        ("some-model", "llama", True, True),
    ],
)
def test_an_instruct_model_is_known_by_name_or_template(name: str, model_type: str, template: bool, chat: bool) -> None:
    tokenizer = SimpleNamespace(chat_template="{{ messages }}" if template else None)
    assert looks_like_chat(ResolvedModel(name, {}, AutoConfig.for_model(model_type)), tokenizer) is chat
