"""The checks of benchmarks/gpu.py: each looks at one thing on a device and yields figures."""

import csv
import gc
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import budget, memory
from benchmarks import kernels as kernel_speeds
from benchmarks.cases import Case, synchronize
from benchmarks.methods import BASES, METHODS, make_network
from momconv import convert, finetune, set_strategy
from momconv.determinism import describe_tf32, deterministic
from momconv.exhaustion import is_exhaustion
from momconv.momentum.equations import Rule, to_grid
from momconv.momentum.faster import fused, kernels
from momconv.momentum.measures import no_magnitudes
from momconv.momentum.storage import State
from momconv.planner.allowance import Allowance
from momconv.planner.measurement import autocast, run_step
from momconv.planner.prediction import PeakMemory, Predictor, Training
from momconv.recipe import load_recipe
from momconv.states import keeping_random_state
from momconv.vocabulary import Precision, StrategyChoice

MIB, GIB = 2**20, 2**30
TABLE = "allowance"  # the figure that has a row of gpus.json in its note
_WITHIN = 3.0  # per cent, of what is predicted
_RATIO = 1.30  # of the time of storing everything
_OF_COPY = 0.8  # of the speed of a copy


@dataclass(frozen=True, slots=True)
class Place:
    """Where the checks run, and whether only to check themselves."""

    device: torch.device
    is_small: bool


@dataclass(frozen=True, slots=True)
class Figure:
    """What was found: a number, whether it is as it should be if that can be said, and more."""

    case: str
    name: str
    value: float | None = None
    goal: bool | None = None
    note: str = ""


Look = Callable[[Place], Iterator[Figure]]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at, and for how many seconds at most."""

    name: str
    look: Look
    seconds: float


# 1. What is there


def look_at_environment(place: Place) -> Iterator[Figure]:
    """The compiler and the headers that Triton needs, versions, and bf16."""
    yield Figure("software", "Python", note=platform.python_version())
    for package in ("torch", "torchvision", "triton", "numba", "momentumnet"):
        yield Figure("software", package, note=_find_version(package))
    yield Figure("software", "CUDA", note=f"{torch.version.cuda}, cuDNN {_find_cudnn()}")
    settings = (os.environ.get(f"PYTORCH_{name}", "") for name in ("ALLOC_CONF", "CUDA_ALLOC_CONF"))
    yield Figure("software", "allocator", note=" ".join(filter(None, settings)) or "default")
    compiler = next(filter(shutil.which, (os.environ.get("CC", ""), "gcc", "clang", "cc")), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    yield Figure("Triton", "compiler", goal=compiler is not None, note=str(compiler))
    yield Figure("Triton", "headers", goal=header.is_file(), note=str(header))
    if place.device.type != "cuda":
        return
    obstacle = fused.find_obstacle(place.device)
    yield Figure("Triton", "builds kernels", goal=obstacle is None, note=str(obstacle or "yes"))
    gpu = torch.cuda.get_device_properties(place.device)
    yield Figure("GPU", "memory in GiB", gpu.total_memory / GIB, note=gpu.name)
    yield Figure("GPU", "compute capability", gpu.major + gpu.minor / 10)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Figure("GPU", "bf16", goal=None, note="yes" if has_bf16 else "no")
    yield Figure("GPU", "fp32", note=describe_tf32(place.device))


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _find_cudnn() -> str:
    return str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else "none"


# 2. The bits of the fused steps


def make_rule(gamma: float) -> Rule:
    """A rule in whose middle the states are."""
    return Rule.of(gamma, (0.25 * (1.1 - gamma),) * 12, 6, torch.float32)


def compare_bits(place: Place) -> Iterator[Figure]:
    """Fused steps there and back against the same steps by PyTorch's own operations."""
    gammas: tuple[float, ...] = (0.1, 0.5, 0.9, 0.95, 1.0)
    remainders: tuple[torch.dtype, ...] = (torch.int8, torch.int16, torch.int32)
    if place.is_small:
        gammas, remainders = gammas[-2:], remainders[:1]
    for gamma, dtype in product(gammas, (torch.float32, torch.bfloat16, torch.float16)):
        differing = sum(
            count_differences(*make_state(shape, gamma, remainder, dtype, place.device), gamma)
            for remainder in remainders
            for shape in _list_shapes(place, is_first=remainder == remainders[0])
        )
        case = f"γ {gamma:g}, {dtype}".replace("torch.", "")
        yield Figure(case, "elements that differ", differing, differing == 0)
    yield _compare_many(place)


def _compare_many(place: Place) -> Figure:
    """More elements than an int32 counts: a small state again and again, of no round size."""
    size = 2**16 + 5 if place.is_small else 2**31 + 5
    label, name = f"{size} elements", "elements that differ"
    small, few = make_state((2**12 + 7,), 0.9, torch.int8, torch.bfloat16, place.device)
    try:
        tensors = (_repeat(t, size) for t in (small.x, small.low, small.v, small.r, few))
        *parts, y = tensors
        differing = count_differences(State(*parts), y, 0.9)  # type: ignore[arg-type]
    except Exception as error:
        is_short = is_exhaustion(error)
        return Figure(label, name, goal=None if is_short else False, note=explain(error))
    return Figure(label, name, differing, differing == 0)


def _repeat(tensor: Tensor | None, size: int) -> Tensor | None:
    if tensor is None:
        return None
    # Of no more memory than the result has.
    repeated = tensor.new_empty(math.ceil(size / len(tensor)), len(tensor)).copy_(tensor)
    return repeated.view(-1)[:size]


def _list_shapes(place: Place, *, is_first: bool) -> list[tuple[int, ...]]:
    """Odd sizes, and images, which are laid out with channels last.

    Kernels are built anew for a size of 1, which is why that is tried with one remainder only.
    """
    odd = [(1,)] * is_first + [(1023,), (1025,), (4099,)]
    return [*odd, (2, 3, 5, 7)] if place.is_small else [*odd, (3_000_017,), (8, 67, 31, 33)]


def make_state(
    shape: tuple[int, ...],
    gamma: float,
    remainder: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[State, Tensor]:
    """A state, and y, a sixteenth of which is a tie between two integers."""
    torch.manual_seed(0)
    rule = make_rule(gamma)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x = torch.randn(shape, dtype=torch.double, device=device).contiguous(memory_format=layout)
    y = torch.randn(shape, device=device).contiguous(memory_format=layout)
    tied = (t.as_strided((t.numel(),), (1,))[::16] for t in (x, y))
    next(tied).fill_(1)
    next(tied).sign_().mul_(2.5 * rule.v_ulp / rule.coefficients[0]).add_(1)
    state = State.start(x.float(), rule, is_reversible=True)
    state.v.random_(-(2**25), 2**25)
    if state.r is not None:
        # A step makes r grow by a factor of 1/γ and less than two more.
        most = min(2**20, int((torch.iinfo(remainder).max - 2) * gamma) - 1)
        state.r = state.r.to(remainder).random_(-most, most + 1)
    state.x = state.pack(to_grid(x, rule.ulp), *state.unpack(rule)[1:], rule)
    return state, y.to(dtype)


def count_differences(state: State, y: Tensor, gamma: float) -> int:
    """Of x, low, v and r after a step, and after its inverse."""
    rule, differing = make_rule(gamma), 0
    ours, theirs = _copy(state), _copy(state)
    largest = [no_magnitudes(state.x) for _ in range(2)]
    ours.x = kernels.advance(ours, y, largest[0], rule, 0)
    with patch.object(fused, "are_for", return_value=False):
        theirs.x = kernels.advance(theirs, y, largest[1], rule, 0)
    differing += _count(*largest) + _count_all(ours, theirs)
    ours.x = kernels.retreat(ours, rule)
    kernels.undo(ours, y, rule, 0)
    return differing + _count_all(ours, state)


def _copy(state: State) -> State:
    low, r = state.low, state.r
    copies = (None if t is None else t.clone() for t in (low, state.v, r))
    return State(state.x, *copies)  # type: ignore[arg-type]


def _count_all(one: State, other: State) -> int:
    return sum(_count(getattr(one, name), getattr(other, name)) for name in ("x", "low", "v", "r"))


def _count(one: Tensor | None, other: Tensor | None) -> int:
    if one is None or other is None:
        return 0
    return 0 if torch.equal(one, other) else int((one != other).sum())


# 3. Gradients

_SETTINGS = ("deterministic", "default", "cudnn.benchmark")


def compare_strategies(place: Place) -> Iterator[Figure]:
    """Each strategy against storing, where storing repeats itself and where it may not."""
    for setting, precision in product(_SETTINGS, _list_precisions(place)):
        model, images = make_dropping(place, precision)
        torch.backends.cudnn.benchmark = setting == "cudnn.benchmark"
        with deterministic(wanted=setting == "deterministic"):
            yield from _compare_with_stored(model, images, precision, setting)
        if place.is_small:
            return


def _list_precisions(place: Place) -> tuple[Precision, ...]:
    return ("fp32", "bf16") if place.is_small else ("fp32", "bf16", "fp16")


def make_dropping(place: Place, precision: Precision) -> tuple[nn.Module, Tensor]:
    """A momentum network with dropout inside of its blocks, and images."""
    name, side = ("cifar_resnet20", 16) if place.is_small else ("resnet50", 128)
    model = make_network(name)
    for module in model.modules():
        if isinstance(conv := getattr(module, "conv2", None), nn.Conv2d):
            module.conv2 = nn.Sequential(nn.Dropout(0.1), conv)
    layout = torch.contiguous_format if precision == "fp32" else torch.channels_last
    model = convert(model, 0.9, stages="all").to(place.device).to(memory_format=layout)
    images = torch.randn(4 if place.is_small else 16, 3, side, side, device=place.device)
    return model.train(), images.to(memory_format=layout)


def _compare_with_stored(
    model: nn.Module, images: Tensor, precision: Precision, setting: str
) -> Iterator[Figure]:
    stored = _step(model, images, precision, "store")
    for strategy in ("store", "checkpoint", "segment", "momentum", "auto"):
        case = f"{setting}, {precision}, {strategy}"
        try:
            found = _step(model, images, precision, strategy)
        except Exception as error:
            yield Figure(case, "tensors that differ", goal=False, note=explain(error))
            continue
        differing = sum(not torch.equal(*pair) for pair in zip(stored, found, strict=True))
        # By default, a convolution's gradient may be another one each time.
        goal = differing == 0 if setting == "deterministic" else None
        yield Figure(case, "tensors that differ", differing, goal, f"of {len(stored)}")


def _step(
    model: nn.Module, images: Tensor, precision: Precision, strategy: StrategyChoice
) -> list[Tensor]:
    """The output, gradients and buffers after a step; the buffers are then as before."""
    set_strategy(model, strategy)
    model.zero_grad()
    before = [buffer.clone() for buffer in model.buffers()]
    with keeping_random_state(images.device):
        torch.manual_seed(0)
        with autocast(precision, images.device):
            output = model(images)
        F.cross_entropy(
            output.float(), torch.zeros(len(images), dtype=torch.long).to(output.device)
        ).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    after = [buffer.clone() for buffer in model.buffers()]
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return [output.detach(), *gradients, *after]


def explain(error: BaseException) -> str:
    """What went wrong, in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


# 4. Predictions


def compare_predictions(place: Place) -> Iterator[Figure]:
    """What is predicted of a step against what the allocator hands out, and the allowance.

    All networks take a turn with each strategy, those that matter most first.
    """
    found: list[tuple[int, int]] = []  # bytes of tensors, as predicted, and what was reserved
    context = 0
    for strategy, precision in _list_turns(place):
        for case in _list_cases(place, precision):
            label = f"{case.label} {strategy}"
            try:
                peak, figures = _measure_peak(case, strategy, place.device)
            except Exception as error:
                yield Figure(label, "step", goal=False, note=explain(error))
                continue
            context = max(context, _held_beside_tensors(place.device))
            tensors = peak.total - peak.allowance - peak.optimizer  # no optimiser is there
            found.append((tensors, figures["reserved"]))
            yield from _judge(label, tensors, figures, place)
            spare = tensors + peak.allowance - figures["reserved"] - context
            yield Figure(label, "MiB to spare", spare / MIB, None if place.is_small else spare >= 0)
        if found:
            row = json.dumps(asdict(fit_allowance(context, found)))
            yield Figure("all so far", TABLE, note=row)


def _judge(label: str, tensors: int, figures: dict[str, int], place: Place) -> Iterator[Figure]:
    for name, measured in figures.items():
        off = 100 * (tensors / measured - 1)
        goal = abs(off) <= _WITHIN if name == "allocated" and not place.is_small else None
        yield Figure(label, f"% of {name}", off, goal, f"{measured / MIB:.0f} MiB")


def _held_beside_tensors(device: torch.device) -> int:
    """What is taken of a GPU's memory by its context, in which kernels are loaded when needed."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _list_turns(place: Place) -> Iterator[tuple[StrategyChoice, Precision]]:
    strategies: tuple[StrategyChoice, ...] = ("store", "auto", "momentum", "checkpoint", "segment")
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    if place.is_small:
        strategies, precisions = strategies[1:2], precisions[:1]
    yield from product(strategies, precisions)


def _list_cases(place: Place, precision: Precision) -> list[Case]:
    cases = [Case("cifar_resnet20", 32, 2)] if place.is_small else _README
    return [replace(case, precision=precision) for case in cases]


_README = [
    Case("resnet152", 224, 24),
    Case("cifar_resnet1202", 32, 8),
    Case("vit_l_16", 224, 4),
    Case("convnext_large", 224, 4),
    Case("resnet152", 500, 4),
]


def _measure_peak(
    case: Case, strategy: StrategyChoice, device: torch.device
) -> tuple[PeakMemory, dict[str, int]]:
    """The prediction for a step, and the peaks of what was requested, allocated and reserved."""
    gc.collect()  # what the case before has left
    model = _prepare(case, "momconv", device)
    set_strategy(model, strategy)
    training = Training(case.resolution, case.precision, device=device.type)
    peak = Predictor(model, training).predict(case.batch, strategy).peak
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images, labels = _make_batch(case, device)
    run_step(model, images, labels, case.precision)  # allocates the workspaces of libraries
    if device.type != "cuda":
        tensors = peak.total - peak.optimizer
        return peak, {"allocated": tensors, "reserved": tensors}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_step(model, images, labels, case.precision)
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    names = ("requested", "allocated", "reserved")
    return peak, {name: stats[f"{name}_bytes.all.peak"] for name in names}


def _prepare(case: Case, key: str, device: torch.device) -> nn.Module:
    """As benchmarks.cases.prepare, but made on the device, which draws weights faster."""
    with device:
        model = make_network(case.network)
    model = (METHODS | BASES)[key].prepare(model).to(device)
    if case.precision == "bf16":
        model.to(memory_format=torch.channels_last)
    return model


def _make_batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(case.batch, 3, case.resolution, case.resolution, device=device)
    return images, torch.zeros(case.batch, dtype=torch.long, device=device)


def fit_allowance(context: int, found: Sequence[tuple[int, int]]) -> Allowance:
    """The least that covers what was reserved beyond the tensors in every case.

    >>> fit_allowance(5, [(2**20, 2**20 + 100), (2**32, 2**32 + 2**30)])
    Allowance(context=5, workspace=100, fragmentation=0.25)
    """
    smallest = min(tensors for tensors, _ in found)
    few = [(t, r) for t, r in found if t <= max(smallest, GIB)]
    workspace = max(0, *(reserved - tensors for tensors, reserved in few))
    shares = [(reserved - workspace) / tensors - 1 for tensors, reserved in found]
    return Allowance(context, workspace, math.ceil(1000 * max(0.0, *shares)) / 1000)


# 5. Exhaustion


def run_out_of_memory(place: Place) -> Iterator[Figure]:
    """Under a cap that shrinks: in which words a step fails, and what stays allocated."""
    case = Case("cifar_resnet20", 32, 8) if place.is_small else Case("resnet50", 224, 32)
    precisions: tuple[Precision, ...] = ("fp32",) if place.is_small else ("fp32", "bf16")
    for precision in precisions:
        yield from _shrink(replace(case, precision=precision), place)
    if place.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(2 * GIB / _total(place.device), place.device)
    with tempfile.TemporaryDirectory() as folder:
        data = make_images(Path(folder) / "images", place)
        changes = [*_list_changes(place), f"data.path={data}", "train.epochs=1"]
        result = finetune(load_recipe(None, changes), Path(folder) / "run")
        rows = _read_metrics(result.folder)
    yield Figure("finetune in 2 GiB", "epochs", len(rows), len(rows) == 1)


def _total(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def _shrink(case: Case, place: Place) -> Iterator[Figure]:
    """Steps with less and less of the memory that the first one took."""
    device = place.device
    model = _prepare(case, "momconv", device)
    images, labels = _make_batch(case, device)
    run_step(model, images, labels, case.precision)
    if device.type != "cuda":
        return
    model.zero_grad()
    before, peak = (
        f(device) for f in (torch.cuda.memory_allocated, torch.cuda.max_memory_reserved)
    )
    for share in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share * peak / _total(device), device)
        words, known = "it fits", True
        try:
            run_step(model, images, labels, case.precision)
            torch.cuda.synchronize(device)
        except Exception as error:
            words, known = explain(error), is_exhaustion(error)
        model.zero_grad()
        left = torch.cuda.memory_allocated(device) - before
        label = f"{case.label} in {share:.0%}"
        yield Figure(label, "is known", goal=known, note=words)
        yield Figure(label, "MiB left behind", left / MIB, abs(left) < MIB)
    torch.cuda.set_per_process_memory_fraction(1.0, device)


# 6. Memory and time of the methods

_METHODS = ("store-momentum", "store", "momconv", "checkpoint", "checkpoint-sqrt", "momentumnet")
_STEPS = 5


def compare_methods(place: Place) -> Iterator[Figure]:
    """README's table: peaks and times of a step; and how fast the fused step moves memory."""
    yield from _compare_speeds(place)
    precisions: tuple[Precision, ...] = ("fp32",) if place.is_small else ("fp32", "bf16")
    for precision in precisions:
        for case in _list_cases(place, precision):
            yield from _compare_methods(case, place.device)


def _compare_speeds(place: Place) -> Iterator[Figure]:
    size, seconds = (2**16, 0.05) if place.is_small else (2**28, 1.0)
    for row in kernel_speeds.measure(size, place.device, seconds):
        share = float(row["of a copy"])
        is_goal = row["way"] == "fused" and not place.is_small
        goal = share >= _OF_COPY if is_goal else None
        label = f"{row['operation']}, {row['way']}"
        yield Figure(label, "of a copy", share, goal, f"{row['GB/s']} GB/s")


def _compare_methods(case: Case, device: torch.device) -> Iterator[Figure]:
    stored = math.nan
    for key in _METHODS:
        method = (METHODS | BASES)[key]
        if not method.applies_to(case.network):
            continue
        label = f"{case.label}, {method.label}"
        try:
            peak, seconds = _time_steps(_prepare(case, key, device), case, device)
        except Exception as error:
            yield Figure(label, "step", note=explain(error))
            continue
        stored = seconds if key == "store-momentum" else stored
        if device.type == "cuda":
            yield Figure(label, memory.VALUE, peak / case.batch / MIB)
        ratio = seconds / stored
        is_promised = key == "momconv" and device.type == "cuda"
        goal = ratio <= _RATIO if is_promised else None
        yield Figure(label, "ms", 1000 * seconds)
        yield Figure(label, "of the same network storing all", ratio, goal)


def _time_steps(model: nn.Module, case: Case, device: torch.device) -> tuple[int, float]:
    """The peak of a step above what was there before, and the median of its times."""
    gc.collect()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images, labels = _make_batch(case, device)
    for _ in range(2):
        run_step(model, images, labels, case.precision)
    before, peak, times = 0, 0, []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(_STEPS if device.type == "cuda" else 1):
        synchronize(device)
        began = time.perf_counter()
        run_step(model, images, labels, case.precision)
        synchronize(device)
        times.append(time.perf_counter() - began)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return peak - before, sorted(times)[len(times) // 2]


# 7. Three GiB


def fill_three_gib(place: Place) -> Iterator[Figure]:
    """The largest batch of recipes/three-gib.yaml, of which no more is granted."""
    if place.device.type != "cuda":
        yield Figure("three GiB", "batch", note="needs a GPU")
        return
    for key in ("momconv", "checkpoint-sqrt", "store"):
        try:
            found = budget.compare(key, place.device)
        except Exception as error:
            yield Figure(METHODS[key].label, "batch", note=explain(error))
            continue
        note = json.dumps(found)
        goal = int(found["batch"]) >= 20 if key == "momconv" else None
        yield Figure(METHODS[key].label, "batch", float(found["batch"]), goal, note)
        torch.cuda.empty_cache()


# 8. Real runs

_RUNS: dict[str, list[str]] = {
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16", "--set", "train.ema=0.9"],
    "3 GiB": ["--memory", "3GiB"],
    "compiled": ["--set", "train.compile=true"],
}
_REPEATING = ["--precision", "bf16", "--set", "train.deterministic=true"]


def run_for_real(place: Place) -> Iterator[Figure]:
    """``momconv finetune`` as people type it, several at a time, one of which is killed."""
    runs = {"fp32": list[str]()} if place.is_small else _RUNS
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as threads:
        folder = Path(name)
        data = make_images(folder / "images", place)
        futures = [
            threads.submit(_finetune, folder / str(number), data, place, label, options)
            for number, (label, options) in enumerate(runs.items())
        ]
        if not place.is_small:
            futures.append(threads.submit(_kill_and_resume, folder, data, place))
        yield from (future.result() for future in as_completed(futures))


def _command(folder: Path, data: Path, place: Place, options: Sequence[str]) -> list[str]:
    changes = [part for change in _list_changes(place) for part in ("--set", change)]
    base = [sys.executable, "-m", "momconv", "finetune", "--data", str(data), "-o", str(folder)]
    return [*base, "--epochs", "1" if place.is_small else "2", *changes, *options]


def _list_changes(place: Place) -> list[str]:
    network = "cifar_resnet20" if place.is_small else "resnet50"
    batch, workers = (4, 0) if place.is_small else (64, 3)
    names = [f"model.name={network}", "model.weights=none", f"train.device={place.device.type}"]
    return [*names, f"train.batch_size={batch}", f"data.workers={workers}"]


def _finetune(folder: Path, data: Path, place: Place, label: str, options: Sequence[str]) -> Figure:
    command = _command(folder, data, place, options)
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines()
        return Figure(label, "images/s", goal=False, note=" / ".join(lines[-2:])[:300])
    last = _read_metrics(folder)[-1]
    note = f"loss {last['train_loss']}"
    return Figure(label, "images/s", float(last["images_per_second"]), goal=True, note=note)


def _read_metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _kill_and_resume(folder: Path, data: Path, place: Place) -> Figure:
    """Two runs of the same seed with deterministic algorithms, one of which is killed."""
    straight, killed = folder / "straight", folder / "killed"
    found = _finetune(straight, data, place, "killed and resumed", _REPEATING)
    if not found.goal:
        return found
    with subprocess.Popen(
        _command(killed, data, place, _REPEATING),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not (killed / "metrics.csv").is_file():
            time.sleep(0.05)
        process.kill()
    command = [sys.executable, "-m", "momconv", "finetune", "--resume", str(killed)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    same = ran.returncode == 0 and _losses(killed) == _losses(straight)
    note = "" if same else " / ".join(ran.stderr.strip().splitlines()[-2:])[:300]
    return Figure(found.case, "same losses", goal=same, note=note)


def _losses(folder: Path) -> list[str]:
    return [row["train_loss"] for row in _read_metrics(folder)]


def make_images(folder: Path, place: Place) -> Path:
    """A folder of two classes of noise, which differ in brightness."""
    random = np.random.default_rng(0)
    count, side = (4, 32) if place.is_small else (128, 256)
    for split, label in product(("train", "val"), (0, 1)):
        images = folder / split / f"class{label}"
        images.mkdir(parents=True)
        for number in range(count if split == "train" else max(2, count // 8)):
            pixels = random.integers(0, 128, (side, side, 3), dtype=np.uint8) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.jpg")
    return folder


CHECKS = (
    Check("environment", look_at_environment, 20),
    Check("bits", compare_bits, 45),
    Check("gradients", compare_strategies, 60),
    Check("predictions", compare_predictions, 90),
    Check("exhaustion", run_out_of_memory, 50),
    Check("methods", compare_methods, 95),
    Check("three GiB", fill_three_gib, 40),
    Check("runs", run_for_real, 80),
)
