"""Input that is odd and right: it works, is counted, and needs bounded memory. And what is odd about the command."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steep.data.long_texts import PART, parts
from tests.bad_input.damage import Scene, make_scene, raw_file, replaced, setting, sources, text_file
from tests.command_line import Steep, assert_one_error_line
from tests.faults.command import ForkServer, Start, start_real
from tests.tiny import documents, sentencepiece_tokenizer, tiny_tokenizer

GIB = 2**30


@pytest.fixture
def scene(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    folder = tmp_path / "scene"
    folder.mkdir()
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "cache"))
    return make_scene(folder, llama_folder)


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_empty_lines_and_empty_documents_are_passed_over_and_counted(scene: Scene, steep: Steep) -> None:
    lines = jsonl(documents("en", 40)).splitlines()
    odd = ["", "   ", '{"text": ""}', '{"text": " \\n\\t"}', '{"text": "\\u3000"}']
    text_file("\n".join([*lines[:7], *odd, *lines[7:]]) + "\n")(scene)
    scene.finish()
    assert steep("train", scene.file).code == 0
    plan = json.loads((scene.run / "plan.json").read_text(encoding="utf-8"))
    ledger = json.loads((scene.run / "ledger.json").read_text(encoding="utf-8"))
    for source in (plan["data"]["sources"][0], ledger["sources"][0]):
        assert source["empty"] == 3  # blank lines are no documents
    assert plan["data"]["sources"][0]["documents"] == ledger["sources"][0]["documents"]["read"] == 40


def test_names_with_spaces_korean_line_ends_and_brackets(scene: Scene, steep: Steep) -> None:
    """They work as text, as cache and as output; a message that names them stays one line."""
    odd = scene.folder / "한국어 말뭉치\n[bold]*?\x1b[31m"
    odd.mkdir()
    text = odd / "법령 1\n.jsonl"
    shutil.move(scene.text, text)
    setting("data.sources.0.path", str(odd))(scene)
    setting("training.output_dir", str(odd.with_name("결과 \n[1]")))(scene)
    setting("data.cache_dir", str(odd.with_name("캐시\n")))(scene)
    scene.finish()
    said = steep("train", scene.file)
    assert said.code == 0, said
    assert (odd.with_name("결과 \n[1]") / "final" / "adapter_config.json").is_file()
    assert any("result: " in line and "결과 \\n[1]/final" in line for line in said.err.splitlines())
    text.write_text('{"text": 5}\n', encoding="utf-8")
    said = steep("plan", scene.file)
    assert_one_error_line(
        said, "data.sources[0].text_field: ", "한국어 말뭉치\\n[bold]*?\\x1b[31m/법령 1\\n.jsonl, line 1"
    )
    assert "\x1b" not in said.err


def test_anchors_and_merge_keys(scene: Scene, steep: Steep) -> None:
    replaced("base: fp32", "base: &kind fp32\n  compute_dtype: *kind")(scene)
    assert steep("plan", scene.file).code == 0
    tree = "x: &x {r: 8}\n" + yaml.safe_dump(scene.tree).replace("adapter:\n  r: 8", "adapter:\n  <<: *x\n  r: 4")
    scene.file.write_text(tree.replace("x: &x {r: 8}\n", "").replace("<<: *x", "<<: {r: 8}"), encoding="utf-8")
    assert steep("plan", scene.file).code == 0


def test_numbers_that_yaml_reads_as_text(scene: Scene, steep: Steep) -> None:
    replaced("learning_rate: 0.01", "learning_rate: 1e-4\n  adam_epsilon: 1E-7")(scene)
    assert steep("plan", scene.file).code == 0


def test_nul_in_json_is_a_character(scene: Scene, steep: Steep) -> None:
    """JSON has to say \\u0000: no binary file does that by mistake."""
    text_file(jsonl([*documents("en", 40), "a\0b"]))(scene)
    scene.finish()
    assert steep("plan", scene.file).code == 0


def test_a_file_that_vanishes_between_plan_and_train(scene: Scene, steep: Steep) -> None:
    scene.finish()
    assert steep("plan", scene.file).code == 0
    scene.text.unlink()
    before = scene.contents()
    assert_one_error_line(steep("train", scene.file), "data.sources[0].path: ", "text.jsonl does not exist")
    assert scene.contents() == before


def test_a_disk_that_cannot_hold_the_checkpoints(scene: Scene, steep: Steep, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.finish()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(GIB, GIB - 2**20, 2**20))  # pyright: ignore[reportAttributeAccessIssue]
    planned = steep("plan", scene.file)  # it may be for another machine
    assert planned.code == 0 and "steep train refuses it: training.output_dir: " in planned.err
    said = steep("train", scene.file)
    assert_one_error_line(said, "training.output_dir: ", " 1.0 MiB free", "save_total_limit")
    assert not scene.run.exists()


@pytest.mark.parametrize("kind", ["byte-level", "first", "normalizer", "never"])
def test_a_long_text_has_the_ids_of_the_whole(kind: str) -> None:
    tokenizer = tiny_tokenizer() if kind == "byte-level" else sentencepiece_tokenizer(kind)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType, reportArgumentType]

    text = " ".join(documents("en", 1000) + documents("ko", 1000)) * 4
    assert len(text) > 3 * PART
    found = list(parts(text, encode))
    assert len(found) >= 3 and max(map(len, found)) <= PART
    assert [number for part in found for number in encode(part)] == encode(text)


def test_a_text_without_any_place_to_cut_stays_whole() -> None:
    """An encoding that looks at the whole text: no two halves give the ids of both."""
    text = "x" * (2 * PART + 5)
    assert list(parts(text, lambda piece: [len(piece)])) == [text]


def test_a_document_of_16_mb_is_rows_like_any_other(tmp_path: Path) -> None:
    """In a process of its own, whose peak is of this document: it was 2.6 GB when a document was encoded at once."""
    words = "the " * 20 + "\n"
    (tmp_path / "big.txt").write_text(words * (16_000_000 // len(words)), encoding="utf-8")
    (tmp_path / "small.txt").write_text("one more text", encoding="utf-8")
    peak, documents_, read, longest = map(int, pack_elsewhere(tmp_path, "*.txt"))
    assert (documents_, read) == (2, 2) and longest > 1_600_000
    assert peak < 1.5 * GIB


def test_a_bomb_takes_no_memory_and_leaves_nothing(tmp_path: Path) -> None:
    """2 GB of zeros in 2 MB."""
    member = gzip.compress(bytes(64 * 2**20))
    (tmp_path / "bomb.jsonl.gz").write_bytes(member * 32)
    assert (tmp_path / "bomb.jsonl.gz").stat().st_size < 2.1e6
    (peak, message) = pack_elsewhere(tmp_path, "*.gz")
    assert "a document of more than 128 MiB" in message or "unpacks to more than 200 times its size" in message
    assert int(peak) < 1.5 * GIB
    assert list((tmp_path / "cache").iterdir()) == []


def pack_elsewhere(folder: Path, pattern: str) -> list[str]:
    """Pack the files in a process of its own: its peak of resident bytes, and what came of it."""
    program = f"""
from steep.data.packing import pack
from steep.errors import UserError
from tests.tiny import tiny_tokenizer
try:
    corpus = pack({str(folder / pattern)!r}, tiny_tokenizer(), holdout=0, cache_dir={str(folder / "cache")!r})
    found = [len(corpus.sources[0]), corpus.sources[0].files, int(corpus.sources[0].lengths.max())]
except UserError as error:
    found = [error]
status = open("/proc/self/status").read()  # getrusage's peak begins with that of the process which started this one
print(int(status.split("VmHWM:")[1].split()[0]) * 1024, *found, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_debug_shows_the_traceback_too(scene: Scene, steep: Steep) -> None:
    setting("adapter.r", 0)(scene)
    scene.finish()
    for words in (["--debug", "train", scene.file], ["train", scene.file, "--debug"]):
        said = steep(*words)
        assert said.code == 2
        assert "Traceback" in said.err and said.err.rstrip().splitlines()[-1].startswith("error: adapter.r: 0")
    assert "--debug" in steep("--help").out


def test_a_bug_is_called_one(scene: Scene, steep: Steep, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **settings: object) -> None:
        raise ZeroDivisionError("a mistake\nof ours")

    monkeypatch.setattr("steep.plan.plan_run", broken)
    scene.finish()
    said = steep("plan", scene.file)
    assert_one_error_line(said, "so it is a bug: ZeroDivisionError: a mistake\\nof ours", "--debug", code=70)
    assert "Traceback" in steep("plan", scene.file, "--debug").err


@pytest.mark.parametrize(
    ("start", "spoil", "words", "says"),
    [
        (start_real, raw_file(b"model: {name: \xff}"), [], "run file: "),
        (None, replaced("fp32", "!!python/object/apply:os.mkdir ['FOLDER/planted']"), [], "os.mkdir"),
        (None, text_file(os.urandom(5000), "text.txt"), [], "data.sources[0].path: "),
        (None, sources({"path": "FOLDER/none.txt"}), [], "none.txt does not exist"),
        (None, setting("data.max_length", 513), ["--adapter.r", "4"], "data.max_length: 513 tokens"),
    ],
    ids=["encoding", "tag", "binary", "missing", "length"],
)
def test_the_real_command(
    start: Start | None, spoil: object, words: list[str], says: str, scene: Scene, quick: ForkServer, tmp_path: Path
) -> None:
    """Once as it is, then in forks of what it imports."""
    spoil(scene)  # pyright: ignore[reportCallIssue]
    scene.finish()
    before = scene.contents()
    (tmp_path / "said").mkdir()
    command = (start or quick)(["train", str(scene.file), *words], tmp_path / "said", {})
    assert command.wait() == 2, command.text()
    assert command.lines()[-1].startswith("error: ") and says in command.log
    assert command.log.count("error: ") == 1 and "Traceback" not in command.log and command.text() == command.log
    assert scene.contents() == before
