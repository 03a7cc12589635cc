"""All bytes of a training step: weights, gradients, optimiser state, images and what it allocates.

Predicted by ``momconv.peak_memory``, 32 images of 224 pixels in single precision on a CPU, in MiB.
"8-bit state" is momconv's optimiser with a byte a value, "released gradients" are used and freed
one by one in backward (``momconv.release_gradients``), "checkpoint" is torch's of each block,
"momconv" is ``momconv.convert(model)`` as it comes, and "all" has these three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.checkpointing import checkpoint_each_block
from benchmarks.tables import Log, Out, Row, show
from momconv import convert
from momconv.planner.prediction import peak_memory
from momconv.vocabulary import OptimizerName
from momconv.zoo.networks import outline

IMAGES, SIDE = 32, 224
MIB = 2**20
TITLE = "whole"
KEY = ("network", "method")
PARTS = ("weights", "optimiser", "gradients", "images", "step")  # from left to right in the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a network is trained."""

    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    has_small_state: bool = False
    releases: bool = False


NETWORKS = {"vit_l_16": "adamw", "convnext_large": "adamw", "resnet152": "sgd"}
METHODS = {
    "plain": Method(),
    "checkpoint": Method(prepare=checkpoint_each_block),
    "8-bit state": Method(has_small_state=True),
    "released gradients": Method(releases=True),
    "momconv": Method(prepare=convert),
    "all": Method(prepare=convert, has_small_state=True, releases=True),
}


def measure(network: str, name: str) -> Row:
    """One row of the table."""
    method, optimizer = METHODS[name], NETWORKS[network]
    model = method.prepare(outline(network).train().to(memory_format=torch.channels_last))
    asked = cast(OptimizerName, f"{optimizer}-8bit" if method.has_small_state else optimizer)
    peak = peak_memory(model, IMAGES, SIDE, optimizer=asked, release_gradients=method.releases)
    sizes = (peak.weights, peak.optimizer, peak.gradients, peak.batch, peak.step)
    parts = {part: f"{size / MIB:.0f}" for part, size in zip(PARTS, sizes, strict=True)}
    return {
        "network": network,
        "method": name,
        "optimizer": asked,
        **parts,
        "MiB": f"{peak.total / MIB:.0f}",
    }


def main(
    network: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    out: Out = None,
) -> None:
    """Predict all ways of all networks."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    for name in network or list(NETWORKS):
        for method in METHODS:
            row = measure(name, method)
            Console(stderr=True).print(*row.values())
            log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
