"""A run from its file to its folder, and the two lines that a script changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from steep.config import RunConfig, parse_config
from steep.errors import UserError
from steep.run import evaluate_run, generate_run, train_run
from tests.tiny import documents, tiny_model


def run_file(model: Path, corpus: Path, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    given: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "base": "fp32"},
        "adapter": {"r": 8},
        "data": {
            "sources": [{"path": str(corpus)}],
            "max_length": 64,
            "holdout": 0.1,
        },
        "training": {
            "output_dir": str(folder),
            "max_steps": 6,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "save_steps": 3,
        },
        "evaluation": {"prompts": ["the river", "강물이"], "max_new_tokens": 4},
    }
    return parse_config({name: {**section, **sections.get(name, {})} for name, section in given.items()})


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder))
    return folder


def test_a_run_folder_has_all_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "run.yaml", "plan.json", "environment.json", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "proof.json",
        "ledger.json", "final", "checkpoint-3", "checkpoint-6",
    }  # fmt: skip
    assert [row["step"] for row in lines(finished / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert {row["step"] for row in lines(finished / "evaluation.jsonl")} == {0, 6}
    assert len([row for row in lines(finished / "samples.jsonl") if row["step"] == 0]) == 2
    assert json.loads((finished / "proof.json").read_text(encoding="utf-8"))["ok"]
    assert json.loads((finished / "ledger.json").read_text(encoding="utf-8"))["adds_up"]
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}


def test_the_samples_show_the_trained_model_too(finished: Path) -> None:
    assert {row["step"] for row in lines(finished / "samples.jsonl")} == {0, 6}


def test_it_learned(finished: Path) -> None:
    losses = {row["step"]: row["loss"] for row in lines(finished / "evaluation.jsonl")}
    assert losses[6] < losses[0] - 0.1


def test_final_opens_with_peft(finished: Path, llama_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(finished / "final"))
    assert len(AutoTokenizer.from_pretrained(finished / "final")) == 384
    saved = {row["domain"]: row for row in lines(finished / "evaluation.jsonl") if row["step"] == 6}
    from steep.config import load_config
    from steep.evaluation.perplexity import evaluate
    from steep.plan import plan_run

    corpus = plan_run(load_config(finished / "run.yaml")).corpus
    for score in evaluate(model, corpus.heldout, max_length=64, max_tokens=100_000):
        assert score.loss == pytest.approx(saved[score.domain]["loss"], rel=1e-6)


def test_evaluate_and_generate_a_finished_run(finished: Path) -> None:
    base, trained = evaluate_run(finished)
    rows = lines(finished / "evaluation.jsonl")
    assert [score.loss for score in base] == pytest.approx([row["loss"] for row in rows if row["step"] == 0], rel=1e-6)
    assert [score.loss for score in trained] == pytest.approx(
        [row["loss"] for row in rows if row["step"] == 6], rel=1e-6
    )
    texts = generate_run(finished, "the river", max_new_tokens=8)
    assert set(texts) == {"base", "trained"}
    assert texts["base"] != texts["trained"]


def test_a_folder_with_another_run_is_refused(finished: Path, llama_folder: Path, korean_corpus: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    with pytest.raises(UserError, match="holds another run"):
        train_run(run_file(llama_folder, korean_corpus, finished))
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_resumed_from_half_way(finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ko"
    shutil.copytree(finished, folder)
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(folder / name)
    for name in ("proof.json", "ledger.json"):
        (folder / name).unlink()
    cut = [row for row in lines(finished / "metrics.jsonl") if row["step"] <= 4]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in cut) + '{"step": 5, "lo', encoding="utf-8"
    )
    config = run_file(llama_folder, korean_corpus, folder)
    train_run(config, resume=True)
    fields = ("step", "loss", "grad_norm", "learning_rate", "embedding_learning_rate", "tokens")
    expected, got = lines(finished / "metrics.jsonl"), lines(folder / "metrics.jsonl")
    assert [[row[field] for field in fields] for row in got] == [[row[field] for field in fields] for row in expected]
    one, two = (root / "final" / "adapter_model.safetensors" for root in (finished, folder))
    assert one.read_bytes() == two.read_bytes()
    for name in ("proof.json", "ledger.json"):
        assert json.loads((folder / name).read_text(encoding="utf-8")) == json.loads(
            (finished / name).read_text(encoding="utf-8")
        )
    evaluated = lines(folder / "evaluation.jsonl")
    assert [row["step"] for row in evaluated] == [row["step"] for row in lines(finished / "evaluation.jsonl")]


def test_resuming_a_finished_run_changes_nothing(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ko"
    shutil.copytree(finished, folder)
    train_run(run_file(llama_folder, korean_corpus, folder), resume=True)
    one, two = (root / "final" / "adapter_model.safetensors" for root in (finished, folder))
    assert one.read_bytes() == two.read_bytes()
    assert len(lines(folder / "metrics.jsonl")) == 6
    assert len(lines(folder / "evaluation.jsonl")) == len(lines(finished / "evaluation.jsonl"))


def test_resume_refuses_another_run_file(finished: Path, llama_folder: Path, korean_corpus: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.r: 8 → 16"):
        train_run(run_file(llama_folder, korean_corpus, finished, adapter={"r": 16}), resume=True)


def test_resume_without_a_run(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        train_run(run_file(llama_folder, korean_corpus, tmp_path / "none"), resume=True)


def test_nothing_held_out(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train_run(run_file(llama_folder, korean_corpus, folder, data={"holdout": 0}))
    assert result["steps"] == 6 and result["before"] == result["after"] == []
    assert (folder / "final" / "adapter_model.safetensors").is_file()


def test_evaluations_on_the_way(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_run(run_file(llama_folder, korean_corpus, folder, training={"eval_steps": 2}))
    assert [row["step"] for row in lines(folder / "evaluation.jsonl")] == [0, 2, 4, 6]


def test_a_plain_transformers_script(llama_folder: Path, tmp_path: Path) -> None:
    """A script of transformers and PEFT; these two lines are the change."""
    from steep import Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32),
        LoraConfig(
            r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
        ),
    )
    rows = [tokenizer(text) for text in documents("ko", 16)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        embedding_learning_rate=1e-3,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], data_collator=collator)
    first = trainer.evaluate()["eval_loss"]
    output = trainer.train()
    assert output.global_step == 8
    assert trainer.proof is not None and trainer.proof.report()["ok"]
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.1
    trainer.save_model(str(tmp_path / "final"))
    opened = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "final"))
    batch = collator([dict(row) for row in rows[:4]])
    with torch.no_grad():
        loss = float(opened(**batch).loss)
    assert loss == pytest.approx(last, rel=1e-5)
