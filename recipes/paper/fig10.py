"""Figure 10, learned ISTA: ``python -m recipes.paper.fig10``.

ISTA minimises F(x) = ½|Ax − y|² + λ|x|₁ by x ← S(x + Aᵀ(y − Ax) / L, λ / L), S being soft
thresholding. Learned ISTA makes one layer of each iteration, x ← S(W₁ x + W₂ y, θ), begins with
the values above and learns W₁, W₂ and θ in every layer, to lower F after the last one. Such
networks have to converge to a fixed point, which proposition 1 denies to RevNets. x has 32
dimensions, y 16, as in the paper; γ = 0.3; λ is a tenth of the smallest with the solution 0. The
loss is F − F*, with F* from 10,000 iterations of FISTA, on 1,000 y that training has not seen.

The layers are ``MomentumSequential`` blocks with an input besides x: y.
"""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.couplings import Coupling
from benchmarks.tables import Row
from momconv import MomentumSequential
from momconv.momentum.sequential import Run
from recipes.paper.report import MOMENTUM, RESNET, REVNET, Claim, panels, report

CODE, MEASUREMENT = 32, 16
REGULARISATION = 0.1
GAMMA = 0.3
DEPTHS = range(2, 9)
STEPS = 500
COLOURS = {"LISTA": RESNET, "momentum LISTA": MOMENTUM, "RevNet LISTA": REVNET}


@dataclass(frozen=True, slots=True)
class Lasso:
    """The problem: A, and for samples y the functional and its solution."""

    matrix: Tensor  # (16, 32), columns of norm 1

    @property
    def lipschitz(self) -> float:
        """L, the largest eigenvalue of AᵀA."""
        return float(torch.linalg.matrix_norm(self.matrix, 2) ** 2)

    def sample(self, count: int) -> Tensor:
        """``count`` random y, such that |Aᵀy|∞ = 1, of shape (count, 16)."""
        y = torch.randn(count, MEASUREMENT, dtype=torch.float64)
        return y / (y @ self.matrix).abs().amax(1, keepdim=True)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of F over the samples."""
        residual = x @ self.matrix.T - y
        return 0.5 * residual.square().sum(1).mean() + REGULARISATION * x.abs().sum(1).mean()

    def solve(self, y: Tensor, iterations: int = 10_000) -> Tensor:
        """The minimisers, by FISTA (Beck and Teboulle 2009)."""
        iteration = Iteration(self)
        x = z = y.new_zeros(len(y), CODE)
        t = 1.0
        with torch.no_grad():
            for _ in range(iterations):
                previous, x = x, iteration(z, y)
                t, t_previous = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
                z = x + (t_previous - 1) / t * (x - previous)
        return x


class Iteration(nn.Module):
    """S(W₁ x + W₂ y, θ), which begins as an iteration of ISTA."""

    def __init__(self, problem: Lasso) -> None:
        super().__init__()
        a, step = problem.matrix, 1 / problem.lipschitz
        self.w1 = nn.Parameter(torch.eye(CODE, dtype=torch.float64) - step * a.T @ a)
        self.w2 = nn.Parameter(step * a.T)
        self.threshold = nn.Parameter(torch.tensor(step * REGULARISATION, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The next x, of shape (samples, 32)."""
        z = x @ self.w1.T + y @ self.w2.T
        return z.sign() * (z.abs() - self.threshold).relu()


class Difference(Iteration):
    """f(x) = S(W₁ x + W₂ y, θ) − x."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual, of the shape of x."""
        return super().forward(x, y) - x


class Network(nn.Module):
    """Layers from x[0] = 0 (and v[0] = 0) to the last x."""

    def __init__(self, kind: str, problem: Lasso, depth: int) -> None:
        super().__init__()
        self.width = CODE
        if kind == "RevNet LISTA":
            self.width = 2 * CODE
            couplings = (Coupling(Difference(problem), Difference(problem)) for _ in range(depth))
            self.layers = MomentumSequential(*couplings, gamma=0)
        else:
            gamma = GAMMA if kind == "momentum LISTA" else 0
            iterations = (Iteration(problem) for _ in range(depth))
            # S(W₁ x + W₂ y, θ) adds nothing to x, so no run would be found.
            runs = [Run(0, depth, (1.0,) * depth)]
            self.layers = MomentumSequential(*iterations, gamma=gamma, strategy="store", runs=runs)

    def forward(self, y: Tensor) -> Tensor:
        """The last x, of shape (samples, 32), for y of shape (samples, 16)."""
        state: Tensor = self.layers(y.new_zeros(len(y), self.width), y)
        return state[:, -CODE:]


def make_problem(seed: int = 0) -> Lasso:
    """A random A."""
    torch.manual_seed(seed)
    matrix = torch.randn(MEASUREMENT, CODE, dtype=torch.float64)
    return Lasso(matrix / matrix.norm(dim=0))


def train(kind: str, problem: Lasso, depth: int, steps: int = STEPS) -> Network:
    """Lower F of the last x on random y."""
    torch.manual_seed(1)
    network = Network(kind, problem, depth)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y = problem.sample(256)
        loss = problem.value(network(y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network


def measure(depths: range = DEPTHS, steps: int = STEPS) -> dict[str, list[float]]:
    """F − F* on fresh y, by kind of network and depth."""
    problem = make_problem()
    y = problem.sample(1000)
    least = problem.value(problem.solve(y), y)
    losses: dict[str, list[float]] = {kind: [] for kind in COLOURS}
    for depth in depths:
        for kind, values in losses.items():
            network = train(kind, problem, depth, steps)
            with torch.no_grad():
                values.append(float(problem.value(network(y), y) - least))
    return losses


def judge(losses: dict[str, list[float]]) -> Claim:
    """Deeper is better with momentum as in LISTA; the RevNet ends far above both."""
    lista, momentum, revnet = losses.values()
    converges = momentum[-1] < momentum[0] / 2 and momentum[-1] < 2 * lista[-1]
    return Claim(
        "momentum LISTA converges as LISTA does; RevNet LISTA does not",
        converges and revnet[-1] > 2 * max(momentum[-1], lista[-1]),
    )


def draw(losses: dict[str, list[float]], depths: range = DEPTHS) -> Figure:
    """The loss over the depth."""
    figure, (axes,) = panels(1, width=5)
    for kind, values in losses.items():
        axes.semilogy(depths, values, "o-", color=COLOURS[kind], label=kind)
    axes.set(xlabel="layers", ylabel="F − F* on test data")
    axes.legend()
    return figure


def main() -> None:
    """Train every kind of network at every depth."""
    losses = measure()
    rows: list[Row] = [
        {"network": kind} | {f"{n} layers": f"{x:.1e}" for n, x in zip(DEPTHS, values, strict=True)}
        for kind, values in losses.items()
    ]
    report("fig10", rows, draw(losses), judge(losses))


if __name__ == "__main__":
    main()
