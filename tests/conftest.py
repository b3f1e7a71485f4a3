"""What every test stands on: no network, Triton's interpreter where no GPU is, one thread a worker, a seed, a cache."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

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

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_without_gpu = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked `gpu` where there is none: deselected and counted, never a silent skip."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.stash[_without_gpu] = len(left_out)
    workeroutput = getattr(config, "workeroutput", None)  # xdist's way to send a number to the process that prints
    if workeroutput is not None:
        workeroutput["steep_without_gpu"] = len(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Every xdist worker collects all tests, so each reports the same number."""
    output = getattr(node, "workeroutput", {})
    if "steep_without_gpu" in output:
        node.config.stash[_without_gpu] = output["steep_without_gpu"]  # pyright: ignore[reportAttributeAccessIssue]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(_without_gpu, 0):
        terminalreporter.write_line(f"{left_out} tests marked 'gpu' were left out: this machine has no CUDA device")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
