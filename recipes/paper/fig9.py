"""Figure 9, ODE blocks of first and second order: ``python -m recipes.paper.fig9``.

Between a convolution and a linear head stands an ODE block, solved by torchdiffeq with the adjoint
method: of first order, x′ = f(x), or of second order, ε x″ + x′ = f(x) with x′(0) = 0 and ε = 1,
which Momentum ResNets become as they get deeper. f is two 3×3 convolutions with as many channels
as x, and the same number of parameters in both. Accuracy over the number of channels, on CIFAR-10
from a ZIP file (``--data``), of three networks each: 2,000 training images of 16² pixels, six
epochs, and 2,000 test images; with ``--full`` all 50,000 of 32², ten epochs. Training writes a
checkpoint after each epoch to runs/paper/; the same command goes on where it was interrupted.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from benchmarks.tables import Row
from recipes.paper import cifar
from recipes.paper.cifar import Images, Schedule
from recipes.paper.report import MOMENTUM, RESNET, Claim, panels, report

CHANNELS = (4, 8, 16)
SEEDS = (0, 1, 2)
ORDERS = {"first order": RESNET, "second order": MOMENTUM}
EPSILON = 1.0


class Field(nn.Module):
    """The right-hand side: of x, or of x and x′ side by side in the channels."""

    def __init__(self, channels: int, order: str) -> None:
        super().__init__()
        self.order = order
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """The derivative of the state."""
        if self.order == "first order":
            return self.f(state)
        x, speed = state.chunk(2, dim=1)
        return torch.cat([speed, (self.f(x) - speed) / EPSILON], dim=1)

    def f(self, x: Tensor) -> Tensor:
        """The residual, of the shape of x."""
        residual: Tensor = self.second(relu(self.first(x)))
        return residual


class Network(nn.Module):
    """A convolution, an ODE block, and a linear head."""

    def __init__(self, channels: int, order: str, shrink: int = 1) -> None:
        super().__init__()
        self.shrink = shrink
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.field = Field(channels, order)
        self.head = nn.Linear(channels * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (B, 10) for images of shape (B, 3, 32, 32)."""
        x = relu(self.stem(avg_pool2d(x, self.shrink)))
        logits: Tensor = self.head(nn.functional.adaptive_avg_pool2d(self.flow(x), 4).flatten(1))
        return logits

    def flow(self, x: Tensor) -> Tensor:
        """x(1) from x(0)."""
        from torchdiffeq import odeint_adjoint

        second = self.field.order == "second order"
        state = torch.cat([x, torch.zeros_like(x)], dim=1) if second else x
        times = torch.tensor([0.0, 1.0], device=x.device)
        options = {"step_size": 0.25}
        path = odeint_adjoint(self.field, state, times, method="rk4", options=options)
        end: Tensor = path[-1].chunk(2, dim=1)[0] if second else path[-1]
        return end


@dataclass(frozen=True, slots=True)
class Task:
    """What is learnt, how long, and by what factor images are made smaller."""

    train: Images
    val: Images
    schedule: Schedule
    shrink: int


Accuracies = dict[str, list[list[float]]]  # in percent; by order, number of channels and seed


def measure(
    task: Task, channels: Sequence[int] = CHANNELS, seeds: Sequence[int] = SEEDS
) -> Accuracies:
    """Train a network of each order with each number of channels from each seed."""
    return {
        order: [[measure_one(task, count, order, seed) for seed in seeds] for count in channels]
        for order in ORDERS
    }


def measure_one(task: Task, channels: int, order: str, seed: int) -> float:
    """The accuracy of one network in percent."""
    torch.manual_seed(seed)
    network = Network(channels, order, task.shrink)
    title = f"{order}, {channels} channels, seed {seed}"
    file = cifar.RUNS / f"{title}, {len(task.train.y)} images.pt"
    cifar.train(network, task.train, task.schedule, file, cifar.teller(title))
    return cifar.accuracy(network, task.val)


def judge(accuracies: Accuracies) -> Claim:
    """On average over seeds and numbers of channels."""
    first, second = (statistics.mean(map(statistics.mean, xs)) for xs in accuracies.values())
    return Claim(
        "second-order blocks are at least as accurate as first-order ones", second >= first
    )


def draw(accuracies: Accuracies, channels: Sequence[int] = CHANNELS) -> Figure:
    """Accuracy over channels: the mean, and a point for each seed."""
    figure, (axes,) = panels(1, width=5)
    for order, values in accuracies.items():
        colour = ORDERS[order]
        axes.plot(channels, [*map(statistics.mean, values)], "-", color=colour, label=order)
        for count, points in zip(channels, values, strict=True):
            axes.plot([count] * len(points), points, ".", color=colour)
    axes.set(xlabel="channels", ylabel="accuracy (%)")
    axes.legend()
    return figure


def summarise(points: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(points):.1f} ± {statistics.stdev(points):.1f}"


def main(
    full: Annotated[bool, typer.Option("--full", help="All of CIFAR-10.")] = False,
    data: Annotated[Path, typer.Option(help="CIFAR-10 as images in a ZIP file.")] = cifar.ARCHIVE,
) -> None:
    """Train with each order and number of channels, from each seed."""
    train, val, epochs = (5000, 1000, 10) if full else (200, 200, 6)
    task = Task(
        cifar.read(data, "train", train),
        cifar.read(data, "val", val),
        Schedule(epochs, rate=0.05),
        1 if full else 2,
    )
    accuracies = measure(task)
    rows: list[Row] = [
        {"block": order}
        | {f"{n} channels": summarise(points) for n, points in zip(CHANNELS, xs, strict=True)}
        for order, xs in accuracies.items()
    ]
    report("fig9", rows, draw(accuracies), judge(accuracies))


if __name__ == "__main__":
    typer.run(main)
