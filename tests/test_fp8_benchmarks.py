"""The benchmarks of the fp8 base measure what they say, at tiny sizes on a CPU: `benchmarks.bases` from text to
verdict, and `benchmarks.loading`."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import bases, bases_table, loading, measuring, shapes
from benchmarks.shapes import empty_model, write
from steep.model.choices import Choices
from steep.schema import Base
from tests.faults.command import ForkServer
from tests.tiny import documents

ARMS = ["fp8-none", "bf16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, korean = tmp_path_factory.mktemp("data"), documents("ko", 300)
    english = documents("en", 40)
    for name, texts in {
        "ko-tech.train": korean[:120], "ko-law.train": korean[120:240], "ko-tech.heldout": korean[240:270],
        "ko-law.heldout": korean[270:], "en-books.heldout": english,
    }.items():  # fmt: skip
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return folder


def words_for(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    tiny = "--steps 5 --batch 2 --seq 64 --r 8 --learning-rate 5e-3 --heldout-tokens 600 --seeds 1"
    return ["--model", str(model), "--data", str(data), "--out", str(out), *tiny.split(), *more]


@pytest.fixture(scope="module")
def lines(llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two arms, the second after the file was there."""
    if torch.cuda.is_available():
        pytest.skip("the runs are those of a CPU, and steep takes a GPU where there is one")
    out = tmp_path_factory.mktemp("bases") / "rows.jsonl"
    bases.main(words_for(llama_folder, data, out, "--arms", ARMS[0]))
    first = out.read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        begun: list[tuple[str, int]] = []
        run = bases.one_run
        patch.setattr(bases, "one_run", lambda *given: begun.append(given[1:]) or run(*given))
        bases.main(words_for(llama_folder, data, out, "--arms", *ARMS))
    assert begun == [(ARMS[1], 0)], "a line that is there is not run again"
    assert out.read_text(encoding="utf-8").startswith(first)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_arms_train_the_same_rows_and_are_scored_on_the_same_text(lines: list[dict[str, Any]]) -> None:
    eight_bit, sixteen_bit = lines
    assert [row["arm"] for row in lines] == ARMS
    for row in lines:
        assert len(row["curve"]) == 5 and row["curve"][-1] < row["curve"][0]
        assert 0 < row["tokens"] <= 5 * 2 * 64 and row["scale"] == pytest.approx(2.0)
        assert row["embedding_learning_rate"] == pytest.approx(row["learning_rate"] / 10)
        assert row["own"]["ko"]["loss"] < row["before"]["ko"]["loss"] - 0.05, "Korean was learned"
        for column in ("before", "own", "merged"):
            for score in row[column].values():
                assert 0 < score["bits_per_byte"] < score["loss"] / math.log(2)  # tokens are more than bytes here
        assert set(row["heldout"]) == {"ko", "en"} and all(tokens <= 600 for _, tokens in row["heldout"].values())
        assert row["heldout"]["ko"][0] > 1
    for what in ("tokens", "heldout"):
        assert eight_bit[what] == sixteen_bit[what]
    assert eight_bit["own"] != sixteen_bit["own"] and eight_bit["curve"] != sixteen_bit["curve"]
    # Merged into its own base, an adapter over 16 bits loses next to nothing.
    for language in ("ko", "en"):
        own, merged = (sixteen_bit[column][language]["loss"] for column in ("own", "merged"))
        assert merged == pytest.approx(own, abs=2e-3)


def test_what_was_merged_is_the_trained_model(lines: list[dict[str, Any]]) -> None:
    for row in lines:
        assert row["merged"]["ko"]["loss"] < row["before"]["ko"]["loss"] - 0.05


@pytest.mark.parametrize("change", [{"--steps": "6"}, {"--r": "4"}, {"--learning-rate": "1e-3"}, {"--seq": "32"}])
def test_a_line_of_other_work_does_not_count(change: dict[str, str], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    same = bases.parse(words_for(tmp_path, data, out))
    other = bases.parse(words_for(tmp_path, data, out, *(word for pair in change.items() for word in pair)))
    assert not bases.done(out, bases.work_of(same))
    for arm, seed in (("nf4", 0), ("bf16", 1)):
        measuring.append(out, {"arm": arm, "seed": seed, **vars(bases.work_of(same))})
    assert bases.done(out, bases.work_of(same)) == {("nf4", 0), ("bf16", 1)}
    assert not bases.done(out, bases.work_of(other))


@pytest.mark.parametrize("arm", bases.ARMS)
def test_an_arm_is_a_run_file(arm: str, data: Path, tmp_path: Path) -> None:
    arguments = bases.parse(words_for(tmp_path, data, tmp_path / "rows.jsonl"))
    config = bases.run_config(arguments, arm, 3, tmp_path / "run")
    assert config.model.fp8_products == bases.ARMS[arm].get("fp8_products", "auto")
    assert config.model.base == bases.ARMS[arm]["base"] and config.training.seed == 3
    assert [source.role for source in config.data.sources] == ["train"] * 2 + ["heldout"] * 3
    assert config.adapter.lora_alpha / config.adapter.r**0.5 == pytest.approx(2.0)


def test_arms_differ_in_base_and_products_alone() -> None:
    assert {field for arm in bases.ARMS.values() for field in arm} == {"base", "fp8_products"}
    assert {arm["base"] for arm in bases.ARMS.values()} <= set(get_args(Base))
    for name, arm in bases.ARMS.items():
        assert ("fp8_products" in arm) == (arm["base"] == "fp8")
        assert name == "-".join(arm.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --model and --data, or --summary"),
        (["--model", "{model}", "--data", "{folder}", "--docs"], "--docs is of a --summary"),
        (["--summary", "{folder}/none.jsonl"], "none.jsonl has no lines"),
        (["--model", "{folder}", "--data", "{folder}"], "holds no model"),
        (["--model", "{model}", "--data", "{folder}"], "lacks ko-tech.train.jsonl.gz"),
        (["--model", "{model}", "--data", "{folder}", "--arms", "fp4"], "invalid choice: 'fp4'"),
    ],
)
def test_what_is_not_there_is_said_before_anything_runs(
    words: list[str], said: str, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        bases.main([word.format(folder=tmp_path, model=llama_folder) for word in words])
    assert said in f"{end.value.code}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("arm", "choices", "said"),
    [
        ("nf4", Choices(False, "bf16"), "not fused"),
        ("fp8-both", Choices(True, "bf16", fp8_products="none"), "its products in fp8 were none, and both"),
        ("fp8-none", Choices(True, "bf16", fp8_products="backward"), "were backward, and none"),
    ],
)
def test_a_run_on_a_gpu_that_was_another_arms_is_no_result(
    arm: str, choices: Choices, said: str, llama_folder: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bases, "train_run", lambda config: {})
    monkeypatch.setattr(bases, "choices_of_run", lambda folder: choices)
    monkeypatch.setattr(bases, "free_memory", lambda: None)
    arguments = bases.parse(words_for(llama_folder, data, tmp_path / "rows.jsonl"))
    for name, value in (("is_available", True), ("reset_peak_memory_stats", None), ("max_memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(RuntimeError, match=said):
        bases.one_run(arguments, arm, 0)
    bases.refuse_other("fp8-both", Choices(True, "bf16", fp8_products="both"), on_gpu=True)
    bases.refuse_other(arm, choices, on_gpu=False)


def test_a_line_waits_for_another_process(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("{}\n")
    writer = threading.Thread(target=measuring.append, args=(out, {"arm": "nf4"}))
    with out.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and out.read_text() == "{}\n"
    writer.join(20)
    assert out.read_text() == '{}\n{"arm": "nf4"}\n'


def test_a_command_names_no_machines_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", "/mnt/a disk/../m", "--data", "/home/me/data/", "--out=/x/y.jsonl", "--steep-args", "--a.b c/d"]
    monkeypatch.setattr(sys, "argv", ["/home/me/benchmarks/bases.py", *words])
    said = measuring.command()
    assert said.startswith("python -m benchmarks.bases --model ")
    assert "--data data/ --out=y.jsonl --steep-args --a.b c/d" in said and "/home" not in said


# ---- the summary


def planted(arm: str, seed: int, losses: tuple[float, float, float, float], **fields: Any) -> dict[str, Any]:
    """Korean and English in its own arithmetic, then merged."""
    scores = [{"loss": loss, "bits_per_byte": loss / 2} for loss in losses]
    row = {"arm": arm, "seed": seed, "model": "m", "steps": 5, "batch": 2, "seq": 64, "r": 8, "learning_rate": 1e-4}
    row |= {"heldout_tokens": 600, "gpu": "none", "tokens": 640, "embedding_learning_rate": 1e-5, "scale": 2.0}
    row |= {
        "heldout": {"ko": [9, 500], "en": [9, 500]},
        "curve": [6.0, 5.0 + seed / 10 + list(bases.ARMS).index(arm) / 100],
    }
    return row | {"own": dict(zip(("ko", "en"), scores[:2], strict=True))} | {
        "merged": dict(zip(("ko", "en"), scores[2:], strict=True)), **fields,
    }  # fmt: skip


NF4, BF16 = (0.780, 3.580, 0.897, 3.486), (0.766, 3.438, 0.766, 3.438)
BOTH = (0.776, 3.456, 0.777, 3.447)


def of_three_seeds(
    both: tuple[float, float, float, float] = BOTH, noise: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> list[dict[str, Any]]:
    """Seeds differ by much more than arms, as they do; `noise` is that of fp8-both alone."""
    rows = []
    for seed, own in enumerate(noise):
        for arm, losses in (("nf4", NF4), ("bf16", BF16), ("fp8-both", tuple(loss + own for loss in both))):
            rows.append(planted(arm, seed, tuple(loss + 0.1 * seed for loss in losses)))  # pyright: ignore[reportArgumentType]
    return rows


def summary_of(
    rows: list[dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, str], str]:
    """Exit code, the answer to each part of the bar, and all that was said."""
    file = folder / "planted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        bases.main(["--summary", str(file)])
    said = capsys.readouterr().out
    answers = dict(line[2:].split(": ", 1) for line in said.splitlines() if line.startswith("- fp8-both is "))
    return int(end.value.code or 0), answers, said


def test_the_studys_figures_hold_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answers, said = summary_of(of_three_seeds(), tmp_path, capsys)
    assert code == 0 and len(answers) == 6
    assert all(answer.startswith("holds, ") for answer in answers.values())
    assert "The bar holds:" in said
    assert f"| fp8 | fp8 both ways | 0.8760 ± {4.303 * 0.1 / 3**0.5:.4f} (n = 3) |" in said
    none = "± 0.0000 (n = 3)"
    assert f"| fp8-both minus nf4 | -0.0040 {none} | -0.1200 {none} | -0.1240 {none} |" in said
    assert f"| fp8-both minus bf16 | +0.0100 {none} | +0.0110 {none} |" in said
    assert "| nf4 minus bf16 |" in said and "bf16 minus nf4" not in said


@pytest.mark.parametrize("column", range(4))
def test_one_column_that_is_worse_breaks_it(column: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for off, holds in ((-0.001, True), (0.001, False), (float("nan"), False)):
        both = list(BOTH)
        both[column] = NF4[column] + off
        code, answers, said = summary_of(of_three_seeds(tuple(both)), tmp_path, capsys)  # pyright: ignore[reportArgumentType]
        language, where = ("Korean", "English")[column % 2], ("own", "merged")[column // 2]
        answer = answers[f"fp8-both is not worse than nf4, {language}, {where}"]
        assert answer.startswith("holds, " if holds else "does not hold, ")
        others = [answer for what, answer in answers.items() if "nf4" in what and f"{language}, {where}" not in what]
        assert len(others) == 3 and all(other.startswith("holds") for other in others)
        if not holds:
            assert code == 1 and "The bar is not shown to hold:" in said


@pytest.mark.parametrize(("gap", "holds"), [(0.0149, True), (0.0151, False)])
@pytest.mark.parametrize("column", [2, 3])
def test_merged_it_may_be_so_far_from_16_bits(
    column: int, gap: float, holds: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = list(BOTH)
    both[column] = BF16[column] + gap
    code, answers, _ = summary_of(of_three_seeds(tuple(both)), tmp_path, capsys)  # pyright: ignore[reportArgumentType]
    what = f"fp8-both is within 0.015 of bf16, {('Korean', 'English')[column % 2]}, merged"
    assert answers[what].startswith("holds, " if holds else "does not hold, ") and (code == 0) is holds


@pytest.mark.parametrize(
    ("gap", "answer"),
    [
        (-0.0026, "holds, -0.0026 ± 0.0025 (n = 3)"),  # 4.303 standard errors of 0.000577
        (-0.0024, "open, -0.0024 ± 0.0025 (n = 3): the mean is within it, its interval is not"),
        (0.0005, "does not hold, +0.0005 ± 0.0025 (n = 3)"),
    ],
)
def test_a_part_holds_if_its_whole_interval_does(
    gap: float, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = (NF4[0] + gap, *BOTH[1:])
    code, answers, _ = summary_of(of_three_seeds(both, noise=(-0.001, 0.001, 0.0)), tmp_path, capsys)
    assert answers["fp8-both is not worse than nf4, Korean, own"] == answer
    assert answers["fp8-both is not worse than nf4, English, own"].startswith("holds")
    assert (code == 0) is answer.startswith("holds")


def test_one_seed_leaves_it_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answers, _ = summary_of(of_three_seeds()[:3], tmp_path, capsys)
    assert code == 1 and len(answers) == 6
    assert all(re.fullmatch(r"open, .* \(n = 1\): one seed has no interval", answer) for answer in answers.values())


def test_a_seed_that_one_arm_lacks_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lone = planted("fp8-both", 9, (9.0, 9.0, 9.0, 9.0))
    code, answers, _ = summary_of([*of_three_seeds(), lone], tmp_path, capsys)
    assert code == 0 and all("(n = 3)" in answer for answer in answers.values())
    code, answers, _ = summary_of([lone, planted("nf4", 0, NF4)], tmp_path, capsys)
    assert code == 1 and set(answers.values()) == {"no seed has both runs"}


def test_each_model_has_to_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = [{**row, "model": "other"} for row in of_three_seeds((NF4[0] + 0.01, *BOTH[1:]))]
    code, _, said = summary_of([*of_three_seeds(), *worse], tmp_path, capsys)
    assert code == 1 and said.count("| base | products |") == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heldout": {"ko": [8, 500], "en": [9, 500]}}, "differ in heldout"),
        ({"tokens": 639}, "differ in tokens"),
        ({"curve": None}, "have the same losses to the last digit"),
    ],
)
def test_runs_that_are_unlike_are_not_compared(fields: dict[str, Any], said: str) -> None:
    rows = of_three_seeds()
    rows[2] |= {"curve": rows[0]["curve"]} if "curve" in fields else fields
    with pytest.raises(SystemExit, match=said):
        bases_table.tell(rows)


def test_seeds_may_differ_in_tokens() -> None:
    """The order of the rows may leave out the last one, which is short: of all arms of a seed alike."""
    rows = [row | {"tokens": row["tokens"] - (row["seed"] == 2)} for row in of_three_seeds()]
    assert len({row["tokens"] for row in rows}) == 2
    bases_table.tell(rows)


def test_every_arm_is_in_the_documents_with_its_interval() -> None:
    """Of each file and each work, in bits a byte in one page and in nats in the other."""
    rows = [
        planted(arm, seed, (0.9 + seed / 100, 3.5, 0.9, 3.5), model=model)
        for model in ("one", "two") for arm in bases.ARMS for seed in (0, 1)
    ]  # fmt: skip
    marks = f"a\n{bases_table.BEGIN}\nold\n{bases_table.END}\nb"
    files = {"x.jsonl": rows, "y.jsonl": rows[:2]}
    for page, loss in ((bases_table.in_recipe(marks, files), 0.4525), (bases_table.in_docs(marks, files), 0.905)):
        half = 12.706 * loss / 0.905 * 0.01 / 2
        assert page.startswith("a\n") and page.endswith("\nb") and "\nold\n" not in page
        assert page.count(f"| {loss:.4f} ± {half:.4f} (n = 2) |") == 2 * len(bases.ARMS) + 1
        assert page.count("| fp8 | fp8 backward |") == 2 and page.count("| nf4 | bf16 |") == 3
        assert page.count("x.jsonl") in (1, 2) and page.count("y.jsonl") == 1


# ---- loading


def test_loading_is_timed_beside_reading(
    tmp_path: Path, quick: ForkServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(subprocess, "run", lambda command, stdout, text: quick.run(command, tmp_path))
    words = "--device cpu --shape tiny --bases fp8 --repeats 1"
    loading.main([*words.split(), "--weights", str(tmp_path), "--out", str(out)])
    read, load = map(json.loads, out.read_text().splitlines())
    assert (read["what"], load["what"]) == ("read", "fp8")
    assert read["seconds"] > 0 and load["seconds"] > 0 and read["gib"] == load["gib"] > 0
    # Linear layers at a byte a weight, both embeddings at two.
    linear, embeddings = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 2 * 384 * 64
    assert load["kept_gib"] * 2**30 == pytest.approx(linear + 2 * embeddings, rel=0.1)
    ratio, told = load["seconds"] / read["seconds"], capsys.readouterr().out
    assert f"{ratio:.2f} x reading" in told and "GiB at its peak" in told
    assert load["gib_per_second"] == pytest.approx(load["gib"] / load["seconds"])
    assert load["peak_host_gib"] > 0 and load["peak_allocated_gib"] is None


def test_a_shape_may_have_fewer_layers(tmp_path: Path) -> None:
    whole, part = write("tiny", tmp_path / "whole", "cpu"), write("tiny", tmp_path / "part", "cpu", 1)
    assert len(loading.weight_files(whole)) == 3 and len(loading.weight_files(part)) == 2
    index = json.loads((part / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(each.numel() for each in empty_model("tiny", 1).parameters())
    assert AutoModelForCausalLM.from_pretrained(part).config.num_hidden_layers == 1


def test_weights_that_do_not_fit_on_the_disk_are_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * sum(each.numel() for each in empty_model("tiny").parameters())
    folder, words = tmp_path / "tiny-cpu", ["--device", "cpu", "--shape", "tiny", "--weights", str(tmp_path)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=size - 1))
    with pytest.raises(SystemExit, match=r"tiny-cpu needs 0\.0 GiB, and its disk has 0\.0 free: delete what"):
        loading.main(words)
    assert not list(folder.iterdir())
    write("tiny", folder, "cpu")
    loading.refuse_full_disk("tiny", None, folder)  # they are there
    (folder / "model.safetensors.index.json").unlink()
    loading.refuse_full_disk("tiny", None, folder)  # they are written over


def test_own_memory_is_watched(tmp_path: Path) -> None:
    """A mapped file is none of it; what is allocated is, also if it is gone at the end."""
    (tmp_path / "file").write_bytes(bytes(2**26))
    found: list[int] = []
    with loading.peak_of_host(found):
        np.memmap(tmp_path / "file", mode="r").sum()
    with loading.peak_of_host(found):
        np.ones(2**26, np.uint8).sum()
        time.sleep(0.1)
    mapped, allocated = found
    assert mapped < 2**25 and allocated > 2**25


def test_a_load_holds_some_tensors_whatever_the_number_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU what is kept is on the host too; what is there beside it may not grow as the checkpoint does. All
    in one process of its own, each model gone before the next."""
    fields = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 1024}
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.SHAPES["tiny"] | fields)
    folders = [write("small", tmp_path / str(layers), "cpu", layers) for layers in (4, 12)]
    stored = [sum(file.stat().st_size for file in loading.weight_files(folder)) / 2**30 for folder in folders]
    tiny = write("tiny", tmp_path / "tiny", "cpu")
    program = (
        "import gc, json, sys\nfrom pathlib import Path\nfrom benchmarks.loading import load_once\n"
        "*folders, tiny = map(Path, sys.argv[1:])\n"
        "for base in ('nf4', 'int8', 'fp8'):\n    for folder in folders:\n"
        "        print(json.dumps(load_once(base, folder, tiny)))\n        gc.collect()\n"
    )
    words = [sys.executable, "-c", program, *map(str, folders), str(tiny)]
    # What is freed goes back, and not into gaps between the kept.
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    beside = [each["peak_host_gib"] - each["kept_gib"] for each in found]
    assert len(beside) == 6
    for few, many in zip(beside[::2], beside[1::2], strict=True):
        assert many - few < 0.5 * (stored[1] - stored[0])


def test_files_are_dropped_and_found_in_memory(tmp_path: Path) -> None:
    files = loading.weight_files(write("tiny", tmp_path / "tiny", "cpu"))
    assert len(files) == 3
    loading.read(files)
    assert loading.resident(files) == 1.0
    loading.drop(files)
    assert loading.resident(files) < 1.0, "the system of this disk does not drop pages: loads would be warm"


def test_a_load_that_fails_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 1, ""))
    with pytest.raises(SystemExit, match="fp8 was not loaded"):
        loading.loaded("fp8", tmp_path, tmp_path)
