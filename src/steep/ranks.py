"""The processes of a run that `torchrun` started: which one this is, what all of them agree on, how they end together.

Gradients are averaged by DDP. Everything else that the processes tell each other goes through the few functions here,
by gloo on the CPU, also where NCCL moves the gradients: gloo raises when a peer is gone, NCCL waits. In a run of
one process each function gives back what it was given, and neither a process group of torch nor a thread exists.

How they end: `joined` keeps a connection between the first process and each other one, through which nothing is sent
until the end. The kernel closes it when a process ends, however it ends, so a lost peer is noticed at once, also by one
that waits in a collective or on the GPU, and a peer that is merely slow is never taken for lost.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from steep.errors import RunError, Stopped, UserError

if TYPE_CHECKING:  # the command line is there before the libraries
    import numpy as np

T = TypeVar("T")

LOST = (
    "lost another process of the run: it was killed or has failed. Nothing was saved after that; the last checkpoint "
    "counts: start all processes again with --resume"
)
_STOPPED_TOO = "stopped at once, as another process of the run was"
_LONG = timedelta(days=30)  # the others wait while the first one tokenises or scores; a lost peer is noticed otherwise
_GRACE = 2.0  # seconds that a process has to end by itself when another one failed, before it is ended
_FIRST_SPEAKS = 10.0  # seconds that the others wait for the first process, which likely has the same error to tell
_LAST_LEAVES = 5.0  # seconds that the process which tells the error waits for the others to be gone
_NOTICED = 2.0  # seconds in which the loss of a peer is noticed for certain
_GOODBYE, _FAILED = b"g", b"f"


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


# ---- what all processes agree on; every one of them has to call these, in the same order


def gathered(values: np.ndarray) -> np.ndarray:
    """The `values` of every process, by rank: [world_size, *values.shape]. Shape and dtype are the same everywhere."""
    if world_size() == 1:
        return values[None]
    import numpy as np
    import torch
    import torch.distributed as dist

    own = torch.from_numpy(np.ascontiguousarray(values))
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own, group=_control())
    return torch.stack(parts).numpy()


def agreed(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if world_size() == 1:
        return flag
    import numpy as np

    return bool(gathered(np.array([flag])).any())


def wait_for_all() -> None:
    """Go on when every process has come so far."""
    agreed(False)


def gathered_bytes(payload: bytes) -> list[bytes]:
    """The `payload` of every process, by rank."""
    if world_size() == 1:
        return [payload]
    import numpy as np

    lengths = gathered(np.array([len(payload)]))[:, 0]
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    return [part[:length].tobytes() for part, length in zip(gathered(padded), lengths, strict=True)]


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives in the first process; the others wait for it. It travels as JSON."""
    if world_size() == 1:
        return make()
    payload = json.dumps(make()).encode() if is_main() else b""
    return json.loads(gathered_bytes(payload)[0])


def _is_connected() -> bool:
    import torch.distributed as dist

    return dist.is_initialized()


def refuse_other_number(before: int, field: str) -> None:
    """Check that as many processes go on with a run as it had: the random state of each one is kept.

    Raises:
        UserError: more, or fewer.
    """
    if before != world_size():
        how = f"torchrun --nproc-per-node {before}" if before > 1 else "without torchrun"
        problem = f"the run trained in {before} process{'es' * (before > 1)}, and here are {world_size()}"
        raise UserError(field, problem, f"Start it as before ({how}).")


@cache
def _control() -> Any:
    """The group that the processes talk in."""
    import torch.distributed as dist

    if not _is_connected():
        _connect()
    return dist.new_group(backend="gloo", timeout=_LONG)


def _connect() -> None:
    """Join torch's process group; accelerate chooses the GPU later."""
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(
                "torchrun",
                f"there are {torch.cuda.device_count()} GPUs for {os.environ.get('LOCAL_WORLD_SIZE')} processes",
                "Start one process for each GPU: --nproc-per-node.",
            )
        backend = "nccl"
    dist.init_process_group(backend)


# ---- how they begin and end


@contextmanager
def joined() -> Iterator[None]:
    """Run the processes of `torchrun` as one: the block ends in all of them, or in none.

    An error is told by one process, and all end with its exit code. When a process is gone the others end within 30
    seconds. In a run of one process, or inside another `joined`, this does nothing.

    Raises:
        RunError: another process is gone.
        SystemExit: another process has told the error; with its exit code.
    """
    if world_size() == 1 or _is_connected():
        yield
        return
    _connect()
    peers = _Peers(_own_store())
    try:
        yield
    except BaseException as error:
        if exit_code(error) == Stopped.exit_code:  # all have agreed to
            _ignore_sigterm()  # which torchrun sends to those that go later, and their exit code shall be the same
            peers.part()
        else:
            peers.leave(error)
        raise
    peers.part()


class _Peers:
    """The connections between the first process and each other one, and what is known of the others' end.

    Args:
        store: a key-value store that all processes share.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._lost, self._leaving = threading.Event(), threading.Event()
        self._connections = _accept(store) if is_main() else [_call(store)]
        self._watchers = [threading.Thread(target=self._watch, args=[c], daemon=True) for c in self._connections]
        for watcher in self._watchers:
            watcher.start()

    def _watch(self, connection: socket.socket) -> None:
        """Wait until the process at the other end is gone, in a thread of its own. If it goes before its time, this
        one has to end too."""
        if _heard(connection) != _GOODBYE and not self._leaving.is_set():
            self._lost.set()
            if is_main():
                self._tell(_FAILED)
            if not self._leaving.wait(_GRACE):
                # The main thread waits in a collective that cannot end, or is at work that has become useless.
                speaks, code = self._first_to_fail(RunError.exit_code)
                if speaks or (is_main() and by_signal(code)):
                    print(f"error: {LOST}" if speaks else _STOPPED_TOO, file=sys.stderr, flush=True)
                os._exit(code)
        while _heard(connection):
            continue

    def _tell(self, what: bytes) -> None:
        for connection in self._connections:
            try:
                connection.sendall(what)
            except OSError:  # it is gone, which its own thread notices
                continue

    def part(self) -> None:
        """End together: nobody goes before all are done."""
        wait_for_all()
        self._leaving.set()
        self._tell(_GOODBYE)
        self._disconnect()

    def leave(self, error: BaseException) -> None:
        """End with an error, which one process tells, as the last to go. torchrun sends SIGTERM to all when the first
        is gone: to this one on its way out, or as the first that it hears of it.

        Raises:
            RunError: in place of an error that only says that a peer is gone.
            SystemExit: another process tells the error.
        """
        _ignore_sigterm()
        ours, code = isinstance(error, UserError | RunError), exit_code(error)
        if ours and not is_main():
            self._lost.wait(_FIRST_SPEAKS)
        may_follow = (isinstance(error, Exception) and not ours) or code == 128 + signal.SIGTERM
        lost = self._lost.wait(_NOTICED if may_follow else 0)
        self._leaving.set()
        speaks, code = self._first_to_fail(RunError.exit_code if lost and not ours else code)
        self._tell(_FAILED)
        if speaks:
            for watcher in self._watchers:
                watcher.join(_LAST_LEAVES)
        self._disconnect()
        if not speaks:
            if is_main() and by_signal(code) and not by_signal(exit_code(error)):
                print(_STOPPED_TOO, file=sys.stderr, flush=True)
            raise SystemExit(code) from error
        if lost and not ours:
            raise RunError(LOST) from error
        if not is_main() and (ours or isinstance(error, OSError)):  # torch itself marks a traceback so
            print(f"[rank{rank()}]: ", end="", file=sys.stderr, flush=True)

    def _first_to_fail(self, code: int) -> tuple[bool, int]:
        """Whether no other process has failed before, and the exit code of the first that did."""
        try:
            if self._store.add("failed", 1) == 1:
                self._store.set("exit_code", str(code))
                return True, code
            self._store.wait(["exit_code"], timedelta(seconds=_NOTICED))
            return False, int(self._store.get("exit_code"))
        except RuntimeError:  # the store has gone with the process that kept it
            return True, code

    def _disconnect(self) -> None:
        import torch.distributed as dist

        _control.cache_clear()
        if not self._lost.is_set() or dist.get_backend() == "gloo":  # NCCL would wait for the peer that is gone
            dist.destroy_process_group()


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def by_signal(code: int) -> bool:
    """Whether an exit code is that of a process which a signal ended at once."""
    return code > 128


def exit_code(error: BaseException) -> int:
    """What the command ends with after `error`."""
    if isinstance(error, UserError | RunError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return UserError.exit_code
    code = getattr(error, "exit_code", getattr(error, "code", None))  # of typer's Exit, of SystemExit
    return code if isinstance(code, int) else RunError.exit_code


def _heard(connection: socket.socket) -> bytes:
    """What the process at the other end says next; nothing when it is gone."""
    try:
        return connection.recv(1)
    except OSError:
        return b""


def _own_store() -> Any:
    """The store that the processes met in, through a connection of its own: torch's may wait for a peer that is gone,
    and answers nothing else meanwhile."""
    import torch.distributed as dist

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"steep/{attempt}", dist.TCPStore(*place, is_master=False, wait_for_workers=False))


def _accept(store: Any) -> list[socket.socket]:
    """The first process's ends of the connections."""
    here = "127.0.0.1" if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] else ""
    secret = secrets.token_hex(16)
    found: list[socket.socket] = []
    with socket.create_server((here, 0), backlog=world_size()) as server:
        store.set("place", json.dumps([here or os.environ["MASTER_ADDR"], server.getsockname()[1], secret]))
        server.settimeout(_LONG.total_seconds())
        while len(found) < world_size() - 1:
            connection, _ = server.accept()
            if connection.recv(len(secret), socket.MSG_WAITALL) == secret.encode():
                found.append(connection)
    return found


def _call(store: Any) -> socket.socket:
    """Another process's end of its connection."""
    host, port, secret = json.loads(store.get("place"))
    connection = socket.create_connection((host, port))
    connection.sendall(secret.encode())
    connection.settimeout(None)
    return connection
