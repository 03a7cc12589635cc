import errno
import mmap
import os
import resource
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from momconv import exhaustion
from momconv.errors import DataError, ModelFileError, OutOfMemory
from momconv.exhaustion import (
    Parts,
    explain,
    is_exhaustion,
    is_short_of,
    keep_reserve,
    naming_exhaustion,
    release_reserve,
    require_memory,
)

# What is said where memory runs out: by Python, PyTorch, oneDNN, safetensors, glibc, CUDA, cuDNN,
# cuBLAS and its kin, NCCL, Triton.
EXHAUSTIONS: list[BaseException] = [
    MemoryError(),
    MemoryError("std::bad_alloc"),
    torch.OutOfMemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[…] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes."),
    RuntimeError("[…] DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."),
    RuntimeError("bad allocation"),
    RuntimeError("Resource temporarily unavailable"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("unable to mmap 1024 bytes from file <…>: Cannot allocate memory (12)"),
    RuntimeError("unable to open shared memory object </torch_1> in read-write mode: …"),
    RuntimeError("Caught MemoryError in DataLoader worker process 0.\nTraceback: …\nMemoryError"),
    RuntimeError(
        "Traceback: …\nnumpy._core._exceptions._ArrayMemoryError: Unable to allocate 9 GiB"
    ),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),  # of a fork
    ImportError("libopenblas.so: failed to map segment from shared object"),
    SafetensorError("Error while serializing: I/O error: Cannot allocate memory (os error 12)"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("No valid engine configs for ConvolutionBackwardFilter"),
    RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the…"),
    RuntimeError("[cudnn_frontend] Error: No valid execution plans built."),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in…"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("CUDA error: resource allocation failed when calling `cusparseCreate(handle)`"),
    RuntimeError("CURAND_STATUS_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("CUDA error (2): cudaErrorMemoryAllocation"),
    RuntimeError("Allocation on device 0 would exceed allowed memory. (out of memory)"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    RuntimeError("NCCL error …: unhandled cuda error. Last error:\nCuda failure 2 'out of memory'"),
    RuntimeError("NCCL error …: Error while creating shared memory segment /dev/shm/nccl-1 (5)"),
    RuntimeError(
        "NCCL error …: unhandled cuda error. Last error:\nFailed to CUDA calloc async 4 bytes"
    ),
    RuntimeError(
        '!handles_.at(i) INTERNAL ASSERT FAILED at "/c10/cuda/CUDACachingAllocator.cpp":430'
    ),
    RuntimeError('INTERNAL ASSERT FAILED at "/c10/cuda/CUDAMallocAsyncAllocator.cpp":5'),
]
OTHERS: list[BaseException] = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
    RuntimeError(
        "could not create a primitive descriptor for the LSTM forward propagation primitive"
    ),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: too many resources requested for launch"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("out of resource: shared memory, Required: 270336, Hardware limit: 232448."),
    RuntimeError("[enforce fail at inline_container.cc:1] unexpected pos 64 vs 0"),
    ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "out of memory/1.png"),
    BlockingIOError(errno.EAGAIN, "write could not complete without blocking"),
    KeyError("out of memory"),
    ValueError("no class is called out of memory"),
    DataError("out of memory: no images", kind="data.no_images"),
    KeyboardInterrupt("out of memory"),
]


@pytest.mark.parametrize("error", EXHAUSTIONS, ids=str)
def test_memory_that_runs_out_is_recognised_in_whatever_words(error: BaseException) -> None:
    assert is_exhaustion(error)
    with pytest.raises(OutOfMemory) as told, naming_exhaustion():
        raise error
    assert (told.value.exit_code, told.value.kind) == (5, "memory.exhausted")
    assert type(error).__name__ in told.value.message
    assert told.value.fix


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    assert not is_exhaustion(error)
    with pytest.raises(type(error)) as told, naming_exhaustion():
        raise error
    assert told.value is error


def test_real_ones_are_recognised() -> None:
    with pytest.raises(OutOfMemory), naming_exhaustion():
        torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(OutOfMemory), naming_exhaustion():
        np.empty(2**55, dtype=np.uint8)
    with pytest.raises(OutOfMemory), naming_exhaustion():
        mmap.mmap(-1, 2**55)
    with pytest.raises(RuntimeError, match="shapes cannot be"), naming_exhaustion():
        torch.ones(2, 3) @ torch.ones(2, 3)


class Huge(Dataset[object]):
    """Its images do not fit the memory of the process that reads them."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> object:
        return np.empty(2**55, dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_that_of_a_process_that_reads_images_is_recognised() -> None:
    with pytest.raises(OutOfMemory), naming_exhaustion():
        list(DataLoader(Huge(), num_workers=1))


def test_what_comes_of_an_exhaustion_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    error = SystemError("returned a result with an exception set")
    assert not is_exhaustion(error)
    error.__cause__ = MemoryError()
    assert is_exhaustion(error)
    lost = ModelFileError("lost", kind="a.kind")
    lost.__cause__ = MemoryError()
    assert not is_exhaustion(lost)  # somebody has judged what it means
    monkeypatch.setattr(exhaustion, "is_short_of", lambda size: True)
    assert is_exhaustion(SystemError("error return without exception set"))


def test_what_was_alive_is_free_again() -> None:
    """A GPU or a limit has room for the next try only if no traceback keeps the tensors."""
    alive: list[int] = []

    class Watched(Tensor):
        def __del__(self) -> None:
            alive.remove(id(self))

    def fail() -> None:
        tensor = torch.zeros(3).as_subclass(Watched)
        alive.append(id(tensor))
        raise MemoryError

    with pytest.raises(OutOfMemory), naming_exhaustion():
        fail()
    assert not alive


def test_a_long_text_is_cut_and_the_fix_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = explain(MemoryError("x" * 1000)).message
    assert text == f"memory ran out\nMemoryError: {'x' * 187}…"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**30, 2**30))
    assert explain(MemoryError()).fix == "ulimit -v unlimited"


def test_a_damaged_file_that_asks_for_much_is_not_short_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_memory(MemoryError(), 2**20)
    require_memory(EOFError(), 2**55)
    with pytest.raises(OutOfMemory):
        require_memory(MemoryError(), 2**55)
    monkeypatch.setattr(exhaustion, "is_short_of", lambda size: True)
    with pytest.raises(OutOfMemory):
        require_memory(SafetensorError("Cannot allocate memory (os error 12)"), 5)


# Parts


class Small(nn.Module):
    """Takes so many images at once, and remembers how many it was given."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise RuntimeError("could not create a primitive")
        return 2 * images


def test_a_network_goes_on_with_fewer_images_at_once() -> None:
    model, parts, cpu = Small(3), Parts(), torch.device("cpu")
    images = torch.arange(10.0)
    assert torch.equal(parts.forward(model, images, cpu), 2 * images)
    assert model.seen == [10, 5, 2, 2, 2, 2, 2]
    model.seen.clear()
    assert torch.equal(parts.forward(model, images[:3], cpu), 2 * images[:3])
    assert model.seen == [2, 1]
    with pytest.raises(OutOfMemory):
        parts.forward(Small(0), images, cpu)


def test_parts_are_never_smaller_than_what_is_needed() -> None:
    seen: list[list[int]] = []

    def fail(parts: Sequence[Tensor]) -> None:
        seen.append([*map(len, parts)])
        raise MemoryError

    with pytest.raises(OutOfMemory):
        Parts(2).work(fail, torch.zeros(5))
    assert seen == [[5], [3, 2]]
    seen.clear()
    with pytest.raises(OutOfMemory):
        Parts(2).work(fail, torch.zeros(1))
    assert seen == [[1]]


# The reserve


def test_the_reserve_is_there_until_memory_runs_out() -> None:
    keep_reserve()
    keep_reserve()
    (reserve,) = exhaustion._reserve
    with pytest.raises(OutOfMemory), naming_exhaustion():
        raise MemoryError
    assert reserve.closed
    keep_reserve()
    release_reserve()
    assert not exhaustion._reserve


def test_the_system_says_what_it_promises() -> None:
    assert not is_short_of(2**20)
    assert is_short_of(2**60)
