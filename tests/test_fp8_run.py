"""A run over an fp8 base from its file to what is made of it, on the CPU."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from steep import hand_over, result
from steep.amounts import human_bytes
from steep.config import parse_config, recorded_config
from steep.errors import RunError, UserError
from steep.evaluation.perplexity import evaluate
from steep.evaluation.score import scored_otherwise
from steep.export.gate import Gap, Measured
from steep.hand_over import export_run
from steep.model.fp8_linear import Fp8Linear
from steep.model.install import fused_of
from steep.model.machine import Card
from steep.model.resolve import read_tokenizer, resolve
from steep.plan import plan_run
from steep.report.read import read_run
from steep.report.verdict import headline
from steep.result import evaluate_run, generate_run, load_result
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.terminal import Terminal, fused_line
from steep.verify_resume import compare
from tests.command_line import Steep
from tests.faults.command import ForkServer, torchrun
from tests.faults.runs import finished as done
from tests.fp8_checkpoints import FINE_GRAINED, publish
from tests.test_run import lines, run_file


def config_of(model: Path, corpus: Path, folder: Path, *, fused: str = "off", **training: Any) -> RunConfig:
    settings = {"base": "fp8", "fused": fused}
    return run_file(model, corpus, folder, model=settings, training=training, evaluation={"prompts": []})


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "run"
    train_run(config_of(llama_folder, korean_corpus, folder, fused="on"))
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_run_trains_and_proves_it(finished: Path) -> None:
    proof = read(finished / "proof.json")
    assert proof["ok"] and not proof["frozen_changed"]
    assert proof["frozen_tensors"] >= 2 * 2 * 7 + 5  # codes and scales of seven layers in each of two, and the norms
    losses = [row["loss"] for row in lines(finished / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    plan = read(finished / "plan.json")
    assert (plan["base"], plan["fused"]) == ("fp8", True)


def test_losses_are_those_of_the_librarys_forward(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    for fused in ("on", "off"):
        settings = {"max_steps": 12, "save_steps": 12, "learning_rate": 1e-3}
        train_run(config_of(llama_folder, korean_corpus, tmp_path / fused, fused=fused, **settings))
    ours, theirs = ([row["loss"] for row in lines(tmp_path / fused / "metrics.jsonl")] for fused in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize(("fused", "products"), [("on", "both"), ("on", "none"), ("off", "auto")])
def test_resumed_is_never_stopped(
    fused: str, products: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """The run that goes on asks for nothing: what was chosen stands in the checkpoint."""

    def config(name: str, asked: str) -> RunConfig:
        given = config_of(llama_folder, korean_corpus, tmp_path / name, fused=fused, save_total_limit=3).model_dump()
        given["model"] |= {"compute_dtype": "bf16", "fp8_products": asked}
        return parse_config(given)

    train_run(config("whole", products))
    stopped(tmp_path / "whole", tmp_path / "stopped")
    assert read(tmp_path / "whole" / "checkpoint-6" / "choices.json")["fp8_products"] == (
        products if fused == "on" else None
    )
    train_run(config("stopped", "auto"), resume=True, allow=["model.fp8_products"])
    parts = compare(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped"))
    assert [part.difference for part in parts] == [None] * len(parts)
    if products == "both":
        assert fused_line(read(tmp_path / "stopped" / "plan.json")).endswith(", products in fp8")
        scores, recorded = evaluate_run(tmp_path / "stopped")[1], lines(tmp_path / "stopped" / "evaluation.jsonl")
        assert [score.loss for score in scores] == pytest.approx(
            [row["loss"] for row in recorded if row["step"] == 6], rel=1e-6
        )


def test_no_other_base_goes_on(finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    given = config_of(llama_folder, korean_corpus, tmp_path / "run", fused="on").model_dump()
    given["model"]["base"] = "nf4"
    with pytest.raises(UserError, match=r"model\.base"):
        train_run(parse_config(given), resume=True, allow=["model.base"])


def stopped(finished: Path, folder: Path) -> Path:
    """A run that was killed after its third step."""
    shutil.copytree(finished, folder)
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(folder / name)
    return folder


HOPPER, AMPERE = (Card("fake", capability, 2**34, 2**34) for capability in ((9, 0), (8, 6)))


def on(card: Card | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are planned for that card from now on; they compute on the CPU."""
    monkeypatch.setattr("steep.plan.card_here", lambda: card)
    monkeypatch.setattr("steep.plan.measured_here", lambda *given: None)  # it is not there


def with_base_of(base: str, model: Path, corpus: Path, folder: Path, **training: Any) -> RunConfig:
    given = config_of(model, corpus, folder, fused="on", **training).model_dump()
    given["model"] |= {"base": base, "compute_dtype": "bf16"}
    return parse_config(given)


@pytest.mark.parametrize(
    ("chosen", "card", "products"), [("fp8", HOPPER, "both"), ("nf4", AMPERE, "none")], ids=["fp8", "nf4"]
)
def test_a_base_that_auto_chose_is_kept(
    chosen: str,
    card: Card,
    products: str,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where `auto` would be another one now, as on another card or within less memory; and where it is named."""

    def config(base: str, name: str, **training: Any) -> RunConfig:
        return with_base_of(base, llama_folder, korean_corpus, tmp_path / name, **training)

    on(card, monkeypatch)
    train_run(config("auto", "run"))
    run = stopped(tmp_path / "run", tmp_path / "stopped")
    for folder in (tmp_path / "run", run):
        assert recorded_config(folder / "run.yaml").model.base == read(folder / "plan.json")["base"] == chosen
    assert read(run / "checkpoint-3" / "choices.json")["fp8_products"] == products
    on(HOPPER, monkeypatch)
    other = "nf4" if chosen == "fp8" else "fp8"
    monkeypatch.setattr("steep.planning.bases._chosen", lambda *given: (other, "it is full, or not"))
    assert plan_run(config("auto", "new")).base == other
    train_run(config("auto", "stopped"), resume=True)
    assert recorded_config(run / "run.yaml").model.base == read(run / "plan.json")["base"] == chosen
    assert not (run / "changes.jsonl").exists()
    parts = compare(RunFolder(tmp_path / "run"), RunFolder(run))
    assert [part.difference for part in parts] == [None] * len(parts)
    score = evaluate_run(run)[1][0]
    recorded = [row["loss"] for row in lines(run / "evaluation.jsonl") if row["step"] == 6]
    assert [score.loss] == pytest.approx(recorded, rel=1e-6)
    train_run(config("auto", "branch", max_steps=1), branch=tmp_path / "run" / "checkpoint-3")
    assert read(tmp_path / "branch" / "plan.json")["base"] == chosen
    train_run(config(chosen, "stopped"), resume=True)
    assert not (run / "changes.jsonl").exists()
    refused = rf"model\.base: '{chosen}' → '{other}'"
    with pytest.raises(UserError, match=rf"{refused}.*model\.base cannot change within a run"):
        train_run(config(other, "stopped"), resume=True)
    with pytest.raises(UserError, match=refused):
        train_run(config(other, "another", max_steps=1), branch=tmp_path / "run" / "checkpoint-3")


@pytest.mark.parametrize(
    ("chosen", "card", "later"), [("fp8", HOPPER, None), ("nf4", AMPERE, HOPPER)], ids=["fp8", "nf4"]
)
def test_a_base_that_auto_chose_is_kept_by_a_run_that_was_killed_before_its_plan_was_written(
    chosen: str,
    card: Card,
    later: Card | None,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, run = with_base_of("auto", llama_folder, korean_corpus, tmp_path / "run"), tmp_path / "run"

    def killed(folder: RunFolder, name: str, tree: Any) -> None:
        raise KeyboardInterrupt(name)

    on(card, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=r"plan\.json"):
        patch.setattr(RunFolder, "write_json", killed)
        train_run(config)
    assert (run / "run.yaml").is_file() and not (run / "plan.json").exists()
    on(later, monkeypatch)
    train_run(config, resume=True)
    assert recorded_config(run / "run.yaml").model.base == read(run / "plan.json")["base"] == chosen


def test_a_run_whose_file_says_auto_keeps_what_its_plan_says(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """As run files said before they named it."""
    run = stopped(finished, tmp_path / "run")
    given = config_of(llama_folder, korean_corpus, run, fused="on").model_dump()
    given["model"]["base"] = "auto"
    (run / "run.yaml").write_text(parse_config(given).to_yaml(), encoding="utf-8")
    train_run(parse_config(given), resume=True)
    assert read(run / "plan.json")["base"] == "fp8"


_TWO_CARDS = """
import os
from steep import cli, plan
from steep.model.machine import Card

capability = ((9, 0), (8, 6))[int(os.environ["RANK"])]
plan.card_here = lambda: Card("fake", capability, 2**34, 2**34)
cli.main()
"""


def test_each_process_has_the_base_of_the_first_whatever_its_own_card(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, quick: ForkServer
) -> None:
    script, file = tmp_path / "two_cards.py", tmp_path / "run.yaml"
    script.write_text(_TWO_CARDS, encoding="utf-8")
    config = with_base_of("auto", llama_folder, korean_corpus, tmp_path / "run", max_steps=4, save_steps=4)
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert done(quick.python(torchrun(script, "train", file), tmp_path)).code == 0
    plan = read(tmp_path / "run" / "plan.json")
    assert (plan["base"], plan["processes"], plan["fp8_products"]) == ("fp8", 2, "both")
    proof = read(tmp_path / "run" / "proof.json")
    assert proof["ok"], proof


def test_a_published_checkpoints_base_may_be_named_or_not(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    model = publish(llama_folder, tmp_path / "published", FINE_GRAINED)
    for first, then in (("auto", "fp8"), ("fp8", "auto")):
        configs = [
            run_file(model, korean_corpus, tmp_path / first, model={"base": base}, evaluation={"prompts": []})
            for base in (first, then)
        ]
        train_run(configs[0])
        for name in ("final", "checkpoint-6"):
            shutil.rmtree(tmp_path / first / name)
        train_run(configs[1], resume=True)
        assert (tmp_path / first / "final").is_dir()


def test_it_is_scored_and_completes_texts(finished: Path) -> None:
    base, trained = evaluate_run(finished)
    recorded = [row for row in lines(finished / "evaluation.jsonl") if row["step"] == 6]
    assert [score.loss for score in trained] == pytest.approx([row["loss"] for row in recorded], rel=1e-6)
    assert all(one.loss > other.loss for one, other in zip(base, trained, strict=True))
    assert generate_run(finished, "the river", max_new_tokens=4).keys() == {"base", "trained"}


def test_without_its_adapter_it_is_the_base(finished: Path, llama_folder: Path) -> None:
    config = run_file(llama_folder, Path("unused"), finished, model={"base": "fp8"})
    resolved = resolve(str(llama_folder))
    ours: Any = load_result(config, resolved, read_tokenizer(resolved), RunFolder(finished)).eval()
    assert sum(isinstance(module, Fp8Linear) for module in ours.modules()) == 14
    plain: Any = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    for name, module in ours.get_base_model().named_modules():
        if isinstance(module, Fp8Linear):
            weight = plain.get_submodule(name.removesuffix(".base_layer")).weight
            weight.data.copy_(module.dequantize())
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        with ours.disable_adapter():
            without = ours(input_ids=tokens, use_cache=False).logits
        expected = plain(input_ids=tokens).logits
        assert torch.allclose(without, expected, atol=1e-5 * float(expected.abs().max()))
        plain = PeftModel.from_pretrained(plain, str(finished / "final")).eval()
        logits, expected = ours(input_ids=tokens, use_cache=False).logits, plain(input_ids=tokens).logits
        assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))
        assert not torch.allclose(logits, without, atol=1e-2)


def test_how_it_opens_is_over_the_16_bit_original(finished: Path, llama_folder: Path) -> None:
    text = (finished / "final" / "README.md").read_text(encoding="utf-8")
    assert "quantization_config" not in text and f"from_pretrained({str(llama_folder)!r}" in text.replace('"', "'")
    assert "The lines below need\n`peft` and `transformers`." in text and "BitsAndBytes" not in text


def test_a_loftq_adapter_opens_over_e4m3(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """It holds the correction of what was lost there: over the original it would correct what nothing lost."""
    given = config_of(llama_folder, korean_corpus, tmp_path / "run").model_dump()
    given["adapter"]["init_lora_weights"] = "loftq"
    config = parse_config(given)
    train_run(config)
    with pytest.raises(UserError, match=r"^--base: a LoftQ adapter holds the quantisation's correction"):
        export_run(tmp_path / "run", tmp_path / "merged", base="original")
    export_run(tmp_path / "run", tmp_path / "out", to="adapter")
    cards = [
        (folder / "README.md").read_text(encoding="utf-8") for folder in (tmp_path / "run" / "final", tmp_path / "out")
    ]
    for text in cards:
        assert "(LoftQ), which the 16-bit original does not need" in text and "AutoModelForCausalLM" not in text
    assert "`peft`, `transformers` and `steep`." in cards[0]
    names: dict[str, Any] = {}
    (lines_of_it,) = [
        block.split("```")[0] for block in cards[0].split("```python\n") if block.startswith("import steep")
    ]
    exec(lines_of_it, names)
    (row,) = [row for row in lines(tmp_path / "run" / "evaluation.jsonl") if row["step"] == 6]
    (found,) = evaluate(names["model"], plan_run(config).corpus.heldout, max_length=64)
    assert found.loss == pytest.approx(row["loss"], rel=1e-4)
    assert sum(isinstance(module, Fp8Linear) for module in names["base"].modules()) == 14


def test_it_is_merged_into_the_original(finished: Path, llama_folder: Path, tmp_path: Path) -> None:
    result = export_run(finished, tmp_path / "out")
    assert result["base"] == "original" and set(result["gaps"]) == {"dequantised", "original"}
    assert all(abs(gap) < 0.005 for gaps in result["gaps"].values() for gap in gaps.values())
    written = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    config = run_file(llama_folder, Path("unused"), finished, model={"base": "fp8"})
    resolved = resolve(str(llama_folder))
    ours: Any = load_result(config, resolved, read_tokenizer(resolved), RunFolder(finished))
    layer = ours.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    original = load_file(llama_folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(written, (original + layer.get_delta_weight("default")).bfloat16())
    assert "the 16-bit original" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("base", "trained_over", "original", "kept"),
    [
        ("auto", "fp8", 0.004, "original"),  # close enough, though the other is better
        ("auto", "fp8", 0.006, "dequantised"),
        ("original", "fp8", 0.006, "original"),
        ("auto", "nf4", 0.004, "dequantised"),
        ("auto", "nf4", -0.004, "original"),
    ],
)
def test_which_merged_model_is_kept(base: str, trained_over: str, original: float, kept: str) -> None:
    rises = {"dequantised": 0.001, "original": original}
    gaps: Any = {kind: Gap({"ko": rise}, 0.0) for kind, rise in rises.items()}
    measured: Any = {kind: SimpleNamespace(bits_per_byte=1 + rise) for kind, rise in rises.items()}
    assert hand_over._kept(measured, gaps, base, trained_over) == kept


def test_a_gguf_file_is_made_of_it(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steep.export.gguf_check.find_spec", lambda _: None)
    assert export_run(finished, tmp_path / "out", to="gguf")["base"] == "original"
    assert (tmp_path / "out" / "out-q8_0.gguf").is_file()


def test_a_plan_knows_it(llama_folder: Path, korean_corpus: Path, tmp_path: Path, steep: Steep) -> None:
    config = config_of(llama_folder, korean_corpus, tmp_path / "run")
    plan = plan_run(config)
    assert plan.base == "fp8" and plan.memory["frozen linear weights"] == plan.shape.linear
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    said = steep("plan", file)
    assert said.code == 0 and "fp8" in said.out
    bases = plan.as_dict()["bases"]
    widths = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1, "fp8": 1, "bf16": 2}
    assert {name: base["bytes"] for name, base in bases.items()} == {
        name: round(width * plan.shape.linear) for name, width in widths.items()
    }
    errors = {name: base["weight_error"] for name, base in bases.items()}
    gaussian = {
        "nf4": pytest.approx(0.094, rel=0.1),
        "int8": pytest.approx(0.007, rel=0.3),
        "fp8": pytest.approx(0.026, rel=0.1),
    }
    assert errors == {**gaussian, "bf16": None}
    said_rows = said.out.rpartition("frozen linear")[2].splitlines()  # of the table's head, which is wrapped
    for name, error in errors.items():
        (row,) = [row for row in said_rows if f" {'16 bits' if error is None else name} " in row]
        assert human_bytes(bases[name]["bytes"]) in row and ("–" if error is None else f"{error:.2%}") in row


def test_a_plan_for_a_card_without_one_is_that_of_the_run(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run here would compute in emulated fp8 else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = config_of(llama_folder, korean_corpus, tmp_path / "run", fused="on", vram="8GiB")
    config.model.compute_dtype = "bf16"
    assert plan_run(config).choices.fp8_products == "none"
    config.model.fp8_products = "both"
    assert plan_run(config).choices.fp8_products == "both"


def test_a_published_checkpoint_goes_the_whole_way(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    model = publish(llama_folder, tmp_path / "published", FINE_GRAINED)
    settings = {"base": "auto", "fused": "on"}
    config = run_file(model, korean_corpus, tmp_path / "run", model=settings, evaluation={"prompts": []})
    train_run(config)
    assert read(tmp_path / "run" / "plan.json")["base"] == "fp8" and read(tmp_path / "run" / "proof.json")["ok"]
    text = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert "FineGrainedFP8Config(dequantize=True)" in text and "BitsAndBytes" not in text
    assert "The lines below need\n`peft` and `transformers`." in text
    result = export_run(tmp_path / "run", tmp_path / "out")
    assert result["base"] == "dequantised" and set(result["gaps"]) == {"dequantised"}
    assert "quantization_config" not in read(tmp_path / "out" / "config.json")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "given as 8 bits (e4m3): its weights were dequantised to 16 bits" in card
    with pytest.raises(UserError, match="is stored in fp8 only"):
        export_run(tmp_path / "run", tmp_path / "other", base="original")


# ---- trained with products in fp8


def test_scores_of_two_arithmetics_are_not_shown_as_one(
    in_fp8: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(in_fp8, tmp_path / "run")
    given = config_of(llama_folder, korean_corpus, run, fused="on").model_dump()
    given["model"] |= {"compute_dtype": "bf16", "fp8_products": "none"}
    terminal, warned = Terminal(quiet=True), list[str]()
    monkeypatch.setattr(terminal, "warn", warned.append)
    train_run(parse_config(given), resume=True, allow=["model.fp8_products"], terminal=terminal)
    assert [(row["step"], row["fp8_products"]) for row in lines(run / "evaluation.jsonl")] == [(0, "both"), (6, "none")]
    said = "The first scores were taken with products in fp8 and the last without"
    assert [line for line in warned if said in line] == [scored_otherwise(lines(run / "evaluation.jsonl"))]
    export_run(run, tmp_path / "out", to="adapter")
    assert said in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert said in headline(read_run(run))
    assert "with products in fp8" not in headline(read_run(in_fp8))


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        ("both", "none", "with products in fp8 and the last without"),
        ("both", "backward", "with products in fp8 and the last without"),
        ("none", "both", "without products in fp8 and the last with them"),
        (None, "both", "without products in fp8 and the last with them"),
        ("backward", "none", None),  # which score nothing
        ("both", "both", None),
        (None, None, None),
    ],
)
def test_when_scores_are_of_two_arithmetics(first: str | None, last: str | None, said: str | None) -> None:
    rows: list[dict[str, Any]] = [{"fp8_products": first}, {"fp8_products": last}]
    assert (said or "") in (scored_otherwise(rows) or "") and (scored_otherwise(rows) is None) is (said is None)
    assert scored_otherwise([]) is scored_otherwise([{}, rows[1]]) is None  # not recorded


@pytest.fixture(scope="module")
def in_fp8(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "run"
    given = config_of(llama_folder, korean_corpus, folder, fused="on").model_dump()
    given["model"] |= {"compute_dtype": "bf16", "fp8_products": "both"}
    train_run(parse_config(given))
    return folder


def recorded_worse(run: Path, folder: Path) -> Path:
    """A copy whose record is what products in fp8 may make of it, as far as another arithmetic can tell."""
    shutil.copytree(run, folder)
    file = folder / "evaluation.jsonl"
    rows = [row | {"bits_per_byte": row["bits_per_byte"] + 0.02} for row in lines(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    on(AMPERE, monkeypatch)
    monkeypatch.setattr(result, "lacks_fp8_units", lambda: True)


def test_its_merge_is_proved_without_them(in_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them the tiny model's logits are as far from the merged one's as a deep model's from the gate's limit."""
    monkeypatch.setattr("steep.export.gate.LOGITS_LIMIT", 0.01)
    measured: list[tuple[str | None, Measured]] = []
    measure, gate_table, shown = hand_over.measure, hand_over.gate_table, []

    def noted(model: Any, *given: Any, **how: Any) -> Measured:
        found = measure(model, *given, **how)
        measured.append((fused_of(model).fp8, found))
        return found

    monkeypatch.setattr(hand_over, "measure", noted)
    monkeypatch.setattr(hand_over, "gate_table", lambda *given: shown.append(gate_table(*given)) or shown[-1])
    assert export_run(in_fp8, tmp_path / "out")["base"] == "original"
    (first, own), (second, exact) = measured
    assert (first, second) == ("both", "none")
    assert float((own.logits - exact.logits).norm() / exact.logits.norm()) > 0.012
    recorded = [row["bits_per_byte"] for row in lines(in_fp8 / "evaluation.jsonl") if row["step"] == 6]
    assert [score.bits_per_byte for score in own.scores] == pytest.approx(recorded, rel=1e-6)
    assert [column.header for column in shown[0].columns] == [
        "domain", "adapter", "in fp8", "merged, dequantised", "merged, original",
    ]  # fmt: skip
    with_them, without = own.scores[0].bits_per_byte, exact.scores[0].bits_per_byte
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        f"with them its bits per byte are: {own.scores[0].domain} {with_them:.4f} ({with_them - without:+.4f})" in card
    )
    assert f"| {own.scores[0].domain} | {without:.4f} |" in card


def test_its_record_holds_where_they_are_computed(in_fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not the model that the run ended with"):
        export_run(recorded_worse(in_fp8, tmp_path / "run"), tmp_path / "out")


def test_a_card_without_units_for_them_says_so_and_exports_it(
    in_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_units(monkeypatch)
    with caplog.at_level(logging.WARNING, "steep"):
        assert export_run(recorded_worse(in_fp8, tmp_path / "run"), tmp_path / "out")["base"] == "original"
    assert caplog.text.count("this card has no units for them") == 1
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Here it has none of them." in card


def test_a_card_without_units_for_them_says_so_and_scores_it(
    in_fp8: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = evaluate_run(in_fp8)[1]
    assert "no units" not in caplog.text
    without_units(monkeypatch)
    with caplog.at_level(logging.WARNING, "steep"):
        other = evaluate_run(in_fp8)[1]
    assert caplog.text.count("this card has no units for them") == 1
    assert [score.loss for score in other] == pytest.approx([score.loss for score in own], rel=1e-2)
    assert [score.loss for score in other] != pytest.approx([score.loss for score in own], rel=1e-6)


@pytest.mark.parametrize(("products", "said"), [("both", True), ("backward", False), ("none", False)])
def test_only_products_that_scores_depend_on_are_missed(
    products: str,
    said: bool,
    in_fp8: Path,
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = shutil.copytree(in_fp8, tmp_path / "run")
    (run / "plan.json").write_text(json.dumps(read(run / "plan.json") | {"fp8_products": products}), encoding="utf-8")
    without_units(monkeypatch)
    config, resolved = run_file(llama_folder, Path("unused"), run, model={"base": "fp8"}), resolve(str(llama_folder))
    model = load_result(config, resolved, read_tokenizer(resolved), RunFolder(run))
    assert fused_of(model).fp8 == "none" and ("no units" in caplog.text) is said
