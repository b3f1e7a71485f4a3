"""What every test stands on: no network, Triton's interpreter where no GPU is, one thread a worker, a seed, a cache."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# torch, triton, transformers and tokenizers read these when they are imported, so they stand before any such import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that a test starts
_CACHE = tempfile.mkdtemp(prefix="steep-tests-")
os.environ["STEEP_CACHE"] = _CACHE
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHE, "datasets")

import importlib.util

import numpy as np
import pytest
import torch

from tests.faults.places import has_namespaces, has_setpriv, has_strace
from tests.report.browser import chromium

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tests.command_line import Said, Steep
    from tests.faults.command import ForkServer

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """The tests are of the CPU, so that they say the same everywhere; `-m gpu` asks for the card."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when it first asks for a card
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; deterministic tests need it
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in a shell's background; steep would leave it so
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_browser() -> bool:
    return chromium() is not None and importlib.util.find_spec("playwright") is not None


# What a marked test needs, and what is said where that is missing.
_NEEDS = {
    "gpu": (torch.cuda.is_available, "they need a CUDA device, and are asked for with -m gpu"),
    "browser": (_has_browser, "they need Chromium (apt install chromium) and playwright (make venv)"),
    "namespaces": (has_namespaces, "they need a private mount namespace with a disk of its own (root, unshare)"),
    "setpriv": (has_setpriv, "they need root, and setpriv to be a user whom permissions stop"),
    "strace": (has_strace, "they need strace (apt install strace), allowed to trace"),
    "llama_cpp": (
        lambda: importlib.util.find_spec("llama_cpp") is not None,
        "they need llama.cpp, compiled for minutes (.venv/bin/pip install -c constraints.txt llama-cpp-python)",
    ),
}
# Under CI=true these may not be missing: what they test has no other test.
_NEEDED_IN_CI = ("namespaces", "setpriv", "strace")
_left_out = pytest.StashKey[dict[str, int]]()
# Files that last longest, begun first: else a process is left with one of them while the others have no more.
_LONG = (
    "kernels/test_machine_code", "test_torchrun", "faults/test_sample", "test_verify_resume", "faults/test_full_disk",
    "model/test_fused_training", "faults/test_exact_resume", "test_bad_input", "test_benchmarks", "test_fp8_benchmarks",
    "test_stopping", "training/test_guard", "model/test_recompute", "test_fused_run", "test_ablation", "test_cli",
    "planning/test_fitting", "test_odd_input", "training/test_resume", "training/test_in_backward", "test_run",
    "faults/test_permissions", "test_notebooks", "export/test_gguf", "ops/test_linear_cross_entropy",
)  # fmt: skip
_PLACES = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(_LONG)}
assert all(file.is_file() for file in _PLACES), "a file was renamed"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, and marked tests left out where what they need is missing: deselected and counted, never a
    silent skip."""
    items.sort(key=lambda item: _PLACES.get(item.path, len(_PLACES)))
    counts: dict[str, int] = {}
    missing: list[str] = []
    for mark, (is_there, _) in _NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not is_there():
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if not item.get_closest_marker(mark)]
            counts[mark] = len(marked)
            if mark in _NEEDED_IN_CI and os.environ.get("CI") == "true":
                missing.append(f"tests marked '{mark}' cannot be left out under CI=true: {_NEEDS[mark][1]}")
    if missing:
        raise pytest.UsageError("\n".join(missing))
    config.stash[_left_out] = counts
    workeroutput = getattr(config, "workeroutput", None)  # xdist's way to send numbers to the process that prints
    if workeroutput is not None:
        workeroutput["steep_left_out"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Every xdist worker collects all tests, so each reports the same numbers."""
    output = getattr(node, "workeroutput", {})
    if "steep_left_out" in output:
        node.config.stash[_left_out] = output["steep_left_out"]  # pyright: ignore[reportAttributeAccessIssue]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for mark, count in config.stash.get(_left_out, {}).items():
        terminalreporter.write_line(f"{count} tests marked '{mark}' were left out: {_NEEDS[mark][1]}")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_of_the_card() -> Iterator[None]:
    """What a test took of a card is the next one's, which may be another worker's, or a process that it starts."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", autouse=True)
def _what_stays_is_not_collected() -> None:
    """Each training run has all garbage collected (accelerate), which goes through all that was imported: a third of
    the time of a small run. What is there before a file's tests is left alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.kernels.interpreter import quicken, repair

    with pytest.MonkeyPatch.context() as patch:
        repair(patch)
        quicken(patch)
        yield


@pytest.fixture(autouse=True)
def _no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a signal ends leaves at once if a thread would hold it up, and here the tests' process would go
    with it. So a thread that it started, which may write a checkpoint, is given time to end. How the real command
    leaves is tested with real ones (test_stopping.py)."""
    from steep import cli

    before, is_waited_for = set(threading.enumerate()), cli._is_waited_for

    def holds_up(thread: threading.Thread) -> bool:
        if thread not in before and is_waited_for(thread):
            thread.join(20)
        return False

    monkeypatch.setattr(cli, "_is_waited_for", holds_up)
    own, leave = os.getpid(), os._exit

    def refuse(code: int) -> NoReturn:
        if os.getpid() != own:  # a fork
            leave(code)
        raise RuntimeError(f"a command left at once with code {code}, and would have taken the tests with it")

    monkeypatch.setattr(os, "_exit", refuse)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer. Shared by the whole run: read it, copy it, don't write to it."""
    from tests.tiny import save_tiny

    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def korean_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus.jsonl`: 100 English and 100 Korean documents, fields "text" and "language"."""
    from tests.tiny import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def quick() -> Iterator[ForkServer]:
    """Starts programs in forks of a process that has imported what they need."""
    from tests.faults.command import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def steep(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Steep:
    """Runs a command in this process, its streams captured as those of a pipe."""
    from steep import cli
    from tests.command_line import Said

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["steep", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Said(code, str(out), str(err))

    return run
