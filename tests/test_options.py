"""Each option of the recipe through a whole run: it trains, differs from the default, resumes and is handed on."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steep.config import load_config
from steep.errors import UserError
from steep.evaluation.perplexity import evaluate
from steep.model.load import keep_4bit_layout
from steep.plan import plan_run
from steep.result import evaluate_run, generate_run
from steep.run import train_run
from steep.schema import RunConfig
from tests.test_run import lines, run_file
from tests.tiny import save_tiny

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "loftq": {"adapter": {"init_lora_weights": "loftq"}},
    "pissa": {"adapter": {"init_lora_weights": "pissa"}},
    "dora": {"adapter": {"use_dora": True}},
    "loraplus": {"training": {"loraplus_lr_ratio": 4}},
    "untied": {"model": {"untie_embeddings": True}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("base"), tied=True)


def config_of(option: str, base: Path, corpus: Path, folder: Path) -> RunConfig:
    given = OPTIONS[option]
    return run_file(
        base, corpus, folder, **{**given, "model": {"base": "nf4", "compute_dtype": "fp32", **given.get("model", {})}}
    )


@pytest.fixture(scope="module")
def runs(base: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for option in OPTIONS:
        found[option] = tmp_path_factory.mktemp("runs") / option
        train_run(config_of(option, base, korean_corpus, found[option]))
    return found


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("option", OPTIONS)
def test_it_learns_and_everything_trains(runs: dict[str, Path], option: str) -> None:
    scores = {row["step"]: row["loss"] for row in lines(runs[option] / "evaluation.jsonl")}
    assert scores[6] < scores[0] - 0.1
    proof = json.loads((runs[option] / "proof.json").read_text(encoding="utf-8"))
    assert proof["ok"]
    groups = {record["group"] for record in proof["trained"].values()}
    assert groups == {"adapters_a", "adapters_b", "embeddings"} | ({"other"} if option == "dora" else set())


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "default"])
def test_it_differs_from_the_default(runs: dict[str, Path], option: str) -> None:
    default, other = losses(runs["default"]), losses(runs[option])
    assert max(abs(a - b) for a, b in zip(default, other, strict=True)) > 1e-4


@pytest.mark.parametrize("option", OPTIONS)
def test_the_result_opens_on_the_stock_base(runs: dict[str, Path], base: Path, option: str) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )  # fmt: skip
    keep_4bit_layout(stock)
    # PEFT advises to keep a head tied that is untied here on purpose.
    said = pytest.warns(UserWarning, match="a tied layer is part of the adapter")
    with said if option == "untied" else nullcontext():
        model: Any = PeftModel.from_pretrained(stock, str(runs[option] / "final")).eval()
    plan = plan_run(load_config(runs[option] / "run.yaml"))
    saved = {row["domain"]: row["loss"] for row in lines(runs[option] / "evaluation.jsonl") if row["step"] == 6}
    assert saved
    for score in evaluate(model, plan.corpus.heldout, max_length=64, max_tokens=100_000):
        assert score.loss == pytest.approx(saved[score.domain], rel=1e-6)


@pytest.mark.parametrize("option", OPTIONS)
def test_it_is_evaluated_and_completes_text(runs: dict[str, Path], option: str) -> None:
    before, after = evaluate_run(runs[option])
    saved = [row["loss"] for row in lines(runs[option] / "evaluation.jsonl")]
    assert [score.loss for score in before + after] == pytest.approx(saved, rel=1e-6)
    samples = [row for row in lines(runs[option] / "samples.jsonl") if row["prompt"] == "the river"]
    completed = generate_run(runs[option], "the river", max_new_tokens=4)
    assert completed == {"base": samples[0]["completion"], "trained": samples[-1]["completion"]}


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "default"])
def test_it_resumes_to_the_bit(
    runs: dict[str, Path], base: Path, korean_corpus: Path, tmp_path: Path, option: str
) -> None:
    stopped = tmp_path / option
    shutil.copytree(runs[option], stopped)
    shutil.rmtree(stopped / "checkpoint-6")
    shutil.rmtree(stopped / "final")
    train_run(config_of(option, base, korean_corpus, stopped), resume=True)
    one, two = (load_file(run / "final" / "adapter_model.safetensors") for run in (runs[option], stopped))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert losses(stopped) == losses(runs[option])


def test_loraplus_and_the_embedding_rate_work_together(runs: dict[str, Path]) -> None:
    last = lines(runs["loraplus"] / "metrics.jsonl")[-1]
    assert last["learning_rate_adapters_b"] == pytest.approx(4 * last["learning_rate_adapters_a"])
    assert last["learning_rate_embeddings"] == pytest.approx(last["learning_rate_adapters_a"] / 10)


def test_an_untied_head_is_one_more_matrix(runs: dict[str, Path]) -> None:
    tied, untied = (load_file(runs[option] / "final" / "adapter_model.safetensors") for option in ("default", "untied"))
    embed, head = (next(name for name in tied if end in name) for end in ("embed_tokens", "lm_head"))
    assert torch.equal(tied[embed], tied[head])
    assert not torch.equal(untied[embed], untied[head])
    plans = [json.loads((runs[o] / "plan.json").read_text(encoding="utf-8")) for o in ("default", "untied")]
    assert [plan["parameters"]["trained_embeddings"] for plan in plans] == [384 * 64, 2 * 384 * 64]


def refused(match: str, base: Path, corpus: Path, folder: Path, **sections: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=match):
        plan_run(run_file(base, corpus, folder, **sections))


def test_what_cannot_be_is_refused_by_the_plan(base: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path):
    def check(match: str, path: Path = base, **sections: dict[str, Any]) -> None:
        refused(match, path, korean_corpus, tmp_path / "run", **sections)

    check("eval_steps: eval_strategy is steps, and after how many", training={"eval_strategy": "steps"})
    for strategy in ("no", False, "epoch"):  # YAML reads a bare no as false
        both = {"eval_strategy": strategy, "eval_steps": 2}
        check("eval_steps: eval_strategy is (no|epoch), with which", training=both)
    nf4: dict[str, Any] = {"base": "nf4"}
    check("init_lora_weights: loftq begins at", adapter={"init_lora_weights": "loftq"})
    check("init_lora_weights: steep does not have 'olora'", adapter={"init_lora_weights": "olora"}, model=nf4)
    check("use_dora: DoRA's lengths", adapter={"init_lora_weights": "pissa", "use_dora": True}, model=nf4)
    check("use_dora: DoRA reads the weights themselves", adapter={"use_dora": True}, model={"base": "int8"})
    untied = {"untie_embeddings": True}
    check("untie_embeddings: the model's head is a matrix of its own", llama_folder, model=untied)
    with pytest.raises(UserError, match="untie_embeddings: a head of its own that is not trained"):
        run_file(base, korean_corpus, tmp_path, model=untied, adapter={"modules_to_save": ["embed_tokens"]})


def test_what_does_not_go_with_rank_stabilised_scaling_is_said_once(base: Path, korean_corpus: Path, tmp_path: Path):
    options = {"adapter": {"init_lora_weights": "pissa", "lora_alpha": 16, "r": 64}}
    training = {"learning_rate": 1e-4, "loraplus_lr_ratio": 16}
    plan = plan_run(run_file(base, korean_corpus, tmp_path / "run", **options, training=training))
    (warning,) = [warning for warning in plan.warnings if "adapters' scale is 2" in warning]
    assert "PiSSA was published" in warning and "LoRA+ trains B at 0.0016" in warning
    quiet = plan_run(run_file(base, korean_corpus, tmp_path / "run"))
    assert not [warning for warning in quiet.warnings if "adapters' scale" in warning]


def test_more_passes_than_teach_are_warned_of(base: Path, korean_corpus: Path, tmp_path: Path) -> None:
    def warned(**training: object) -> str:
        return " ".join(plan_run(run_file(base, korean_corpus, tmp_path / "run", training=training)).warnings)

    assert "is gone through" not in warned(max_steps=-1, num_train_epochs=16)
    assert "is gone through 17.0 times" in warned(max_steps=-1, num_train_epochs=17)
    assert "grad_accum_dtype" not in warned(gradient_accumulation_steps=2)
    single = "training.grad_accum_dtype: bf16 changes nothing: a step is a single forward"
    assert single in warned(gradient_accumulation_steps=1, grad_accum_dtype="bf16")
    assert "weights train in fp32" in warned(gradient_accumulation_steps=2, grad_accum_dtype="bf16")
    assert "master_weights" not in warned()
    unneeded = "training.master_weights: embeddings changes nothing: weights train in fp32"
    assert unneeded in warned(master_weights="embeddings")
    assert "each step is a whole pass" not in warned()
    assert "a step takes 2,000,000 rows and the text has" in warned(gradient_accumulation_steps=10**6)


def test_long_rows_of_short_documents_are_warned_of(
    base: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cost memory, and documents of a row do not see each other."""

    def warned(length: int) -> str:
        data = {"max_length": length}
        return " ".join(plan_run(run_file(base, korean_corpus, tmp_path / "run", data=data)).warnings)

    assert "the longest document" not in warned(512)  # such rows cost little
    monkeypatch.setattr("steep.planning.advice.LONG_ROWS", 256)
    said = re.search(r"rows have 512 tokens \(data\.max_length\), and the longest document (\d+)", warned(512))
    assert said is not None and 0 < int(said[1]) <= 256
    assert "the longest document" not in warned(256)
