"""The processes that read rows: the first signal is left to the one that trains, the second one ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from steep.training.workers import leave_signals_to_parent


class Numbers(Dataset[int]):
    """So many rows, each of them its own number and what the worker was prepared with."""

    prepared = 0

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index + Numbers.prepared


def prepare(worker: int) -> None:
    Numbers.prepared = 5000


def loader(**settings: Any) -> DataLoader[int]:
    made = DataLoader(Numbers(), batch_size=1, num_workers=1, worker_init_fn=prepare, **settings)
    leave_signals_to_parent(made)
    return made


@pytest.fixture
def workers() -> Iterator[None]:
    """Those that a failed test leaves do not hold up the next."""
    yield
    for process in active_children():
        process.kill()


def worker_of(rows: Any) -> Any:
    (worker,) = rows._workers
    return worker


@pytest.mark.parametrize("context", [None, "spawn"])
def test_the_first_signal_is_left_to_the_parent(context: str | None, workers: None) -> None:
    rows = iter(loader(multiprocessing_context=context))
    assert next(rows).tolist() == [5000]  # what the caller has workers do first is done
    os.kill(worker_of(rows).pid, signal.SIGTERM)
    assert [next(rows).item() for _ in range(20)] == list(range(5001, 5021))
    os.kill(worker_of(rows).pid, signal.SIGINT)
    worker_of(rows).join(20)
    assert worker_of(rows).exitcode == 0  # which torch does not take for a crash


def test_a_worker_that_is_not_needed_ends(workers: None) -> None:
    rows = iter(loader())
    next(rows)
    worker = worker_of(rows)
    os.kill(worker.pid, signal.SIGTERM)
    del rows
    worker.join(4)
    assert worker.exitcode == 0


def test_a_signal_may_come_while_a_worker_starts(workers: None) -> None:
    for _ in range(20):
        rows = iter(loader())
        os.kill(worker_of(rows).pid, signal.SIGTERM)
        assert next(rows).item() == 5000
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_worker_without_a_parent_ends() -> None:
    """At once where a signal reaches it, else when torch's watchdog looks."""
    code = (
        "import os, signal, time; from tests.training.test_workers import loader, worker_of\n"
        "rows = iter(loader()); next(rows); print(worker_of(rows).pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + 3
    while os.path.exists(f"/proc/{worker}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
