"""Peak memory of a training step over the number of images, as in figure 7 of Sander et al. 2021.

The same measurement as benchmarks/memory.py, in MiB for the whole batch, for storing all, the
checkpointing that is best for these networks, momentumnet and momconv.
"""

import torch
import typer
from rich.console import Console

from benchmarks.cases import Case, Chosen, Networks, choose
from benchmarks.isolation import attempt
from benchmarks.memory import describe, measure
from benchmarks.methods import METHODS
from benchmarks.tables import Log, Out, choose_device, show

TITLE = "batches"
VALUE = "MiB"
KEY = ("network", "resolution", "batch", "method")
COMPARED = ("store", "checkpoint-sqrt", "momentumnet", "momconv")

CASES = [
    Case(network, resolution, batch)
    for network, resolution, batches in [
        ("resnet152", 224, (2, 4, 8, 16)),
        ("cifar_resnet1202", 32, (2, 8)),
    ]
    for batch in batches
]


def measure_batch(case: Case, key: str, device: torch.device) -> float:
    """MiB at the peak of a step on the whole batch."""
    return measure(case, key, device) * case.batch


def main(networks: Networks, method: Chosen, out: Out = None) -> None:
    """Measure the memory of a training step for growing batches."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for case in choose(CASES, networks):
        for key in method or COMPARED:
            if not METHODS[key].applies_to(case.network):
                continue
            Console(stderr=True).print(f"{case.label}: {key}")
            value = attempt(measure_batch, case, key, device)
            cell = value if isinstance(value, str) else f"{value:.1f}"
            log.merge([describe(case) | {"method": METHODS[key].label, VALUE: cell}], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
