"""The peak of live memory, measured on the allocator.

PyTorch's profiler records every allocation and release of its allocators with bytes, address and
time. From 0, their running sum is the memory above what was alive before, and its maximum is the
peak. The obvious alternatives are not exact: the process's resident size holds retained heap and
misses untouched pages, and under a ``TorchDispatchMode`` gradients are no longer added in place.

Not seen: what libraries allocate past PyTorch, and (on the CPU) the release of memory older than
the measurement: work that frees such memory is not credited for it.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import accumulate
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.autograd.profiler import profile
from torch.nn import functional as F

from momconv.eightbit import state_bytes
from momconv.heap import keeping_freed_memory
from momconv.momentum.sequential import forget_ranges, momentum_stages
from momconv.planner.micro_batch import Line, StaticBytes
from momconv.states import keep_buffers, keeping_random_state
from momconv.vocabulary import OPTIMIZERS, OptimizerName, Precision

_HEADROOM = 0.1  # of the free memory: fragmentation, and what no allocator reports
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_NAMES = (  # limit, use, and the part of the use that is cache, in versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_OWN_CGROUPS = Path("/proc/self/cgroup")


def measure(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that ``work`` keeps alive on ``device`` while it runs."""
    if device.type == "cuda":
        return _count_on_cuda(work, device)
    return max(accumulate(record(work, device), initial=0))


def measure_step(
    model: nn.Module, batch: int, resolution: int, *, precision: Precision, device: torch.device
) -> int:
    """Return the peak bytes of a training step of ``model``, in its current mode, on random images.

    Weights, gradients, optimiser state and images do not count. Gradients exist beforehand, as in
    every micro-batch but the first, and are added to in place. Afterwards the model's
    gradients, buffers and ranges and the random state are what they were.
    """
    with _keeping_state(model, device):
        images = torch.randn(batch, 3, resolution, resolution, device=device)
        labels = torch.zeros(batch, dtype=torch.long, device=device)  # their values cost nothing
        step = partial(run_step, model, images, labels, precision)
        if device.type == "cuda":
            step()  # allocates cuBLAS's and cuDNN's workspaces
        return measure(step, device)


def per_image(
    model: nn.Module,
    resolution: int,
    *,
    precision: Precision,
    device: torch.device,
) -> Line:
    """Return the line through the peaks of batches of 2 and 3, which are measured.

    A batch of 1 is no good: BatchNorm refuses it where an image shrinks to a pixel, and small
    convolutions take another algorithm.
    """
    few, many = (
        (batch, measure_step(model, batch, resolution, precision=precision, device=device))
        for batch in (2, 3)
    )
    return Line.through(few, many)


def write_snapshot(
    model: nn.Module, batch: int, resolution: int, precision: Precision, path: Path
) -> None:
    """Write a GPU's memory during a step as in ``measure_step`` for pytorch.org/memory_viz.

    ``model`` is on that GPU.
    """
    device = next(model.parameters()).device
    with _keeping_state(model, device):
        images = torch.randn(batch, 3, resolution, resolution, device=device)
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        run_step(model, images, labels, precision)  # allocates workspaces
        torch.cuda.memory._record_memory_history()
        try:
            run_step(model, images, labels, precision)
            torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)


def time_step(
    model: nn.Module, batch: int, resolution: int, precision: Precision, device: torch.device
) -> float:
    """Return the seconds of a training step as in ``measure_step``.

    The shorter of two, after another to warm up: what else the machine does adds to them.
    """
    with _keeping_state(model, device), keeping_freed_memory(device):
        images = torch.randn(batch, 3, resolution, resolution, device=device)
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            run_step(model, images, labels, precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return min(times[1:])


def static_bytes(
    model: nn.Module,
    optimizer: OptimizerName,
    *,
    ema: bool = False,
    release_gradients: bool = False,
    shards: int = 1,
    unused: AbstractSet[Tensor] = frozenset(),
) -> StaticBytes:
    """Return the bytes of weights, gradients, optimiser state and average in training.

    Of each parameter, a process has the first of so many ``shards``; the others are as large or
    padded. Those that no loss depends on are ``unused``, and have neither gradient nor state.
    """
    parameters = list(model.parameters())
    learning = [p for p in parameters if p.requires_grad and p not in unused]
    trained = sum(shard_bytes(p, shards) for p in learning)
    weights = sum(shard_bytes(p, shards) for p in parameters)
    weights += sum(buffer.nbytes for buffer in model.buffers())
    row = OPTIMIZERS[optimizer]
    state = trained
    if row.bits == 8:
        state = sum(state_bytes(p.numel()) for p in learning)
    state *= row.states
    gradients = 0 if release_gradients else trained
    return StaticBytes(weights, gradients, optimizer=state, ema=weights if ema else 0)


def shard_bytes(parameter: Tensor, shards: int) -> int:
    """Return the bytes of the largest of so many parts of the rows of ``parameter``."""
    if shards == 1:
        return parameter.nbytes
    rows, *others = parameter.shape
    return math.ceil(rows / shards) * math.prod(others) * parameter.itemsize


def available_bytes(device: torch.device, headroom: float = _HEADROOM) -> int:
    """Return the bytes that new tensors may take on ``device``: what is free, less ``headroom``.

    What is already alive, such as a loaded model, is not part of them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + cached) * (1 - headroom))
    free = min([psutil.virtual_memory().available, *_free_in_cgroups()])
    return int(free * (1 - headroom))


# The step


@contextlib.contextmanager
def _keeping_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Zero-filled gradients and unknown ranges of runs inside; all as before afterwards.

    The images are no real ones: what is seen in them is nobody's range.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained]
    restore_buffers = keep_buffers(model.modules())
    runs = [(stage, stage.runs) for stage in momentum_stages(model).values()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    forget_ranges(model)
    try:
        with keeping_random_state(device):
            yield
    finally:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        restore_buffers()
        for stage, before in runs:
            stage.runs = before


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return autocast to the ``precision``, which is off for "fp32"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def run_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    precision: Precision,
    enter_loss: Callable[[], None] = lambda: None,
) -> None:
    """Run the forward pass, ``enter_loss``, the loss and the backward pass."""
    with torch.enable_grad():
        with autocast(precision, images.device):
            outputs = model(images)
            enter_loss()
            loss = F.cross_entropy(outputs, labels)
        loss.backward()


# The allocator's record


def record(work: Callable[[], object], device: torch.device) -> list[int]:
    """Return the bytes that ``work`` allocates or, negative, releases again, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes on stderr
    with profile(profile_memory=True) as profiler:
        work()
    assert profiler.kineto_results is not None
    # Of the profiler's results only this tree has the addresses.
    events = list(_walk(profiler.kineto_results.experimental_event_tree()))
    changes = []
    addresses = set()  # what lived before may be released by a collection of garbage
    for event in sorted(events, key=lambda event: event.start_time_ns):
        fields = event.typed[1]
        if isinstance(fields, _ExtraFields_Allocation):
            is_known = fields.alloc_size > 0 or fields.ptr in addresses
            if fields.device.type == device.type and is_known:
                addresses.add(fields.ptr)
                changes.append(fields.alloc_size)
    return changes


def _walk(events: list[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        yield event


def _count_on_cuda(work: Callable[[], object], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


# The memory that a container leaves to its processes


def _free_in_cgroups() -> Iterator[int]:
    """Yield what the control groups of this process still grant, those that limit memory at all."""
    for folder in _find_cgroups():
        for limit, used, cache in _CGROUP_NAMES:
            if (folder / limit).is_file() and (text := (folder / limit).read_text()) != "max\n":
                yield int(text) - int((folder / used).read_text()) + _read_cache(folder, cache)


def _read_cache(folder: Path, name: str) -> int:
    """Return the bytes of files' pages, which count as used but make room when needed."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines)[name])


def _find_cgroups() -> Iterator[Path]:
    """Yield the groups of this process that may limit its memory, innermost first."""
    if not _OWN_CGROUPS.is_file():  # not Linux
        return
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller in ("", "memory"):  # version 2 and 1
            root = _CGROUPS / controller
            own = root / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(root))
