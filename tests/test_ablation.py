"""The ablation measures what it says: each arm trains its own tensors at its own rates and scale, over the same rows;
lines that are there are not done again; and the summary's figures, worked out by hand."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from benchmarks import ablation, ablation_run, ablation_table
from benchmarks.ablation_arms import ARMS, CORE, FULL, LADDER, arm_over, run_file
from benchmarks.ablation_figure import figure, mean_curve, ticks
from benchmarks.ablation_run import GRID, RUN, Work
from benchmarks.ablation_table import COMMON, OWN, Ladder
from benchmarks.estimate import Estimate
from benchmarks.measuring import lines_of
from steep.config import parse_config
from steep.model.adapters import add_adapters
from tests.tiny import documents, tiny_model

ROOT = Path(__file__).parents[1]
RATE, FULL_RATES = 4e-3, (1e-5, 2e-3)
TINY = f"--tokens 384 --batch 2 --seq 32 --r 8 --heldout-tokens 120 --seeds 1 --learning-rate {RATE}"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 2

Row = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, korean, english = tmp_path_factory.mktemp("data"), documents("ko", 150), documents("en", 180)
    for name, texts in {
        "ko-tech.train": korean[:120], "ko-tech.heldout": korean[120:],
        "en-books.train": english[:120], "en-books.heldout": english[120:150], "en-wiki.heldout": english[150:],
    }.items():  # fmt: skip
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return folder


def words_for(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--data", str(data), "--out", str(out), *TINY.split(), *more]


@pytest.fixture(scope="module")
def lines(llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The grid of full finetuning, then every arm."""
    out = tmp_path_factory.mktemp("ablation") / "new" / "rows.jsonl"  # a folder that is not there yet
    rates, threads = [f"{rate:g}" for rate in FULL_RATES], torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other longer than such small products take
    try:
        ablation.main(words_for(llama_folder, data, out, "--grid", "--arms", FULL, "--rates", *rates))
        ablation.main(words_for(llama_folder, data, out, "--arms", *ARMS))
    finally:
        torch.set_num_threads(threads)
    return lines_of(out)


@pytest.fixture(scope="module")
def runs(lines: list[Row]) -> dict[str, Row]:
    return {row["arm"]: row for row in lines if row["part"] == RUN}


# ---- the arms


def test_all_arms_train_the_same_rows_and_are_scored_on_the_same_text(lines: list[Row], runs: dict[str, Row]) -> None:
    assert list(runs) == list(ARMS) and len(lines) == len(FULL_RATES) + len(ARMS)
    for name, row in runs.items():
        assert row["tokens"] == 384 and row["curve"]["step"] == [1, 2, 3, 4, 5, 6]
        assert row["curve"]["tokens"] == [64, 128, 192, 256, 320, 384]
        assert all(0 < loss < 12 for loss in row["curve"]["loss"])
        assert row["heldout"] == runs["lora"]["heldout"] and all(tokens <= 120 for _, tokens in row["heldout"].values())
        if not name.startswith("replay"):
            assert row["targets"] == runs["lora"]["targets"]
        assert list(row["after"]) == list(row["heldout"]) == ["ko", "en", "wiki"]
        for domain in row["after"]:
            before = runs["lora"]["before"][domain]["bits_per_byte"]
            quantised = "nf4" in (ARMS[name].model.get("base"), name)
            assert row["before"][domain]["bits_per_byte"] == pytest.approx(before, rel=2e-2 if quantised else 2e-3)
        assert row["after"]["ko"]["bits_per_byte"] != row["before"]["ko"]["bits_per_byte"]
        assert row["versions"]["torch"] and row["seconds"] == row["ended"] - row["begun"] > 0
    curves = [tuple(row["curve"]["loss"]) for row in runs.values()]
    assert len(set(curves)) == len(curves), "no two arms compute the same"


def test_arms_without_other_rows_begin_at_the_same_loss(runs: dict[str, Row]) -> None:
    alike = [name for name, arm in ARMS.items() if not arm.replay and arm.model.get("base") != "nf4"]
    first = [runs[name]["curve"]["loss"][0] for name in alike]
    assert first == pytest.approx([first[0]] * len(first), rel=2e-3)
    assert runs["replay-25"]["curve"]["loss"][0] != pytest.approx(first[0], rel=2e-3)


def expected_tensors(name: str) -> dict[str, int]:
    """By module: two matrices a layer of an adapter, with DoRA the lengths too; one of an embedding."""
    if name == FULL:
        norms = {"input_layernorm": LAYERS, "post_attention_layernorm": LAYERS, "norm": 1}
        return dict.fromkeys(SEVEN, LAYERS) | {"embed_tokens": 1, "lm_head": 1} | norms
    targets = [module for module in SEVEN if name != "lora" or module != "gate_proj"]
    trained = dict.fromkeys(targets, (3 if name == "dora" else 2) * LAYERS)
    return trained if name in ("lora", "gate") else trained | {"embed_tokens": 1, "lm_head": 1}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_trains_its_tensors_at_its_rates(name: str, runs: dict[str, Row]) -> None:
    row, slower = runs[name], {"embeddings": 1, "apart-2": 2, "apart-5": 5}.get(name, 10)
    assert row["trained_tensors"] == expected_tensors(name)
    if name == FULL:
        rates = {"embeddings": FULL_RATES[1], "other": FULL_RATES[1]}
    else:
        rates = {"adapters_a": RATE, "adapters_b": RATE * (16 if name == "loraplus" else 1)}
        if name not in ("lora", "gate"):
            rates["embeddings"] = RATE / slower
        if name == "dora":
            rates["other"] = RATE
    assert row["peak_rates"] == pytest.approx(rates, rel=1e-3)
    assert row["embedding_learning_rate"] == (pytest.approx(rates["embeddings"]) if "embeddings" in rates else None)


@pytest.mark.parametrize("name", [name for name in ARMS if name != FULL])
def test_an_arm_has_its_scale(name: str) -> None:
    settings = {**run_file(arm_over(name, "rslora"), 8, RATE)["adapter"], "init_lora_weights": True}
    model = add_adapters(tiny_model("llama"), **settings)
    found = {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}
    plain = name in ("lora", "gate", "embeddings", "apart-2", "apart-5", "apart-10")
    assert len(found) == 1 and found.pop() == pytest.approx(32 / 8 if plain else 32 / 8**0.5)


def test_an_arm_differs_from_the_one_below_it_in_one_thing() -> None:
    for name, arm in ARMS.items():
        if arm.on is None:
            continue
        below = ARMS[arm.on]
        fields = {field.name for field in dataclasses.fields(arm)} - {"says", "on", "better", "by", "on_top", "rates"}
        differ = {field for field in fields if getattr(arm, field) != getattr(below, field)}
        expected = {"gate": {"targets"}, "embeddings": {"saved", "slower"}, FULL: {"whole", "slower", "model"}}
        assert len(differ) == 1 or differ == expected[name], name
    assert {name for name in ARMS if ARMS[name].on is None} == {"lora"}
    assert [*LADDER, FULL, "replay-5", "replay-25"] == CORE


def test_an_arm_on_another_rung_has_that_rungs_settings() -> None:
    arm = arm_over("dora", "apart-5")
    assert (arm.on, arm.slower, arm.rslora, arm.adapter) == ("apart-5", 5, False, {"use_dora": True})
    assert arm_over("replay-25", "apart-5").on == "replay-5" and arm_over("gate", "") is ARMS["gate"]


@pytest.mark.parametrize("name", ARMS)
def test_runs_share_all_but_what_they_are_about(name: str, data: Path, llama_folder: Path, tmp_path: Path) -> None:
    arguments = ablation.parse(words_for(llama_folder, data, tmp_path / "rows.jsonl", "--arms", "lora", name))
    jobs = {job.arm: job for job in ablation.jobs_of(arguments, grid_lines(arguments))}
    ours, first = (
        ablation_run.run_config(jobs[arm], tmp_path / "run").model_dump(mode="json") for arm in (name, "lora")
    )
    assert parse_config(ours)
    differ = {
        f"{section}.{field}" for section in ours for field in ours[section]
        if ours[section][field] != first[section][field]
    }  # fmt: skip
    assert differ <= {
        "model.base", "adapter.target_modules", "adapter.modules_to_save", "adapter.use_rslora", "adapter.use_dora",
        "adapter.init_lora_weights", "data.replay_share", "data.sources", "training.learning_rate",
        "training.embedding_learning_rate", "training.loraplus_lr_ratio", "model.fused", "model.trained_dtype",
        "training.optim", "training.max_grad_norm", "training.optimizer_in_backward",
    }  # fmt: skip
    assert ("data.sources" in differ) == ("data.replay_share" in differ) == (ARMS[name].replay > 0)
    assert ("training.learning_rate" in differ) == (name == FULL)


def grid_lines(arguments: Any) -> list[Row]:
    """Two made-up lines of full finetuning's grid."""
    work = ablation.work_of(arguments, arguments.tokens // 2)
    return [line(work, FULL, 0, rate, part=GRID, loss=loss) for rate, loss in ((1e-5, 3.0), (2e-5, 2.0))]


# ---- one resumable command


def test_what_is_there_is_not_done_again(
    lines: list[Row], data: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "rows.jsonl", []
    out.write_text("".join(json.dumps(row) + "\n" for row in lines if row["arm"] in ("lora", "gate")))

    def run(job: ablation_run.Job) -> Row:
        begun.append((job.arm, job.seed, job.learning_rate))
        if job.arm == "apart-2":
            raise RuntimeError("a run that fails")
        return {**next(row for row in lines if row["arm"] == job.arm), **job.key}

    monkeypatch.setattr(ablation, "one_run", run)
    words = words_for(llama_folder, data, out, "--arms", "lora", "gate", "apart-2", "rslora")
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        ablation.main(words)
    assert begun == [("apart-2", 0, RATE), ("rslora", 0, RATE)], "one that fails does not keep others from their turn"
    begun.clear()
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        ablation.main(words)
    assert begun == [("apart-2", 0, RATE)]
    begun.clear()
    ablation.main([*words_for(llama_folder, data, out, "--arms", "lora"), "--first-seed", "1"])
    ablation.main([*words_for(llama_folder, data, out, "--arms", "lora"), "--learning-rate", "1e-3"])
    ablation.main([*words_for(llama_folder, data, out, "--arms", "lora"), "--tokens", "512"])
    assert begun == [("lora", 1, RATE), ("lora", 0, 1e-3), ("lora", 0, RATE)]
    (data / "ko-tech.train.jsonl.gz").touch()  # the same text
    begun.clear()
    ablation.main(words_for(llama_folder, data, out, "--arms", "lora", "gate"))
    assert begun == []
    assert len({row["data"] for row in lines_of(out)}) == 1


def test_one_command_does_the_grid_and_then_the_runs(
    data: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "rows.jsonl", []

    def run(job: ablation_run.Job) -> Row:
        begun.append((job.part, job.arm, job.learning_rate))
        if len(begun) == 2:
            raise RuntimeError("a run that fails")
        row = line(job.work, job.arm, job.seed, job.learning_rate, part=job.part, loss=job.learning_rate)
        return {**row, "seconds": 1.0}

    monkeypatch.setattr(ablation, "one_run", run)
    words = words_for(llama_folder, data, out, "--whole", "--arms", "lora", FULL, "--rates", "1e-3", "3e-3")
    with pytest.raises(SystemExit, match="1 of 4 runs failed"):
        ablation.main(words)
    grid = [(GRID, arm, rate) for arm in ("lora", FULL) for rate in (1e-3, 3e-3)]
    assert begun == grid, "no run at a rate that is not known yet"
    ablation.main(words)
    assert begun[len(grid) :] == [grid[1], (RUN, "lora", RATE), (RUN, "lora", 1e-3), (RUN, FULL, 1e-3)]
    ablation.main(words)
    assert len(begun) == 8


def test_a_stop_by_hand_says_how_to_go_on(
    data: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(job: ablation_run.Job) -> Row:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "one_run", stopped)
    with pytest.raises(SystemExit, match="stopped; the same command goes on"):
        ablation.main(words_for(llama_folder, data, tmp_path / "rows.jsonl", "--arms", "lora"))


def test_processes_of_the_pool_end_with_the_one_that_began_them(data: Path, llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = [*words_for(llama_folder, data, out, "--jobs", "2", "--arms", "lora"), "--seeds", "50"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    with subprocess.Popen([sys.executable, "-m", "benchmarks.ablation", *words], cwd=ROOT, env=environment) as main:
        until = time.monotonic() + 200
        while not out.exists() or not out.read_text(encoding="utf-8"):
            assert main.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        children = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text(encoding="utf-8").split()
        main.kill()
    assert len(children) >= 2
    until = time.monotonic() + 30
    while alive := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < until, f"{alive} are still there"
        time.sleep(0.1)


def test_a_line_that_was_cut_off_is_named(data: Path, llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    whole = json.dumps(line(WORK, "lora", 0, RATE))
    out.write_text(f"{whole}\n{whole[:300]}")
    for words in (words_for(llama_folder, data, out), ["--summary", str(out)]):
        with pytest.raises(SystemExit, match=r"rows\.jsonl: line 2 is no result: cut off\? Delete it"):
            ablation.main(words)


def test_what_a_summary_cannot_be_of_is_said(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in three("lora", 2.0)))
    with pytest.raises(SystemExit, match=r"no run was at 0\.001; the common one is among 0\.004"):
        ablation.main(["--summary", str(file), "--learning-rate", "1e-3"])
    figure_words = ["--figure", str(tmp_path / "no" / "f.svg"), "--arms", "lora"]
    with pytest.raises(SystemExit, match=r"--figure: .* cannot be written"):
        ablation.main(["--summary", str(file), "--learning-rate", f"{RATE}", *figure_words])
    file.write_text('{"shape": "llama"}\n')
    with pytest.raises(SystemExit, match="is of another benchmark"):
        ablation.main(["--summary", str(file)])


def test_another_model_of_the_same_name_is_not_taken_for_it(
    lines: list[Row], data: Path, llama_folder: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "rows.jsonl", tmp_path / llama_folder.name
    shutil.copytree(llama_folder, other)
    assert ablation_run.weights_name(other) == ablation_run.weights_name(llama_folder) == lines[0]["weights"]
    out.write_text("".join(json.dumps(row) + "\n" for row in lines if row["arm"] == "lora"))
    ablation.main(words_for(other, data, out, "--arms", "lora"))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SystemExit, match=f"has runs of another {llama_folder.name}, with other weights"):
        ablation.main(words_for(other, data, out, "--arms", "lora"))


def test_replay_that_is_the_new_text_is_refused(data: Path, llama_folder: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "en-books.train.jsonl.gz").write_bytes((tmp_path / "ko-tech.train.jsonl.gz").read_bytes())
    with pytest.raises(SystemExit, match=r"replay-25 replays 0\.0% of its tokens, not 25%"):
        ablation.main(words_for(llama_folder, tmp_path, tmp_path / "rows.jsonl", "--arms", "lora", "replay-25"))
    assert not lines_of(tmp_path / "rows.jsonl"), "before any run"


def test_other_text_is_other_work(data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert ablation_run.data_name(tmp_path, "ko-tech") == ablation_run.data_name(data, "ko-tech")
    with gzip.open(tmp_path / "ko-tech.heldout.jsonl.gz", "at", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": documents("ko", 160)[-1]}) + "\n")
    assert ablation_run.data_name(tmp_path, "ko-tech") != ablation_run.data_name(data, "ko-tech")


def test_two_processes_take_runs_from_one_queue(
    lines: list[Row], runs: dict[str, Row], data: Path, llama_folder: Path, tmp_path: Path
) -> None:
    """The command itself: what its processes write is what one process wrote, and names no folder of this machine."""
    out = tmp_path / "rows.jsonl"
    words = words_for(llama_folder, data, out, "--arms", "lora", "gate", "--jobs", "2")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ablation", *words], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {row["arm"]: row for row in lines_of(out)}
    assert set(found) == {"lora", "gate"} and all(row["at_once"] == 2 for row in found.values())
    for name, row in found.items():
        assert row["curve"]["loss"] == pytest.approx(runs[name]["curve"]["loss"], rel=1e-3)
        assert row["command"].startswith("python -m benchmarks.ablation --model ")
        assert str(llama_folder.parent) not in json.dumps(row) and str(data.parent) not in json.dumps(row)


def test_a_run_over_rows_seen_before_is_no_result(data: Path, llama_folder: Path, tmp_path: Path) -> None:
    work = Work("m", "ko-tech", "d", 256, 2, 32, 8, False, 120, "none")
    whole = {"adds_up": True, "problems": [], "rows": 9, "rows_trained": 8, "rows_seen": 8, "times_seen": {"1": 8}}
    ablation_run.refuse_unequal(whole, work)
    for change, said in (
        ({"adds_up": False, "problems": ["a row is lost"]}, "a row is lost"),
        ({"rows_trained": 7}, "trained 7 rows of 8 seen, and 8 are meant"),
        ({"rows": 7, "times_seen": {"1": 6, "2": 1}}, "some were seen 2 times"),
    ):
        with pytest.raises(RuntimeError, match=said):
            ablation_run.refuse_unequal({**whole, **change}, work)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --model and --data, or --summary"),
        (["--model", "{folder}", "--data", "{folder}"], "holds no config.json with 16-bit weights"),
        (["--model", "{model}", "--data", "{folder}"], "lacks ko-tech.train.jsonl.gz"),
        (["--model", "{model}", "--data", "{data}", "--arms", "lora2"], "invalid choice: 'lora2'"),
        (["--model", "{model}", "--data", "{data}", "--tokens", "9000"], "less than two steps"),
        (["--model", "{model}", "--data", "{data}", "--tokens", "20000", "--grid"], "less than two steps of a grid"),
        (["--model", "{model}", "--data", "{data}", "--untied", "--arms", "gate", "rslora"], "gate trains no head"),
        (["--model", "{model}", "--data", "{data}", "--tokens", "20000", "--whole"], "less than two steps of a grid"),
        (["--model", "{model}", "--data", "{data}", "--grid", "--whole"], "not allowed with"),
        (["--model", "{model}", "--data", "{data}", "--rates", "1e-3"], "--rates are of --grid"),
        (["--model", "{model}", "--data", "{data}", "--docs"], "are of a --summary"),
        (["--model", "{model}", "--data", "{data}", "--jobs", "0"], "--jobs: give 1 or more"),
        (["--model", "{model}", "--data", "{data}", "--heldout-tokens", "0"], "--heldout-tokens: give 1 or more"),
        (["--model", "{model}", "--data", "{data}", "--learning-rate", "nan"], "give numbers above 0"),
        (["--model", "{model}", "--data", "{data}", "--grid", "--rates", "1e-3", "-1"], "give numbers above 0"),
        (["--model", "{model}", "--data", "{data}", "--first-seed", "-1"], "--first-seed: give 0 or more"),
        (["--model", "{model}", "--data", "{data}", "--out", "{folder}"], "cannot be read: Is a directory"),
        (["--model", "{model}", "--data", "{data}", "--out", "/proc/none/a.jsonl"], "--out: /proc/none/a.jsonl cannot"),
        (
            ["--model", "{model}", "--data", "{data}", "--seq", "64", "--vram", "lots", "--out", "{folder}/a"],
            "training.vram: 'lots' is not valid",
        ),
        (
            ["--model", "{model}", "--data", "{data}", "--seq", "64", "--out", "{folder}/a"],
            "each once, and the text has",
        ),
        (["--summary", "{folder}/none.jsonl"], "has no lines"),
    ],
)
def test_what_is_not_there_is_said_before_anything_runs(
    words: list[str], said: str, llama_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        ablation.main([word.format(folder=tmp_path, model=llama_folder, data=data) for word in words])
    assert said in f"{end.value.code}\n{capsys.readouterr().err}"


def test_a_head_of_its_own_is_for_the_arms_that_train_one(data: Path, llama_folder: Path, tmp_path: Path) -> None:
    arguments = ablation.parse(words_for(llama_folder, data, tmp_path / "rows.jsonl", "--untied"))
    names = ablation.arms_of(arguments)
    assert "lora" not in names and FULL not in names and {"embeddings", "rslora", "replay-5"} <= set(names)


# ---- the grid and the summary, on lines made by hand

WORK = Work("model", "ko-tech", "ko-tech+en-books:0", 400, 2, 50, 8, False, 1000, "GPU")
GRID_WORK = dataclasses.replace(WORK, tokens=200)


def line(
    work: Work, arm: str, seed: int, rate: float, ko: float = 2.0, en: float = 1.0, part: str = RUN, loss: float = 3.0
) -> Row:
    step, over = work.batch * work.seq, "rslora" if ARMS[arm].on_top else ""
    # Losses of two runs are never the same: those of one arm, seed and rate are.
    own = list(ARMS).index(arm) * 1e-5 + seed * 1e-6 + rate * 1e-7
    return {
        "part": part, "arm": arm, "over": over, "seed": seed, "learning_rate": rate,
        "embedding_learning_rate": arm_over(arm, over or "rslora").embedding_rate(rate), **dataclasses.asdict(work),
        "steps": work.steps, "targets": 300 + seed, "replay_share": ARMS[arm].replay,
        "curve": {"step": list(range(1, work.steps + 1)), "tokens": [step * n for n in range(1, work.steps + 1)],
                  "loss": [9.0 + own] * (work.steps - 1) + [loss + own]},
        "before": {"ko": {"loss": 2.0, "bits_per_byte": 2.5}, "en": {"loss": 2.0, "bits_per_byte": 1.1}},
        "after": {"ko": {"loss": 2.0, "bits_per_byte": ko}, "en": {"loss": 2.0, "bits_per_byte": en}},
        "heldout": {"ko": [5, 900], "en": [6, 950]}, "begun": 100.0 * seed, "ended": 100.0 * seed + 30,
        "versions": {"torch": "2"},
    }  # fmt: skip


def three(arm: str, *ko: float, en: float = 1.0, rate: float = RATE) -> list[Row]:
    return [line(WORK, arm, seed, rate, value, en) for seed, value in enumerate(ko)]


def test_the_grid_picks_the_rate_with_the_lowest_loss_at_the_end() -> None:
    losses = {1e-4: 3.0, 2e-4: 2.5, 4e-4: 2.7}
    rows = [line(GRID_WORK, "lora", 0, rate, part=GRID, loss=loss) for rate, loss in losses.items()]
    assert ablation_table.own_rate(rows, GRID_WORK, "lora", "") == 2e-4
    assert ablation_table.own_rate(rows[:1], GRID_WORK, "lora", "") is None, "one rate is no grid"
    assert ablation_table.own_rate(rows, GRID_WORK, "gate", "") is None
    assert ablation_table.own_rate(rows, WORK, "lora", "") is None, "a run's line is none of the grid"
    rows[1]["curve"]["loss"] = rows[1]["curve"]["loss"][:-1]  # a step without a finite loss
    assert ablation_table.own_rate(rows, GRID_WORK, "lora", "") == 4e-4
    for row in rows:
        row["curve"]["loss"] = row["curve"]["loss"][: GRID_WORK.steps - 1]
    assert ablation_table.own_rate(rows, GRID_WORK, "lora", "") is None, "each diverged"
    rows.append(line(GRID_WORK, "lora", 1, 8e-4, part=GRID, loss=2.0))
    with pytest.raises(SystemExit, match="The grid of lora has the seeds 0, 1"):
        ablation_table.own_rate(rows, GRID_WORK, "lora", "")


def test_rates_that_had_other_rows_are_named() -> None:
    rows = [line(GRID_WORK, "lora", 0, rate, part=GRID, loss=loss) for rate, loss in ((1e-3, 3.0), (2e-3, 2.5))]
    rows += three("lora", 2.0)
    assert "in another order" not in ablation_table.tell(rows, RATE)
    rows[0]["targets"] += 1
    said = ablation_table.tell(rows, RATE)
    assert "rows in another order, so that their losses are of other text: lora (0.001 beside 0.002)." in said


def test_the_settled_loss_is_of_the_last_quarter() -> None:
    row = {"steps": 8, "curve": {"loss": [9, 9, 9, 9, 9, 9, 2, 4]}}
    assert ablation_table.settled_loss(row) == 3.0


def test_each_arm_trains_at_the_common_rate_and_at_its_own(data: Path, llama_folder: Path, tmp_path: Path) -> None:
    words = words_for(llama_folder, data, tmp_path / "rows.jsonl", "--arms", "lora", "gate", FULL, "--seeds", "2")
    arguments = ablation.parse(words)
    work = ablation.work_of(arguments, 192)
    grid = [line(work, "lora", 0, rate, part=GRID, loss=loss) for rate, loss in ((1e-4, 3.0), (2e-4, 2.5))]
    grid += [line(work, "gate", 0, rate, part=GRID, loss=loss) for rate, loss in ((RATE, 2.0), (2e-4, 2.5))]
    jobs = [(job.seed, job.arm, job.learning_rate) for job in ablation.jobs_of(arguments, grid + grid_lines(arguments))]
    one = [("lora", RATE), ("lora", 2e-4), ("gate", RATE), (FULL, 2e-5)]
    assert jobs == [(seed, *job) for seed in (0, 1) for job in one]
    without = [(job.arm, job.learning_rate) for job in ablation.jobs_of(arguments, [])]
    assert without == [("lora", RATE), ("gate", RATE)] * 2, "without a grid full finetuning has no rate"


def test_a_grid_is_of_one_seed_and_half_the_tokens(data: Path, llama_folder: Path, tmp_path: Path) -> None:
    words = words_for(llama_folder, data, tmp_path / "rows.jsonl", "--grid", "--arms", "lora", FULL, "--seeds", "3")
    jobs = list(ablation.jobs_of(ablation.parse(words), []))
    assert {(job.part, job.seed, job.work.tokens) for job in jobs} == {(GRID, 0, 192)}
    assert [job.learning_rate for job in jobs] == [*ARMS["lora"].rates, *ARMS[FULL].rates]


def test_intervals_by_hand() -> None:
    three_values = Estimate.of([2.00, 2.02, 2.04])
    assert three_values.mean == pytest.approx(2.02) and three_values.half == pytest.approx(4.303 * 0.02 / 3**0.5)
    assert three_values.text() == "2.0200 ± 0.0497 (n = 3)"
    assert Estimate.of([1.0, 3.0]).half == pytest.approx(12.706)  # sd √2, over √2
    assert Estimate.of([1.5]).text("+") == "+1.5000 (n = 1)"
    assert Estimate.of([0.0, 1.0] * 20).half == pytest.approx(2.086 * (10 / 39) ** 0.5 / 40**0.5)


def test_differences_are_of_runs_with_the_same_seed() -> None:
    rows = [*three("lora", 2.00, 2.10, 2.20), *three("gate", 1.90, 1.99, 2.11, 1.0)]
    found = Ladder(WORK, rows, RATE).differences(("gate", ""), ("lora", ""), COMMON, "new")
    assert found == pytest.approx([-0.10, -0.11, -0.09])  # the fourth seed is of one arm alone
    said = ablation_table.tell(rows, RATE)
    half = 4.303 * 0.01 / 3**0.5
    assert f"| lora → gate | Korean better | -0.1000 ± {half:.4f} (n = 3) | +0.0000 ± 0.0000 (n = 3) |" in said
    assert "overlap | as the advice says |" in said, "the two means' intervals overlap, though the difference is clear"
    assert "2.5000 → 2.1000 ± 0.2484 (n = 3)" in said and "2.5000 → 1.7500 ± " in said
    assert "Every step that was measured is in the order of the advice" in said
    assert " 2 GPU minutes, 0 runs of the grid included." in said, "both arms had the card at once, with each seed"


def test_gpu_minutes_are_those_in_which_a_run_was_under_way() -> None:
    spans = [(0, 60), (30, 90), (40, 50), (100, 130), (130, 140)]
    rows = [{"begun": begun, "ended": ended} for begun, ended in reversed(spans)]
    assert ablation_table.gpu_seconds(rows) == (130.0, False)
    older = [
        {"command": command, "at_once": at_once, "seconds": seconds}
        for command, at_once, times in (("a", 2, (10, 40, 20, 20)), ("b", 1, (5, 5))) for seconds in times
    ]  # fmt: skip
    assert ablation_table.gpu_seconds(older) == (50.0 + 10.0, True)  # 10 + 20 + 20 beside 40
    assert ablation_table.gpu_seconds([*older, *rows]) == (190.0, True)
    undated = [{**row, "command": "a", "at_once": 1, "seconds": 60.0} for row in three("lora", 2.0, 2.1)]
    for row in undated:
        del row["begun"]
    assert " About 2 GPU minutes (estimated where rows do not say when they began), 0 runs" in ablation_table.tell(
        undated, RATE
    )
    on_cpu = [{**row, "gpu": "none"} for row in undated]
    assert "GPU minutes" not in ablation_table.tell(on_cpu, RATE)


def test_a_grid_reaches_as_far_as_it_had_to() -> None:
    """The rates that the results have of each arm's grid are those that the command tries now."""
    found: dict[str, set[float]] = {}
    for row in lines_of(ROOT / "benchmarks" / "results" / "2026-11-29-h200-ablation.jsonl"):
        if row["part"] == GRID and (row["model"], row["text"], row["untied"]) == ("smollm2", "ko-tech", False):
            found.setdefault(row["arm"], set()).add(row["learning_rate"])
    assert set(found) == set(CORE) and found == {arm: set(ARMS[arm].rates) for arm in found}


def test_a_contradiction_is_named() -> None:
    rows = [*three("lora", 2.00, 2.01, 2.02), *three("gate", 2.10, 2.11, 2.125)]
    said = ablation_table.tell(rows, RATE)
    assert "- lora → gate, at the common rate: CONTRADICTS the advice (+0.1017 ± " in said
    assert "Not borne out, or not settled" in said and "Every step" not in said
    # The advice expects embeddings at the same rate to be worse: that they are better contradicts it too.
    rows = [*three("gate", 2.00, 2.01, 2.02), *three("embeddings", 1.90, 1.91, 1.925)]
    assert "gate → embeddings, at the common rate: CONTRADICTS" in ablation_table.tell(rows, RATE)
    rows = [*three("gate", 2.00, 2.01, 2.02), *three("embeddings", 2.10, 2.11, 2.125)]
    assert "apart | as the advice says |" in ablation_table.tell(rows, RATE)


def test_an_order_that_the_seeds_do_not_settle_is_said() -> None:
    rows = [*three("lora", 2.0, 2.0, 2.0), *three("gate", 2.1, 2.0, 1.95)]
    assert "NOT in the order of the advice, but its interval holds zero" in ablation_table.tell(rows, RATE)
    rows = [*three("lora", 2.0), *three("gate", 2.1)]
    assert "NOT in the order of the advice, but one seed, no interval" in ablation_table.tell(rows, RATE)
    rows = [*three("lora", 2.0), *three("gate", 1.9)]
    assert "as the advice says, but one seed, no interval (-0.1000 (n = 1) bits a byte)" in ablation_table.tell(
        rows, RATE
    )


def test_intervals_of_two_arms_are_apart_on_either_side() -> None:
    for gate, said in ((1.9, "apart"), (2.1, "apart"), (2.01, "overlap"), (1.99, "overlap")):
        rows = [*three("lora", 2.00, 2.01, 2.02), *three("gate", gate, gate + 0.01, gate + 0.02)]
        lines = ablation_table.tell(rows, RATE).splitlines()
        head, step = (next(line for line in lines if line.startswith(begin)) for begin in ("| step |", "| lora → gate"))
        cells = dict(zip(head.split(" | "), step.split(" | "), strict=True))
        assert cells["intervals of the two"] == said, gate
    assert " | – | as the advice says, but one seed" in ablation_table.tell(
        [*three("lora", 2.0), *three("gate", 1.9)], RATE
    )


def test_replay_is_judged_by_what_is_forgotten() -> None:
    rows = [
        *(line(WORK, "rslora", seed, RATE, 2.0, 1.2 + seed / 100) for seed in range(3)),
        *(line(WORK, "replay-5", seed, RATE, 2.1, 1.1 + seed / 99) for seed in range(3)),
    ]
    said = ablation_table.tell(rows, RATE)
    assert "| rslora → replay-5 (on rslora) | English better | +0.1000 ± 0.0000 (n = 3) | -0.09" in said
    assert "as the advice says |" in said
    rows = [*three("rslora", 2.0, 2.0, 2.1), *three("dora", 1.9, 1.8, 2.05)]
    assert "| rslora → dora (on rslora) | – |" in ablation_table.tell(rows, RATE)
    assert "| better, but its interval holds zero |" in ablation_table.tell(rows, RATE)


def test_text_that_is_never_replayed_has_a_column_where_all_runs_were_scored_on_it() -> None:
    rows = [*three("rslora", 2.0, 2.0), *three("replay-5", 2.1, 2.1)]
    without = ablation_table.tell(rows, RATE)
    for seed, row in enumerate(rows):
        row["before"] |= {"wiki": {"loss": 2.0, "bits_per_byte": 1.3}}
        row["after"] |= {"wiki": {"loss": 2.0, "bits_per_byte": 1.5 - seed / 10}}
        row["heldout"] |= {"wiki": [7, 960]}
    said = ablation_table.tell(rows, RATE)
    # Wikipedia goes from 1.5 and 1.4 to 1.3 and 1.2; English books stay, so only the former can be as the advice says.
    assert "| rslora → replay-5 (on rslora) | English Wikipedia better |" in said
    assert (
        "| overlap | as the advice says |" in said and "English better | +0.1000 ± 0.0000 (n = 2) | +0.0000" in without
    )
    assert "| Korean | English | English Wikipedia |" in said and "English Wikipedia 7 documents, 960 tokens" in said
    assert "| 1.3000 → 1.4500 ± " in said and "| -0.2000 ± 0.0000 (n = 2) |" in said
    assert "English Wikipedia" not in without
    del rows[0]["after"]["wiki"], rows[0]["before"]["wiki"], rows[0]["heldout"]["wiki"]
    assert ablation_table.tell(rows, RATE) == without


def test_several_works_stand_beside_each_other() -> None:
    """Steps of the core, each arm at its own rate; forgotten is what is never replayed, where that was scored. Bold is
    what two seeds agree on."""
    works = {"ko-tech": WORK, "ko-law": dataclasses.replace(WORK, text="ko-law")}
    rows = [
        line(dataclasses.replace(work, tokens=GRID_WORK.tokens), arm, 0, rate, part=GRID, loss=loss)
        for work in works.values() for arm in ("lora", "gate", "apart-10", "rslora", "pissa")
        for rate, loss in ((RATE, 2.5), (1e-2, 2.4))
        if (work.text, arm) != ("ko-tech", "apart-10")  # an arm that the first work knows nothing of
    ]  # fmt: skip
    rows += [line(works["ko-tech"], arm, 0, 1e-2, ko, en) for arm, ko, en in (("lora", 2.0, 1.0), ("gate", 1.75, 1.25))]
    rows += [line(works["ko-tech"], arm, 1, 1e-2, ko, 1.0) for arm, ko in (("lora", 3.0), ("gate", 2.75))]
    rows += [line(works["ko-tech"], arm, 0, 1e-2) for arm in ("rslora", "pissa")]  # a step, and none of the core
    rows += [line(works["ko-tech"], arm, 0, RATE, ko=5.0) for arm in ("lora", "gate", "pissa")]  # at the common rate
    law = [line(works["ko-law"], arm, 0, 1e-2, ko) for arm, ko in (("lora", 2.0), ("gate", 2.5), ("apart-10", 2.25))]
    for row, wiki in zip(law, (1.0, 1.125, 1.5), strict=True):
        row["before"] |= {"wiki": {"loss": 2.0, "bits_per_byte": 1.3}}
        row["after"] |= {"wiki": {"loss": 2.0, "bits_per_byte": wiki}}
        row["heldout"] |= {"wiki": [7, 960]}
    said = ablation_table.tell([*rows, *law], RATE)
    beside, tech, of_law = said.split("\n### ")
    assert beside.startswith("### Side by side\n") and [tech.split("\n")[0], of_law.split("\n")[0]] == [
        f"{WORK.model} on ko-tech", f"{WORK.model} on ko-law",
    ]  # fmt: skip
    learned, forgotten = (part.split("\n\n")[0].splitlines() for part in beside.split("| step |")[1:])
    assert learned[0] == f" {WORK.model} on ko-tech, 400 tokens: Korean | {WORK.model} on ko-law, 400 tokens: Korean |"
    assert learned[2:] == [
        "| lora → gate | **-0.2500 ± 0.0000 (n = 2)** | +0.5000 (n = 1) |", "| gate → apart-10 |  | -0.2500 (n = 1) |",
    ]  # fmt: skip
    assert [head.rsplit(": ")[1] for head in forgotten[0].split(" |")[:2]] == ["English", "English Wikipedia"]
    assert forgotten[2:] == [
        "| lora → gate | +0.1250 ± 1.5882 (n = 2) | +0.1250 (n = 1) |", "| gate → apart-10 |  | +0.3750 (n = 1) |",
    ]  # fmt: skip
    assert "###" not in ablation_table.tell(rows, RATE), "one work needs none"


def test_own_rates_have_a_table_of_their_own() -> None:
    grid = [
        line(GRID_WORK, arm, 0, rate, part=GRID, loss=loss)
        for arm in ("lora", "gate") for rate, loss in ((RATE, 2.4), (1e-3, 2.5), (1e-2, 2.6 if arm == "lora" else 2.0))
    ]  # fmt: skip
    rows = [*grid, *three("lora", 2.0, 2.1), *three("gate", 1.9, 2.0), *three("gate", 2.3, 2.41, rate=1e-2)]
    said = ablation_table.tell(rows, RATE)
    common, own = said.split(f"**{OWN.capitalize()}**")
    assert "lora → gate, at the common rate" not in said and "lora → gate, each at its own rate: CONTRADICTS" in own
    assert "| gate | and on gate_proj | 0.01 | – | 2.5000 → 2.3550 ± " in own and "2.3550" not in common
    assert "| lora | 2.5000 | **2.4000** | 2.6000 |" in own.replace("2.5000 |  |", "")
    assert "the end of its grid, and a wider one may have a better: gate (0.01)." in own


def test_unlike_runs_are_not_compared() -> None:
    rows = [*three("lora", 2.0), *three("gate", 1.9)]
    for change, said in (
        ({"heldout": {"ko": [5, 901]}}, "scored on other held-out text"),
        ({"targets": 299}, "had other rows"),
        ({"curve": rows[0]["curve"]}, "they computed the same"),
    ):
        with pytest.raises(SystemExit, match=said):
            ablation_table.tell([rows[0], {**rows[1], **change}], RATE)
    with pytest.raises(SystemExit, match="no runs beside a grid"):
        ablation_table.tell([line(GRID_WORK, "lora", 0, RATE, part=GRID)], RATE)


def test_every_figure_says_of_how_many_runs_it_is() -> None:
    rows = [row for arm in LADDER for row in three(arm, 2.0, 2.1, 2.05 + list(ARMS).index(arm) / 100)]
    cells = re.findall(r"[^|\n]*±[^|\n]*", ablation_table.tell(rows, RATE))
    assert len(cells) >= 1 + 2 * len(LADDER) + 2 * (len(LADDER) - 1)
    assert [cell for cell in cells if "(n = 3)" not in cell] == cells[:1] and cells[0].endswith("over n seeds.")


def test_the_summary_of_real_lines_goes_into_the_docs_and_a_figure(
    lines: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, docs, readme = tmp_path / "rows.jsonl", tmp_path / "evidence.md", tmp_path / "README.md"
    picture = tmp_path / "loss.svg"
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    docs.write_text((ROOT / "docs" / "evidence.md").read_text(encoding="utf-8"), encoding="utf-8")
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(ablation, "DOCS", docs)
    monkeypatch.setattr(ablation, "README", readme)
    words = ["--summary", str(file), "--learning-rate", f"{RATE}", "--docs", "--figure", str(picture)]
    ablation.main(words)
    said = capsys.readouterr().out.strip()
    assert all(f"| {name} " in said for name in ARMS if name != FULL) and "| full " in said.split(OWN.capitalize())[1]
    text = docs.read_text(encoding="utf-8")
    assert said in text and "benchmarks/results/rows.jsonl" in text
    front = readme.read_text(encoding="utf-8")
    table = front.split(ablation_table.BEGIN)[1].split(ablation_table.END)[0]
    assert "benchmarks/results/rows.jsonl" in table and arms_of(table) == ["–", FULL], "the others have no grid"
    ablation.main(words)
    assert docs.read_text(encoding="utf-8") == text, "written twice, it stands there once"
    assert readme.read_text(encoding="utf-8") == front
    drawn = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    assert len(drawn.findall("{*}g[@id='loss']/{*}polyline")) == len(LADDER), "at the common rate, so none of full"
    assert len(drawn.findall("{*}g[@id='learned']/{*}circle")) == len(CORE) - 1


def arms_of(table: str) -> list[str]:
    return re.findall(
        r"^\| (\S+)(?: \(on \w+\))? \|", table.replace("| arm |", "").replace("| --- |", ""), re.MULTILINE
    )


def test_the_readme_has_the_core_each_at_its_own_rate() -> None:
    rows = [*three("lora", 9.0), *three("lora", 2.0, 2.1, rate=2 * RATE), *three("gate", 3.0), *three("dora", 1.0)]
    for arm, best in (("lora", 2 * RATE), ("gate", RATE), ("dora", RATE)):
        rows += [line(GRID_WORK, arm, 0, rate, part=GRID, loss=3 + (rate != best)) for rate in (RATE, 2 * RATE)]
    marks = f"a\n{ablation_table.BEGIN}\nold\n{ablation_table.END}\nb"
    front = ablation_table.in_readme(marks, rows, RATE, "rows.jsonl")
    assert front.startswith("a\n") and front.endswith("\nb") and "old" not in front
    assert arms_of(front) == ["–", "lora", "gate"], "dora is no arm of the core"
    assert (
        "| not trained | 2.5000 | 1.1000 |" in front
        and "2.0500 ± " in front
        and "(n = 2)" in front
        and "9.0" not in front
        and "3.0000 (n = 1)" in front
    )
    with pytest.raises(SystemExit, match="runs at each arm's own rate, and the file has none"):
        ablation_table.in_readme(marks, three("lora", 2.0), RATE, "rows.jsonl")


def test_a_figure_draws_losses_and_what_they_differ_by() -> None:
    """Of the seeds that all arms share: one that an arm lacks has no part in any panel."""
    rows = [*three("lora", 2.0, 2.1), *three("gate", 1.9, 1.8, 9.9)]
    drawn = ElementTree.fromstring(figure(rows, RATE))
    loss, less = (heights(drawn, name) for name in ("loss", "difference"))
    assert len(loss) == 2 and len(less) == 1
    for curve in loss:
        assert curve[0] < curve[-1], "a loss that falls is drawn lower"
    assert figure(rows, RATE) == figure(rows[:-1], RATE)
    assert "lora (n = 2)" in figure(rows, RATE) and "gate (n = 2)" in figure(rows, RATE)
    swapped = [rows[1], rows[0], *rows[2:]]
    assert figure(swapped, RATE) == figure(rows, RATE), "runs stand by seed, whatever their order in the file"
    with pytest.raises(SystemExit, match=r"lora, gate share no seed: leave one out"):
        figure([rows[0], rows[3]], RATE)
    with pytest.raises(SystemExit, match="no runs of the core"):
        figure(three("dora", 2.0), RATE)


def test_a_figure_is_of_the_arms_that_are_asked_for() -> None:
    rows = [*three("lora", 2.0), *three("rslora", 1.9), *three("lean", 1.8)]
    svg = figure(rows, RATE, ["rslora", "lean"])
    drawn = ElementTree.fromstring(svg)
    assert len(heights(drawn, "loss")) == 2 and len(heights(drawn, "difference")) == 1
    assert "Less that of rslora on the same rows" in svg and "lora (n = 3)" not in svg.replace("rslora (n", "")
    with pytest.raises(SystemExit, match=r"no runs of dora, lean\."):
        figure(three("lora", 2.0), RATE, ["dora", "lean"])


def test_an_arm_without_a_finite_loss_has_no_curve() -> None:
    rows = [*three("lora", 2.0), *three("gate", 1.9)]
    rows[1]["curve"] = {"step": [], "tokens": [], "loss": []}
    drawn = ElementTree.fromstring(figure(rows, RATE))
    assert len(heights(drawn, "loss")) == 1 and heights(drawn, "difference") == []
    assert len(drawn.findall("{*}g[@id='learned']/{*}circle")) == 2


def test_a_difference_is_taken_step_by_step_of_each_seed() -> None:
    def run(seed: int, *losses: float) -> Row:
        return {"seed": seed, "curve": {"tokens": [8, 16, 24][: len(losses)], "loss": list(losses)}}

    first = [run(0, 3.0, 2.0, 9.0), run(1, 5.0, 4.0)]
    tokens, losses = mean_curve([run(0, 2.5, 1.5, 1.0), run(1, 4.9, 3.9, 1.0)], first)
    assert tokens.tolist() == [16], "a step that some seed lacks is left out, and the first"
    assert losses.tolist() == pytest.approx([-0.3])


def heights(drawn: ElementTree.Element, group: str) -> list[list[float]]:
    """Of the points of each curve."""
    curves = drawn.findall(f"{{*}}g[@id='{group}']/{{*}}polyline")
    return [[float(point.split(",")[1]) for point in (curve.get("points") or "").split()] for curve in curves]


def test_a_figure_shows_what_is_learned_and_forgotten_with_replay_that_has_no_curve() -> None:
    rows = [*three("lora", 2.0, 2.1), *three("rslora", 1.9, 1.8), *three("replay-5", 3.0, 3.1)]
    drawn = ElementTree.fromstring(figure(rows, RATE))
    assert len(heights(drawn, "loss")) == 2
    marks = drawn.findall("{*}g[@id='learned']/{*}circle")
    across = [float(mark.get("cx") or "nan") for mark in marks]
    assert across[1] < across[0] < across[2], "fewer bits of the new text stand to the left"
    bars = drawn.findall("{*}g[@id='learned']/{*}line[@class='curve']")
    assert len(bars) == 2 * len(marks)
    assert "Bars: 95 % intervals; dashed" in figure(rows, RATE) and "One seed; dashed" in figure(rows[::2], RATE)
    alone = ElementTree.fromstring(figure(three("lora", 2.0), RATE))
    assert heights(alone, "difference") == [] and len(heights(alone, "loss")) == 1
    replay = ElementTree.fromstring(figure(three("replay-5", 3.0), RATE))
    assert heights(replay, "loss") == [] and len(replay.findall("{*}g[@id='learned']/{*}circle")) == 1


def test_a_run_that_failed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither its model, which the frames of an error hold, nor a line."""
    models: list[weakref.ref[torch.nn.Module]] = []

    def fails(job: Any) -> Row:
        model = torch.nn.Linear(2, 2)
        models.append(weakref.ref(model))
        raise ValueError(f"planted in {job}")

    monkeypatch.setattr(ablation, "one_run", fails)
    said, done = ablation.attempt("a job", tmp_path / "out.jsonl")  # pyright: ignore[reportArgumentType]
    assert not done and "ValueError: planted in a job" in said and "in fails" in said
    assert models[0]() is None and not (tmp_path / "out.jsonl").exists()


def test_ticks_are_round_and_within() -> None:
    assert ticks(1.93, 2.61) == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6])
    assert ticks(0, 999_424) == pytest.approx([0, 200_000, 400_000, 600_000, 800_000])
