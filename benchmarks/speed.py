"""Seconds of one training step for every method, paired with storing all in one run.

On a GPU the networks and batches are those of the memory benchmark, in fp32 and, with channels
last, in bf16.

Each method has a process of its own. They take turns, so that a machine whose speed drifts slows
all of them alike, and each step is compared with the storing steps of the same turn: of the plain
network, and of the network that the method trains (momentum blocks, couplings), which alone says
what saving memory costs. The table has medians over the turns. A first step that allocates,
compiles and finds algorithms is not counted.

The couplings of memcnn and revtorch do half of the work, see benchmarks/couplings.py: their ratio
to the plain network is no comparison.
"""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache

import torch
import typer
from rich.console import Console

from benchmarks import memory
from benchmarks.cases import Case, Chosen, Networks, choose, prepare, synchronize
from benchmarks.isolation import outcome, start_process
from benchmarks.methods import BASES, METHODS, select
from benchmarks.tables import Log, Row, choose_device, show
from momconv.planner import measurement

TURNS = 5
TITLE = "speed"
ALSO_ON_GPUS = ("resnet152", "vit_l_16", "convnext_large")
KEY = ("network", "method")

CPU_CASES = [
    Case("cifar_resnet110", 32, 32),
    Case("resnet50", 224, 8),
    Case("resnet152", 224, 8),
    Case("cifar_resnet1202", 32, 8),
]
GPU_CASES = [case for case in memory.CASES if case.network in ALSO_ON_GPUS]

Turn = dict[str, float | str]  # seconds, or why there are none, by method


prepare_once = cache(prepare)  # in each process


def run_step(case: Case, key: str, device: torch.device) -> float:
    """Seconds of one forward and backward pass."""
    model = prepare_once(case, key, device)
    images = torch.randn(case.batch, 3, case.resolution, case.resolution, device=device)
    labels = torch.zeros(case.batch, dtype=torch.long, device=device)
    synchronize(device)
    began = time.perf_counter()
    measurement.run_step(model, images, labels, case.precision, lambda: None)
    synchronize(device)
    return time.perf_counter() - began


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
    before: float | str | None,
) -> float | str:
    if isinstance(before, str):
        return before
    return outcome(process, run_step, case, key, device)


def compare(case: Case, keys: list[str], device: torch.device) -> list[Row]:
    """A row for each method and each base that it is compared with."""
    methods = METHODS | BASES
    bases = ["store", *(methods[key].stored for key in keys)]
    keys = list(dict.fromkeys([*bases, *keys]))
    turns = take_turns(case, keys, device)
    return [
        {
            "network": case.label,
            "method": methods[key].label,
            "seconds": _median(turns, key, digits=".3g"),
            "of store all": _median(turns, key, "store"),
            "of the same network storing all": _median(turns, key, methods[key].stored),
        }
        for key in keys
    ]


def _median(turns: list[Turn], key: str, base: str | None = None, digits: str = ".2f") -> str:
    """Of a method's seconds, or of their ratios to those of another in the same turn."""
    values = []
    for turn in turns:
        seconds, one = turn[key], turn[base] if base else 1.0
        if isinstance(seconds, str) or isinstance(one, str):
            return str(seconds) if base is None else "–"
        values.append(seconds / one)
    return format(statistics.median(values), digits)


def main(networks: Networks, method: Chosen) -> None:
    """Time a training step, always together with the ways to store all."""
    device = choose_device()
    log = Log.of(TITLE, device)
    for case in choose(GPU_CASES if device.type == "cuda" else CPU_CASES, networks):
        Console(stderr=True).print(case.label)
        rows = compare(case, select(case.network, method), device)
        log.merge(rows, KEY)
        show(TITLE, rows)


if __name__ == "__main__":
    typer.run(main)
