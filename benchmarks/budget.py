"""The largest batch of ResNet-152 at 500 × 500 pixels in 3 GiB, as in recipes/three-gib.yaml.

Weights, gradients, the state of SGD with momentum and the images are in the 3 GiB. The batch is
planned from ``momconv.peak_memory``, or, for momentumnet, which looks at values and so cannot be
traced, from two small measured steps; then a step with it is run, and its peak is what PyTorch's
CPU allocator counts. "used" is the share of the 3 GiB.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.cases import Case
from benchmarks.isolation import attempt
from benchmarks.methods import METHODS, make_network
from benchmarks.tables import Log, Row, show
from momconv import peak_memory
from momconv.planner.measurement import measure_step, per_image, static_bytes
from momconv.planner.micro_batch import Line
from momconv.units import format_bytes

CPU = torch.device("cpu")
TITLE = "budget"
KEY = ("network", "method")
BUDGET = 3 * 2**30
CASE = Case("resnet152", 500, 0)  # the batch is what is looked for
IMAGE_BYTES = 4 * 3 * CASE.resolution**2 + 8  # with its label
CHOSEN = ("store", "momentumnet", "checkpoint-sqrt", "momconv")


def foresee(model: nn.Module) -> Callable[[int], int]:
    """The peak as a function of the batch."""

    def predict(batch: int) -> int:
        return peak_memory(model, batch, CASE.resolution).total

    try:
        predict(2)
    except ValueError:  # of momentumnet, about the value of a fake tensor
        line = per_image(model, CASE.resolution, precision="fp32", device=CPU)
        rest = static_bytes(model, "sgd").total
        return lambda batch: rest + line.at(batch) + batch * IMAGE_BYTES
    return predict


def plan(peak: Callable[[int], int]) -> int:
    """The largest batch that is foreseen to fit: memory is almost linear in it."""
    batch = Line.through((2, peak(2)), (4, peak(4))).largest_batch(BUDGET)
    while peak(batch + 1) <= BUDGET:
        batch += 1
    while peak(batch) > BUDGET:
        batch -= 1
    return batch


def compare(key: str) -> Row:
    """The row of a method."""
    model = METHODS[key].prepare(make_network(CASE.network))
    peak = foresee(model)
    batch = plan(peak)
    step = measure_step(model, batch, CASE.resolution, precision="fp32", device=CPU)
    measured = static_bytes(model, "sgd").total + batch * IMAGE_BYTES + step.peak_bytes
    return {
        "batch": str(batch),
        "predicted": format_bytes(peak(batch)),
        "measured": format_bytes(measured),
        "used": f"{100 * measured / BUDGET:.1f} %",
    }


def main(methods: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Plan and run a step under each of ``methods``, or all."""
    log = Log.of(TITLE, CPU)
    for key in methods or CHOSEN:
        found = attempt(compare, key)
        if isinstance(found, str):
            found = dict.fromkeys(("predicted", "measured", "used"), "–") | {"batch": found}
        columns = ("batch", "predicted", "measured", "used")
        row = {"network": f"{CASE.network} {CASE.resolution}²", "method": METHODS[key].label}
        row |= {column: found[column] for column in columns}
        Console(stderr=True).print(*row.values())
        log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
