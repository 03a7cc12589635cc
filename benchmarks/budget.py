"""The largest batch of ResNet-152 at 500 × 500 pixels in 3 GiB, as in recipes/three-gib.yaml.

Weights, gradients, the state of SGD with momentum and the images are in the 3 GiB. The batch is
planned from ``momconv.peak_memory``, or, for momentumnet, which looks at values and so cannot be
traced, from two small measured steps; then steps with it are run and timed, and their peak is what
PyTorch's allocator counts. Channels come last, as in fine-tuning. A GPU grants the process no more
than 3 GiB, and the batch is the largest that runs there, beside the context of CUDA. "used" is the
share of the 3 GiB.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.cases import Case, prepare
from benchmarks.isolation import attempt
from benchmarks.methods import METHODS
from benchmarks.tables import Log, Out, Row, choose_device, show
from momconv import peak_memory
from momconv.exhaustion import is_exhaustion
from momconv.planner.allowance import find_allowance
from momconv.planner.measurement import measure_step, per_image, static_bytes, time_step
from momconv.planner.micro_batch import Line
from momconv.units import format_bytes

TITLE = "budget"
KEY = ("network", "method")
COLUMNS = ("batch", "predicted", "measured", "used", "images/s")
BUDGET = 3 * 2**30
CASE = Case("resnet152", 500, 0)  # the batch is what is looked for
IMAGE_BYTES = 4 * 3 * CASE.resolution**2 + 8  # with its label
CHOSEN = ("store", "momentumnet", "checkpoint-sqrt", "momconv")


def foresee(model: nn.Module, device: torch.device) -> Callable[[int], int]:
    """The peak as a function of the batch."""

    def predict(batch: int) -> int:
        return peak_memory(model, batch, CASE.resolution, device=device.type).total

    try:
        predict(2)
    except ValueError:  # of momentumnet, about the value of a fake tensor
        line = per_image(model, CASE.resolution, precision=CASE.precision, device=device)
        rest = static_bytes(model, "sgd").total
        return lambda batch: rest + line.at(batch) + batch * IMAGE_BYTES
    return predict


def find_largest(fits: Callable[[int], bool], batch: int) -> int:
    """The largest batch that fits, near a first guess."""
    while fits(batch + 1):
        batch += 1
    while not fits(batch):
        batch -= 1
    return batch


def compare(key: str, device: torch.device) -> Row:
    """The row of a method."""
    model = prepare(CASE, key, device).to(memory_format=torch.channels_last)
    static = static_bytes(model, "sgd")
    if device.type == "cuda":
        # The steps below are not followed by SGD's, so its state is not there.
        whole = torch.cuda.get_device_properties(device).total_memory
        tensors = BUDGET - find_allowance(device).context - static.optimizer
        torch.cuda.set_per_process_memory_fraction(tensors / whole, device)

    def measure(batch: int) -> int:
        step = measure_step(model, batch, CASE.resolution, precision=CASE.precision, device=device)
        return static.total + batch * IMAGE_BYTES + step

    def runs(batch: int) -> bool:
        try:
            measure(batch)
        except Exception as error:
            if not is_exhaustion(error):
                raise
            return False
        return True

    peak = foresee(model, device)
    batch = Line.through((2, peak(2)), (4, peak(4))).largest_batch(BUDGET)  # almost
    batch = find_largest(lambda batch: peak(batch) <= BUDGET, batch)
    if device.type == "cuda":
        batch = find_largest(runs, batch)
    measured = measure(batch)
    seconds = time_step(model, batch, CASE.resolution, CASE.precision, device)
    return {
        "batch": str(batch),
        "predicted": format_bytes(peak(batch)),
        "measured": format_bytes(measured),
        "used": f"{100 * measured / BUDGET:.1f} %",
        "images/s": f"{batch / seconds:.2f}",
    }


def main(methods: Annotated[list[str] | None, typer.Argument()] = None, out: Out = None) -> None:
    """Plan and run a step under each of ``methods``, or all."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for key in methods or CHOSEN:
        found = attempt(compare, key, device)
        if isinstance(found, str):
            found = dict.fromkeys(COLUMNS, "–") | {"batch": found}
        row = {
            "network": f"{CASE.network} {CASE.resolution}²",
            "method": METHODS[key].label,
            **found,
        }
        Console(stderr=True).print(*row.values())
        log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
