"""Memory that has run out, in whatever words Python, PyTorch and the libraries below it say so.

A CPU's memory runs out as MemoryError, as RuntimeErrors of PyTorch's allocator and of oneDNN, as
threads and libraries that cannot be started or loaded; a GPU's as OutOfMemoryError, but also as
cuDNN that finds no engine with as little workspace as is left, or cuBLAS that cannot start. Some of
these words may have another cause, which is why an :class:`OutOfMemory` repeats them.
"""

import errno
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from momconv.errors import MomconvError, OutOfMemory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

_WORDS = re.compile(
    r"""
    (can't|cannot|unable\ to|failed\ to|could\ not)\ [mc]?alloc(ate)?\b(?!\ memory\ in\ static\ TLS)
    | (not\ enough|insufficient)\ memory | insufficient\ resources | paging\ file\ is\ too\ small
    | out[ _]of[ _]((device|host)[ _])?memory | OutOfMemory
    | (memory|resource)\ allocation\ (failed|failure|error) | MemoryAllocation
    | bad[_ ]alloc | bad_array_new_length | ^[\w.]*MemoryError\b
    | resource\ temporarily\ unavailable | can't\ start\ new\ thread
    | unable\ to\ (open\ shared\ memory|mmap) | creating\ shared\ memory\ segment
    | failed\ to\ map\ segment
    | could\ not\ (create|execute)\ a\ (primitive(?!\ desc)|memory\ object)
    | unable\ to\ find\ an\ engine | no\ (valid\ )?(engine\ configs|execution\ plans)
    | _ALLOC(ATION)?_FAILED | AllocFailed | rocblas_status_memory_error
    | (BLAS|SOLVER)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED) | CUFFT_INTERNAL_ERROR
    | CUDNN_STATUS_(INTERNAL_ERROR|NOT_SUPPORTED|NOT_INITIALIZED|EXECUTION_FAILED)
    | failed\ to\ CUDA\ (calloc|malloc|host\ alloc) | CUDA\w+Allocator\.cpp
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_ABOUT_VALUES = (LookupError, ValueError, TypeError)  # these quote names of people's own
_SCARCE = 2**28  # bytes; where not even these are promised, what fails fails for that
_RESERVE = 2**25  # bytes
EXHAUSTED = "memory.exhausted"
_LONGEST = 200  # characters of what an error says

_reserve: list[mmap.mmap] = []


def is_exhaustion(error: BaseException | None) -> bool:
    """Return whether ``error``, or what it came from, says that memory has run out."""
    if error is None or isinstance(error, MomconvError):
        return isinstance(error, OutOfMemory)
    return _says_so(error) or is_exhaustion(error.__cause__ or error.__context__)


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        # Of a pipe that is full, a BlockingIOError has words of its own.
        starts_nothing = error.errno == errno.EAGAIN and error.strerror == os.strerror(errno.EAGAIN)
        return error.errno == errno.ENOMEM or starts_nothing
    if not isinstance(error, Exception) or isinstance(error, _ABOUT_VALUES):
        return False
    return _WORDS.search(str(error)) is not None or is_short_of(_SCARCE)


def is_short_of(size: int) -> bool:
    """Return whether the system does not even promise so many bytes."""
    try:
        mmap.mmap(-1, size).close()
    except (OSError, MemoryError):
        return True
    return False


def explain(error: BaseException) -> OutOfMemory:
    """Return what to tell of an exhaustion, which may have happened anywhere."""
    if isinstance(error, OutOfMemory):
        return error
    words = " ".join(f"{type(error).__name__}: {error}".split())
    if len(words) > _LONGEST:
        words = f"{words[:_LONGEST]}…"
    return OutOfMemory(f"memory ran out\n{words}", kind=EXHAUSTED, fix=_find_fix())


def _find_fix() -> str:
    if sys.platform != "win32":
        import resource

        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            return "ulimit -v unlimited"
    return "end other programs that hold memory, or give a container more: docker run --memory …"


@contextmanager
def naming_exhaustion() -> Iterator[None]:
    """Let memory that runs out inside be told in one way.

    Raises:
        OutOfMemory: It did. What was alive inside is given back by then.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_exhaustion(error):
            raise
        message = explain(error).message
    else:
        return
    release_reserve()
    _empty_cache()
    # Without the traceback of the first, which holds what is alive in it.
    raise OutOfMemory(message, kind=EXHAUSTED, fix=_find_fix())


def require_memory(error: BaseException, size: int) -> None:
    """Do nothing if ``error``, met in reading a file of so many bytes, is the file's own fault.

    A damaged file may ask for any amount of memory.

    Raises:
        OutOfMemory: There is too little memory to read a whole one.
    """
    if is_exhaustion(error) and is_short_of(4 * size + _SCARCE):
        raise explain(error) from error


class Parts:
    """Work on batches, in smaller parts from where memory has run out on."""

    def __init__(self, fewest: int = 1) -> None:
        self._fewest = fewest
        self._largest: int | None = None  # images at once

    def work(self, work: Callable[[Sequence["Tensor"]], T], images: "Tensor") -> T:
        """Return ``work`` on ``images``, in smaller and smaller parts while memory runs out.

        Raises:
            OutOfMemory: It does so with the fewest images at once.
        """
        while True:
            count = len(images)
            largest = min(count, self._largest or count)
            parts = max(1, min(-(-count // largest), count // self._fewest))
            try:
                with naming_exhaustion():
                    return work(images.tensor_split(parts))
            except OutOfMemory:
                if largest <= self._fewest:
                    raise
            self._largest = max(self._fewest, largest // 2)

    def forward(self, model: "nn.Module", images: "Tensor", device: "torch.device") -> "Tensor":
        """Return ``model(images)`` on ``device``, for a model to which each image is one by itself.

        Raises:
            OutOfMemory: Not even one image fits.
        """
        from torch import cat

        return self.work(lambda parts: cat([model(few.to(device)) for few in parts]), images)


def keep_reserve() -> None:
    """Set address space aside, until memory runs out: to save with, and to say what happened."""
    with suppress(OSError, MemoryError):
        if not _reserve:
            _reserve.append(mmap.mmap(-1, _RESERVE))


def release_reserve() -> None:
    """Give it back."""
    while _reserve:
        _reserve.pop().close()


def _empty_cache() -> None:
    """Let others have what PyTorch keeps of a GPU's memory, such as cuDNN and cuBLAS."""
    torch = sys.modules.get("torch")
    with suppress(RuntimeError):
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
