"""The scripts of examples/, each run as a user would, on a tiny model. `examples/demo.py` has `make demo`."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import wandb
from datasets import config
from peft import LoraConfig, PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from examples import continue_adapter, demo, open_result, trackers, trl_sft, two_lines
from steep.config import parse_config
from steep.errors import UserError
from steep.result import generate_run
from steep.run import train_run
from steep.training.adamw8bit import AdamW8bit
from tests.tiny import documents, save_tiny, tiny_model

RATES = ["--learning-rate", "1e-2"]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts run in a folder of their own; what `datasets` keeps goes there too."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("ko", 48)), encoding="utf-8")
    return str(file)


def loss_on(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Mean loss of plain transformers over whole texts."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([tokenizer(text) for text in texts])
    mixed = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        return float(model.eval()(**batch).loss)


# --- two lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_two_lines(tied: bool, corpus_file: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base", tied=tied)
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), documents("ko", 8)
    before = loss_on(AutoModelForCausalLM.from_pretrained(folder), tokenizer, texts)
    trainer = two_lines.main(
        ["--model", str(folder), "--data", corpus_file, "--output", "run", "--steps", "8", "--rank", "8", *RATES]
    )
    assert trainer.state.global_step == 8
    assert trainer.proof is not None and trainer.proof.report()["ok"]
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert (rates["adapters_b"], rates["embeddings"]) == (1e-2, 1e-3)
    after = loss_on(trainer.model, tokenizer, texts)
    assert after < before - 0.1
    first: Any = trainer.train_dataset  # transformers' own way to score rows
    assert trainer.evaluate(first.select(range(8)))["eval_loss"] == pytest.approx(after, rel=1e-5)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), "run/final")
    assert loss_on(opened, tokenizer, texts) == pytest.approx(after, rel=1e-5)


def test_the_script_differs_from_a_plain_one_in_two_places() -> None:
    """The lines that it marks are the only ones that name steep or its field; the other imports are the libraries'."""
    source = Path(two_lines.__file__).read_text(encoding="utf-8").split('"""')[2].splitlines()
    marked = [line for line in source if "# line " in line]
    assert len(marked) == 2
    assert marked[0].startswith("from steep import Trainer, TrainingArguments")
    assert marked[1].strip().startswith("embedding_learning_rate=")
    others = [line.split("#")[0] for line in source if line not in marked]
    assert not [line for line in others if "steep" in line or "embedding_learning_rate" in line]


# --- TRL -------------------------------------------------------------------------------------------------------


# TRL 1.16 sets this argument in each of its configs, under the name that transformers 5.23 calls old.
trl_speaks = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@trl_speaks
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_trl(base: str, corpus_file: str, llama_folder: Path) -> None:
    tokenizer, texts = AutoTokenizer.from_pretrained(llama_folder), documents("ko", 8)
    before = loss_on(AutoModelForCausalLM.from_pretrained(llama_folder), tokenizer, texts)
    words = ["--model", str(llama_folder), "--data", corpus_file, "--output", "run", "--base", base]
    trainer = trl_sft.main([*words, "--steps", "8", "--max-length", "64", "--rank", "8", *RATES])
    model: Any = trainer.model
    assert type(model).__module__.startswith("peft")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.bfloat16 if base == "nf4" else torch.float32}  # TRL's doing, and why the example says so
    optimizer: Any = trainer.optimizer
    assert isinstance(optimizer.optimizer, AdamW8bit)  # inside accelerate's
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert (rates["adapters_b"], rates["embeddings"]) == (1e-2, 1e-3)
    assert loss_on(model, tokenizer, texts) < before - 0.1
    start = tiny_model("llama").state_dict()
    for name in ("embed_tokens", "lm_head"):
        (trained,) = (p for full, p in model.named_parameters() if f"{name}.modules_to_save" in full)
        (first,) = (p for full, p in start.items() if full.endswith(f"{name}.weight"))
        assert not torch.equal(trained.float(), first)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), "run/final")
    assert loss_on(opened, tokenizer, texts) < before - 0.1


@trl_speaks
def test_documents_that_trl_packs_do_not_see_each_other(corpus_file: str, llama_folder: Path) -> None:
    """The packed row's loss is that of its documents one by one, and with an attention mask or a cache it is not."""
    words = ["--model", str(llama_folder), "--data", corpus_file, "--output", "run", "--base", "fp32"]
    trainer = trl_sft.main([*words, "--steps", "1", "--max-length", "128", "--rank", "8", *RATES])
    batch: dict[str, Any] = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 3  # several documents a row
    model: Any = trainer.model
    model.eval()
    with torch.no_grad():
        packed = float(trainer.compute_loss(model, dict(batch)))
        total, count = 0.0, 0
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            ids = batch["input_ids"][:, start:end]
            if end - start > 1:
                total += float(model(input_ids=ids, labels=ids).loss) * (end - start - 1)
                count += end - start - 1
        seen = float(model(batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]),
                           position_ids=batch["position_ids"], labels=batch["labels"]).loss)  # fmt: skip
    assert packed == pytest.approx(total / count, rel=1e-5)
    assert abs(seen - packed) > 1e-3


# --- the result in plain PEFT ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ko"
    tree = {
        "model": {"name": str(llama_folder), "base": "fp32"},
        "adapter": {"r": 8},
        "data": {"sources": [{"path": str(korean_corpus)}], "max_length": 64, "holdout": 0},
        "training": {
            "output_dir": str(folder),
            "max_steps": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
        },
    }
    train_run(parse_config(tree))
    return folder


def test_a_result_opens_and_writes(finished: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--adapter", str(finished / "final"), "--prompt", "the river", "--max-new-tokens", "12"]
    text = open_result.main(words)
    both = generate_run(finished, "the river", max_new_tokens=12)
    assert text == "the river" + both["trained"]
    assert both["trained"] != both["base"]
    assert capsys.readouterr().out.strip() == text.strip()
    assert open_result.main([*words, "--model", str(llama_folder), "--four-bit"]).startswith("the river")


# --- somebody else's adapter -------------------------------------------------------------------------------------


def foreign_adapter(folder: Path, **settings: Any) -> str:
    """What plain PEFT writes, moved off its start."""
    torch.manual_seed(3)
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(folder))
    return str(folder)


FOREIGN = {
    "attention": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all with embeddings": {
        "r": 5, "use_rslora": True, "target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_adapter_made_elsewhere_goes_on(kind: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    adapter = foreign_adapter(tmp_path / "theirs", **FOREIGN[kind])
    words = ["--model", str(llama_folder), "--adapter", adapter, "--data", str(korean_corpus), "--base", "fp32"]
    trainer = continue_adapter.main([*words, "--output", "run", "--steps", "6", "--max-length", "64", *RATES])
    report = trainer.proof.report() if trainer.proof else {}
    assert report["ok"]
    groups = {record["group"] for record in report["trained"].values()}
    assert groups == {"adapters_a", "adapters_b"} | ({"embeddings"} if "embeddings" in kind else set())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    theirs, ours = (json.loads((Path(folder) / "adapter_config.json").read_text()) for folder in (adapter, "run/final"))
    for field in ("r", "lora_alpha", "use_rslora", "modules_to_save"):
        assert ours[field] == theirs[field]
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    # The first step's loss is their adapter's, not that of a fresh one.
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    texts, tokenizer = documents("en", 4), AutoTokenizer.from_pretrained(llama_folder)
    plain = loss_on(base, tokenizer, texts)
    assert abs(loss_on(PeftModel.from_pretrained(base, adapter), tokenizer, texts) - plain) > 1e-4


def test_a_rate_for_embeddings_that_do_not_train_is_refused(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    adapter = foreign_adapter(tmp_path / "theirs", **FOREIGN["attention"])
    words = ["--model", str(llama_folder), "--adapter", adapter, "--data", str(korean_corpus), "--base", "fp32"]
    with pytest.raises(UserError, match=r"embedding_learning_rate: it is set but no embedding is trained"):
        continue_adapter.main([*words, "--max-length", "64", "--embedding-learning-rate", "1e-3"])


# --- trackers ----------------------------------------------------------------------------------------------------

SCALARS = {
    "train/loss", "train/learning_rate", "train/embedding_learning_rate", "train/tokens_per_second",
    "train/peak_memory_bytes", "eval/loss", "eval/text_bits_per_byte",
}  # fmt: skip


def tracked(model: Path, corpus: Path, output: Path, tracker: str, how: str) -> None:
    words = ["--model", str(model), "--data", str(corpus), "--output", str(output), "--base", "fp32"]
    trackers.main([*words, "--tracker", tracker, "--how", how, "--steps", "3", "--max-length", "64", "--rank", "8"])


@pytest.mark.parametrize("how", ["run-file", "arguments"])
def test_tensorboard(
    how: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    tracked(llama_folder, korean_corpus, tmp_path / "run", "tensorboard", how)
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("*tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("eval/text_bits_per_byte")] == [0, 3]
    adapters, embeddings = (events.Scalars(f"train/{name}learning_rate")[-1].value for name in ("", "embedding_"))
    assert embeddings == pytest.approx(adapters / 10)
    assert not list((tmp_path / "here").iterdir())


def wandb_history(file: Path) -> Iterator[dict[str, Any]]:
    """The logged rows of an offline run: protocol buffers in LevelDB's log format, behind a header of 7 bytes.

    A record is cut where a block of 32 KiB ends; each piece has a checksum, its length and its kind (1 whole, 2 first,
    3 middle, 4 last) in front.
    """
    data, place, whole = file.read_bytes(), 7, b""
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Everything of wandb's in folders of its own, and nothing sent, error reports included."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        (tmp_path / name.lower()).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    yield tmp_path / "wandb_dir"
    wandb.teardown()


def test_weights_and_biases_offline(
    wandb_offline: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    tracked(llama_folder, korean_corpus, tmp_path / "run", "wandb", "run-file")
    wandb.finish()
    wandb.teardown()  # waits for the process that writes; without it the file may still be empty
    (file,) = wandb_offline.rglob("*.wandb")
    assert file.parent.name.startswith("offline-run-")
    rows = list(wandb_history(file))
    assert set().union(*rows) >= SCALARS
    losses = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    name = "eval/text_bits_per_byte"
    bits = {row["train/global_step"]: row[name] for row in rows if name in row}
    metrics, scores = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "evaluation.jsonl")
    )
    assert losses == {row["step"]: row["loss"] for row in metrics}
    assert bits == {row["step"]: row["bits_per_byte"] for row in scores}
    assert not list((tmp_path / "here").iterdir())
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in names if "wandb" in name]


# --- the demo --------------------------------------------------------------------------------------------------


def test_the_demo_names_the_command_as_it_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = (tmp_path / "here" / name / "bin" for name in (".venv", "other"))
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "steep").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    for path, called in {"": ".venv/bin/steep", str(other): ".venv/bin/steep", str(own): "steep"}.items():
        monkeypatch.setenv("PATH", path)
        assert demo.called() == called
