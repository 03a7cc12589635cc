"""The peak of live memory, measured on the allocator.

PyTorch's profiler records every allocation and release of its allocators with bytes, address and
time. From 0, their running sum is the memory above what was alive before, and its maximum is the
peak. The obvious alternatives are not exact: the process's resident size holds retained heap and
misses untouched pages, and under a ``TorchDispatchMode`` gradients are no longer added in place.

Not seen: what libraries allocate past PyTorch, and (on the CPU) the release of memory older than
the measurement: work that frees such memory is not credited for it.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.autograd.profiler import profile, record_function
from torch.nn import functional as F

from momconv.planner.micro_batch import Line, StaticBytes

Precision = Literal["fp32", "bf16", "fp16"]

_HEADROOM = 0.1  # of the free memory: fragmentation, and what no allocator reports
_STATES = {"sgd": 1, "adamw": 2}  # per trainable parameter
_TRUNK = 0.9  # of the modules
_STAGE_MARK = "momconv.stage:"
_LOSS_MARK = "momconv.loss"
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_NAMES = (  # limit, use, and the part of the use that is cache, in versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Usage:
    """The memory of a piece of work, above what was alive before it."""

    peak_bytes: int


@dataclass(frozen=True, slots=True)
class StepUsage:
    """The memory of a training step besides weights, gradients, optimiser state and images.

    The stages are the children of the network, or of what is nearly all of it, such as a vision
    transformer's encoder: "stem" is all before the first ``nn.Sequential`` among them, "head" all
    after the last one.
    """

    peak_bytes: int
    peak_stage: str  # whose forward or backward pass ran at the peak
    held_bytes: dict[str, int]  # by stage that allocated them, at the end of the forward pass


class _Change(NamedTuple):
    """An allocation, or a release (its bytes are negative)."""

    address: int
    bytes: int
    stage: str
    in_forward: bool


def measure(work: Callable[[], object], device: torch.device) -> Usage:
    """The peak of the memory that ``work`` keeps alive on ``device`` while it runs."""
    if device.type == "cuda":
        return Usage(_count_on_cuda(work, device))
    return Usage(_find_peak(_record(work, device))[0])


def measure_step(
    model: nn.Module, batch: int, resolution: int, *, precision: Precision, device: torch.device
) -> StepUsage:
    """The memory of one training step of ``model``, in its current mode, on random images.

    Gradients exist beforehand, as in every micro-batch but the first, and are added to in place.
    Afterwards the model's gradients and buffers and the random state are what they were.
    """
    stages = find_stages(model)
    with _keeping_state(model, device), marking(stages, _mark_stage):
        images = torch.randn(batch, 3, resolution, resolution, device=device)
        labels = torch.zeros(batch, dtype=torch.long, device=device)  # their values cost nothing
        step = partial(run_step, model, images, labels, precision, _mark_loss)
        changes = _record(step, device, next(iter(stages.values())))
        peak_bytes, peak_stage = _find_peak(changes)
        if device.type == "cuda":  # the run above also allocated cuBLAS's and cuDNN's workspaces
            peak_bytes = _count_on_cuda(step, device)
    return StepUsage(peak_bytes, peak_stage, _sum_held(changes, stages))


def per_image(
    model: nn.Module,
    resolution: int,
    *,
    precision: Precision,
    device: torch.device,
    batches: tuple[int, int] = (2, 3),
) -> Line:
    """The line through the peaks of two measured batches.

    A batch of 1 is no good: BatchNorm refuses it where an image shrinks to a pixel, and small
    convolutions take another algorithm.
    """
    few, many = (
        measure_step(model, batch, resolution, precision=precision, device=device).peak_bytes
        for batch in batches
    )
    return Line.through((batches[0], few), (batches[1], many))


def time_step(
    model: nn.Module, batch: int, resolution: int, precision: Precision, device: torch.device
) -> float:
    """The seconds of one training step as in ``measure_step``, after another to warm up."""
    with _keeping_state(model, device):
        images = torch.randn(batch, 3, resolution, resolution, device=device)
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        for _ in range(2):
            began = time.perf_counter()
            run_step(model, images, labels, precision, lambda: None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
    return seconds


def static_bytes(
    model: nn.Module, optimizer: Literal["sgd", "adamw"], *, ema: bool = False
) -> StaticBytes:
    """The bytes of weights, gradients, optimiser state and average while ``model`` is trained."""
    parameters = list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    weights = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))
    state = _STATES[optimizer] * trained
    return StaticBytes(weights, gradients=trained, optimizer=state, ema=weights if ema else 0)


def available_bytes(device: torch.device, headroom: float = _HEADROOM) -> int:
    """The bytes that new tensors may take on ``device``, ``headroom`` of the free memory kept back.

    What is already alive, such as a loaded model, is not part of them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + cached) * (1 - headroom))
    free = min([psutil.virtual_memory().available, *_free_in_cgroups()])
    return int(free * (1 - headroom))


# The step and its stages


def find_stages(model: nn.Module) -> dict[nn.Module, str]:
    """The modules of ``model`` and their stages; see :class:`StepUsage`."""
    children = list(_unfold(model))
    deep = [i for i, (_, child) in enumerate(children) if isinstance(child, nn.Sequential)]
    if not deep:
        return {child: name for name, child in children} or {model: "model"}
    return {
        child: "stem" if i < deep[0] else "head" if i > deep[-1] else name
        for i, (name, child) in enumerate(children)
    }


def _unfold(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children by name; in place of one that is nearly all, its own, if some are sequences."""
    for name, child in module.named_children():
        share = len(list(child.modules())) / len(list(module.modules()))
        if share > _TRUNK and any(isinstance(part, nn.Sequential) for part in child.children()):
            yield from _unfold(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


@contextlib.contextmanager
def marking(stages: dict[nn.Module, str], enter: Callable[[str], None]) -> Iterator[None]:
    """Calls ``enter`` when the forward and backward pass enter a stage.

    The backward marks are hooks on the output's gradient: a full backward hook would make the
    output a view, which the in-place ReLU of a torchvision network could not change.
    """

    def mark(stage: str, *_: object) -> None:
        enter(stage)

    def mark_backward(stage: str, _module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(mark, stage))

    handles = []
    for module, stage in stages.items():
        handles.append(module.register_forward_pre_hook(partial(mark, stage)))
        handles.append(module.register_forward_hook(partial(mark_backward, stage)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark_stage(stage: str) -> None:
    with record_function(_STAGE_MARK + stage):
        pass


def _mark_loss() -> None:
    with record_function(_LOSS_MARK):
        pass


@contextlib.contextmanager
def _keeping_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Zero-filled gradients inside; gradients, buffers and random state as before afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Mixed precision inside, or none for "fp32"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def run_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    precision: Precision,
    enter_loss: Callable[[], None],
) -> None:
    """The forward pass, the loss, before which ``enter_loss`` is called, and the backward pass."""
    with torch.enable_grad():
        with autocast(precision, images.device):
            outputs = model(images)
            enter_loss()
            loss = F.cross_entropy(outputs, labels)
        loss.backward()


# The allocator's record


def _record(work: Callable[[], object], device: torch.device, stage: str = "") -> list[_Change]:
    """What ``work``, which begins in ``stage``, allocates and releases again, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes on stderr
    with profile(profile_memory=True) as profiler:
        work()
    assert profiler.kineto_results is not None
    # Of the profiler's results only this tree has the addresses.
    events = list(_walk(profiler.kineto_results.experimental_event_tree()))
    changes, in_forward = [], True
    addresses = set()  # what lived before may be released by a collection of garbage
    for event in sorted(events, key=lambda event: event.start_time_ns):
        fields = event.typed[1]
        if isinstance(fields, _ExtraFields_Allocation):
            is_known = fields.alloc_size > 0 or fields.ptr in addresses
            if fields.device.type == device.type and is_known:
                addresses.add(fields.ptr)
                changes.append(_Change(fields.ptr, fields.alloc_size, stage, in_forward))
        elif event.name == _LOSS_MARK:
            in_forward = False
        elif event.name.startswith(_STAGE_MARK):
            stage = event.name.removeprefix(_STAGE_MARK)
    return changes


def _walk(events: list[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        yield event


def _find_peak(changes: list[_Change]) -> tuple[int, str]:
    live, peak, stage = 0, 0, ""
    for change in changes:
        live += change.bytes
        if live > peak:
            peak, stage = live, change.stage
    return peak, stage


def _sum_held(changes: list[_Change], stages: dict[nn.Module, str]) -> dict[str, int]:
    live: dict[int, _Change] = {}
    for change in changes:
        if not change.in_forward:
            break
        if change.bytes > 0:
            live[change.address] = change
        else:
            live.pop(change.address, None)
    held = dict.fromkeys(stages.values(), 0)
    for change in live.values():
        held[change.stage] += change.bytes
    return held


def _count_on_cuda(work: Callable[[], object], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


# The memory that a container leaves to its processes


def _free_in_cgroups() -> Iterator[int]:
    """What the control groups of this process still grant, those that limit memory at all."""
    for folder in _find_cgroups():
        for limit, used, cache in _CGROUP_NAMES:
            if (folder / limit).is_file() and (text := (folder / limit).read_text()) != "max\n":
                yield int(text) - int((folder / used).read_text()) + _read_cache(folder, cache)


def _read_cache(folder: Path, name: str) -> int:
    """Pages of files that count as used but make room as soon as memory is needed."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines)[name])


def _find_cgroups() -> Iterator[Path]:
    """The groups of this process that may limit its memory, innermost first."""
    if not _OWN_CGROUPS.is_file():  # not Linux
        return
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller in ("", "memory"):  # version 2 and 1
            root = _CGROUPS / controller
            own = root / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(root))
