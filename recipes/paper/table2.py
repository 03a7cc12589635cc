"""Table 2, accuracy on CIFAR: ``python -m recipes.paper.table2``.

A ResNet and two Momentum ResNets (γ = 0.9, v[0] = 0 and v[0] = f(x[0])) trained from scratch. The
paper's are ResNet-101 on CIFAR-10 and CIFAR-100; ``--full`` does the same on a GPU (220 epochs,
three seeds, data downloaded by torchvision). The default is ResNet-20, one seed, ten epochs on
2,000 images of CIFAR-10 and accuracy on 1,000 others, from a ZIP file (``--data``); and the
published ResNet-20 and -32 (``--weights``), converted with gains, and trained for three epochs on
the same images. Training writes a checkpoint after each epoch to
runs/paper/; the same command goes on where it was interrupted.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from torch import nn

from benchmarks.tables import Row
from momconv import convert, load_network
from momconv.momentum.equations import Velocity
from recipes.paper import cifar
from recipes.paper.cifar import Images, Schedule
from recipes.paper.report import MOMENTUM, OTHER, RESNET, Claim, panels, report

GAMMA = 0.9
KINDS: dict[str, Velocity | None] = {
    "ResNet": None,
    "Momentum ResNet, v₀ = 0": "zero",
    "Momentum ResNet, v₀ = f(x₀)": "residual",
}
COLOURS = (RESNET, MOMENTUM, OTHER)


@dataclass(frozen=True, slots=True)
class Task:
    """What is learnt, by which network, and how long."""

    name: str
    train: Images
    val: Images
    make: Callable[[int], nn.Module]
    schedule: Schedule
    seeds: int
    classes: int = 10
    gain: bool = False  # of converted blocks; the paper has none


Results = dict[str, dict[str, list[float]]]  # accuracies in % over the seeds, by task and kind


def small(archive: Path) -> Task:
    """ResNet-20 on a part of CIFAR-10."""
    train, val = cifar.read(archive, "train", 200), cifar.read(archive, "val", 100)
    return Task("CIFAR-10 subset", train, val, cifar.make_small, Schedule(10), seeds=1)


def published(archive: Path, name: str, weights: Path) -> Task:
    """A network with published weights, on a part of its training images."""
    return replace(
        small(archive),
        name=name.replace("cifar_resnet", "converted ResNet-"),
        make=lambda _classes: load_network(name, weights),
        schedule=Schedule(3, rate=0.01),
        gain=True,
    )


def large(classes: int) -> Task:
    """ResNet-101 on all of CIFAR."""
    train, val = cifar.download(classes, "train"), cifar.download(classes, "val")
    return Task(
        f"CIFAR-{classes}",
        train,
        val,
        cifar.make_large,
        Schedule(220, rate=0.01, drops=(180,)),
        seeds=3,
        classes=classes,
    )


def make(task: Task, kind: str, seed: int, gamma: float = GAMMA) -> nn.Module:
    """The network with its first weights, the same for all kinds."""
    torch.manual_seed(seed)
    network, velocity = task.make(task.classes), KINDS[kind]
    if velocity is None:
        return network
    return with_momentum(task, network, gamma, velocity, gain=task.gain)


def with_momentum(
    task: Task, network: nn.Module, gamma: float, velocity: Velocity = "zero", *, gain: bool = False
) -> nn.Module:
    """The weights of ``network`` under the momentum rule."""
    return convert(network, gamma, "all", velocity, gain=gain)


def train(task: Task, kind: str, seed: int, gamma: float = GAMMA) -> nn.Module:
    """The trained network; if runs/paper/ has a checkpoint, it goes on from there."""
    network = make(task, kind, seed, gamma)
    file = f"{task.name}, {kind}, {gamma:g}, {seed}.pt"
    tell = cifar.teller(f"{task.name}, {kind}, seed {seed}")
    cifar.train(network, task.train, task.schedule, cifar.RUNS / file, tell)
    return network


def measure(task: Task, kind: str) -> list[float]:
    """The accuracies of every seed, in percent."""
    return [cifar.accuracy(train(task, kind, seed), task.val) for seed in range(task.seeds)]


def judge(results: Results, tolerance: float) -> Claim:
    """Both Momentum ResNets are no more than ``tolerance`` points below the ResNet."""
    means = [[statistics.mean(x) for x in kinds.values()] for kinds in results.values()]
    holds = all(min(momentum) > resnet - tolerance for resnet, *momentum in means)
    text = f"momentum is as accurate as the ResNet, within {tolerance:g} points"
    return Claim(text, holds)


def draw(results: Results) -> Figure:
    """A bar for each kind."""
    figure, grid = panels(len(results))
    for axes, (task, kinds) in zip(grid, results.items(), strict=True):
        means = [statistics.mean(values) for values in kinds.values()]
        axes.bar(["ResNet", "v₀ = 0", "v₀ = f(x₀)"], means, color=COLOURS)
        axes.set(title=task, ylabel="accuracy (%)")
    return figure


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main(
    full: Annotated[bool, typer.Option("--full", help="The paper's networks and data.")] = False,
    data: Annotated[Path, typer.Option(help="CIFAR-10 as images in a ZIP file.")] = cifar.ARCHIVE,
    weights: Annotated[Path, typer.Option(help="Folder of the published ones.")] = cifar.WEIGHTS,
) -> None:
    """Train every kind of network."""
    tasks = [large(10), large(100)] if full else [small(data)]
    if not full:
        files = cifar.find_published(weights)
        tasks += [published(data, name, file) for name, file in files.items()]
    results = {task.name: {kind: measure(task, kind) for kind in KINDS} for task in tasks}
    rows: list[Row] = [
        {"network": kind} | {task: spread(kinds[kind]) for task, kinds in results.items()}
        for kind in KINDS
    ]
    # On 1,000 images the standard error of a difference is about 2 points.
    report("table2", rows, draw(results), judge(results, 0.5 if full else 4.0))


if __name__ == "__main__":
    typer.run(main)
