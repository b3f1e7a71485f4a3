"""The model card: front matter that the hub reads, the figures, and nothing of one machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from steep.evaluation.score import DomainScore
from steep.export.base_weights import Kind
from steep.export.card import write_card
from steep.export.gate import Measured, compare
from steep.export.story import Base, Gated, Story, describe_base
from steep.model.resolve import resolve
from tests.tiny import save_tiny


def score(domain: str, bits: float, step: int = 9) -> DomainScore:
    return DomainScore(step, domain, 1.0, 2.72, bits, 1000, 2000, 3)


def story(**adapter: Any) -> Story:
    names = {"name": "corpus.jsonl", "domain": "ko", "documents": 12, "tokens": 3456}
    return Story(
        settings={
            "model": {"new_tokens": None, "untie_embeddings": False},
            "adapter": {
                "r": 8,
                "lora_alpha": 16.0,
                "use_rslora": True,
                "modules_to_save": ["lm_head"],
                "init_lora_weights": True,
                "use_dora": False,
                "lora_dropout": 0.0,
                **adapter,
            },
            "training": {"lr_scheduler_type": "cosine", "optim": "adamw_8bit", "loraplus_lr_ratio": 1.0, "seed": 42},
            "data": {
                "replay_share": 0.05,
                "sources": [{"path": "/home/ada/secret/corpus.jsonl", "hub": None}, {"hub": "wiki/pedia"}],
            },
        },
        plan={
            "base": "nf4",
            "compute_dtype": "bf16",
            "trained_dtype": "fp32",
            "parameters": {"trained": 12345},
            "learning_rate": 5e-5,
            "embedding_learning_rate": 5e-6,
            "steps": 9,
            "rows_per_step": 16,
            "epochs": 1.0,
            "data": {
                "max_length": 64,
                "sources": [
                    {**names, "role": "train", "path": "/home/ada/secret/corpus.jsonl"},
                    {**names, "name": "pedia", "role": "replay", "path": "wiki/pedia"},
                ],
            },
        },
        ledger={
            "targets": 5000,
            "targets_reached": 4999,
            "targets_trained": 4999,
            "epochs": 0.9998,
            "rows_trained": 144,
            "rows_refused": 16,
            "adds_up": True,
            "problems": [],
        },
        environment={"python": "3.12.1", "gpus": ["NVIDIA H100"], "packages": {"torch": "2.13.0", "peft": "0.21.2"}},
        before=[score("ko", 2.5, 0)],
        after=[score("ko", 1.75)],
        roles={"ko": "train"},
    )


def gated(kind: Kind, merged: float) -> Gated:
    ours, theirs = (Measured([score("ko", bits)], torch.ones(1, 3), torch.float32) for bits in (1.75, merged))
    other = compare(ours, Measured([score("ko", 1.9)], torch.ones(1, 3), torch.float32))
    return Gated(kind, kind == "dequantised", compare(ours, theirs), ours, theirs, other, "the run's held-out text")


def card(
    folder: Path, base: Base, form: str, gate: Gated | None = None, told: Story | None = None, **given: Any
) -> ModelCard:
    write_card(folder, base, told or story(), form=form, gated=gate, name="ada/ko", **given)
    return ModelCard.load(folder / "README.md")


HUB = Base("mistralai/Mistral-7B-v0.3", True, "main", None, {"license": "apache-2.0"})


def test_the_front_matter(tmp_path: Path) -> None:
    data = card(tmp_path, HUB, "merged", gated("dequantised", 1.7512)).data.to_dict()
    assert data["base_model"] == "mistralai/Mistral-7B-v0.3"
    assert data["license"] == "apache-2.0"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["datasets"] == ["wiki/pedia"]


def test_recipe_text_figures_ledger_gate_and_versions(tmp_path: Path) -> None:
    text = card(tmp_path, HUB, "merged", gated("dequantised", 1.7512)).text
    for said in (
        "| ko | 1.7500 | 1.7512 | +0.0012 |",
        "merged into the dequantised base that it was trained over",
        "would be +0.1500 bits per byte",
        "| ko | train | 2.500 | 1.750 |",
        "r 8, alpha 16, rank-stabilised",
        "nf4, computed in bf16",
        "| corpus.jsonl | ko | train | 12 | 3,456 |",
        "| wiki/pedia | ko | replay | 12 | 3,456 |",
        "| replay | 5% of the tokens |",
        "4,999 were trained at least once",
        "16 rows were in steps that were not applied. All sums agree.",
        "NVIDIA H100 with Python 3.12.1, torch 2.13.0, peft 0.21.2",
        'from_pretrained("ada/ko"',
        "vllm serve ada/ko",
    ):
        assert said in text
    assert "secret" not in text and "/home" not in text
    assert "worse" not in text


def test_a_loss_by_the_merge_is_said_loudly(tmp_path: Path) -> None:
    assert (
        "**The merged model is worse than the trained one by up to 0.1400 bits per byte.**"
        in card(tmp_path, HUB, "merged", gated("original", 1.89)).text
    )
    assert "worse" not in card(tmp_path, HUB, "merged", gated("original", 1.7549)).text


@pytest.mark.parametrize(
    ("base", "start", "stored_by", "by_steep"),
    [
        ("fp8", "loftq", None, True),
        ("fp8", True, None, False),
        ("nf4", "loftq", None, False),
        ("fp8", True, "fp8", False),
    ],
)
def test_a_loftq_adapter_opens_over_e4m3_as_steep_has_it(
    base: str, start: bool | str, stored_by: str | None, by_steep: bool, tmp_path: Path
) -> None:
    told = story(init_lora_weights=start)
    told = replace(told, plan={**told.plan, "base": base})
    text = card(tmp_path, replace(HUB, stored_by=stored_by), "adapter", told=told).text
    line = 'base, _ = steep.load("mistralai/Mistral-7B-v0.3", base="fp8", compute_dtype="bf16", revision="main")'
    assert (line in text) is ("holds the correction of what e4m3 lost" in text) is by_steep
    assert ("BitsAndBytesConfig" in text) is (base == "nf4")


def test_scores_of_two_arithmetics_are_told(tmp_path: Path) -> None:
    told = replace(story(), scored_otherwise="The first scores were otherwise.")
    assert (
        "1.750 | 2.72 | 2.72 | 1,000 |\n\nThe first scores were otherwise."
        in card(tmp_path, HUB, "merged", told=told).text
    )


def test_no_replay_is_stated_where_there_is_none(tmp_path: Path) -> None:
    told = story()
    told.plan["data"]["sources"][1]["role"] = "train"
    assert "| replay |" not in card(tmp_path, HUB, "merged", told=told).text


@pytest.mark.parametrize(("start", "stated"), [("pissa", True), ("loftq", False), (True, False)])
def test_a_pissa_adapter_is_saved_with_twice_the_rank(start: bool | str, stated: bool, tmp_path: Path) -> None:
    text = card(tmp_path, HUB, "adapter", told=story(init_lora_weights=start)).text
    assert "r 8, alpha 16" in text and ("| rank as saved | 16: r trained, and r that take" in text) is stated


@pytest.mark.parametrize("grew", [True, False])
def test_an_adapter_says_how_it_opens_and_who_refuses_it(grew: bool, tmp_path: Path) -> None:
    made = card(tmp_path, HUB, "adapter", vocabulary_grew=grew)
    assert made.data.to_dict()["library_name"] == "peft"
    assert 'PeftModel.from_pretrained(base, "ada/ko")' in made.text
    assert ("base.resize_token_embeddings(len(tokenizer), mean_resizing=False)" in made.text) is grew
    assert "vLLM and llama.cpp refuse adapters with trained embeddings" in made.text
    assert "local one" not in made.text


def test_a_gguf_card(tmp_path: Path) -> None:
    made = card(tmp_path, Base("x.gguf", False, stored="GGUF"), "gguf", gated("original", 1.75))
    assert "ollama create ko -f Modelfile" in made.text and "base_model" not in made.data.to_dict()
    assert "given as GGUF: its weights were converted to 16 bits" in made.text
    assert "merged into the 16-bit copy of the GGUF file" in made.text and "original" not in made.text


def test_a_loss_over_a_gguf_base_names_no_original(tmp_path: Path) -> None:
    base = Base("x.gguf", False, stored="GGUF")
    for form, bits in (("merged", 1.89), ("gguf", 1.75)):
        made = card(tmp_path, base, form, gated("original", bits))
        assert "original" not in made.text
    assert "would be" in card(tmp_path, base, "merged", gated("dequantised", 1.75)).text


@pytest.mark.parametrize(
    ("modules", "dora", "refused"),
    [
        (["lm_head"], False, "with trained embeddings. For"),
        (["lm_head"], True, "with trained embeddings and DoRA. For"),
        ([], True, "with DoRA. For"),
        ([], False, None),
    ],
)
def test_an_adapter_says_who_refuses_it_and_what_is_folded(
    modules: list[str], dora: bool, refused: str | None, tmp_path: Path
) -> None:
    text = card(tmp_path, HUB, "adapter", told=story(modules_to_save=modules, use_dora=dora)).text
    assert ("vLLM and llama.cpp refuse" in text) is (refused is not None)
    assert (refused or "") in text
    assert ("scale of each layer is folded into its `lora_B`" in text) is (not modules)


def test_a_local_base_is_called_by_its_last_name(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "private" / "tiny-llama")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n# x\n")
    base = describe_base(str(folder), None, resolve(str(folder)))
    assert (base.name, base.on_hub, base.stored) == ("tiny-llama", False, None)
    assert base.licence == {"license": "other", "license_name": "ours"}
    made = card(tmp_path, base, "merged")
    assert made.data.to_dict()["license_name"] == "ours" and "base_model" not in made.data.to_dict()
    assert "private" not in made.content
    assert "The base model, tiny-llama, was a local one" in card(tmp_path, base, "adapter").text
