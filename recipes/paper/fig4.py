"""Figure 4, theorem 1 and proposition 4, linear networks: ``python -m recipes.paper.fig4``.

With f(x) = θx in all layers, v[0] = 0 and ε = 1 / (depth · (1 − γ)), a Momentum ResNet approximates
ε x″ + x′ = θx, x′(0) = 0, whose solution is x(1) = Ψ_ε(θ) x(0) (proposition 4):

    Ψ_ε(θ) = exp(−1/(2ε)) Σ (1/(2n)! + 1/(2ε (2n+1)!)) (θ/ε + 1/(4ε²))^n

Theorem 1: a real diagonalisable map is Ψ_ε(θ) for a real θ if and only if each of its eigenvalues
below λ_ε = min G_ε(α), G_ε(α) = exp(−1/(2ε)) (cos α + sin α / (2εα)), has even multiplicity.
ResNets (ε = 0) allow no single negative eigenvalue. Three checks: Ψ_ε against numerical integration
and against a deep ``MomentumSequential``; λ_ε; and for which diagonal maps of two dimensions a
search among all real θ succeeds.
"""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.tables import Row
from momconv import MomentumSequential
from recipes.paper.report import MOMENTUM, RESNET, Claim, panels, report

TERMS = 25
SHOWN = (0.25, 0.5, 1.0, 2.0)
SIDE = 21  # maps a side of the picture
TOLERANCE = 0.01


def series(theta: Tensor, epsilon: float) -> Tensor:
    """Ψ_ε(θ) for square matrices θ of shape (…, d, d)."""
    power = torch.eye(theta.shape[-1], dtype=theta.dtype).expand(theta.shape)
    base = theta / epsilon + power / (4 * epsilon**2)
    total = torch.zeros_like(theta)
    for n in range(TERMS):
        factor = 1 / math.factorial(2 * n) + 1 / (2 * epsilon * math.factorial(2 * n + 1))
        total = total + factor * power
        power = power @ base
    return math.exp(-1 / (2 * epsilon)) * total


def integrate(theta: Tensor, epsilon: float, steps: int = 2000) -> Tensor:
    """The map x(0) ↦ x(1) of the ODE by the classical Runge–Kutta method."""
    size = len(theta)
    zero, one = torch.zeros_like(theta), torch.eye(size, dtype=theta.dtype)
    field = (
        torch.cat([torch.cat([zero, one], 1), torch.cat([theta / epsilon, -one / epsilon], 1)])
        / steps
    )  # of (x, x′)
    runge_kutta = sum(
        (torch.linalg.matrix_power(field, n) / math.factorial(n) for n in range(1, 5)),
        torch.eye(2 * size, dtype=theta.dtype),
    )
    flow: Tensor = torch.linalg.matrix_power(runge_kutta, steps)
    return flow[:size, :size]


class Layer(nn.Module):
    """x + f(x), f(x) = θx / depth."""

    def __init__(self, theta: Tensor, depth: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta / depth)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for x of shape (samples, d)."""
        return x + x @ self.theta.T


def network_map(theta: Tensor, epsilon: float, depth: int) -> Tensor:
    """The linear map of a Momentum ResNet of that depth, which tends to Ψ_ε(θ)."""
    blocks = [Layer(theta, depth)] * depth
    network = MomentumSequential(*blocks, gamma=1 - 1 / (epsilon * depth), strategy="store")
    with torch.no_grad():
        transposed: Tensor = network(torch.eye(len(theta), dtype=theta.dtype))
    return transposed.T


def smallest(epsilon: float) -> float:
    """λ_ε. The first minimum of G_ε is its least, and lies below 2π."""
    alpha = torch.linspace(1e-6, 2 * math.pi, 200_001, dtype=torch.float64)
    g = math.exp(-1 / (2 * epsilon)) * (alpha.cos() + alpha.sin() / (2 * epsilon * alpha))
    return float(g.min())


def search(targets: Tensor, epsilon: float, starts: int = 16, steps: int = 600) -> Tensor:
    """The distance of each diagonal target (…, 2) to the nearest Ψ_ε(θ) found by descent."""
    torch.manual_seed(0)
    wanted = torch.diag_embed(targets).expand(starts, *targets.shape, 2)
    # Half of the starts are nearly diagonal, as solutions with real eigenvalues may be.
    theta = epsilon * 10 * torch.randn(wanted.shape, dtype=torch.float64)
    theta[::2, ..., [0, 1], [1, 0]] *= 0.01
    theta.requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.3 * epsilon)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        errors = (series(theta, epsilon) - wanted).square().sum((-2, -1))
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
        scheduler.step()
    return errors.detach().amin(0).sqrt()


@dataclass(frozen=True, slots=True)
class Region:
    """The maps diag(λ₁, λ₂) tried at one ε, and how near the search came to each."""

    epsilon: float
    targets: Tensor  # (side, side, 2)
    errors: Tensor  # (side, side)

    @property
    def predicted(self) -> Tensor:
        """Which of them theorem 1 says can be represented."""
        first, second = self.targets.unbind(-1)
        return (self.targets >= smallest(self.epsilon)).all(-1) | (first == second)

    @property
    def agreement(self) -> float:
        """The share of maps for which the search says the same."""
        return float(((self.errors < TOLERANCE) == self.predicted).double().mean())


def explore(epsilon: float, side: int = SIDE, **effort: int) -> Region:
    """Try the maps of a grid over [−1.2, 1.2]²."""
    axis = torch.linspace(-1.2, 1.2, side, dtype=torch.float64)
    targets = torch.cartesian_prod(axis, axis).view(side, side, 2)
    return Region(epsilon, targets, search(targets, epsilon, **effort))


def compare(epsilon: float, depths: tuple[int, ...] = (50, 500)) -> list[float]:
    """Distances of Ψ_ε(θ) from the integrated ODE and from networks, for a random θ."""
    torch.manual_seed(0)
    theta = torch.randn(3, 3, dtype=torch.float64)
    exact = series(theta, epsilon)
    others = [integrate(theta, epsilon), *(network_map(theta, epsilon, n) for n in depths)]
    return [float((other - exact).norm()) for other in others]


def judge(solutions: list[list[float]], regions: list[Region]) -> list[Claim]:
    """Proposition 4 and theorem 1."""
    solves = all(
        ode < 1e-9 and deep < shallow / 5 and deep < 0.1 for ode, shallow, deep in solutions
    )
    return [
        Claim("Ψ_ε is the solution, and networks approach it as they get deeper", solves),
        Claim(
            "θ is found for the maps that theorem 1 allows, and for no other",
            all(region.agreement > 0.95 for region in regions),
        ),
    ]


def draw(regions: list[Region]) -> Figure:
    """λ_ε, and the distance of each diagonal map from what can be represented."""
    figure, (curve, *maps) = panels(1 + len(regions), width=3.2)
    epsilons = torch.logspace(-1.5, 1, 60)
    curve.semilogx(epsilons, [smallest(float(e)) for e in epsilons], color=MOMENTUM)
    curve.axhline(0, color=RESNET, lw=0.8)
    curve.set(title="smallest single eigenvalue", xlabel="ε", ylabel="λ_ε")
    for axes, region in zip(maps, regions, strict=True):
        axes.imshow(
            (region.errors < TOLERANCE).T.numpy(),
            origin="lower",
            extent=(-1.25, 1.25) * 2,
            cmap="Oranges",
            vmax=2,
        )
        bound = smallest(region.epsilon)
        axes.plot([bound, bound, 1.2], [1.2, bound, bound], color=RESNET)
        axes.plot([-1.2, bound], [-1.2, bound], color=RESNET)
        axes.set(title=f"maps found, ε = {region.epsilon:g}", xlabel="λ₁", ylabel="λ₂")
    return figure


def main() -> None:
    """Make the three checks."""
    solutions = [compare(epsilon) for epsilon in SHOWN]
    regions = [explore(epsilon) for epsilon in SHOWN[1:]]
    agreement = {region.epsilon: f"{region.agreement:.1%}" for region in regions}
    rows: list[Row] = [
        {
            "ε": f"{epsilon:g}",
            "λ_ε": f"{smallest(epsilon):.4f}",
            "|ODE − Ψ|": f"{ode:.0e}",
            "|50 layers − Ψ|": f"{shallow:.4f}",
            "|500 layers − Ψ|": f"{deep:.4f}",
            "search agrees with theorem 1": agreement.get(epsilon, "–"),
        }
        for epsilon, (ode, shallow, deep) in zip(SHOWN, solutions, strict=True)
    ]
    report("fig4", rows, draw(regions), *judge(solutions, regions))


if __name__ == "__main__":
    main()
