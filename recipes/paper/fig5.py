"""Figure 5, separating four nested rings: ``python -m recipes.paper.fig5``.

Four rings in the plane, of two classes in turn, go through fifteen layers that share the weights of
x + W₂ tanh(W₁ x + b₁) + b₂ with 16 hidden units; the two coordinates at the end are the logits. A
ResNet's layers approximate a flow of the plane, which keeps rings nested. Settings of the authors'
example: γ = 0.99, Adam at 0.2, for the ResNet at 0.01, here with cosine decay; 1,500 steps (for the
ResNet 5,000 there) on 200 points a ring (2,000 there); ``--full`` takes theirs. Accuracy on 2,000
fresh points, for five seeds. "folds" is the share of these points at which some layer reverses the
orientation of the plane, det(1 + ∂f) < 0, which no flow can.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.functional import cross_entropy

from benchmarks.tables import Row
from momconv import MomentumSequential
from recipes.paper.report import MOMENTUM, REVNET, Claim, panels, report
from recipes.paper.tied import DEPTH, make_network, trace

GAMMAS = (0.0, 0.99)
SEEDS = 5
LAYERS = range(0, DEPTH + 1, 3)


@dataclass(frozen=True, slots=True)
class Result:
    """The accuracy of one network, its rings at every layer, and their classes."""

    gamma: float
    accuracy: float
    folds: float
    path: Tensor  # (16, points, 2)
    classes: Tensor  # (points,)


def sample(points: int) -> tuple[Tensor, Tensor]:
    """``points`` points of each ring, of shape (4 · points, 2), and their classes."""
    rings = torch.arange(4).repeat_interleave(points)
    angle = 2 * math.pi * torch.rand(len(rings), dtype=torch.float64)
    radius = 1.5 * (rings + 1) + 0.6 * torch.rand(len(rings), dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None], rings % 2


def train(gamma: float, seed: int, steps: int = 1500, points: int = 200) -> Result:
    """Learn to tell the classes apart."""
    network = make_network(2, gamma, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.2 if gamma else 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = sample(points)
        loss = cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    x, y = sample(500)
    path = trace(network, x)
    accuracy = (path[-1].argmax(1) == y).double().mean()
    return Result(gamma, float(accuracy), fold(network, path), path, y)


def fold(network: MomentumSequential, path: Tensor) -> float:
    """The share of the points at which x + f(x), as a ResNet's layer, reverses the orientation."""
    jacobians = vmap(jacrev(network[0]))(path[:-1].flatten(0, 1)).detach()
    reverses = (torch.linalg.det(jacobians) < 0).view(DEPTH, -1)
    return float(reverses.any(0).double().mean())


def judge(results: list[Result]) -> Claim:
    """On average over the seeds, and more than 5 points apart."""
    resnet, momentum = (mean_accuracy(results, gamma) for gamma in GAMMAS)
    return Claim(
        "on average momentum separates the rings (above 95 %), the ResNet does not",
        momentum > 0.95 and resnet < momentum - 0.05,
    )


def mean_accuracy(results: list[Result], gamma: float) -> float:
    """Over the seeds."""
    return statistics.mean(result.accuracy for result in results if result.gamma == gamma)


def draw(results: list[Result]) -> Figure:
    """The best network of each kind at every third layer."""
    figure, grid = panels(len(LAYERS), len(GAMMAS), width=2.4)
    for row, gamma in enumerate(GAMMAS):
        own = [result for result in results if result.gamma == gamma]
        best = max(own, key=lambda result: result.accuracy)
        for axes, layer in zip(grid[row * len(LAYERS) :], LAYERS, strict=False):
            for number, colour in enumerate((MOMENTUM, REVNET)):
                points = best.path[layer, best.classes == number]
                axes.plot(*points.T, ".", ms=1.5, color=colour)
            name = f"γ = {gamma:g}" if gamma else "ResNet"
            axes.set(title=f"{name}, layer {layer}", xticks=[], yticks=[])
    return figure


def main(
    full: Annotated[bool, typer.Option("--full", help="The authors' points and steps.")] = False,
) -> None:
    """Train both kinds of network from each seed."""
    results = []
    cases = [(gamma, seed) for gamma in GAMMAS for seed in range(SEEDS)]
    for gamma, seed in track(cases, "networks", console=Console(stderr=True)):
        effort = {"points": 2000, "steps": 1500 if gamma else 5000} if full else {}
        results.append(train(gamma, seed, **effort))
    rows: list[Row] = [
        {
            "network": f"Momentum ResNet, γ = {result.gamma:g}" if result.gamma else "ResNet",
            "seed": str(number % SEEDS),
            "accuracy in %": f"{100 * result.accuracy:.1f}",
            "folds in %": "–" if result.gamma else f"{100 * result.folds:.1f}",
        }
        for number, result in enumerate(results)
    ]
    report("fig5", rows, draw(results), judge(results))


if __name__ == "__main__":
    typer.run(main)
