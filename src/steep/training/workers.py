"""The processes that read rows for a data loader, and signals.

Ctrl-C in a terminal, `timeout`, a container and a batch system send a signal to every process of a run. The one that
trains answers it, and needs its workers until its step is done.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing import get_start_method
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from steep.stopping import SIGNALS


def leave_signals_to_parent(loader: Any) -> None:
    """Let the workers that `loader` starts from now on ignore the first signal; with the second one they end.

    They end as before when the loader has no use for them any more, or within seconds when their parent is gone.

    Args:
        loader: torch's, or accelerate's around one.
    """
    loader = getattr(loader, "base_dataloader", loader)
    if loader.num_workers == 0:
        return
    loader.worker_init_fn = partial(_begin, loader.worker_init_fn)
    if loader.multiprocessing_context is None and get_start_method() == "fork":
        loader.multiprocessing_context = _Holding()


def _begin(inner: Callable[[int], None] | None, number: int) -> None:
    """The `worker_init_fn`: it runs after torch has set a handler of its own for SIGTERM, which ends the worker."""
    if inner is not None:
        inner(number)
    parent, asked = os.getppid(), False

    def on_signal(signal_number: int, frame: Any) -> None:
        nonlocal asked
        if asked or os.getppid() != parent:
            os._exit(0)  # any other code is a crash to torch, which it would raise in the parent
        asked = True

    for heeded in SIGNALS:
        if signal.getsignal(heeded) is not signal.SIG_IGN:
            signal.signal(heeded, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class _HeldProcess(ForkProcess):
    """A worker that signals wait for until it can answer them."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Holding(ForkContext):
    Process = _HeldProcess
