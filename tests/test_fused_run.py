"""A fused run from its file to its folder, on the CPU: the same layers in plain torch."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoConfig

from benchmarks.peers import Work
from benchmarks.shapes import empty_model
from benchmarks.steep_run import RUNS
from benchmarks.steep_run import run_file as benchmark_file
from benchmarks.table import OF_THE_WORK
from steep.amounts import human_bytes
from steep.config import parse_config, read_yaml
from steep.errors import UserError
from steep.hand_over import export_run
from steep.model import decoder, machine
from steep.model.block import Place
from steep.model.choices import Choices
from steep.model.install import is_installed
from steep.model.machine import Card
from steep.model.mlp_half import MlpHalf
from steep.model.quantisable import quantisable
from steep.model.resolve import read_tokenizer, resolve
from steep.model.tiling import tile_sizes
from steep.ops.fp8_groups import Fp8Products
from steep.ops.row_gradient import SUMMING
from steep.plan import plan_run
from steep.planning import fusing
from steep.planning.fp8_choice import in_fp8
from steep.planning.fused_memory import FusedStep
from steep.planning.fusing import decide, fused_step, resolve_trained_dtype, settle
from steep.planning.memory import WORKSPACES, memory_by_item, shape_of
from steep.planning.sizes import host_bytes
from steep.planning.step_work import step_work
from steep.planning.vram import host_budget, host_limit, vram_budget
from steep.result import evaluate_run, generate_run, load_result
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import AdapterSection, RunConfig
from steep.terminal import fused_line
from steep.training.adamw8bit import OFFLOADS, Offload
from steep.training.checkpoint import FORMAT, read_choices
from steep.verify_resume import compare
from tests.command_line import Steep
from tests.test_run import lines, run_file
from tests.tiny import save_tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def fused_file(model: Path, corpus: Path, folder: Path, /, **sections: dict[str, Any]) -> RunConfig:
    return run_file(model, corpus, folder, **{**sections, "model": {"fused": "on", **sections.get("model", {})}})


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over NF4, two micro-batches a step."""
    folder = tmp_path_factory.mktemp("runs") / "ko"
    training = {"gradient_accumulation_steps": 2}
    train_run(fused_file(llama_folder, korean_corpus, folder, model={"base": "nf4"}, training=training))
    return folder


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


# ---- end to end


def test_a_fused_run_ends_as_any_other(finished: Path) -> None:
    assert read(finished / "proof.json")["ok"] and read(finished / "ledger.json")["adds_up"]
    losses = [row["loss"] for row in lines(finished / "metrics.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    plan = read(finished / "plan.json")
    chosen = (plan["fused"], plan["fused_reason"], plan["levels"], plan["loss_way"])
    assert chosen == (True, None, [0, 0], "tokens")
    assert plan["trained_dtype"] == "fp32"  # products on a CPU run in fp32


def test_what_was_chosen_stands_in_the_checkpoint(finished: Path) -> None:
    choices = read_choices(finished / "checkpoint-6")
    assert choices == Choices(True, "fp32", [0, 0], 0, "tokens", choices.backends, "none", choices.tile)
    assert choices.tile is not None and read(finished / "plan.json")["tile"] is None
    assert choices.backends.keys() == {"documents of uneven lengths"}
    assert read(finished / "checkpoint-6" / "format.json")["format"] == FORMAT
    assert read(finished / "checkpoint-6" / "choices.json").keys() == {each.name for each in fields(Choices)}


def test_the_result_opens_in_plain_peft_with_the_same_logits(finished: Path, llama_folder: Path) -> None:
    config = run_file(llama_folder, Path("unused"), finished)
    resolved = resolve(str(llama_folder))
    ours = load_result(config, resolved, read_tokenizer(resolved), RunFolder(finished)).eval()
    assert is_installed(ours)
    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(finished / "final")).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = ours(input_ids=tokens, use_cache=False).logits
        expected = plain(input_ids=tokens).logits
        assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))
        with plain.disable_adapter():
            assert not torch.allclose(logits, plain(input_ids=tokens).logits, atol=1e-2)


def test_evaluation_of_a_finished_run_is_fused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    block = decoder.block
    monkeypatch.setattr(decoder, "block", lambda *given: calls.append(1) or block(*given))
    _, trained = evaluate_run(finished)
    assert calls
    recorded = [row for row in lines(finished / "evaluation.jsonl") if row["step"] == 6]
    assert [score.loss for score in trained] == pytest.approx([row["loss"] for row in recorded], rel=1e-6)
    assert generate_run(finished, "the river", max_new_tokens=4).keys() == {"base", "trained"}


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_losses_are_those_of_the_librarys_forward(
    base: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    training = {"max_steps": 20, "save_steps": 20, "learning_rate": 1e-3}
    for fused in ("on", "off"):
        model = {"fused": fused, "base": base}
        train_run(run_file(llama_folder, korean_corpus, tmp_path / fused, model=model, training=training))
    ours, theirs = ([row["loss"] for row in lines(tmp_path / fused / "metrics.jsonl")] for fused in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert ours != theirs, "the same bits: both ran the same forward"
    assert ours[-1] < 0.995 * ours[0]


def test_the_result_is_exported(finished: Path, tmp_path: Path) -> None:
    """Merged, opened with plain transformers, and scored against the fused result."""
    export_run(finished, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- resume


@pytest.mark.parametrize("checkpointing", [None, True])
def test_resumed_is_never_stopped(
    checkpointing: bool | None, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    def config(folder: str, **training: Any) -> RunConfig:
        training = {"gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing, **training}
        model = {"base": "nf4", "compute_dtype": "bf16"}
        return fused_file(llama_folder, korean_corpus, tmp_path / folder, model=model, training=training)

    train_run(config("whole", save_total_limit=3))
    assert read(tmp_path / "whole" / "plan.json")["trained_dtype"] == "bf16"
    assert read(tmp_path / "whole" / "plan.json")["levels"] == ([3, 3] if checkpointing else [0, 0])
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "final")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-6")
    train_run(config("stopped", save_total_limit=3), resume=True)
    parts = compare(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped"))
    assert [part.difference for part in parts] == [None] * len(parts)


def test_choices_stay_on_resume(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where another card would choose otherwise."""
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "final")
    choices = read_choices(folder / "checkpoint-6")
    config = fused_file(Path(read(folder / "plan.json")["model"]), Path("unused"), folder)
    config.data.sources = []
    empty = empty_llama()
    step = step_of(config, empty)
    for level in (1, 2):
        before = replace(choices, levels=[level] * 2, loss_way="vocabulary", trained_dtype="bf16")
        settled = settle(config, step, 10**15, before)
        assert (settled.levels, settled.loss_way) == ([level] * 2, "vocabulary")
        assert settled.backends == choices.backends
    config.model.fused = "auto"
    assert decide(config, empty, choices, None)[0] is not None  # though a CPU would not choose it
    not_fused = replace(choices, fused=False)
    assert "no GPU" in (decide(config, empty, not_fused, None)[1] or "")
    with monkeypatch.context() as patch:
        patch.setattr(fusing, "_why_not_by_itself", lambda config, card: None)
        assert decide(config, empty, None, None)[0] is not None
        assert decide(config, empty, not_fused, None) == (None, "the run began so")
    with pytest.raises(UserError, match=r"--resume: the run is fused so far, .* the card has 7\.0"):
        decide(config, empty, choices, card_of((7, 0), is_here=False))


def test_levels_are_chosen_anew_where_they_are_no_longer_asked_for(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder, checkpointing = tmp_path / "run", {"gradient_checkpointing": True}
    train_run(fused_file(llama_folder, korean_corpus, folder, training=checkpointing))
    assert read_choices(folder / "checkpoint-6").levels == [3, 3]
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-6")
    allow = ["training.gradient_checkpointing"]
    train_run(fused_file(llama_folder, korean_corpus, folder), resume=True, allow=allow)
    assert read_choices(folder / "checkpoint-6").levels == [0, 0]


def test_a_run_goes_on_leaner_where_memory_ran_out(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed too, though the run file asks for a level."""
    folder, calls = tmp_path / "run", []
    backward = MlpHalf.backward

    def failing(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return backward(*given)

    monkeypatch.setattr(MlpHalf, "backward", failing)
    config = fused_file(llama_folder, korean_corpus, folder, training={"gradient_checkpointing": False})
    train_run(config)
    planned = human_bytes(sum(read(folder / "plan.json")["memory_bytes"].values()) / 2)  # its total is among them
    (incident,) = lines(folder / "incidents.jsonl")
    assert incident["kind"].startswith(f"GPU memory ran out: {planned} were planned for a step, and ")
    assert (incident["step"], incident["action"]) == (3, "leaner") and incident["rows"][0]["pieces"]
    ledger, levels = read(folder / "ledger.json"), read_choices(folder / "checkpoint-3").levels
    assert ledger["adds_up"] and levels != [0, 0] == read(folder / "plan.json")["levels"]
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-6")
    train_run(config, resume=True)
    assert read(folder / "plan.json")["levels"] == read_choices(folder / "checkpoint-6").levels == levels


def test_fused_may_change_only_where_it_is_allowed(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-6")
    settings: dict[str, Any] = {
        "model": {"base": "nf4", "fused": "off"},
        "training": {"gradient_accumulation_steps": 2},
    }
    config = run_file(llama_folder, korean_corpus, folder, **settings)
    with pytest.raises(UserError, match=r"--allow model\.fused"):
        train_run(config, resume=True)
    train_run(config, resume=True, allow=["model.fused"])
    assert "those before were fused" in caplog.text
    assert not read_choices(folder / "checkpoint-6").fused
    assert not read(folder / "plan.json")["fused"]


def test_vram_does_not_change_within_a_run(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    training = {"gradient_accumulation_steps": 2, "vram": "8GiB"}
    config = fused_file(llama_folder, korean_corpus, folder, model={"base": "nf4"}, training=training)
    with pytest.raises(UserError, match=r"training\.vram cannot change within a run: what layers keep was chosen"):
        train_run(config, resume=True)


def test_a_branch_goes_on_fused(llama_folder: Path, korean_corpus: Path, finished: Path, tmp_path: Path) -> None:
    training = {"max_steps": 2, "gradient_accumulation_steps": 2}
    config = fused_file(llama_folder, korean_corpus, tmp_path / "b", model={"base": "nf4"}, training=training)
    train_run(config, branch=finished / "checkpoint-3")
    assert read_choices(tmp_path / "b" / "checkpoint-5").fused
    assert read(tmp_path / "b" / "proof.json")["frozen_changed"] == []


# ---- what the plan says


def test_the_plan_says_whether_and_why(steep: Steep, finished: Path) -> None:
    file = finished / "run.yaml"
    said = steep("plan", file, "--training.output_dir", finished / "other")
    assert said.code == 0 and "yes, at level 0 in 2 layers" in " ".join(said.out.split())
    said = steep("plan", file, "--model.fused", "auto", "--training.output_dir", finished / "other")
    assert "no: there is no GPU" in " ".join(said.out.split())
    said = steep("plan", file, "--model.fused", "off", "--training.output_dir", finished / "other")
    assert "no: model.fused is off" in " ".join(said.out.split())


def test_a_run_of_the_command(steep: Steep, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(run_file(llama_folder, korean_corpus, tmp_path / "run").to_yaml(), encoding="utf-8")
    said = steep("train", file, "--model.fused", "on", "--training.max_steps", 2)
    assert said.code == 0, said.err
    assert "yes, at level 0 in 2 layers" in said.out and "0 frozen ones" not in said.err


def test_memory_stands_in_the_plan_by_item(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    plan = plan_run(fused_file(llama_folder, korean_corpus, tmp_path / "run")).as_dict()
    library = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run")).as_dict()
    assert set(plan["memory_bytes"]) - set(library["memory_bytes"]) == {"work of a layer"}
    assert plan["memory_bytes"]["total"] < library["memory_bytes"]["total"]


@pytest.mark.parametrize("fused", ["on", "off"])
def test_attention_that_a_fused_run_does_not_use_is_said(
    fused: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    model = {"fused": fused, "attn_implementation": "eager"}
    plan = plan_run(fused_file(llama_folder, korean_corpus, tmp_path / "run", model=model))
    assert any("model.attn_implementation: eager" in warning for warning in plan.warnings) == (fused == "on")


# ---- what is refused, before the run folder is there


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"adapter": {"r": 8, "use_dora": True}}, "adapter.use_dora is true"),
        ({"adapter": {"r": 8, "lora_dropout": 0.1}}, r"adapter\.lora_dropout is 0\.1"),
    ],
)
def test_on_where_it_cannot_be_is_an_error(
    sections: dict[str, Any], reason: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"model.fused: the run cannot be fused: .*{reason}"):
        plan_run(fused_file(llama_folder, korean_corpus, tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()


def test_an_unknown_family_is_named() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(OlmoConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=64))
    with pytest.raises(UserError, match=r"model\.fused: .*OlmoForCausalLM is not one of LlamaForCausalLM, "):
        decide(config_of(), empty, None, None)


@pytest.mark.parametrize(
    "value", ["much", "0GiB", "-3GiB", "101%", "12", "12 TB", "100KiB", "", 12, 0.8, None, True, ["8GiB"]]
)
def test_vram_is_an_amount(value: Any, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.vram.*Give an amount in GiB, GB, MiB or MB"):
        run_file(llama_folder, korean_corpus, tmp_path / "run", training={"vram": value})


def test_a_bare_on_is_on(finished: Path) -> None:
    tree = read_yaml((finished / "run.yaml").read_text(encoding="utf-8"))
    for written, meant in ((True, "on"), (False, "off"), ("auto", "auto")):
        tree["model"]["fused"] = written
        assert parse_config(tree).model.fused == meant
    tree["model"]["fused"] = "yes"
    with pytest.raises(UserError, match=r"model\.fused"):
        parse_config(tree)


# ---- decisions, from the shapes alone

OPTIONS: dict[str, list[tuple[Any, str | None]]] = {  # of AdapterSection: a value, and why it is not fused
    "r": [(4, None), (64, None)],
    "lora_alpha": [(8, None)],
    "use_rslora": [(False, None)],
    "lora_dropout": [(0.1, "adapter.lora_dropout is 0.1")],
    "target_modules": [("all-linear", None), (["q_proj"], None), (["down_proj", "k_proj"], None)],
    "modules_to_save": [([], None), (["lm_head"], None), (["embed_tokens"], None)],
    "init_lora_weights": [("pissa", None), ("loftq", None)],
    "use_dora": [(True, "adapter.use_dora is true")],
}


def empty_llama(**overrides: Any) -> Any:
    small: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, **overrides,
    }  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**small))


def config_of(**sections: Any) -> RunConfig:
    given = {"model": {"name": "x", "fused": "on"}, "data": {"sources": [{"path": "x"}], "max_length": 2048}}
    given["training"] = {"output_dir": "x", "gradient_accumulation_steps": 1}
    return parse_config({**given, **{name: {**given.get(name, {}), **part} for name, part in sections.items()}})


def step_of(config: RunConfig, empty: Any, fp8: Fp8Products = "none") -> FusedStep:
    """Over nf4, or over e4m3 where some products are in fp8."""
    layer, _ = decide(config, empty, None, None)
    assert layer is not None
    base = "nf4" if fp8 == "none" else "fp8"
    layers = [layer] if base == "nf4" else in_fp8(layer, quantisable(empty), (), blocks=False)
    how: dict[str, Any] = {"compute": "bf16", "trained": "bf16", "on_card": True, "fp8": fp8}
    return fused_step(config, layers, shape_of(empty, config.adapter), base=base, **how)


@pytest.mark.parametrize("option", AdapterSection.model_fields)
def test_every_option_of_the_adapter_is_fused_or_named(option: str) -> None:
    assert option in OPTIONS, "say whether it is fused"
    for value, reason in OPTIONS[option]:
        config = config_of(adapter={"r": 8, option: value})
        if reason is None:
            assert decide(config, empty_llama(), None, None)[1] is None
            continue
        with pytest.raises(UserError, match=reason):
            decide(config, empty_llama(), None, None)


def card_of(capability: tuple[int, int], **others: Any) -> Card:
    """24 GB, nothing on it."""
    return Card("fake", capability, 24 * 10**9, 24 * 10**9, **others)


def test_auto_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    config, empty = config_of(model={"fused": "auto"}), empty_llama()
    assert "no GPU" in (decide(config, empty, None, None)[1] or "")
    old, new = card_of((7, 0), is_here=False), card_of((8, 6), is_here=False)
    assert "compute capability 7.5, and the card has 7.0" in (decide(config, empty, None, old)[1] or "")
    assert decide(config, empty, None, new)[1] is None
    config.model.attn_implementation = "eager"
    assert "asks for transformers' eager" in (decide(config, empty, None, new)[1] or "")
    config.model.attn_implementation = "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    here = card_of((8, 6))
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert decide(config, empty, None, here)[1] == "triton is not installed"
    assert decide(config, empty, None, new)[1] is None  # where the other card is it will be
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "NVIDIA" in (decide(config, empty, None, here)[1] or "")


@pytest.mark.parametrize(
    ("asked", "optim", "fused", "compute", "found"),
    [
        ("auto", "adamw_8bit", True, "bf16", "bf16"),
        ("auto", "adamw_8bit", False, "bf16", "fp32"),
        ("auto", "adamw_8bit", True, "fp16", "fp32"),
        ("auto", "adamw_torch", True, "bf16", "fp32"),
        ("fp32", "adamw_8bit", True, "bf16", "fp32"),
        ("bf16", "adamw_torch", False, "bf16", "bf16"),
    ],
)
def test_the_dtype_of_what_trains(asked: str, optim: str, fused: bool, compute: str, found: str) -> None:
    config = config_of(model={"trained_dtype": asked}, training={"optim": optim})
    assert resolve_trained_dtype(config, fused, compute, None) == found
    if asked == "auto":
        assert resolve_trained_dtype(config, fused, compute, Choices(fused, "bf16")) == "bf16"


def test_bf16_is_not_trained_where_products_run_in_another_dtype() -> None:
    with pytest.raises(UserError, match=r"model\.trained_dtype: bf16 cannot be trained where products run in fp16"):
        resolve_trained_dtype(config_of(model={"trained_dtype": "bf16"}), True, "fp16", None)


@pytest.mark.parametrize("accumulation", [1, 8])
def test_layers_keep_what_the_budget_allows(accumulation: int) -> None:
    """Within it, and as much as can be: a level lower in one layer more would not fit."""
    empty = empty_llama(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    config = config_of(training={"gradient_accumulation_steps": accumulation})
    step = step_of(config, empty)
    peaks = {level: sum(step.by_item([level] * 4, "vocabulary", step.tokens).values()) for level in range(4)}
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    seen: list[int] = []
    for budget in range(round(0.98 * peaks[3]), round(1.1 * peaks[0]), 2**26):
        levels, places, way, tile = step.choose(budget)
        assert places is None  # of the host there is nothing
        assert tile == step.tokens or peaks[3] > budget
        peak = sum(step.by_item(levels, way, tile).values())
        assert levels == sorted(levels, reverse=True) and max(levels) - min(levels) <= 1
        assert peak <= budget or peaks[3] > budget
        if sum(levels):
            lower = [*levels]
            lower[max(index for index, level in enumerate(levels) if level == max(levels))] -= 1
            assert all(sum(step.by_item(lower, each, tile).values()) > budget for each in ("tokens", "vocabulary"))
        if tile == step.tokens:  # a smaller one has fewer bytes by the layer, and so levels of its own
            seen.append(sum(levels))
    assert seen == sorted(seen, reverse=True) and seen[-1] == 0 and len(set(seen)) >= 4
    assert settle(config, step, None, None).levels == [0] * 4  # without a card
    for asked, level in ((True, 3), (False, 0)):
        config.training.gradient_checkpointing = asked
        assert settle(config, step, peaks[2], None).levels == [level] * 4
        begun = settle(config, step, peaks[2], Choices(True, "bf16", [1] * 4, loss_way="tokens"))
        assert begun.levels == [1] * 4  # as it goes on since memory ran out


@pytest.mark.parametrize("accumulation", [1, 8])
def test_gradients_are_always_there_where_several_processes_train(
    accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP's buckets hold all of them, in the dtype of what trains."""
    empty, config = empty_llama(), config_of(training={"gradient_accumulation_steps": accumulation})
    alone = step_of(config, empty)
    monkeypatch.setattr("steep.ranks.world_size", lambda: 2)
    step = step_of(config, empty)
    assert (step.processes, step.gradient_width, alone.gradient_width) == (2, 2, 2 if accumulation == 1 else 4)
    here: list[Place] = ["gpu"] * 2
    of_all, of_head = 2 * step.shape.trained, 2 * step.shape.vocabulary * step.shape.hidden
    assert step.by_item([0, 0], "tokens", step.tokens)["gradients"] >= of_all
    assert step._at_the_loss([0, 0], here, "tokens")["gradients"] == of_all + of_head
    assert all(items["gradients"] == of_all for items in step._in_layers([0, 0], here, step.tokens))
    (table, *_), (of_one, *_) = step._at_the_update(), alone._at_the_update()
    assert table["gradients"] == of_all + of_head
    assert of_one["gradients"] == (of_all if accumulation == 1 else 2 * (of_all + of_head))


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"], []])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_updates_inside_backward_need_few_gradients(tied: bool, saved: list[str]) -> None:
    """A tied head's gradient waits for its table's, any other is gone before the layers; a layer's own are there."""
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    empty = empty_llama(vocab_size=128_256, num_hidden_layers=8, tie_word_embeddings=tied, **large)
    trained = {"modules_to_save": ["embed_tokens", "lm_head"] if tied and saved else saved}
    lean = {"optimizer_in_backward": True, "max_grad_norm": 0}
    step, whole = (step_of(config_of(adapter=trained, training=training), empty) for training in (lean, {}))
    assert step.shape.tied == tied and step.in_backward and not whole.in_backward
    of_table, of_layer, levels = 2 * 128_256 * 4096, 2 * step.shape.lora // 8, [0] * 8
    of_head = of_table if "lm_head" in trained["modules_to_save"] else 0
    here: list[Place] = ["gpu"] * 8
    waits = of_head if tied else 0
    assert step._at_the_loss(levels, here, "tokens")["gradients"] == of_head
    assert {items["gradients"] for items in step._in_layers(levels, here, step.tokens)} == {waits + of_layer}
    (last,) = step._at_the_update()
    # Those that a batch looks up, their sums, and the kernel's partial sums.
    of_rows = of_table if tied else round((2 * 2 + SUMMING) * step.tokens * 4096)
    assert last["gradients"] == waits + (of_rows if "embed_tokens" in trained["modules_to_save"] else 0)
    for state, at_the_end in zip(*(each._in_layers(levels, here, each.tokens) for each in (step, whole)), strict=True):
        assert state["activations"] == at_the_end["activations"] and state["gradients"] <= at_the_end["gradients"]
    for level in range(4):
        lean_peak, peak = (sum(each.by_item([level] * 8, "vocabulary", each.tokens).values()) for each in (step, whole))
        assert lean_peak <= peak
    budget = sum(whole.by_item([2] * 8, "vocabulary", whole.tokens).values())
    assert sum(step.choose(budget)[0]) <= sum(whole.choose(budget)[0])


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_bases_head_has_room_within_the_peak(tied: bool, lean: bool) -> None:
    """It is held while the base is scored, when there are neither gradients nor what layers keep. The head alone: what
    scoring computes beside it is not planned."""
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    empty = empty_llama(vocab_size=128_256, num_hidden_layers=4, tie_word_embeddings=tied, **large)
    updates = {"optimizer_in_backward": True, "max_grad_norm": 0, "offload_optimizer": "all"} if lean else {}
    step = step_of(config_of(data={"max_length": 256}, training={"per_device_train_batch_size": 1, **updates}), empty)
    beside = sum(step.by_item([3] * 4, "narrow", tile_sizes(step.tokens)[-1]).values()) - sum(step.standing.values())
    assert step.in_backward is lean and beside > 2 * 128_256 * 4096


def test_the_library_too_needs_few_gradients() -> None:
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    for tied in (False, True):
        empty = empty_llama(vocab_size=128_256, num_hidden_layers=8, tie_word_embeddings=tied, **large)
        shape = shape_of(empty, config_of().adapter)
        how: dict[str, Any] = {"base": "nf4", "compute": "bf16", "trained": "bf16", "optim": "adamw_8bit"}
        how |= {"checkpointing": True, "accumulates": False, "on_card": True}
        whole, lean = (memory_by_item(shape, tokens=64, **how, in_backward=each) for each in (False, True))
        of_table = 2 * 128_256 * 4096
        both = of_table if tied else 0  # which stand side by side before they are one
        assert whole["gradients"] == 2 * shape.trained + both and lean["gradients"] == of_table + both
        assert {name for name in lean if lean[name] != whole[name]} <= {"gradients", "activations"}
        whole, lean = (memory_by_item(shape, tokens=65_536, **how, in_backward=each) for each in (False, True))
        assert lean["gradients"] <= whole["gradients"] and sum(lean.values()) <= sum(whole.values())


@pytest.mark.parametrize("asked", [None, True, False])
def test_the_way_of_other_levels_is_not_taken_over(asked: bool | None) -> None:
    """A branch has its parent's way without the levels, and so has a run that may ask for others."""
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    empty = empty_llama(vocab_size=128_256, num_hidden_layers=4, **large)
    config = config_of(training={"gradient_checkpointing": asked, "per_device_train_batch_size": 8})
    step, levels = step_of(config, empty), [0 if asked is False else 3] * 4
    tile = tile_sizes(step.tokens)[-1 if levels[0] else 0]
    lean, fast = (sum(step.by_item(levels, way, tile).values()) for way in ("vocabulary", "tokens"))
    assert step.faster_way == "tokens" and lean < fast
    before = Choices(True, "bf16", None, loss_way="tokens")
    settled = settle(config, step, lean + WORKSPACES, before)
    assert settled.levels is not None and settled.loss_way == "vocabulary"
    assert settled.tile is not None
    assert sum(step.by_item(settled.levels, settled.loss_way, settled.tile).values()) <= lean
    assert settle(config, step, 10**15, replace(before, loss_way="vocabulary")).loss_way == "tokens"


def measured() -> list[dict[str, Any]]:
    """Runs of the committed benchmarks with default settings, and no words but those that belong to the work: how much
    memory there is, and how positions are stretched."""
    files = sorted((BENCHMARKS / "results").glob("*-h200-train.jsonl"))
    rows = [row for file in files for row in lines(file) if row["peer"] in RUNS and "failed" not in row]
    return [row for row in rows if not OF_THE_WORK.sub("", row["steep_args"]).strip()]


# By the minute of their call, runs whose memory was another than that of the same step now.
OTHER_MEMORY = {
    "2026-11-28T19:15": "1 x 16384, with another layout of the loss",
    "2026-11-28T19:19": "8 x 2048, with that",
    "2026-11-30T08:15": "1 x 65536 took 0.54 GiB more than the same command later that day",
    "2026-11-30T13:59": "1 x 262144, when attention's backward held all query heads of a key and value head: 1.2 GiB",
}


def measured_config(row: dict[str, Any]) -> RunConfig:
    """That of the run, its peer's settings included."""
    work = Work("x", row["batch"], row["seq"], row["r"], 12, row["packed"], "cuda")
    tree = benchmark_file(work, Path("text"), Path("run"))
    tree["model"]["fused"] = "on"
    names, values = RUNS[row["peer"]][::2], RUNS[row["peer"]][1::2]
    for (section, name), value in zip((each.removeprefix("--").split(".") for each in names), values, strict=True):
        tree[section][name] = yaml.safe_load(value)
    return parse_config(tree)


def name_of(row: dict[str, Any]) -> str:
    within = f" within {row['cap_gib']:.3g}" if row["cap_gib"] else ""
    return f"{row['call'][:16]}, {row['peer']}, {row['shape']}, {row['batch']} x {row['seq']}{within}"


def test_memory_that_was_another_is_of_runs_that_are_there() -> None:
    assert set(OTHER_MEMORY) <= {row["call"][:16] for row in measured()}
    assert {row["seq"] for row in measured()} == {2048, 16_384, 65_536, 131_072, 262_144}
    assert {row["peer"] for row in measured()} == set(RUNS)
    assert "llama-3-70b" in {row["shape"] for row in measured()}


@pytest.mark.parametrize("row", [row for row in measured() if row["call"][:16] not in OTHER_MEMORY], ids=name_of)
def test_the_peak_is_the_measured_one(row: dict[str, Any]) -> None:
    step = step_of(measured_config(row), empty_model(row["shape"]), row.get("fp8_products", "none"))
    if "places" not in row:  # the table's gradient was dense then
        step = replace(step, trains_table=False)
    places, tile = row.get("places"), row.get("tile") or step.tokens
    planned = sum(step.by_item(row["levels"], row["loss_way"], tile, places).values()) + WORKSPACES
    if "tile" not in row:  # attention's output was kept with what LoRA adds beside
        o = step.layers[0].groups(torch.bfloat16, "none").o
        beside = o.input_width - step.layers[0].attention.num_heads * step.layers[0].attention.head_dim
        planned += 2 * step.tokens * beside * sum(level <= 2 for level in row["levels"])
    # Where layers keep something in host memory, 1.8 % more was planned than taken.
    near = 0.02 * row["peak_allocated_gib"] if places else 0.1
    assert planned / 2**30 == pytest.approx(row["peak_allocated_gib"], abs=near)


@pytest.mark.parametrize(
    ("asked", "found"),
    [("auto", 0.9 * 80e9 - 20e9), ("22GiB", 22 * 2**30), ("24gb", 24e9), ("20000 MiB", 20000 * 2**20), ("80%", 64e9)],
)
def test_the_budget(asked: str, found: float, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_card = vram_budget(asked, None)
    assert without_a_card == (None if asked in ("auto", "80%") else pytest.approx(found))
    fake = SimpleNamespace(
        is_available=lambda: True, mem_get_info=lambda: (50 * 10**9, 80 * 10**9), memory_reserved=lambda: 10 * 10**9,
        get_device_capability=lambda: (9, 0), get_device_name=lambda: "NVIDIA X",
        get_device_properties=lambda: SimpleNamespace(multi_processor_count=132),
    )  # fmt: skip
    monkeypatch.setattr(machine.torch, "cuda", fake)
    card = machine.card_here()
    assert card == Card("NVIDIA X", (9, 0), 80 * 10**9, 60 * 10**9, processors=132)
    assert vram_budget(asked, card) == pytest.approx(found)
    assert vram_budget("90GB", card) == 80 * 10**9  # no card holds more than it has
    fake.mem_get_info = lambda: (0, 80 * 10**9)
    fake.memory_reserved = lambda: 0
    assert vram_budget("auto", machine.card_here()) == 0  # others hold all of it


def test_a_broken_choices_file_is_named(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "checkpoint-6", tmp_path / "checkpoint-6")
    (folder / "choices.json").write_text('{"fused": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"choices\.json: fused is 3"):
        read_choices(folder)
    with pytest.raises(UserError, match="damaged"):
        read_choices(tmp_path)


def test_an_amount_of_vram_is_planned_for_without_a_card(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """In the dtype that products have here, unless another is given."""

    def planned(vram: str, compute: str) -> tuple[Any, str]:
        sections = {"training": {"vram": vram}, "model": {"base": "nf4", "compute_dtype": compute}}
        plan = plan_run(fused_file(llama_folder, korean_corpus, tmp_path / "run", **sections))
        assert plan.memory["libraries' workspaces"] == WORKSPACES
        return plan.choices.levels, " ".join(plan.warnings)

    levels, warned = planned("1MiB", "bf16")
    assert levels == [3, 3] and "and 1.0 MiB of the card may be filled" in warned and "there is no GPU" not in warned
    whole = sum(plan_run(fused_file(llama_folder, korean_corpus, tmp_path / "run")).memory.values())
    between = f"{(WORKSPACES + 0.8 * whole) / 2**20:.3f}MiB"
    in_bf16, _ = planned(between, "bf16")
    in_fp32, warned = planned(between, "auto")
    assert sum(in_bf16) < sum(in_fp32)
    assert f"only training.vram, {between}, is known: products are taken to be in fp32, as on this machine" in warned


# ---- host memory


def test_the_budget_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the host of a card that is not here nothing is known; two processes share one."""
    here = Card("X", (9, 0), 80 * 10**9, 80 * 10**9)
    monkeypatch.setattr("steep.planning.vram.room_on_host", lambda: 10**9)
    for card in (None, here, replace(here, is_here=False)):
        assert host_budget("64GiB", card) == 64 * 2**30
        assert host_budget("auto", card) == (10**9 if card is here else 0)
    monkeypatch.setattr("steep.ranks.world_size", lambda: 2)
    monkeypatch.setattr("steep.planning.vram.available_on_host", lambda: 5 * 10**9)
    assert [host_limit("auto", card) for card in (here, None)] == [5 * 10**9, math.inf]
    assert host_limit("auto", here, 4 * 10**9) == 4 * 10**9  # of a new run
    assert host_limit("auto", None, 0) == host_limit("auto", replace(here, is_here=False), 0) == math.inf
    assert host_limit("64GiB", here) == host_limit("64GiB", here, 10**9) == 64 * 2**30
    assert host_budget("auto", here) == 2 * 10**9 and host_budget("64GiB", here) == 64 * 2**30


def test_the_room_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is available; within a container what that may still take, its page cache included."""
    assert 0 < machine.room_on_host() < machine.available_on_host()
    own = tmp_path / "own"
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", own)
    monkeypatch.setattr(machine, "_meminfo", lambda: {"MemTotal": 10**12, "MemAvailable": 10**11})
    assert machine.available_on_host() == 10**11 and machine.room_on_host() == 8 * 10**10
    own.write_text("3:cpu,cpuacct:/elsewhere\n0::/outside/name\n")
    for name, text in (
        ("memory.max", "50000"),
        ("memory.current", "45000"),
        ("memory.stat", "anon 9\ninactive_file 2000"),
    ):
        assert machine.available_on_host() == 10**11
        (tmp_path / name).write_text(f"{text}\n")
    assert machine.available_on_host() == 7000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_on_host() == 10**11
    monkeypatch.setattr("steep.ranks.world_size", lambda: 2)
    assert machine.room_on_host() == 4 * 10**10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert machine.room_on_host() == 8 * 10**10


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_has_no_more_of_the_host_than_the_groups_that_it_is_in(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster's scheduler sets limits: at the job, which the step that runs is within."""
    own, (place, limit, used, freeable) = tmp_path / "own", machine._VERSIONS[version]
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", own)
    own.write_text({1: "4:memory:/job/step\n", 2: "0::/job/step\n"}[version])
    for group, most in (("job/step", {1: str(2**63 - 4096), 2: "max"}[version]), ("job", "64000"), ("", "80000")):
        (tmp_path / place / group).mkdir(parents=True, exist_ok=True)
        for name, text in ((limit, most), (used, "30000"), ("memory.stat", f"{freeable} 500")):
            (tmp_path / place / group / name).write_text(f"{text}\n")
    assert machine.available_on_host() == 34_500


def test_a_step_takes_the_host_before_it_computes_again() -> None:
    empty = empty_llama(
        vocab_size=1000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=6, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    step = step_of(config_of(), empty)
    whole = sum(step.by_item([0] * 6, "tokens", step.tokens).values())
    levels, places, way, tile = step.choose(whole - 1, 10**12)
    assert levels == [0] * 6 and places is not None and places[0] != "gpu" and places[-1] == "gpu"
    assert (
        sum(step.by_item(levels, way, tile, places).values()) < whole <= sum(step.by_item(levels, way, tile).values())
    )
    at_2 = sum(step.by_item([2] * 6, "tokens", step.tokens).values())
    levels, places, way, tile = step.choose(at_2, 10**12)
    without, nowhere, *_ = step.choose(at_2)
    assert sum(levels) < sum(without) and nowhere is None and places is not None
    assert step.in_host_memory(levels, places) > 0 == step.in_host_memory(levels, None)
    config = config_of(training={"gradient_checkpointing": True})
    leanest = settle(config, step, WORKSPACES, None, 10**12)
    assert (leanest.levels, leanest.places) == ([3] * 6, ["x"] * 6)
    half: list[Place] = ["x", "x", "x", "gpu", "gpu", "gpu"]
    assert settle(config, step, WORKSPACES, None, step.in_host_memory([3] * 6, half)).places == half
    assert settle(config, step, WORKSPACES, leanest, 0).places == leanest.places  # as before
    assert settle(config_of(), step, 10**15, replace(leanest, levels=None), 0).places is None


@pytest.mark.parametrize(
    "training", [{}, {"gradient_accumulation_steps": 2}, {"optimizer_in_backward": True, "max_grad_norm": 0}], ids=str
)
def test_what_cannot_fit_is_passed_over_and_nothing_else(
    training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is that of looking at each candidate, within budgets of all kinds."""
    empty = empty_llama(
        vocab_size=20_000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    step = step_of(config_of(training={**training, "per_device_train_batch_size": 4}), empty)
    least = sum(step.standing.values())
    most = sum(step.by_item([0] * 4, "tokens", step.tokens).values())
    rooms = [0, step.in_host_memory([3] * 4, ["x", "x", "gpu", "gpu"]), 10**12]
    asked = [(least + (most - least) * part / 24, room) for part in range(26) for room in rooms]
    found = [step.choose(*each) for each in asked]
    at_least = FusedStep._at_least
    monkeypatch.setattr(FusedStep, "_at_least", lambda *given: 0)
    assert found == [step.choose(*each) for each in asked]
    monkeypatch.setattr(FusedStep, "_at_least", lambda *given: at_least(*given) + 2**24)
    assert found != [step.choose(*each) for each in asked]
    assert {tuple(levels) for levels, *_ in found} > {(0,) * 4, (3,) * 4}


def test_a_step_that_cannot_fit_is_found_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers have 700 levels, tiles, and ways of the loss to be looked at."""
    looked_at, by_item = [], FusedStep.by_item
    monkeypatch.setattr(FusedStep, "by_item", lambda *given: looked_at.append(1) or by_item(*given))
    step = step_of(config_of(training={"per_device_train_batch_size": 8}), empty_model("llama-3-70b"))
    for budget in (2**30, 30 * 2**30, 50 * 2**30):
        assert step.choose(budget)[0] == [3] * 80
    assert len(looked_at) <= 3


def test_a_run_keeps_what_it_has_in_host_memory(korean_corpus: Path, tmp_path: Path) -> None:
    """Planned, said, recorded, and the bits of one that has it where it computes; resumed with it, or refused."""
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=5)

    def config(folder: str, **training: Any) -> RunConfig:
        training = {"host_memory": "1GiB", "optim": "sgd", "save_total_limit": 3, **training}
        return fused_file(model, korean_corpus, tmp_path / folder, training=training)

    planned = plan_run(config("planned", vram="1GiB"))
    assert planned.choices.places is None and "kept for the backward pass" not in planned.host
    vram = f"{(sum(planned.memory.values()) - 1) / 2**20:.9f}MiB"
    train_run(config("host", vram=vram))
    train_run(config("gpu", vram="1GiB"))
    plan = read(tmp_path / "host" / "plan.json")
    places = read_choices(tmp_path / "host" / "checkpoint-6").places
    assert plan["levels"] == [0] * 5 and plan["places"] == places and places is not None
    assert places[0] == "x" and places[-1] == "gpu"
    assert plan["host_bytes"]["kept for the backward pass"] > 0
    inputs = places.count("x")
    assert (
        f"at level 0 in 5 layers (0 computes least again, 3 most), with the input of {inputs} layers in host memory"
        in (fused_line(plan))
    )
    assert tensors_of(tmp_path / "host") == tensors_of(tmp_path / "gpu")

    shutil.rmtree(tmp_path / "host" / "final")
    shutil.rmtree(tmp_path / "host" / "checkpoint-6")
    told = r"training\.host_memory: .* in host memory, and .* needs .* may be filled.*--allow training\.gradient_check"
    with pytest.raises(UserError, match=told):
        train_run(config("host", vram=vram, host_memory="0.001MiB"), resume=True)
    train_run(config("host", vram=vram, host_memory="2GiB"), resume=True)
    assert read_choices(tmp_path / "host" / "checkpoint-6").places == places
    assert tensors_of(tmp_path / "host") == tensors_of(tmp_path / "gpu")


def tensors_of(folder: Path) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "final" / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("value", ["10%", "much", 64, True, None, "0GiB"])
def test_host_memory_is_an_amount(value: Any, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.host_memory.*[Gg]ive an amount in GiB, GB, MiB or MB"):
        run_file(llama_folder, korean_corpus, tmp_path / "run", training={"host_memory": value})


@pytest.mark.parametrize("offload", OFFLOADS[1:])
@pytest.mark.parametrize("lean", [False, True], ids=["at the end", "in backward"])
def test_states_in_host_memory_leave_the_plan_of_the_card(
    offload: Offload, lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For three slots, and inside backward the gradients that their updates still read. On a CPU nothing moves."""
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    empty = empty_llama(vocab_size=128_256, num_hidden_layers=8, **large)
    given = {"optimizer_in_backward": True, "max_grad_norm": 0} if lean else {}
    whole = step_of(config_of(training=given), empty)
    step = step_of(config_of(training={**given, "offload_optimizer": offload}), empty)
    shape, levels = step.shape, [3] * 8
    here: list[Place] = ["gpu"] * 8
    ours, theirs = (each.by_item(levels, "vocabulary", each.tokens) for each in (step, whole))
    left = {"embeddings": shape.lora, "all": 0}[offload]
    assert ours["optimizer states"] == round(left * (2 + 8 / 256)) < theirs["optimizer states"]
    assert (ours["staging of states"], theirs["staging of states"]) == (3 * (2**24 + 2**18), 0)
    of_layer = 2 * shape.lora // 8
    more = [
        a["gradients"] - b["gradients"]
        for a, b in zip(*(s._in_layers(levels, here, s.tokens) for s in (step, whole)), strict=True)
    ]
    first_layer = {"embeddings": 0, "all": 4 * of_layer}[offload]
    assert more == [first_layer if lean else 0, 0]  # the head's is awaited
    assert sum(ours.values()) < sum(theirs.values())
    on_cpu = fused_step(
        config_of(training={**given, "offload_optimizer": offload}), step.layers, shape,
        base="nf4", compute="bf16", trained="bf16", on_card=False,
    )  # fmt: skip
    assert on_cpu.by_item(levels, "vocabulary", on_cpu.tokens)["optimizer states"] == theirs["optimizer states"]
    how: dict[str, Any] = {"base": "nf4", "compute": "bf16", "trained": "bf16", "optim": "adamw_8bit", "tokens": 64}
    how |= {"checkpointing": True, "accumulates": False, "on_card": True, "in_backward": lean}
    config, states = config_of(training={**given, "offload_optimizer": offload}), round(shape.trained * (2 + 8 / 256))
    for processes in (1, 3):  # each has its own, and one writes the checkpoint
        monkeypatch.setattr("steep.ranks.processes_here", lambda processes=processes: processes)
        host = host_bytes(config, shape, step.standing, "bf16")
        assert host["optimizer states"] == processes * (states - ours["optimizer states"]) > 0
        assert host["copy of a checkpoint"] == states + ours["adapters"] + ours["trained embeddings"]
    library, on_card = (memory_by_item(shape, **how, offload=each) for each in (offload, "none"))
    assert library["optimizer states"] == ours["optimizer states"]
    assert library["gradients"] == on_card["gradients"]  # at the loss
    assert sum(library.values()) < sum(on_card.values())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_fp32_states_and_masters_are_planned(offload: Offload) -> None:
    """8 bytes a value, and 2 for a master, which bf16 weights alone have; on the card, on the host and in a checkpoint.
    The step takes as much longer as they take to move."""
    empty = empty_llama(num_hidden_layers=4, hidden_size=1024)
    config = config_of(
        training={"optimizer_states": "fp32", "master_weights": "embeddings", "offload_optimizer": offload}
    )
    step = step_of(config, empty)
    shape = step.shape
    of_adapters, of_tables = 8 * shape.lora, 10 * shape.trained_embeddings
    on_card = {"none": of_adapters + of_tables, "embeddings": of_adapters, "all": 0}[offload]
    assert step.standing["optimizer states"] == on_card
    host = host_bytes(config, shape, step.standing, "bf16")
    assert host["optimizer states"] == of_adapters + of_tables - on_card
    weights = step.standing["adapters"] + step.standing["trained embeddings"]
    assert host["copy of a checkpoint"] == of_adapters + of_tables + weights
    how: dict[str, Any] = {"base": "nf4", "compute": "bf16", "optim": "adamw_8bit", "tokens": 64, "on_card": True}
    how |= {"checkpointing": True, "accumulates": False, "offload": offload, "states": "fp32", "masters": "embeddings"}
    assert memory_by_item(shape, trained="bf16", **how)["optimizer states"] == on_card
    in_fp32 = fused_step(config, step.layers, shape, base="nf4", compute="bf16", trained="fp32", on_card=True)
    assert in_fp32.states_bytes("none") == 8 * shape.trained
    narrow = step_of(config_of(training={"offload_optimizer": offload}), empty)
    assert narrow.states_bytes("none") == round(shape.trained * (2 + 8 / 256))
    ours, theirs = (step_work(each, [1] * 4, micro_batches=1, document=64) for each in (step, narrow))
    wider = step.states_bytes("none") - narrow.states_bytes("none")
    assert ours.moved - theirs.moved == 2 * wider > 0
    copied = [sum(each.nbytes * each.count for each in work.transfers) for work in (ours, theirs)]
    assert copied[0] == of_adapters + of_tables - on_card and (copied[0] > copied[1] or offload == "none")


@pytest.mark.parametrize(("batches", "accumulation"), [(1, 1), (2, 4), (1, 32)])
def test_the_gradient_of_the_table_is_of_its_rows(batches: int, accumulation: int) -> None:
    """Where those of all tokens of a step, and their sums, are fewer; in one process, by AdamW8bit, on a card."""
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    empty = empty_llama(vocab_size=128_256, num_hidden_layers=2, **large)
    training = {"per_device_train_batch_size": batches, "gradient_accumulation_steps": accumulation}
    step = step_of(config_of(training=training), empty)
    looked_up, width = 2048 * batches * accumulation, step.gradient_width
    fewer = 4 * looked_up < 128_256
    assert fewer == (accumulation < 32)
    of_all = width * step.shape.trained
    of_rows = round((2 * width + SUMMING) * looked_up * 4096) - width * step.shape.table if fewer else 0
    *_, at_the_end = step._at_the_update()
    assert at_the_end["gradients"] == of_all + of_rows
    for other in (
        {"optim": "adamw_torch"}, {"processes": 2}, {"on_card": False}, {"trains_table": False}, {"compute": "fp16"},
    ):  # fmt: skip
        assert replace(step, **other)._spared_by_rows == 0
