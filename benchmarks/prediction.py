"""How far the predicted peak of a training step is from the measured one.

Predicted by ``momconv.peak_memory``, measured on PyTorch's CPU allocator. "step" is what a step
allocates, "whole" has weights, gradients, optimiser state (SGD) and the batch as well. All cases
take a quarter of an hour with instructions for bf16, and more than an hour without; to measure
some, name networks.

What convolutions need for themselves in bf16 depends on the processor and is predicted. What
products of matrices copy on tiles (AMX) is not: up to 15 MiB in the layers of ViT-L.
"""

from collections.abc import Iterator
from typing import get_args

import torch
import typer
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.cases import Case, Networks, Trained, choose
from benchmarks.methods import make_network
from benchmarks.tables import Log, Out, Row, show
from momconv import convert, peak_memory, set_strategy
from momconv.planner.measurement import measure_step
from momconv.vocabulary import STRATEGIES

MIB = 2**20
VARIANTS = ("plain", *STRATEGIES)
TITLE = "prediction"
KEY = ("network", "images", "precision", "trained", "strategy")
COLUMNS = (*KEY, "predicted MiB", "measured MiB", "% of step", "% of whole")


# The other families, by a small member of each.
FAMILIES = [
    *("resnext50_32x4d", "regnet_x_400mf", "regnet_y_400mf", "swin_t", "swin_v2_t"),
    *("efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5"),
]

# Those that take images of sizes that nothing divides.
ANY_SIZE = [*FAMILIES, "resnet18", "wide_resnet50_2", "convnext_tiny"]

# At 64 pixels steps are quick, and small feature maps make oneDNN choose odd algorithms.
CASES = [
    *(Case("resnet18", 64, batch) for batch in (1, 2, 8, 32, 64)),
    *(Case("resnet50", 64, batch) for batch in (2, 8, 64)),
    Case("resnet50", 224, 4),
    *(Case("resnet152", 64, batch) for batch in (2, 16)),
    *(Case("cifar_resnet110", 32, batch) for batch in (1, 8, 64)),
    *(Case("wide_resnet50_2", 64, batch) for batch in (2, 8, 32)),
    *(Case("vit_b_16", 224, batch) for batch in (1, 4)),
    *(Case("convnext_tiny", 64, batch) for batch in (1, 8, 32)),
    *(Case("resnet18", 64, 8, "fp32", trained) for trained in get_args(Trained)[1:]),
    *(Case("resnet50", 96, 8, "fp32", trained) for trained in get_args(Trained)[1:]),
    *(Case("resnet152", 64, 8, "fp32", trained) for trained in get_args(Trained)[1:]),
    *(Case("cifar_resnet110", 32, 16, "fp32", trained) for trained in get_args(Trained)[1:]),
    *(Case("wide_resnet50_2", 64, 8, "fp32", trained) for trained in get_args(Trained)[1:]),
    Case("vit_b_16", 224, 2, "fp32", "head"),
    Case("convnext_tiny", 64, 8, "fp32", "head"),
    *(Case("resnet18", 64, batch, "bf16") for batch in (2, 8)),
    *(Case("resnet18", 64, 8, "bf16", trained) for trained in get_args(Trained)[1:]),
    Case("cifar_resnet110", 32, 2, "bf16"),
    Case("resnet50", 64, 2, "bf16"),
    Case("resnet152", 32, 2, "bf16"),
    Case("wide_resnet50_2", 32, 2, "bf16"),
    Case("convnext_tiny", 32, 2, "bf16"),
    Case("vit_b_16", 224, 1, "bf16"),
    *(Case(network, 32, 2) for network in FAMILIES),
    *(Case(network, 75, 3) for network in ANY_SIZE),
    *(Case(network, 96, 8) for network in ("regnet_x_400mf", "regnet_y_400mf")),
    *(Case(network, 224, 2) for network in ("vit_b_32", "maxvit_t")),  # made for this size
]


def measure(case: Case) -> Iterator[Row]:
    """A row of the table for each strategy."""
    for strategy in VARIANTS:
        model = make_network(case.network)
        if strategy != "plain":
            model = convert(model, stages="all")
            set_strategy(model, strategy)  # type: ignore[arg-type]  # one of the tuple above
        freeze(model, case.trained)
        predicted = peak_memory(model, case.batch, case.resolution, case.precision)
        device = torch.device("cpu")
        measured = measure_step(
            model, case.batch, case.resolution, precision=case.precision, device=device
        )
        rest = predicted.static + predicted.batch
        images = f"{case.batch} × {case.resolution}²"
        figures = (
            *(predicted.step / MIB, measured / MIB),
            100 * (predicted.step / measured - 1),
            100 * ((predicted.step + rest) / (measured + rest) - 1),
        )
        cells = (case.network, images, case.precision, case.trained, strategy)
        yield dict(zip(COLUMNS, (*cells, *(f"{x:.2f}" for x in figures)), strict=True))


def freeze(model: nn.Module, trained: Trained) -> None:
    """Leave only what is ``trained`` trainable; BatchNorm that is not uses its statistics."""
    head = list(model.children())[-1]
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(trained != "head")
        if isinstance(module, _BatchNorm) and trained != "all":
            module.requires_grad_(False)
            nn.init.constant_(module.weight, 0.1)  # else activations of random weights explode
            module.eval()
    head.requires_grad_()


def main(networks: Networks, out: Out = None) -> None:
    """Compare predictions with measurements."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    for case in choose(CASES, networks):
        for row in measure(case):
            Console(stderr=True).print(*row.values())
            log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
