"""Ctrl-C and SIGTERM: while a model trains a wish that is granted after the step, everywhere else the end at once.

Nobody's signals are touched at import. The command line heeds them, and a script that wants the same asks for it:

    with steep.heed_signals() as stop:
        steep.train_run(config, stop=stop)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from steep import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WISH = b"stopping after this step, with a checkpoint; once more stops at once\n"


class Interrupted(BaseException):
    """A signal that ends what is under way at once. No `Exception`, so that nothing that mends errors holds it up.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM, as shells have it.
        go_on: what to do now.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        self.go_on = "nothing is damaged: start the same command again"
        super().__init__(signal.Signals(number).name)


class Stop:
    """Whether somebody asked for an end, and what a signal does just now.

    Attributes:
        asked: a signal came while steps were being finished.
    """

    def __init__(self) -> None:
        self.asked = False
        self._finishing = self._ended = False
        self._owner = os.getpid()

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Within, the first signal sets `asked` and nothing else; a second one ends all at once."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def last_look(self) -> bool:
        """`asked`, and the end of `finishing_steps`: no later signal is taken for a wish that nobody looks at."""
        self._finishing = False
        return self.asked

    def on_signal(self, number: int, frame: Any) -> None:
        """The handler.

        Raises:
            Interrupted: no step is being finished, or it is not the first signal.
        """
        if os.getpid() != self._owner:  # a worker process that was forked: Ctrl-C is the parent's to answer
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._finishing and not self.asked:
            self.asked = True
            # Printing could come in the middle of a print. To several processes torchrun also sends SIGTERM when one of
            # them is gone, and then there is no such step.
            if ranks.world_size() == 1:
                with suppress(OSError):  # the terminal may be gone: that must not end the step
                    os.write(2, _WISH)
            return
        if self._ended:  # the first one was caught and dropped, or its clean-up takes too long
            os._exit(128 + number)
        self._ended = True
        raise Interrupted(number)


@contextmanager
def heed_signals() -> Iterator[Stop]:
    """Answer Ctrl-C and SIGTERM within the block, and give back the old handlers after it. In the main thread only.

    A signal that is ignored stays so: a shell has its background jobs ignore Ctrl-C.

    Raises:
        ValueError: it is not the main thread.
    """
    stop = Stop()
    heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop.on_signal) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == stop.on_signal:  # else somebody has found another answer
                signal.signal(number, handler)
