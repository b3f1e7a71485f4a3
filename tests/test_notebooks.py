"""The notebooks run from top to bottom: each in a real kernel, on a tiny model and text of our own, on a CPU.

The cells run as they stand, with a model and text beside them. Steps and sizes of the run file are then exchanged by a
cell of the test, those of the ladder in its cell tagged "parameters". The commands are the real ones; they run in forks
of a process that has imported the libraries, and every exit code is looked at, which a notebook itself does not do.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from steep.config import parse_config
from tests.faults.command import ForkServer, environment
from tests.test_docs import relative_links
from tests.tiny import documents, save_tiny

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(file.name for file in FOLDER.glob("*.ipynb"))
RUN_FILES = {"korean.ipynb": "korean.yaml", "text_completion.ipynb": "prose.yaml"}
WRITES = re.compile(r"%%writefile (\S+)\n")
LOCAL_MODEL = "models/SmolLM2-135M"
SMALL_TRAINING = ["max_steps", "learning_rate", "vram"]
CELL_SECONDS = 200


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def parameters(notebook: NotebookNode) -> NotebookNode:
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return cell


def run_file(source: str) -> dict[str, Any]:
    return yaml.safe_load(WRITES.sub("", source, count=1))


def cell_of(notebook: NotebookNode, name: str) -> NotebookNode:
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    return cell


# ---- the settings


def with_alternatives(source: str, said: str) -> str:
    """The run file with the commented values that end in `said` in place of those above them."""
    lines: list[str] = []
    for line in source.splitlines():
        found = re.fullmatch(rf"( *)# (- \{{.*|(\w+): .*){said}", line)
        if found and found[3]:
            assert lines.pop().startswith(f"{found[1]}{found[3]}:"), f"{line} stands below another field"
        lines.append(found[1] + found[2] if found else line)
    return "\n".join(lines)


@pytest.mark.parametrize("name", RUN_FILES)
def test_every_setting_that_stands_in_the_notebook_is_one(name: str) -> None:
    source = parameters(read(name)).source
    assert WRITES.match(source)[1] == RUN_FILES[name]  # pyright: ignore[reportOptionalSubscript]
    as_it_is = parse_config(run_file(source))
    on_a_t4 = parse_config(run_file(with_alternatives(source, "  # T4")))
    assert on_a_t4.adapter.r < as_it_is.adapter.r
    assert as_it_is.training.rows_per_step == on_a_t4.training.rows_per_step  # cut as the card of each allows


@pytest.mark.parametrize("name", RUN_FILES)
def test_the_small_run_is_that_of_local_folders_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook, file = read(name), tmp_path / RUN_FILES[name]
    source = cell_of(notebook, "small").source
    written = WRITES.sub("", parameters(notebook).source, count=1)
    file.write_text(written, "utf-8")
    monkeypatch.chdir(tmp_path)
    for folder in ("models", "data"):  # one of the two is not enough, nor is a folder without the model
        exec(compile(source, "cell", "exec"), {})
        assert "of the hub" in capsys.readouterr().out and file.read_text("utf-8") == written
        (tmp_path / folder).mkdir()
    exec(compile(source, "cell", "exec"), {})
    assert "of the hub" in capsys.readouterr().out and file.read_text("utf-8") == written
    (tmp_path / LOCAL_MODEL).mkdir()
    exec(compile(source, "cell", "exec"), {})
    said = capsys.readouterr().out
    before, after = yaml.safe_load(written), yaml.safe_load(file.read_text("utf-8"))
    small = parse_config(after)
    assert Path(small.model.name) == tmp_path / LOCAL_MODEL and small.training.vram == "22GiB"
    further = ["heldout"] * (len(before["data"]["sources"]) - 2)  # of text that is only scored
    assert [source.role for source in small.data.sources] == ["train", "heldout", "replay", "heldout", *further]
    domains = dict.fromkeys(source.domain for source in small.data.sources)
    assert [source["domain"] for source in before["data"]["sources"]] == list(domains)
    assert all(source.path and not source.hub for source in small.data.sources)
    assert said.startswith("The small run") and f" {small.training.max_steps} steps, at most 22 GiB" in said
    for section, fields in {"model": ["name"], "data": ["sources"], "training": SMALL_TRAINING}.items():
        for field in fields:
            del before[section][field], after[section][field]
    assert after == before  # nothing else is exchanged


# ---- the cell that installs


def installed_by(
    source: str, missing: set[str], monkeypatch: pytest.MonkeyPatch, torch: str = "9.5.0"
) -> list[list[str]]:
    """The calls of a cell on a machine that lacks some modules, and has a folder in place of one."""
    calls: list[list[str]] = []

    def find(name: str) -> Any:
        return None if name in missing else SimpleNamespace(origin=None if f"{name}/" in missing else f"{name}.py")

    monkeypatch.setattr(util, "find_spec", find)
    monkeypatch.setattr(metadata, "version", {"torch": torch}.__getitem__)
    monkeypatch.setattr(subprocess, "run", lambda words, check: calls.append(list(words)))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(FOLDER)
    exec(compile(source, "cell", "exec"), {})
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_missing_is_installed_and_never_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cell_of(read(name), "install").source
    assert installed_by(source, set(), monkeypatch) == []
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert installed_by(source, {"steep"}, monkeypatch) == [[*pip, "..", "torch==9.5.0"]]
    assert installed_by(source, {"steep/"}, monkeypatch) == [[*pip, "..", "torch==9.5.0"]]  # a clone of that name
    drawing = [[*pip, "matplotlib"]] if name in RUN_FILES else []
    assert installed_by(source, {"matplotlib", "torch"}, monkeypatch) == drawing


@pytest.mark.parametrize("name", NAMES)
def test_what_pip_could_not_install_is_refused_in_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cell_of(read(name), "install").source
    least = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert "torch>=2.11" in least

    def elsewhere(place: str) -> str:
        assert 'STEEP = ".."' in source
        return source.replace('STEEP = ".."', f"STEEP = {place!r}")

    with pytest.raises(SystemExit, match=f"^{tmp_path} is no clone of steep: clone the repository, and put its folder"):
        installed_by(elsewhere(str(tmp_path)), {"steep"}, monkeypatch)
    assert installed_by(elsewhere(str(tmp_path)), set(), monkeypatch) == []  # nothing is to be installed of there
    for place in ("git+https://x.org/steep", "https://x.org/steep.zip"):
        assert place in installed_by(elsewhere(place), {"steep"}, monkeypatch)[0]

    for old in ("2.10.0", "1.13.1+cu117"):
        with pytest.raises(
            SystemExit, match=rf"^torch {re.escape(old)} is here, and steep needs 2\.11 or newer: upgrade"
        ):
            installed_by(source, {"steep"}, monkeypatch, old)
        assert installed_by(source, set(), monkeypatch, old) == []
    for enough in ("2.11.0+cu128", "3.0.0"):
        assert f"torch=={enough}" in installed_by(source, {"steep"}, monkeypatch, enough)[0]
    assert installed_by(source, {"steep", "torch"}, monkeypatch, "2.10.0")


# ---- top to bottom


class Commands:
    """`steep` and `python -m` for a kernel's shell, run in forks of a fork server, with the caller's streams.

    Attributes:
        folder: to be first on the caller's PATH.
        done: the words and the exit code of each call.
    """

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self.folder, self.done = folder, list[tuple[list[str], int]]()
        self._server = server
        self._place = tempfile.mkdtemp(prefix="steep-")  # a socket's name may have 107 characters
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"{self._place}/s")
        self._socket.listen()
        for name, words in {"steep": ["-m", "steep"], "python": []}.items():
            program = folder / name
            program.write_text(
                f"#!{sys.executable} -IS\n"
                "import json, os, socket, sys\n"
                "caller = socket.socket(socket.AF_UNIX)\n"
                f"caller.connect({self._place + '/s'!r})\n"
                f"words = {words!r} + sys.argv[1:]\n"
                "request = [words, os.getcwd(), dict(os.environ), os.getpid()]\n"
                "caller.sendall(json.dumps(request).encode() + b'\\n')\n"
                "sys.exit(int(caller.makefile().readline()))\n"
            )
            program.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:  # closed
                return
            with caller, caller.makefile("rw") as stream:
                words, folder, given, pid = json.loads(stream.readline())
                streams = {"out": f"/proc/{pid}/fd/1", "err": f"/proc/{pid}/fd/2"}
                forked = self._server.start(words, folder, environment({**given, "COLUMNS": "100"}), streams)
                while (code := forked()) is None:
                    time.sleep(0.02)
                self.done.append((words, code))
                stream.write(f"{code}\n")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        shutil.rmtree(self._place)


@pytest.fixture
def commands(quick: ForkServer, tmp_path: Path) -> Iterator[Commands]:
    (tmp_path / "bin").mkdir()
    found = Commands(quick, tmp_path / "bin")
    yield found
    found.close()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder that a notebook runs in, with a model and text."""
    folder = tmp_path / "notebooks"
    save_tiny("llama", folder / LOCAL_MODEL)
    (folder / "data").mkdir()
    korean, english = documents("ko", 150), documents("en", 300)
    for name, texts in {
        "ko-tech.train": korean[:120], "ko-tech.heldout": korean[120:],
        "en-books.train": english[:120], "en-books.heldout": english[120:150],
        "en-wiki.train": english[150:270], "en-wiki.heldout": english[270:],
    }.items():  # fmt: skip
        with gzip.open(folder / "data" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return folder


def execute(notebook: NotebookNode, folder: Path, commands: Commands) -> None:
    """
    Raises:
        AssertionError: a command ended with another exit code than 0.
        CellExecutionError: a cell raised.
    """
    own = {
        "PATH": f"{commands.folder}{os.pathsep}{os.environ['PATH']}",
        "JUPYTER_RUNTIME_DIR": str(folder.parent / "runtime"),
        "IPYTHONDIR": str(folder.parent / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    for cell in notebook.cells:  # the kernel's own would be no fork
        cell.source = cell.source.replace("{sys.executable}", "python")
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    try:
        client.execute(env={**os.environ, **own})
    finally:  # a command that failed is why a cell did
        assert [(words, code) for words, code in commands.done if code != 0] == [], text_of(notebook)


def outputs(notebook: NotebookNode, name: str = "") -> Iterator[NotebookNode]:
    for cell in notebook.cells:
        if cell.cell_type == "code" and name in ("", cell.id):
            yield from cell.outputs


def text_of(notebook: NotebookNode, name: str = "") -> str:
    """All text that a cell, or every one, has put out."""
    found = (
        output.text if output.output_type == "stream" else "\n".join(map(str, output.get("data", {}).values()))
        for output in outputs(notebook, name)
    )
    return COLOUR.sub("", "\n".join(found))


COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLACE = re.compile(r"(?<![\w.:/~*}<-])/(?:home|root|tmp|mnt|usr|opt|var|content|kaggle|work\w*|data|Users)\b")


def unfit(notebook: NotebookNode) -> list[str]:
    """What may not stand in outputs that are committed: errors, and places of one machine."""
    found = [output.ename for output in outputs(notebook) if output.output_type == "error"]
    text = text_of(notebook)
    found += [line for line in text.splitlines() if line.startswith(("Traceback (most", "error: "))]
    return found + [text[match.start() : match.start() + 40] for match in PLACE.finditer(text)]


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_from_top_to_bottom(name: str, here: Path, commands: Commands) -> None:
    korean = name == "korean.ipynb"
    domains = ("korean", "english", "other-english") if korean else ("prose", "general")
    tiny = {
        "data": {"max_length": 64},
        "training": {
            "max_steps": 4,
            "rows_per_step": 2,
            "learning_rate": 1e-2,
        },
        "evaluation": {"max_new_tokens": 4, "max_tokens": 400},
    }
    notebook = read(name)
    written = run_file(parameters(notebook).source)
    file = f"Path({RUN_FILES[name]!r})"
    exchange = nbformat.v4.new_code_cell(
        f"tiny = yaml.safe_load({file}.read_text('utf-8'))\n"
        f"for section, values in {tiny!r}.items():\n"
        "    tiny[section] |= values\n"
        f"{file}.write_text(yaml.safe_dump(tiny, allow_unicode=True), 'utf-8');"
    )
    notebook.cells.insert(notebook.cells.index(cell_of(notebook, "small")) + 1, exchange)
    execute(notebook, here, commands)

    run = here / written["training"]["output_dir"]
    asked = ["plan", "train", *(["eval", "report"] if korean else []), "generate", "export", *["export"] * korean]
    assert [words[2] for words, _ in commands.done] == asked
    assert "step 4/4" in text_of(notebook, "train") and f"result: {run.relative_to(here)}/final" in text_of(notebook)
    assert text_of(notebook, "card").startswith("no GPU, torch") and "The small run" in text_of(notebook, "small")
    assert LOCAL_MODEL in text_of(notebook, "plan")
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook, "loss"))
    board = text_of(notebook, "board" if korean else "train")
    assert all(domain in board for domain in domains) and "better" in board, board
    table = text_of(notebook, "samples")
    assert all(prompt in table for prompt in written["evaluation"]["prompts"]) and "base" in table
    written_now = text_of(notebook, "generate")
    assert written_now.index("--- base") < written_now.index("--- trained")
    assert (here / f"{written['training']['output_dir']}-merged" / "model.safetensors").is_file()
    if korean:
        assert list((here / "runs" / "korean-gguf").glob("*.gguf")) and (run / "report.html").is_file()
    assert unfit(notebook) == []


def test_the_ladder_from_top_to_bottom(here: Path, commands: Commands) -> None:
    notebook = read("ablation.ipynb")
    cell = parameters(notebook)
    tiny = {
        "ARMS": "lora gate", "TOKENS": 256, "BATCH": 2, "SEQ": 32, "RATE": 4e-3,
        "HELDOUT": 100,
    }  # fmt: skip
    lines = cell.source.splitlines()
    given = {line.split(" = ")[0]: ast.literal_eval(line.split(" = ")[1]) for line in lines}
    assert tiny.keys() <= given.keys()
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in {**given, **tiny}.items())
    execute(notebook, here, commands)

    assert [words[:2] for words, _ in commands.done] == [["-m", "benchmarks.ablation"]] * 2
    rows = [json.loads(line) for line in (here / "runs" / "ablation.jsonl").read_text("utf-8").splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [("lora", 0), ("gate", 0), ("lora", 1), ("gate", 1)]
    drawn = {kind for output in outputs(notebook, "table") for kind in output.get("data", {})}
    assert {"image/svg+xml", "text/markdown"} <= drawn
    table = text_of(notebook, "table")
    assert "| gate | and on gate_proj |" in table and "(n = 2)" in table and "| lora → gate | Korean better |" in table
    assert text_of(notebook, "card").startswith("no GPU, torch")
    assert unfit(notebook) == []


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("!steep plan nowhere.yaml 2>&1 | cat", AssertionError, "nowhere.yaml"),  # to a notebook that is no error
        ("import nowhere_at_all", CellExecutionError, "nowhere_at_all"),
    ],
)
def test_what_fails_is_found(
    source: str, error: type[Exception], says: str, tmp_path: Path, commands: Commands
) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with pytest.raises(error, match=says):
        execute(notebook, tmp_path, commands)
    assert unfit(notebook)


# ---- what is committed


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    names = [cell.id for cell in notebook.cells]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z-]+", found) for found in names)
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = relative_links(prose)
    assert links and [link for link in links if not (FOLDER / link).exists()] == []
    assert unfit(notebook) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_was_executed_on_a_card(name: str) -> None:
    notebook = read(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "execute it from top to bottom: CONTRIBUTING.md"
    assert re.match(r"NVIDIA \w.*, torch \d.*, CUDA \d", text_of(notebook, "card"))
    plots = {"image/svg+xml", "text/markdown"} if name == "ablation.ipynb" else {"image/png", "text/html"}
    assert plots <= {kind for output in outputs(notebook) for kind in output.get("data", {})}
    if name in RUN_FILES:
        (steps,) = re.findall(r"The small run: .* (\d+) steps", text_of(notebook, "small"))
        assert f"step {steps}/{steps}" in text_of(notebook, "train")
        assert "--- trained" in text_of(notebook, "generate")


def test_unfit_outputs_are_found() -> None:
    def with_output(text: str) -> NotebookNode:
        cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", text=text)])
        return nbformat.v4.new_notebook(cells=[cell])

    for text in ("error: no", "a\nTraceback (most recent call last):", "loading /home/a/b", "'/tmp/x'", "x=/content/a"):
        assert len(unfit(with_output(text))) == 1, text
    for text in ("runs/home/a", "an error: no", "https://x.org/home/a", "bits/byte", "loading models/tiny"):
        assert unfit(with_output(text)) == [], text
    failed = nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    cell = nbformat.v4.new_code_cell("", outputs=[failed])
    assert unfit(nbformat.v4.new_notebook(cells=[cell])) == ["ValueError"]
