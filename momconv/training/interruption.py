"""How a run ends early: by Ctrl-C or SIGTERM, of which a second one quits at once, or in time."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from momconv.training.run import TrainingRun

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to end, and ended with its state saved.

    Attributes:
        signal: The number of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal = number


class TimeUp(Exception):
    """A run used up its ``train.time_limit``, and ended with its state saved."""


@contextmanager
def catching_signals(announce: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Give a function that checks whether SIGINT or SIGTERM has come since.

    Only the main thread of a process gets signals; in another one nothing is caught.

    Raises:
        Interrupted: By the function, if one has come.
        SystemExit: Wherever the program is, at a second signal.
    """
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)
        announce("note: stopping after this micro-batch; once more to quit at once")

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, receive) for number in _SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked(run: TrainingRun, check: Callable[[], None]) -> None:
    """End the run if a process was signalled, as ``check`` says of this one, or no time is left.

    All processes end together; it is the leader's time that counts.

    Raises:
        Interrupted: One was signalled.
        TimeUp: There is no time left.
    """
    number = 0
    try:
        check()
    except Interrupted as interrupted:
        number = interrupted.signal
    own = run.processes.leads and time.monotonic() >= run.ends
    number, late = run.processes.largest(number, own)
    if number:
        raise Interrupted(number)
    if late:
        raise TimeUp
