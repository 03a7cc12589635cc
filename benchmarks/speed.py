"""Seconds of one training step for every method, paired with storing all in one run.

On a GPU the networks and batches are those of the memory benchmark, in fp32 and, with channels
last, in bf16.

Each method has a process of its own. They take turns, so that a machine whose speed drifts slows
all of them alike, and each step is compared with the storing steps of the same turn: of the plain
network, and of the network that the method trains (momentum blocks, couplings), which alone says
what saving memory costs. The table has medians over the turns. A first turn, which allocates,
compiles and finds algorithms, is not counted, nor is the first step of each turn, which finds the
caches full of other methods' work. What a step frees on a CPU is kept for the next one, as in
fine-tuning (momconv.heap).

"Forward twice" is what the storing steps of the same network would take if the forward pass cost
its time twice, which is what it takes to compute every block again just as it was computed.
momconv may stay below: on a CPU it takes BatchNorm's statistics once (momentum/faster/norms.py).

The couplings of memcnn and revtorch do half of the work, see benchmarks/couplings.py: their ratio
to the plain network is no comparison.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks import memory
from benchmarks.cases import Case, Chosen, Networks, choose, prepare, synchronize
from benchmarks.isolation import outcome, start_process
from benchmarks.methods import BASES, METHODS, select
from benchmarks.tables import MISSING, Log, Out, Row, choose_device, show
from momconv.heap import keeping_freed_memory
from momconv.planner import measurement

TURNS = 5
TITLE = "speed"
VALUE = "of store all"
ALSO_ON_GPUS = ("resnet152", "vit_l_16", "convnext_large")
KEY = ("network", "method")

CPU_CASES = [
    Case("cifar_resnet110", 32, 32),
    Case("resnet50", 224, 8),
    Case("resnet152", 224, 8),
    Case("cifar_resnet1202", 32, 8),
]
GPU_CASES = [case for case in memory.CASES if case.network in ALSO_ON_GPUS]


class Step(NamedTuple):
    """The seconds of one step, and of the forward pass in it."""

    seconds: float
    forward: float


Turn = dict[str, Step | str]  # by method; or why there is no step

prepare_once = cache(prepare)  # in each process


def time_step(case: Case, key: str, device: torch.device) -> Step:
    """Time one step under the method of that key."""
    return time_model(prepare_once(case, key, device), case, device)


def time_model(model: nn.Module, case: Case, device: torch.device) -> Step:
    """Time one forward and backward pass, which comes after another as it does in training."""
    images = torch.randn(case.batch, 3, case.resolution, case.resolution, device=device)
    labels = torch.zeros(case.batch, dtype=torch.long, device=device)
    times: list[float] = []

    def take_time() -> None:
        synchronize(device)
        times.append(time.perf_counter())

    with keeping_freed_memory(device):
        measurement.run_step(model, images, labels, case.precision)
        take_time()
        measurement.run_step(model, images, labels, case.precision, take_time)
        take_time()
    began, at_loss, ended = times
    return Step(ended - began, at_loss - began)


def take_turns(case: Case, keys: list[str], device: torch.device) -> list[Turn]:
    """The turns after the first, which does not count; a method that failed is not run again."""
    turns: list[Turn] = []
    with ExitStack() as stack:
        processes = {key: stack.enter_context(start_process()) for key in keys}
        for _ in range(1 + TURNS):
            last = turns[-1] if turns else {}
            turns.append(
                {
                    key: _step(process, case, key, device, last.get(key))
                    for key, process in processes.items()
                }
            )
    return turns[1:]


def _step(
    process: ProcessPoolExecutor,
    case: Case,
    key: str,
    device: torch.device,
    before: Step | str | None,
) -> Step | str:
    if isinstance(before, str):
        return before
    return outcome(process, time_step, case, key, device)


def compare(case: Case, keys: list[str], device: torch.device) -> list[Row]:
    """A row for each method and each base that it is compared with."""
    methods = METHODS | BASES
    bases = ["store", *(methods[key].stored for key in keys)]
    keys = list(dict.fromkeys([*bases, *keys]))
    turns = take_turns(case, keys, device)
    rows: list[Row] = []
    for key in keys:
        stored = methods[key].stored
        rows.append(
            {
                "network": case.label,
                "method": methods[key].label,
                "seconds": _median(turns, _seconds, key, digits=".3g"),
                VALUE: _median(turns, _ratio, key, "store"),
                "of the same network storing all": _median(turns, _ratio, key, stored),
                "forward twice": _median(turns, _forward_twice, stored),
            }
        )
    return rows


def _seconds(step: Step) -> float:
    return step.seconds


def _ratio(step: Step, base: Step) -> float:
    return step.seconds / base.seconds


def _forward_twice(stored: Step) -> float:
    return 1 + stored.forward / stored.seconds


def _median(turns: list[Turn], value: Callable[..., float], *keys: str, digits: str = ".2f") -> str:
    """Over the turns, of a function of the steps of these methods; why there is none, for one."""
    values = []
    for turn in turns:
        steps = [turn[key] for key in keys]
        failures = [step for step in steps if isinstance(step, str)]
        if failures:
            return failures[0] if len(keys) == 1 else MISSING
        values.append(value(*steps))
    return format(statistics.median(values), digits)


def main(networks: Networks, method: Chosen, out: Out = None) -> None:
    """Time a training step, always together with the ways to store all."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for case in choose(GPU_CASES if device.type == "cuda" else CPU_CASES, networks):
        Console(stderr=True).print(case.label)
        rows = compare(case, select(case.network, method), device)
        log.merge(rows, KEY)
        show(TITLE, rows)


if __name__ == "__main__":
    typer.run(main)
