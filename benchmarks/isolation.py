"""Each method in a process of its own, so that a failure is a result like any other.

Nothing that one method leaves behind (buffers, compiled code, threads) reaches the next one.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LONGEST = 120  # characters of a reason, which has to fit a table


def start_process() -> ProcessPoolExecutor:
    """A fresh process, which runs what is submitted to it one by one, and ends when we do."""
    return ProcessPoolExecutor(
        max_workers=1, mp_context=get_context("spawn"), initializer=_end_with_parent
    )


def attempt(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | str:
    """What ``work`` returns in a process of its own, or why it failed."""
    with start_process() as process:
        return outcome(process, work, *args, **kwargs)


def outcome(
    process: ProcessPoolExecutor, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> _T | str:
    """What ``work`` returns in ``process``, or why it failed; also when the process was killed."""
    future = process.submit(work, *args, **kwargs)
    error = future.exception()
    return future.result() if error is None else _reason(error)


def _end_with_parent() -> None:
    """End this process with the one that started it, which may be killed: it would wait forever."""
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _reason(error: BaseException) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {first_line}"[:_LONGEST]
