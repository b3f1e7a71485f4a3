"""From a finished run to a folder that others open."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steep import cli, hand_over
from steep.errors import RunError, UserError
from steep.evaluation.perplexity import evaluate
from steep.evaluation.score import DomainScore
from steep.export.adapter_weights import AdapterWeights
from steep.export.gate import Measured
from steep.export.gguf import write_gguf
from steep.export.merged import Merger
from steep.hand_over import export_run, next_step
from steep.plan import plan_run
from steep.result import finished
from steep.run import train_run
from steep.terminal import Terminal
from tests.test_run import run_file
from tests.tiny import save_tiny, sentencepiece_tokenizer

Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished runs by the form of their base, each made once."""
    made: dict[str, Path] = {}
    place = tmp_path_factory.mktemp("runs")

    def run(base: str) -> Path:
        if base not in made:
            model = save_tiny("llama", place / f"model-{base}", tied=base == "nf4")
            made[base] = place / base
            given = {"base": base, "compute_dtype": "fp32" if base == "fp32" else "auto"}
            train_run(run_file(model, korean_corpus, made[base], model=given, evaluation={"prompts": []}))
        return made[base]

    return run


@pytest.fixture
def spoken() -> tuple[Terminal, list[str]]:
    """A terminal that keeps what is said and warned of."""
    terminal, said = Terminal(quiet=True), []
    terminal.say = lambda text: said.append(text)
    terminal.warn = lambda text: said.append(f"warning: {text}")
    return terminal, said


def test_a_run_over_4_bits_is_merged_into_the_better_base(
    runs: Runs, tmp_path: Path, spoken: tuple[Terminal, list[str]]
) -> None:
    terminal, said = spoken
    out = tmp_path / "out"
    result = export_run(runs("nf4"), out, terminal=terminal)
    assert result["path"] == out and set(result["gaps"]) == {"dequantised", "original"}
    assert all(abs(gap) < 0.005 for gap in result["gaps"]["dequantised"].values())
    best = min(result["gaps"], key=lambda kind: sum(result["gaps"][kind].values()))
    assert result["base"] == best and f"merged into the {best} base: the better of the two" in said
    names = {file.name for file in out.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"}  # fmt: skip
    config, folder = finished(runs("nf4"))
    heldout = plan_run(config).corpus.heldout
    opened = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(out)) == 384
    recorded = {row["domain"]: row for row in folder.read_lines("evaluation.jsonl") if row["step"]}
    for score in evaluate(opened, heldout, max_length=64):
        assert score.bits_per_byte - recorded[score.domain]["bits_per_byte"] == pytest.approx(
            result["gaps"][best][score.domain], abs=1e-4
        )
    assert f"| {next(iter(heldout))} |" in (out / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("base", ["int8", "fp32", "bf16"])
def test_runs_over_other_bases(base: str, runs: Runs, tmp_path: Path) -> None:
    result = export_run(runs(base), tmp_path / "out")
    kinds = {"dequantised", "original"} if base == "int8" else {"original"}
    assert set(result["gaps"]) == kinds
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("16-bit original" in text) is (base != "int8" or result["base"] == "original" or "would be" in text)


def test_the_original_is_obeyed_and_its_rise_said(
    runs: Runs, tmp_path: Path, spoken: tuple[Terminal, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, said = spoken
    monkeypatch.setattr(hand_over, "BITS_LIMIT", -1.0)  # a loss of a tiny random model sees next to nothing
    monkeypatch.setattr("steep.export.card.BITS_LIMIT", -1.0)
    result = export_run(runs("nf4"), tmp_path / "out", base="original", terminal=terminal)
    assert (result["base"], set(result["gaps"])) == ("original", {"original", "dequantised"})
    assert any(line.startswith("warning: merged into the 16-bit original the model is worse") for line in said)
    assert not any("the better of the two" in line for line in said)  # it was asked for, not chosen
    assert "**The merged model is worse" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_auto_keeps_the_better_whichever_it_is(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Measured.bits_per_byte.fget
    assert real is not None
    kept = export_run(runs("nf4"), tmp_path / "one")["base"]
    monkeypatch.setattr(Measured, "bits_per_byte", property(lambda self: -real(self)))
    other = export_run(runs("nf4"), tmp_path / "two")["base"]
    assert {kept, other} == {"dequantised", "original"}
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert not torch.equal(*(part["model.layers.0.mlp.up_proj.weight"] for part in (one, two)))


def halve_one_layer(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In the folder of one kind, and in the last layer alone, which a tiny model's loss does not see."""
    real_write, real_scale = Merger.write, AdapterWeights.scale

    def write(self: Merger, folder: Path, written: Any, **given: Any) -> None:
        with monkeypatch.context() as planted:
            if written == kind:
                half = "layers.1.self_attn.v_proj"
                planted.setattr(
                    AdapterWeights, "scale", lambda self, name: real_scale(self, name) * (0.5 if half in name else 1)
                )
            real_write(self, folder, written, **given)

    monkeypatch.setattr(Merger, "write", write)


@pytest.mark.parametrize(("base", "kind"), [("nf4", "dequantised"), ("nf4", "original"), ("fp32", "original")])
def test_a_model_that_is_not_the_trained_one_is_not_published(
    base: str, kind: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halve_one_layer(monkeypatch, kind)
    with pytest.raises(RunError, match=r"the merged model is not the trained one: model\.layers\.1\.self_attn\.v_proj"):
        export_run(runs(base), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Merger.write

    def stop(self: Merger, folder: Path, *given: Any, **named: Any) -> None:
        real(self, folder, *given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Merger, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export_run(runs("nf4"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ({}, {"init_lora_weights": "pissa"}),
        ({}, {"init_lora_weights": "loftq"}),
        ({}, {"use_dora": True}),
        ({"untie_embeddings": True}, {}),
    ],
    ids=["pissa", "loftq", "dora", "untied"],
)
def test_each_option_of_the_recipe_is_merged(
    model: dict[str, Any], adapter: dict[str, Any], korean_corpus: Path, tmp_path: Path
) -> None:
    base = save_tiny("llama", tmp_path / "model", tied=True)
    given = {"model": {"base": "nf4", **model}, "adapter": adapter, "evaluation": {"prompts": []}}
    train_run(run_file(base, korean_corpus, tmp_path / "run", **given))
    result = export_run(tmp_path / "run", tmp_path / "out")
    assert all(abs(gap) < 0.005 for gap in result["gaps"]["dequantised"].values())
    assert ("original" in result["gaps"]) is ("loftq" not in adapter.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in written) is (not model)
    if model:
        assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_without_held_out_text_trained_text_is_scored(
    korean_corpus: Path, llama_folder: Path, tmp_path: Path, spoken: tuple[Terminal, list[str]]
) -> None:
    terminal, said = spoken
    run = tmp_path / "run"
    train_run(run_file(llama_folder, korean_corpus, run, data={"holdout": 0}, evaluation={"prompts": []}))
    result = export_run(run, tmp_path / "out", terminal=terminal)
    assert set(result["gaps"]["original"]) == set(plan_run(finished(run)[0]).corpus.roles)
    assert "comparing on text that it was trained on, since nothing was held out" in said
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "text that it was trained on, since nothing was held out" in text and "before and after" not in text


def test_an_adapter_opens_in_peft(runs: Runs, tmp_path: Path, spoken: tuple[Terminal, list[str]]) -> None:
    terminal, said = spoken
    with pytest.raises(UserError, match="--base: an adapter is merged into nothing"):
        export_run(runs("fp32"), tmp_path / "out", to="adapter", base="original")
    export_run(runs("fp32"), tmp_path / "out", to="adapter", terminal=terminal)
    base = AutoModelForCausalLM.from_pretrained(runs("fp32").parent / "model-fp32", dtype=torch.float32)
    opened = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    config, folder = finished(runs("fp32"))
    rows = {row["domain"]: row for row in folder.read_lines("evaluation.jsonl") if row["step"]}
    for score in evaluate(opened, plan_run(config).corpus.heldout, max_length=64):
        assert score.loss == pytest.approx(rows[score.domain]["loss"], rel=1e-5)  # fp32
    assert any("vLLM and llama.cpp refuse" in line for line in said)
    assert any(line.startswith("warning: The base model, model-fp32, was a local one") for line in said)
    for file in (tmp_path / "out").iterdir():
        if file.suffix in (".json", ".md"):
            assert str(tmp_path.parent.parent) not in file.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "model-fp32"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 384


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_result_without_its_tokenizer_is_not_handed_on(form: str, runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs("fp32"), run)
    (run / "final" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^run folder: .*final \(tokenizer_config.json\) cannot be read"):
        export_run(run, tmp_path / "out", to=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("judged", [pytest.param(True, marks=pytest.mark.llama_cpp), False])
def test_gguf_files_are_the_merged_model(
    judged: bool, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoken: tuple[Terminal, list[str]]
) -> None:
    if not judged:
        monkeypatch.setattr("steep.export.gguf_check.find_spec", lambda _: None)
    terminal, said = spoken
    export_run(runs("nf4"), tmp_path / "out", to="gguf", terminal=terminal)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "Modelfile", "out-f16.gguf", "out-q8_0.gguf"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "ollama create out" in card
    found = "in llama.cpp, " if judged else "tensors and metadata are the merged folder's"
    for file in ("out-f16.gguf", "out-q8_0.gguf"):
        assert any(line.startswith(file) and found in line for line in said)
        assert any(line.startswith(f"| {file} |") and found in line for line in card.splitlines())


@pytest.mark.parametrize("judged", [pytest.param(True, marks=pytest.mark.llama_cpp), False])
def test_a_gguf_file_that_is_not_the_merged_model_is_not_published(
    judged: bool, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not judged:
        monkeypatch.setattr("steep.export.gguf_check.find_spec", lambda _: None)
    real = hand_over.write_gguf

    def write_another(model_folder: Path, out: Path, name: str) -> list[Path]:
        weights = load_file(model_folder / "model.safetensors")
        other = {key: -tensor if "down_proj" in key else tensor for key, tensor in weights.items()}
        save_file(other, model_folder / "model.safetensors", {"format": "pt"})
        files = real(model_folder, out, name)
        save_file(weights, model_folder / "model.safetensors", {"format": "pt"})
        return files

    monkeypatch.setattr(hand_over, "write_gguf", write_another)
    with pytest.raises(RunError, match=r"out-f16\.gguf is not the merged model"):
        export_run(runs("nf4"), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


def test_what_gguf_cannot_hold_is_refused_before_the_work(
    korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("gemma2", tmp_path / "model")
    untied = {"base": "fp32", "untie_embeddings": True}
    train_run(run_file(model, korean_corpus, tmp_path / "run", model=untied, evaluation={"prompts": []}))
    monkeypatch.setattr(hand_over, "load_result", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="output embeddings are separate"):
        export_run(tmp_path / "run", tmp_path / "out", to="gguf")


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_with_new_tokens_is_handed_on_in_every_form(korean_corpus: Path, tmp_path: Path, tied: bool) -> None:
    model = save_tiny("llama", tmp_path / "model", tied=tied)
    settings = {"base": "nf4", "compute_dtype": "fp32", "new_tokens": {"auto": 20}}
    train_run(run_file(model, korean_corpus, tmp_path / "run", model=settings, evaluation={"prompts": []}))
    for form in ("merged", "gguf", "adapter"):
        export_run(tmp_path / "run", tmp_path / form, to=form)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer) == 404
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    assert (tmp_path / "gguf" / "gguf-f16.gguf").is_file()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == 404


@pytest.mark.parametrize("grown", [False, True])
def test_who_may_make_gguf_of_a_merged_folder_is_said(
    grown: bool, korean_corpus: Path, tmp_path: Path, spoken: tuple[Terminal, list[str]]
) -> None:
    """New tokens leave the base's tokenizer.model behind, and llama.cpp's converter has no other scores."""
    terminal, said = spoken
    base = save_tiny("llama", tmp_path / "base", tokenizer=sentencepiece_tokenizer())
    (base / "tokenizer.model").write_bytes(b"scores")
    model = {"base": "fp32", **({"new_tokens": {"auto": 5}} if grown else {})}
    train_run(run_file(base, korean_corpus, tmp_path / "run", model=model, evaluation={"prompts": []}))
    export_run(tmp_path / "run", tmp_path / "out", terminal=terminal)
    assert (tmp_path / "out" / "tokenizer.model").is_file() is not grown
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    note = "For GGUF files use steep export RUN --to gguf"
    assert (note in card) is any(line.startswith(f"warning: {note}") for line in said) is grown


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_another_model_than_the_trained_one_is_found(runs: Runs, tmp_path: Path, what: str) -> None:
    run = shutil.copytree(runs("nf4"), tmp_path / "run")
    if what == "base":
        other = save_tiny("llama", tmp_path / "other", tied=True, seed=5)
        file = run / "run.yaml"
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        settings["model"]["name"] = str(other)
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    else:
        file = run / "final" / "adapter_model.safetensors"
        emptied = {name: 0 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
        save_file(emptied, file, {"format": "pt"})
    # PEFT says on its own that the adapter names another base.
    renamed = pytest.warns(UserWarning, match="was renamed") if what == "base" else nullcontext()
    with renamed, pytest.raises(RunError, match="not the model that the run ended with"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_text_is_found_before_the_work(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(runs("fp32"), tmp_path / "run")
    file = run / "run.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    (tmp_path / "other.txt").write_text("another text altogether " * 200, encoding="utf-8")
    settings["data"] = {**settings["data"], "holdout": 0, "sources": [{"path": str(tmp_path / "other.txt")}]}
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr(hand_over, "load_result", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="is not what the run had"):
        export_run(run, tmp_path / "out")


def test_the_original_is_no_way_round_the_gate(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halve_one_layer(monkeypatch, "dequantised")
    with pytest.raises(RunError, match="the merged model is not the trained one"):
        export_run(runs("nf4"), tmp_path / "out", base="original")
    assert not list(tmp_path.iterdir())


def scored(bits: float) -> Measured:
    return Measured([DomainScore(1, "ko", 1.0, 2.7, bits, 10, 20, 1)], torch.ones(1, 3), torch.float32)


@pytest.mark.parametrize("base", ["auto", "original"])
@pytest.mark.parametrize(("dequantised", "fails"), [(0.004, False), (0.006, True), (-0.006, True)])
def test_the_limit_is_for_the_base_that_was_trained_over(
    dequantised: float, fails: bool, base: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other base may be as much worse as it is."""
    found = {"dequantised": dequantised, "original": 0.05}
    monkeypatch.setattr(hand_over, "measure", lambda *_, **__: scored(1.0))
    monkeypatch.setattr(hand_over, "measure_folder", lambda folder, *_, **__: scored(1.0 + found[folder.name]))
    error = pytest.raises(RunError, match=r"ko is .* bits per byte from the adapter's, and 0\.005 is allowed")
    with error if fails else nullcontext():
        result = export_run(runs("nf4"), tmp_path / "out", base=base)
        assert result["base"] == ("dequantised" if base == "auto" else "original")
        assert result["gaps"]["original"]["ko"] == pytest.approx(0.05)
    assert (tmp_path / "out").exists() is not fails


def test_the_adapters_card_opens_it_over_the_quantised_base(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(runs("nf4"), tmp_path / "out", to="adapter")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace(', device_map="auto"', "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model-nf4").symlink_to(runs("nf4").parent / "model-nf4")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["base"].config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert isinstance(names["model"], PeftModel) and len(names["tokenizer"]) == 384


@pytest.fixture(scope="module")
def run_over_gguf(korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A .gguf file, and a finished run over it in 4 bits."""
    place = tmp_path_factory.mktemp("gguf")
    file = write_gguf(save_tiny("llama", place / "model", bos=True), place, "tiny")[0]
    train_run(run_file(file, korean_corpus, place / "run", model={"base": "nf4"}, evaluation={"prompts": []}))
    return file, place / "run"


def python_lines(readme: Path) -> list[str]:
    """The blocks of Python, to be run on this machine."""
    blocks = readme.read_text(encoding="utf-8").split("```python\n")[1:]
    return [block.split("```")[0].replace(', device_map="auto"', "") for block in blocks]


def test_the_adapters_card_opens_it_over_a_gguf_file(
    run_over_gguf: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = run_over_gguf
    export_run(run, tmp_path / "out", to="adapter")
    monkeypatch.chdir(tmp_path)
    (tmp_path / file.name).symlink_to(file)
    names: dict[str, Any] = {}
    (code,) = python_lines(tmp_path / "out" / "README.md")
    exec(code, names)
    assert isinstance(names["model"], PeftModel) and names["tokenizer"]("a")["input_ids"]
    assert_scores_are_those_of_the_run(names["model"], run)


def test_the_lines_in_final_open_it_over_a_gguf_file(run_over_gguf: tuple[Path, Path]) -> None:
    _, run = run_over_gguf
    tokenizer, *ways = python_lines(run / "final" / "README.md")
    assert "PeftModel.from_pretrained(base" in ways[-1]
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert "The lines below need\n`peft`, `transformers` and `bitsandbytes`." in text
    for way in ways:  # where the reader of GGUF files adds a token, PEFT's one-go would resize the base: it is left out
        names: dict[str, Any] = {}
        exec(tokenizer + way, names)
        assert_scores_are_those_of_the_run(names["model"], run)


def test_a_model_that_was_made_of_a_gguf_file_has_no_original(run_over_gguf: tuple[Path, Path], tmp_path: Path) -> None:
    export_run(run_over_gguf[1], tmp_path / "out", base="original")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "merged into the 16-bit copy of the GGUF file" in card and "original" not in card


def assert_scores_are_those_of_the_run(model: Any, run: Path) -> None:
    config, folder = finished(run)
    rows = {row["domain"]: row for row in folder.read_lines("evaluation.jsonl") if row["step"]}
    for score in evaluate(model, plan_run(config).corpus.heldout, max_length=64):
        assert score.loss == pytest.approx(rows[score.domain]["loss"], rel=1e-4)  # fp32


def test_an_adapter_without_trained_embeddings_is_handed_on_folded(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, spoken: tuple[Terminal, list[str]]
) -> None:
    terminal, said = spoken
    given = {"model": {"base": "fp32"}, "adapter": {"modules_to_save": [], "r": 40}, "evaluation": {"prompts": []}}
    train_run(run_file(llama_folder, korean_corpus, tmp_path / "run", **given))
    export_run(tmp_path / "run", tmp_path / "out", to="adapter", terminal=terminal)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (40, 40, False, {})
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    assert_scores_are_those_of_the_run(PeftModel.from_pretrained(base, str(tmp_path / "out")), tmp_path / "run")
    assert "is folded into its `lora_B`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not any("refuse" in line for line in said)


def test_who_refuses_a_dora_adapter_is_said(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, spoken: tuple[Terminal, list[str]]
) -> None:
    terminal, said = spoken
    given = {"adapter": {"modules_to_save": [], "use_dora": True}, "evaluation": {"prompts": []}}
    train_run(run_file(llama_folder, korean_corpus, tmp_path / "run", **given))
    export_run(tmp_path / "run", tmp_path / "out", to="adapter", terminal=terminal)
    assert any(line.startswith("warning: vLLM and llama.cpp refuse adapters with DoRA.") for line in said)


def copied(run: Path, place: Path, edit: Callable[[str], str]) -> Path:
    """The run with another run file."""
    shutil.copytree(run, place)
    file = place / "run.yaml"
    file.write_text(edit(file.read_text(encoding="utf-8")), encoding="utf-8")
    return place


def test_a_base_that_is_stored_in_4_bits_has_no_original(runs: Runs) -> None:
    config, _ = finished(runs("nf4"))
    plan = plan_run(config)
    assert hand_over._kinds(config, plan, "auto", True) == ["dequantised"]
    with pytest.raises(UserError, match=r"^--base: model-nf4 is stored in nf4 only"):
        hand_over._kinds(config, plan, "original", True)


def test_a_loftq_adapter_has_no_original(runs: Runs) -> None:
    config, _ = finished(runs("nf4"))
    plan = plan_run(config)
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"init_lora_weights": "loftq"})})
    assert hand_over._kinds(config, plan, "auto", False) == ["dequantised"]
    with pytest.raises(UserError, match=r"^--base: a LoftQ adapter holds the quantisation's correction"):
        hand_over._kinds(config, plan, "original", False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "ggfu"}, r"--to: 'ggfu' is unknown\. Did you mean 'gguf'\?"),
        ({"base": "nf4"}, r"--base: 'nf4' is unknown\. It is one of auto, original"),
        ({"push_to": "x"}, "--push: 'x' has no owner"),
    ],
)
def test_a_wrong_word_is_found_first(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_run(tmp_path / "none", tmp_path / "out", **given)


def test_a_folder_in_use_is_refused(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=f"--output: {tmp_path} is not empty"):
        export_run(runs("fp32"), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        export_run(runs("fp32"), tmp_path / "file")
    with pytest.raises(UserError, match="holds no run"):
        export_run(tmp_path / "none", tmp_path / "out")
    monkeypatch.setattr("steep.run_folder.RunFolder.free_bytes", lambda self: 1000)
    for form in ("merged", "adapter"):
        with pytest.raises(UserError, match=r"--output: its disk has 0\.0 GiB free"):
            export_run(runs("fp32"), tmp_path / "out", to=form)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_result_is_uploaded(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def create_repo(self, name: str, **given: Any) -> str:
            return f"hub:{name}"

        def model_info(self, name: str) -> Any:
            return SimpleNamespace(private=True, siblings=[])

        def upload_folder(self, folder_path: Path, **given: Any) -> None:
            assert (folder_path / "README.md").read_text().count('"ada/ko"') == 2

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    result = export_run(runs("fp32"), tmp_path / "out", to="adapter", push_to="ada/ko", api=Api())
    assert result["address"] == "hub:ada/ko"


def test_what_comes_next_can_be_copied() -> None:
    place = Path("my ü's/ko out")
    said = {form: next_step(place, form) for form in ("merged", "gguf")}
    serve, load = said["merged"].removeprefix("next: ").split(", or ")
    assert shlex.split(serve) == ["vllm", "serve", str(place)] and repr(str(place)) in load
    create = shlex.split(said["gguf"].removeprefix("next: "))
    assert create == ["ollama", "create", "ko out", "-f", str(place / "Modelfile")]


def test_the_command(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["steep", "export", str(runs("fp32")), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert not stop.value.code, err
    assert "merged, original" in out and f"next: vllm serve {tmp_path / 'out'}" in out
    assert f"result: {tmp_path / 'out'}" in err
    monkeypatch.setattr(sys, "argv", ["steep", "export", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    out, _ = capfd.readouterr()
    assert all(word in out for word in ("--to", "--base", "--push", "dequantised"))
