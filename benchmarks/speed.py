"""Seconds of one training step for every method, paired with storing all in one run.

The methods take turns, so that a machine whose speed drifts slows all of them alike, and each step
is compared with the storing step of the same turn. Run ``python -m benchmarks.speed``, or name
networks: ``python -m benchmarks.speed cifar_resnet1202``.
"""

import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.methods import METHODS, make_network, store_momentum
from benchmarks.results import report

TURNS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One network under one load."""

    network: str
    resolution: int
    batch: int


CASES = [Case("resnet152", 224, 8), Case("cifar_resnet1202", 32, 8)]


def seconds(model: nn.Module, case: Case, device: torch.device) -> float:
    """One forward and backward pass."""
    images = torch.randn(case.batch, 3, case.resolution, case.resolution, device=device)
    labels = torch.zeros(case.batch, dtype=torch.long, device=device)
    began = time.perf_counter()
    F.cross_entropy(model(images), labels).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def compare(case: Case, device: torch.device) -> list[tuple[object, ...]]:
    """Rows of method, median seconds, and median ratios to the two ways of storing all."""
    methods = METHODS | {"store all, momentum": store_momentum}
    models = {name: make(make_network(case.network)).to(device) for name, make in methods.items()}
    for model in models.values():
        seconds(model, case, device)  # the first step allocates and finds algorithms
    turns = [
        {name: seconds(model, case, device) for name, model in models.items()} for _ in range(TURNS)
    ]
    label = f"{case.network} {case.resolution}² ×{case.batch}"

    def median_ratio(name: str, base: str) -> float:
        return statistics.median(turn[name] / turn[base] for turn in turns)

    return [
        (
            label,
            name,
            statistics.median(turn[name] for turn in turns),
            median_ratio(name, "store all"),
            median_ratio(name, "store all, momentum"),
        )
        for name in models
    ]


def main(networks: list[str]) -> None:
    """Compare the cases of ``networks``, or all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in CASES if not networks or case.network in networks]
    rows = [row for case in cases for row in compare(case, device)]
    columns = ("network", "method", "seconds", "of store all", "of store all, momentum")
    report("speed", columns, rows, device)


if __name__ == "__main__":
    main(sys.argv[1:])
