"""All bytes of a training step: weights, gradients, optimiser state, images and what it allocates.

Predicted by ``momconv.peak_memory``, 32 images of 224 pixels where nothing else is said, in single
precision on a CPU, in MiB. With ``--measure``, a step of "all" is run too, which takes minutes.
"8-bit state" is momconv's optimiser with a byte a value, "released gradients" are used and freed
one by one in backward (``momconv.release_gradients``), "checkpoint" is torch's of each block,
"momconv" is ``momconv.convert(model)`` as it comes, and "all" has these three.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.cases import check_names
from benchmarks.checkpointing import checkpoint_each_block
from benchmarks.tables import MISSING, Log, Out, Row, show
from momconv import convert, load_network, release_gradients
from momconv.planner.measurement import measure, run_step
from momconv.planner.prediction import peak_memory
from momconv.recipe import TrainRecipe
from momconv.training.optimisation import make_optimizer
from momconv.vocabulary import OptimizerName
from momconv.zoo.networks import outline

CPU = torch.device("cpu")
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


@dataclass(frozen=True, slots=True)
class Case:
    """A network, and what it is trained on."""

    network: str
    optimizer: OptimizerName
    images: int = 32
    side: int = 224


CASES = {
    "vit_l_16": Case("vit_l_16", "adamw"),
    "convnext_large": Case("convnext_large", "adamw"),
    "resnet152": Case("resnet152", "sgd"),
    "resnet152, 24 images of 500²": Case("resnet152", "sgd", images=24, side=500),
}
METHODS = {
    "plain": Method(),
    "checkpoint": Method(prepare=checkpoint_each_block),
    "8-bit state": Method(has_small_state=True),
    "released gradients": Method(releases=True),
    "momconv": Method(prepare=convert),
    "all": Method(prepare=convert, has_small_state=True, releases=True),
}


def predict(name: str, way: str) -> Row:
    """One row of the table."""
    case, method = CASES[name], METHODS[way]
    model = _prepare(method, outline(case.network))
    optimizer = _find_optimizer(case, method)
    peak = peak_memory(
        model, case.images, case.side, optimizer=optimizer, release_gradients=method.releases
    )
    sizes = (peak.weights, peak.optimizer, peak.gradients, peak.batch, peak.step)
    parts = {part: f"{size / MIB:.0f}" for part, size in zip(PARTS, sizes, strict=True)}
    total = f"{peak.total / MIB:.0f}"
    return {"network": name, "method": way, "optimizer": optimizer, **parts, "MiB": total}


def measure_whole(case: Case, method: Method) -> int:
    """The bytes of a step that is run on random images, after one on two of them."""
    model = _prepare(method, load_network(case.network, "none"))
    optimizer = make_optimizer(model, TrainRecipe(optimizer=_find_optimizer(case, method)))
    images = torch.randn(case.images, 3, case.side, case.side)
    labels = torch.zeros(case.images, dtype=torch.long)
    with release_gradients(optimizer) if method.releases else nullcontext():
        run_step(model, images[:2], labels[:2], "fp32")
        if not method.releases:
            optimizer.step()
        step = measure(partial(run_step, model, images, labels, "fp32"), CPU)
    parameters, states = [*model.parameters()], optimizer.state.values()
    gradients = (p.grad for p in parameters if p.grad is not None)
    state = (t for values in states for t in values.values() if isinstance(t, torch.Tensor))
    kept = chain(parameters, model.buffers(), gradients, state, (images, labels))
    return step + sum(tensor.nbytes for tensor in kept)


def _prepare(method: Method, model: nn.Module) -> nn.Module:
    return method.prepare(model.train().to(memory_format=torch.channels_last))


def _find_optimizer(case: Case, method: Method) -> OptimizerName:
    return cast(OptimizerName, f"{case.optimizer}{'-8bit' if method.has_small_state else ''}")


def main(
    network: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    *,
    measuring: Annotated[bool, typer.Option("--measure", help="Run steps of all too.")] = False,
    out: Out = None,
) -> None:
    """Predict all ways of all networks; other results stay as they are."""
    check_names(network or [], CASES)
    log = Log.of(TITLE, CPU, out)
    before = {tuple(row[key] for key in KEY): row.get("measured", MISSING) for row in log.read()}
    for name in network or list(CASES):
        for way, method in METHODS.items():
            row = predict(name, way)
            row["measured"] = before.get((name, way), MISSING)
            if measuring and way == "all":
                row["measured"] = f"{measure_whole(CASES[name], method) / MIB:.0f}"
            Console(stderr=True).print(*row.values())
            log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
