"""Memory and time of a training step as a network gets deeper, everything else staying the same.

The CIFAR ResNet of He et al. with 20 to 1,202 layers (images of 32 pixels) and a vision transformer
of width 192 with 12 to 96 blocks (images of 64 pixels, patches of 8). MiB for an image is the
predicted peak of a step with 8 images, by ``momconv.peak_memory``, and side information the part of
it that is bits kept to invert blocks, at the peak. Seconds for an image are the fastest of three
such steps, one after the other in one process, so they tell the order of the methods and not more.
benchmarks/speed.py times with care.
"""

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from benchmarks.cases import synchronize
from benchmarks.checkpointing import checkpoint_each_block, checkpoint_sqrt
from benchmarks.tables import Log, Out, Row, choose_device, show
from momconv import convert
from momconv.planner.prediction import peak_memory
from momconv.zoo.cifar import cifar_resnet
from momconv.zoo.description import Description, Preprocessing, attach

IMAGES = 8
MIB = 2**20
TITLE = "ladder"
KEY = ("network", "depth", "method")
STEPS = 3
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "store all": lambda model: model,
    "checkpoint each block": checkpoint_each_block,
    "checkpoint √L blocks": checkpoint_sqrt,
    "momconv": convert,
}


def make_transformer(depth: int) -> nn.Module:
    """A narrow vision transformer of that many blocks."""
    model: nn.Module = VisionTransformer(64, 8, depth, 3, 192, 768, num_classes=10)
    colours = (0.5, 0.5, 0.5)  # a description says which images the network takes
    attach(model, Description(f"vit of {depth}", 10, Preprocessing(64, 64, colours, colours)))
    return model


# How a network of a depth is made, the side of its images, and the depths.
LADDERS: dict[str, tuple[Callable[[int], nn.Module], int, tuple[int, ...]]] = {
    "cifar_resnet": (cifar_resnet, 32, (20, 56, 110, 302, 602, 1202)),
    "vit": (make_transformer, 64, (12, 24, 48, 96)),
}


def measure(network: str, depth: int, method: str, device: torch.device) -> Row:
    """One row of the table."""
    make, side, _ = LADDERS[network]
    torch.manual_seed(0)
    model = METHODS[method](make(depth)).train()
    peak = peak_memory(model, IMAGES, side, device=device.type)
    seconds = min(_time(model.to(device), side, device) for _ in range(STEPS))
    return {
        "network": network,
        "depth": str(depth),
        "method": method,
        "MiB": f"{peak.step / IMAGES / MIB:.3f}",
        "side information": f"{peak.side_information / IMAGES / MIB:.3f}",
        "seconds": f"{seconds / IMAGES:.4f}",
    }


def _time(model: nn.Module, side: int, device: torch.device) -> float:
    images = torch.randn(IMAGES, 3, side, side, device=device)
    labels = torch.zeros(IMAGES, dtype=torch.long, device=device)
    began = time.perf_counter()
    F.cross_entropy(model(images), labels).backward()
    synchronize(device)
    return time.perf_counter() - began


def main(
    network: Annotated[list[str] | None, typer.Argument(help="Only this ladder.")] = None,
    *,
    deepest: Annotated[int, typer.Option(metavar="N", help="Only up to this depth.")] = 1202,
    out: Out = None,
) -> None:
    """Climb the ladders."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for name in network or list(LADDERS):
        for depth in (d for d in LADDERS[name][2] if d <= deepest):
            for method in METHODS:
                row = measure(name, depth, method, device)
                Console(stderr=True).print(*row.values())
                log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
