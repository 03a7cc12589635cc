"""Figure 1, learning x ↦ −x³: ``python -m recipes.paper.fig1``.

The layers of a ResNet that share their weights approximate a first-order ODE, whose trajectories
cannot cross, so it cannot reverse the order of its inputs, as −x³ does. With momentum the ODE is of
second order: trajectories that meet may have different velocities. Fifteen layers, real x, 16
hidden units, as in the paper; here each network has 1,000 steps of Adam on 200 random points of
[−1, 1], the authors' example 300 (momentum) and 2,000 (ResNet) of SGD. The learning rate is 0.05,
and for the ResNet 0.01: at 0.05 its layers may become steps too large to resemble an ODE.
"""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.tables import Row
from recipes.paper.report import MOMENTUM, RESNET, Claim, panels, report
from recipes.paper.tied import make_network, trace

LEARNING_RATES = {0.0: 0.01, 0.9: 0.05, 0.99: 0.05}  # by γ
STEPS = 1000


@dataclass(frozen=True, slots=True)
class Result:
    """A trained network's mean square error, and the paths of nine points, of shape (16, 9)."""

    gamma: float
    loss: float
    paths: Tensor

    @property
    def name(self) -> str:
        """What the paper calls it."""
        return f"Momentum ResNet, γ = {self.gamma:g}" if self.gamma else "ResNet"

    @property
    def crossings(self) -> int:
        """How many pairs of points are at some layer in another order than at the start."""
        above = self.paths[:, :, None] > self.paths[:, None, :]
        return int((above != above[0]).any(0).sum()) // 2


def train(gamma: float, steps: int = STEPS, seed: int = 0) -> Result:
    """Fit the network to −x³."""
    network = make_network(1, gamma, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATES[gamma])
    for _ in range(steps):
        x = 2 * torch.rand(200, 1, dtype=torch.float64) - 1
        loss = (network(x) + x**3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
    with torch.no_grad():
        error = (network(points) + points**3).square().mean().item()
    return Result(gamma, error, trace(network, points[::25])[..., 0])


def judge(results: list[Result]) -> Claim:
    """Only momentum reverses the order, and only momentum fits."""
    resnet, *momentum = results
    holds = resnet.crossings == 0 and all(
        result.crossings and result.loss < resnet.loss / 4 for result in momentum
    )
    return Claim("momentum fits −x³ with trajectories that cross; the ResNet's do not", holds)


def draw(results: list[Result]) -> Figure:
    """The points over the layers, from bottom to top."""
    figure, grid = panels(len(results))
    for axes, result in zip(grid, results, strict=True):
        axes.plot(result.paths, range(16), ".-", color=MOMENTUM if result.gamma else RESNET)
        axes.set(title=f"{result.name}\nloss {result.loss:.1e}", xlabel="x", ylabel="layer")
    return figure


def main() -> None:
    """Train a ResNet and two Momentum ResNets."""
    results = [train(gamma) for gamma in LEARNING_RATES]
    rows: list[Row] = [
        {"network": r.name, "loss": f"{r.loss:.2e}", "pairs that cross (of 36)": str(r.crossings)}
        for r in results
    ]
    report("fig1", rows, draw(results), judge(results))


if __name__ == "__main__":
    main()
