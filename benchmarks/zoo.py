"""Every network that momconv knows: MiB for an image, predicted, in a training step of 32 images.

Predicted by ``momconv.peak_memory`` at the network's own resolution on a CPU; weights, gradients,
optimiser state and images are left out. "checkpoint" is torch's checkpointing of each block, "sqrt"
of √L blocks at a time, both also of a ResNet's stem and of what else is in a sequence with stages;
"auto" is ``momconv.convert(model)`` as it comes, which recomputes every network's stem. About
twenty minutes on one core; to predict some, name them.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.checkpointing import checkpoint_each_block, checkpoint_sqrt
from benchmarks.tables import Log, Out, Row, measure_each
from momconv import convert
from momconv.planner.prediction import peak_memory
from momconv.zoo.description import describe
from momconv.zoo.networks import names, outline

IMAGES = 32
MIB = 2**20
TITLE = "zoo"
KEY = ("network",)
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "store": lambda model: model,
    "checkpoint": checkpoint_each_block,
    "sqrt": checkpoint_sqrt,
    "auto": convert,
}


def measure(name: str) -> Row:
    """The row of one network."""
    resolution = describe(outline(name)).preprocessing.resolution
    row = {"network": name, "pixels": str(resolution)}
    for method, prepare in METHODS.items():
        model = prepare(outline(name).train())
        step = peak_memory(model, IMAGES, resolution).step
        row[method] = f"{step / IMAGES / MIB:.2f}"
    best = min(float(row["checkpoint"]), float(row["sqrt"]))
    return row | {"auto / best checkpointing": f"{float(row['auto']) / best:.2f}"}


def main(pattern: Annotated[list[str] | None, typer.Argument()] = None, out: Out = None) -> None:
    """Predict for all networks, or those that are called like a PATTERN."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    chosen = [n for n in names() if not pattern or any(fnmatch(n, each) for each in pattern)]
    measure_each(chosen, measure, log, KEY)


if __name__ == "__main__":
    typer.run(main)
