"""Peak activation and transient bytes of one training step, per image, for every method.

Weights, gradients, optimiser state and the input images are left out; everything else that the
allocator handed out is in. Run ``python -m benchmarks.memory`` (all cases, about half an hour on
two cores) or name some: ``python -m benchmarks.memory cifar_resnet1202 resnet152``.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.methods import METHODS, make_network
from benchmarks.results import report
from momconv.planner.measurement import measure_step

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Case:
    """One network under one load."""

    network: str
    resolution: int
    batch: int
    precision: Literal["fp32", "bf16"] = "fp32"


CASES = [
    Case("cifar_resnet1202", 32, 8),
    Case("resnet50", 224, 24),
    Case("resnet152", 224, 24),
    Case("resnet152", 500, 4),
    Case("vit_l_16", 224, 4),
    Case("convnext_large", 224, 4),
]


def measure(case: Case, method: str, device: torch.device) -> float:
    """MiB per image."""
    model = METHODS[method](make_network(case.network)).to(device)
    step = measure_step(model, case.batch, case.resolution, precision=case.precision, device=device)
    return step.peak_bytes / case.batch / MIB


def main(networks: list[str]) -> None:
    """Measure the cases of ``networks``, or all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for case in CASES:
        if networks and case.network not in networks:
            continue
        peaks = {method: measure(case, method, device) for method in METHODS}
        best = min(peak for method, peak in peaks.items() if method.startswith("checkpoint"))
        for method, peak in peaks.items():
            label = f"{case.network} {case.resolution}² ×{case.batch} {case.precision}"
            rows.append((label, method, peak, peak / peaks["store all"], peak / best))
    columns = ("network", "method", "MiB per image", "of store all", "of best checkpointing")
    report("memory", columns, rows, device)


if __name__ == "__main__":
    main(sys.argv[1:])
