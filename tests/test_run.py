"""A run from its file to its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from steep import run
from steep.config import load_config, parse_config
from steep.errors import RunError, UserError
from steep.evaluation.perplexity import evaluate
from steep.model.adapters import add_adapters
from steep.model.load import keep_4bit_layout
from steep.model.original_module import OriginalModule
from steep.plan import plan_run
from steep.result import evaluate_run, generate_run, load_result
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.terminal import Terminal
from steep.training.checkpoint import checkpoints, step_of
from steep.training.trainer import Trainer
from tests.tiny import documents, save_tiny
from tests.training.helpers import contents


def run_file(model: Path, corpus: Path, folder: Path, /, **sections: dict[str, Any]) -> RunConfig:
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
    if "rows_per_step" in sections.get("training", {}):
        del given["training"]["gradient_accumulation_steps"]
    return parse_config({name: {**section, **sections.get(name, {})} for name, section in given.items()})


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder))
    return folder


@pytest.fixture(scope="module")
def two_domains(korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    other = tmp_path_factory.mktemp("other") / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("en", 330)[300:]))
    return {"sources": [{"path": str(korean_corpus)}, {"path": str(other), "role": "heldout"}]}


@pytest.fixture(scope="module")
def finished_of_two(
    two_domains: dict[str, Any], llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder, data=two_domains))
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


def test_a_finished_run_that_was_killed_before_it_deleted_old_checkpoints(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    def config(limit: int) -> RunConfig:
        training = {"save_steps": 2, "save_total_limit": limit}
        return run_file(llama_folder, korean_corpus, tmp_path / "run", training=training)

    train_run(config(9))
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [2, 4, 6]
    train_run(config(2), resume=True)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [4, 6]


def test_the_plan_knows_the_size_of_checkpoints(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    training = {"optim": "adamw_torch", "max_steps": 2, "save_steps": 1, "save_total_limit": 9}
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", training=training)
    train_run(config)
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    size = sum((tmp_path / "run" / "checkpoint-2" / name).stat().st_size for name in names)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    planned = plan["host_bytes"]["copy of a checkpoint"]
    assert 0.95 * size < planned < size  # less than it by the headers of the files
    assert plan["disk_bytes"]["checkpoints"] == 3 * planned  # two, and one that is being written
    going_back = run_file(
        llama_folder, korean_corpus, tmp_path / "other", training={**training, "spike_action": "rollback"}
    )
    assert plan_run(going_back).disk["checkpoints"] == 4 * planned  # the start is one too


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
    from steep.evaluation.perplexity import evaluate
    from steep.plan import plan_run

    corpus = plan_run(load_config(finished / "run.yaml")).corpus
    for score in evaluate(model, corpus.heldout, max_length=64, max_tokens=100_000):
        assert score.loss == pytest.approx(saved[score.domain]["loss"], rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_final_of_a_4bit_run_opens_with_peft(
    tied: bool, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny("llama", tmp_path / "base", tied=tied)
    trainers: list[Trainer] = []
    monkeypatch.setattr(run, "Trainer", lambda **given: trainers.append(Trainer(**given)) or trainers[-1])
    train_run(run_file(base, korean_corpus, tmp_path / "run", model={"base": "nf4"}))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
    keep_4bit_layout(stock)  # on some CPUs bitsandbytes would compute in bf16, whatever it was told
    opened: Any = PeftModel.from_pretrained(stock, str(tmp_path / "run" / "final")).eval()
    tokens = torch.randint(3, 384, (2, 24))
    with torch.no_grad():
        expected, got = trainers[0].model.eval()(tokens).logits, opened(tokens).logits
        with opened.disable_adapter():
            untrained = opened(tokens).logits
    # The same codes, weights and kernels: nothing but the order of a sum could differ.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert (got - untrained).abs().max() > 0.5


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


@pytest.mark.parametrize("sections", [{}, {"data": {"holdout": 0}, "evaluation": {"prompts": []}}])
def test_frequencies_that_each_forward_sets_are_no_change(
    sections: dict[str, Any], korean_corpus: Path, tmp_path: Path
) -> None:
    """As in Phi-3 and Phi-4-mini: a buffer holds the short or the long ones, as the last batch was."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 16.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    }  # fmt: skip
    base = save_tiny("llama", tmp_path / "base", rope_parameters=rope)
    train_run(run_file(base, korean_corpus, tmp_path / "whole", **sections))
    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(resumed / name)
    train_run(run_file(base, korean_corpus, resumed, **sections), resume=True)
    weights = "final/adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    for folder in (tmp_path / "whole", resumed):
        assert json.loads((folder / "proof.json").read_text(encoding="utf-8"))["ok"]


@pytest.mark.parametrize("name", ["evaluation.jsonl", "samples.jsonl"])
def test_what_was_measured_in_part_at_the_end_is_measured_anew(
    name: str,
    two_domains: dict[str, Any],
    finished_of_two: Path,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
) -> None:
    """As a process leaves it that is killed while it writes: of two lines one and the half of the other."""
    folder = shutil.copytree(finished_of_two, tmp_path / "ko")
    shutil.rmtree(folder / "final")
    text = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
    first, whole = [line for line in text if json.loads(line)["step"] < 6], lines(folder / name)
    assert len(whole) == 2 * len(first) == 4
    (folder / name).write_text("".join(text[:3]) + text[3][:20], encoding="utf-8")
    train_run(run_file(llama_folder, korean_corpus, folder, data=two_domains), resume=True)
    assert lines(folder / name) == whole
    assert (folder / "final").is_dir()


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
    with pytest.raises(UserError, match=f"{Path.cwd()}/runs/none holds no run to go on with.* its own run.yaml"):
        train_run(run_file(llama_folder, korean_corpus, Path("runs/none")), resume=True)


def test_a_place_that_takes_no_file(llama_folder: Path, korean_corpus: Path) -> None:
    """Also as root, whom permissions do not stop."""
    said = r"^training\.output_dir: /proc cannot be written into: no file can be made there\. Give a folder"
    with pytest.raises(UserError, match=said):
        plan_run(run_file(llama_folder, korean_corpus, Path("/proc/runs/ko")))


@pytest.mark.parametrize("kind", ["cosine", "constant_with_warmup", "warmup_stable_decay", "polynomial"])
def test_a_single_step_of_warmup_is_refused(kind: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    def plan(**training: Any) -> int:
        kinds = {"lr_scheduler_type": kind, "max_steps": 1, **training}
        return plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run", training=kinds)).steps

    if kind == "warmup_stable_decay":  # which has no room for it
        with pytest.raises(UserError, match=r"decay_steps: the phases are longer than the 1 steps"):
            plan()
        return
    said = r"^training\.warmup_steps: the run has one step, of \d rows where the text has \d+, and a warm-up begins at"
    with pytest.raises(UserError, match=said):
        plan()
    assert plan(warmup_steps=0) == plan(lr_scheduler_type="constant") == 1
    if kind != "polynomial":
        assert plan(warmup_lr_rate=0.1) == 1


@pytest.mark.parametrize("place", ["checkpoint-3/ko", "final/ko", "checkpoint-9"])
def test_a_place_that_a_run_may_delete(place: str, finished: Path, llama_folder: Path, korean_corpus: Path) -> None:
    with pytest.raises(UserError, match=r"^training\.output_dir: .* lies in .*, which belongs to that run"):
        plan_run(run_file(llama_folder, korean_corpus, finished / place))


def test_a_folder_with_something_else_in_it(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"is not empty\. Give another folder, or empty it\.$"):
        train_run(run_file(llama_folder, korean_corpus, tmp_path))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"^training\.lr_scheduler_kwargs: .*cosine_with_min_lr refuses"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"foo": 3}},
            r"^training\.lr_scheduler_kwargs: .*polynomial refuses them: .*'foo'",
        ),
        ({"warmup_steps": 7}, r"^training\.warmup_steps: a warm-up of 7 steps is longer than the 6"),
        ({"warmup_steps": 7, "lr_scheduler_type": "polynomial"}, r"^training\.warmup_steps: a warm-up of 7 steps"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "cooldown_steps": 6, "stable_lr_rate": 0.5},
            r"^training\.cooldown_steps: the phases are longer than the 6 steps",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_the_plan(
    training: dict[str, Any], message: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run", training=training))


def test_other_text_is_said_before_it_is_scored(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    corpus, run = tmp_path / "corpus", tmp_path / "ko"
    shutil.copytree(korean_corpus, corpus)
    shutil.copytree(finished, run)
    text = (run / "run.yaml").read_text(encoding="utf-8").replace(str(korean_corpus), str(corpus))
    (run / "run.yaml").write_text(text, encoding="utf-8")
    terminal = Terminal(quiet=True)
    warned: list[str] = []
    terminal.warn = lambda text: warned.append(text)
    evaluate_run(run, terminal=terminal)
    assert warned == []
    with (corpus / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more document"}\n')
    evaluate_run(run, terminal=terminal)
    assert len(warned) == 1 and warned[0].startswith("the text is not what the run had")


def test_nothing_held_out(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train_run(run_file(llama_folder, korean_corpus, folder, data={"holdout": 0}))
    assert result["steps"] == 6 and result["before"] == result["after"] == []
    assert (folder / "final" / "adapter_model.safetensors").is_file()


def test_evaluations_on_the_way(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_run(run_file(llama_folder, korean_corpus, folder, training={"eval_steps": 2}))
    assert [row["step"] for row in lines(folder / "evaluation.jsonl")] == [0, 2, 4, 6]


def test_tensorboard_gets_every_logged_step(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run folder, what is evaluated before the first step too, and nothing in the current folder."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "run"
    train_run(run_file(llama_folder, korean_corpus, folder, training={"report_to": "tensorboard", "logging_steps": 2}))
    assert not list((tmp_path / "here").iterdir())
    (written,) = {path.parent for path in folder.rglob("*tfevents*")}
    events = EventAccumulator(str(written)).Reload()
    for file, name in (("metrics.jsonl", "train/loss"), ("evaluation.jsonl", "eval/loss")):
        expected, got = lines(folder / file), events.Scalars(name)
        assert [event.step for event in got] == [row["step"] for row in expected]
        assert [event.value for event in got] == pytest.approx([row["loss"] for row in expected], rel=1e-6)  # fp32
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_an_attention_that_gemma2_cannot_have_is_refused(attention: str, korean_corpus: Path, tmp_path: Path) -> None:
    """transformers has no sdpa for this model, and flash-attn is not installed here."""
    model = save_tiny("gemma2", tmp_path / "gemma2")
    config = run_file(model, korean_corpus, tmp_path / "run", model={"attn_implementation": attention})
    with pytest.raises(UserError, match=rf"^model\.attn_implementation: {attention} cannot be used"):
        plan_run(config)
    eager = run_file(model, korean_corpus, tmp_path / "run", model={"attn_implementation": "eager"})
    assert plan_run(eager).steps == 6


def test_a_run_over_a_16bit_base(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """fp32 weights are trained over a bf16 base: everything runs under autocast, samples and `steep eval` too."""
    folder = tmp_path / "run"
    train_run(run_file(llama_folder, korean_corpus, folder, model={"base": "bf16"}))
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert (plan["base"], plan["compute_dtype"], plan["trained_dtype"]) == ("bf16", "bf16", "fp32")
    assert {row["step"] for row in lines(folder / "samples.jsonl")} == {0, 6}
    rows = {row["step"]: row for row in lines(folder / "evaluation.jsonl")}
    (base,), (trained,) = evaluate_run(folder)
    assert (base.loss, trained.loss) == (rows[0]["loss"], rows[6]["loss"])
    assert generate_run(folder, "the river", max_new_tokens=4).keys() == {"base", "trained"}


@pytest.mark.parametrize(
    ("section", "change", "field"),
    [
        ("training", {"seed": 7}, "training.seed"),
        ("training", {"per_device_train_batch_size": 1}, "training.per_device_train_batch_size"),
        ("training", {"gradient_accumulation_steps": 2}, "training.gradient_accumulation_steps"),
        ("training", {"learning_rate": 1e-3}, "training.learning_rate"),
        ("training", {"adam_beta2": 0.9}, "training.adam_beta2"),
        ("adapter", {"r": 4}, "adapter.r"),
        ("data", {"max_length": 32}, "data.max_length"),
        ("model", {"trained_dtype": "bf16", "compute_dtype": "bf16"}, "model.trained_dtype"),
    ],
)
def test_a_resume_with_another_run_file_is_refused(
    section: str, change: dict[str, Any], field: str, finished: Path, llama_folder: Path, korean_corpus: Path
) -> None:
    before = (finished / "run.yaml").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=rf"--resume: the run file differs.*{field}: .* → "):
        train_run(run_file(llama_folder, korean_corpus, finished, **{section: change}), resume=True)
    assert (finished / "run.yaml").read_text(encoding="utf-8") == before


def stopped(model: Path, corpus: Path, folder: Path) -> RunConfig:
    """A run of which only the checkpoint at step 3 is left."""
    config = run_file(model, corpus, folder)
    train_run(config)
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(folder / name)
    return config


def test_a_resume_with_other_text_is_refused(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(korean_corpus, tmp_path / "corpus")
    config = stopped(llama_folder, corpus, tmp_path / "run")
    text = (corpus / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (corpus / "corpus.jsonl").write_text("".join(reversed(text)), encoding="utf-8")
    changed = r"--resume: the text is not what the run began with: data\.sources\[0\] .*: corpus\.jsonl has changed"
    with pytest.raises(UserError, match=changed):
        train_run(config, resume=True)
    (corpus / "corpus.jsonl").write_text("".join(text), encoding="utf-8")
    train_run(config, resume=True)
    assert json.loads((tmp_path / "run" / "ledger.json").read_text(encoding="utf-8"))["adds_up"]


def test_a_resume_over_another_base_is_refused_before_it_trains(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(llama_folder, tmp_path / "base")
    config = stopped(base, korean_corpus, tmp_path / "run")
    left = contents(tmp_path / "run")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].view(-1)[-1] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    other = r"another base than the one below .*checkpoint-3: 1 of \d+ frozen tensors differ, .*layers\.1\.mlp\.up_proj"
    with pytest.raises(UserError, match=rf"^--resume: model\.name is {other}"):
        train_run(config, resume=True)
    assert contents(tmp_path / "run") == left


def test_a_start_that_was_killed_goes_on(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """Before the first checkpoint a resumed run is the run from its beginning."""
    config = run_file(llama_folder, korean_corpus, tmp_path / "run")
    train_run(config)
    whole = lines(tmp_path / "run" / "metrics.jsonl")
    for name in ("checkpoint-3", "checkpoint-6", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    train_run(config, resume=True)
    again = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    assert [row["step"] for row in lines(tmp_path / "run" / "evaluation.jsonl")] == [0, 6]


def test_two_processes_do_not_train_in_one_folder(finished: Path, llama_folder: Path, korean_corpus: Path) -> None:
    with RunFolder(finished).locked(), pytest.raises(UserError, match="another process trains in"):
        train_run(run_file(llama_folder, korean_corpus, finished), resume=True)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("training", {"lr_scheduler_type": "cosin"}, r"training\.lr_scheduler_type: 'cosin' .*Did you mean 'cosine'"),
        ("training", {"lr_scheduler_type": "reduce_lr_on_plateau"}, r"training\.lr_scheduler_type: .*is unknown"),
        ("training", {"lr_scheduler_type": "greedy"}, r"training\.lr_scheduler_type: .*is unknown"),
        ("training", {"optim": "adamw8bit"}, r"training\.optim: 'adamw8bit' is unknown.*Did you mean 'adamw_8bit'"),
        (
            "training",
            {"report_to": "tensorbord"},
            r"training\.report_to: 'tensorbord' is unknown.*mean 'tensor",
        ),
        (
            "training",
            {"report_to": "dvclive"},
            r"training\.report_to: the package of dvclive is not inst",
        ),
        ("training", {"save_steps": 2.5}, r"training: transformers refuses it: .*save_steps"),
        ("training", {"logging_steps": 1.5}, r"training: transformers refuses it: .*logging_steps"),
        ("training", {"lr_scheduler_type": "constant", "min_lr_rate": 0.1}, r"training\.min_lr_rate: 0\.1 has no mean"),
        (
            "training",
            {"lr_scheduler_kwargs": {"num_cycles": 3}},
            r"training\.lr_scheduler_kwargs: they belong to transf",
        ),
        ("evaluation", {"stride": 64}, r"evaluation\.stride: 64 leaves a window no context"),
        ("model", {"compute_dtype": "fp16"}, r"model\.compute_dtype: fp16 needs a GPU"),
        ("model", {"base": "bf16", "compute_dtype": "fp32"}, r"model\.compute_dtype: fp32 products .* in bf16"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_folder_is_made(
    section: str, change: dict[str, Any], message: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_run(run_file(llama_folder, korean_corpus, tmp_path / "run", **{section: change}))
    assert not (tmp_path / "run").exists()


def test_evaluations_without_held_out_text_are_refused(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", data={"holdout": 0}, training={"eval_steps": 2})
    with pytest.raises(UserError, match=r"training\.eval_steps: there is no held-out text"):
        train_run(config)


def test_a_constant_rate_with_the_other_defaults(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    train_run(run_file(llama_folder, korean_corpus, tmp_path / "run", training=schedule))
    rates = [row["learning_rate"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 1e-2, 1e-2, 1e-2])


def test_a_run_whose_proof_fails_says_so(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*given: Any, **settings: Any) -> Any:
        model = add_adapters(*given, **settings)
        name = "model.layers.1.self_attn.v_proj.lora_B.default"
        module = next(module for full, module in model.named_modules() if full.endswith(name))
        module.register_forward_hook(lambda module, inputs, output: output.detach())
        return model

    monkeypatch.setattr(run, "add_adapters", cut_off)
    with pytest.raises(RunError, match="v_proj"):
        train_run(run_file(llama_folder, korean_corpus, tmp_path / "run"))
    proof = json.loads((tmp_path / "run" / "proof.json").read_text(encoding="utf-8"))
    assert (proof["complete"], proof["ok"]) == (True, False)
    failed = [name for name, record in proof["trained"].items() if not record["trained"]]
    assert failed and all("layers.1.self_attn.v_proj" in name for name in failed)
    assert not (tmp_path / "run" / "final").exists()


def test_embeddings_that_were_frozen_by_mistake_stop_the_run(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a known tool's recipe did for months."""

    def frozen(*given: Any, **settings: Any) -> Any:
        model = add_adapters(*given, **settings)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.requires_grad_(False)
        return model

    monkeypatch.setattr(run, "add_adapters", frozen)
    with pytest.raises(RunError, match=r"16,384 values of the model require a gradient, and 65,536 are meant to train"):
        train_run(run_file(llama_folder, korean_corpus, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_last_samples_are_taken_also_where_an_evaluation_ends_the_run(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    train_run(run_file(llama_folder, korean_corpus, tmp_path / "run", training={"eval_steps": 3}))
    assert [row["step"] for row in lines(tmp_path / "run" / "evaluation.jsonl")] == [0, 3, 6]
    assert {row["step"] for row in lines(tmp_path / "run" / "samples.jsonl")} == {0, 6}


def test_a_run_is_evaluated_from_any_folder(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    shutil.copytree(korean_corpus, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    train_run(run_file(Path("model"), Path("corpus"), Path("run")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base, trained = evaluate_run(tmp_path / "run")
    assert trained[0].loss < base[0].loss


def test_a_run_goes_on_from_any_folder_and_wherever_its_own_was_moved(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_run(run_file(llama_folder, korean_corpus, Path("run")))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    copy = Path(shutil.copy(tmp_path / "run" / "run.yaml", elsewhere / "copy.yaml"))
    assert load_config(copy).training.output_dir == str(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    weights = (moved / "final" / "adapter_model.safetensors").read_bytes()
    for part in ("final", "checkpoint-6"):
        shutil.rmtree(moved / part)
    train_run(load_config(moved / "run.yaml"), resume=True)
    assert (moved / "final" / "adapter_model.safetensors").read_bytes() == weights
    assert list(elsewhere.iterdir()) == [copy] and not (tmp_path / "run").exists()
    given = ["--training.output_dir", str(tmp_path / "new")]
    assert load_config(moved / "run.yaml", given).training.output_dir == str(tmp_path / "new")
    monkeypatch.chdir(moved)
    assert load_config("run.yaml").training.output_dir == str(moved)
    users = elsewhere / "run.yaml"  # a file of a user's own, beside a plan
    users.write_bytes((moved / "run.yaml").read_bytes())
    shutil.copy(moved / "plan.json", elsewhere)
    assert load_config(users).training.output_dir == str(moved)
    file = moved / "run.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace(str(moved), "/proc/none"), encoding="utf-8")
    evaluate_run(moved)  # which writes nothing to the folder that the file names


@pytest.mark.parametrize(
    ("loss", "speed", "said"),
    [(1.5, 10.0, "loss 1.5000"), (None, 10.0, "loss not finite"), (None, 0.0, "passed over")],
)
def test_what_is_said_of_a_step_without_a_loss(
    loss: float | None, speed: float, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    row = {"step": 1, "loss": loss, "learning_rate": 1e-3, "embedding_learning_rate": None, "peak_memory_bytes": 1}
    with Terminal().training(1, 0) as show:
        show({**row, "tokens_per_second": speed})
    assert f"step 1/1 · {said} · " in capfd.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_the_originals_of_embeddings_are_in_no_memory(
    tied: bool, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the run's nor in that of `steep eval`; and the base scores what it does with plain transformers."""
    base = save_tiny("llama", tmp_path / "base", tied=tied)
    models: list[Any] = []
    monkeypatch.setattr(run, "Trainer", lambda **given: models.append(given["model"]) or Trainer(**given))
    config = run_file(base, korean_corpus, tmp_path / "run")
    train_run(config)
    plan = plan_run(config)
    models.append(load_result(config, plan.resolved, plan.tokenizer, RunFolder(tmp_path / "run")))
    for model in models:
        assert not [name for name, _ in model.named_parameters() if "original_module" in name]
        originals = [module for module in model.modules() if isinstance(module, OriginalModule)]
        assert [module.matrix.file for module in originals] == [base / "model.safetensors"] * 2
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = evaluate(stock, plan.corpus.heldout, max_length=64, max_tokens=config.evaluation.max_tokens)
    rows = lines(tmp_path / "run" / "evaluation.jsonl")
    before = {row["domain"]: row["loss"] for row in rows if row["step"] == 0}
    assert before == {score.domain: pytest.approx(score.loss, rel=1e-6) for score in expected}
    frozen = {name for name, _ in stock.named_parameters()}  # all of it, and the buffers of rotary embeddings
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["frozen_tensors"] >= len(frozen)


@pytest.mark.parametrize("when", ["before it is scored", "while it trains"])
def test_a_base_that_changes_under_a_run(
    when: str, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny("llama", tmp_path / "base", tied=False)
    file = base / "model.safetensors"
    shutil.copyfile(file, tmp_path / "before")

    def change() -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        tensors["lm_head.weight"][7] += 1
        save_file(tensors, file, {"format": "pt"})

    def changed(**given: Any) -> Trainer:
        if when == "before it is scored":
            change()
        else:
            monkeypatch.setattr(Trainer, "training_step", lambda *given: change() or step(*given))
        return Trainer(**given)

    step = Trainer.training_step
    monkeypatch.setattr(run, "Trainer", changed)
    config = run_file(base, korean_corpus, tmp_path / "run")
    if when == "before it is scored":
        with pytest.raises(RunError, match=f"{file} was changed while it is in use: lm_head.weight"):
            train_run(config)
        return
    named = f"changed during training, .* base_model.model.lm_head.original_module.weight in {file}"
    with pytest.raises(RunError, match=named):
        train_run(config)
    proof = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert proof["frozen_changed"] == ["base_model.model.lm_head.original_module.weight"] and not proof["ok"]
    monkeypatch.undo()
    shutil.copyfile(tmp_path / "before", file)
    train_run(config, resume=True)
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["ok"]
