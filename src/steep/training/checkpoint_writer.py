"""The thread that writes checkpoints while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from transformers import TrainerCallback

from steep.errors import RunError, UserError

logger = logging.getLogger("steep")


class CheckpointCallback(TrainerCallback):
    """A callback that has something to say about checkpoints, and needs none of them on the disk in `on_save`.

    A save is over for training before it is for the disk. Any other callback with an `on_save`, such as a tracker that
    uploads the folder, is called when the checkpoint has its name.
    """

    def before_publishing(self) -> None:
        """Called in the writer's thread when all of a checkpoint but its name is written."""


class CheckpointWriter:
    """Does one piece of work at a time in a thread of its own, and brings its failure back.

    The process does not exit while the thread works.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._name = ""
        self._abandoned = False
        self._last_step = threading.Lock()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begin to write the checkpoint called `name`; the one before has to be waited for."""
        assert self._thread is None and self._failure is None
        self._name, self._abandoned = name, False
        self._thread = threading.Thread(target=self._run, args=(work,), name=f"writes {name}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is published.

        Raises:
            OSError: the disk is full, the folder may not be written, ...
            RunError: anything else that kept it from being written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if isinstance(failure, UserError | RunError) or (isinstance(failure, OSError) and failure.errno is not None):
            raise failure
        raise RunError(
            f"{self._name} could not be written ({type(failure).__name__}: {failure}). The checkpoints before it are "
            "as they were: `--resume` goes on from the newest of them"
        ) from failure

    def check(self) -> None:
        """Raise what `wait` would, but wait for nothing."""
        if self._failure is not None:
            self.wait()

    def settle(self) -> None:
        """Wait, where something else has failed already: what is being written is still good to have."""
        try:
            self.wait()
        except (OSError, UserError, RunError) as failure:
            logger.warning("%s was not saved either: %s", self._name, failure)

    def abandon(self) -> None:
        """Wait for nothing: what is not published by now never will be, though the thread may still work on it."""
        with self._last_step:
            self._abandoned = True

    def publish(self, last_step: Callable[[], None]) -> bool:
        """For the work itself: do its last step, which publishes the checkpoint, unless it is abandoned."""
        with self._last_step:
            if not self._abandoned:
                last_step()
            return not self._abandoned

    @property
    def works(self) -> bool:
        """Whether the thread is at work just now."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:  # it is raised again by whoever waits
            self._failure = failure
