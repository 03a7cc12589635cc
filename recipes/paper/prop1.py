"""Proposition 1, fixed points: ``python -m recipes.paper.prop1``.

A RevNet, v ← v + φ(x), x ← x + ψ(v), has at a fixed point the Jacobian [[1, A], [B, 1 + BA]] of
determinant 1 (A and B are those of φ and ψ): its eigenvalues cannot all be inside the unit circle.
The Jacobian of a momentum layer, [[γ, (1 − γ)A], [γ, 1 + (1 − γ)A]], has the determinant γ^d < 1.
Here f = φ = ψ pulls towards x* with symmetric negative definite Jacobians. The eigenvalues come
from the layers themselves by automatic differentiation; then both networks start beside x* and are
200 layers deep. In the RevNet, v* = x*.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor, nn
from torch.func import jacrev

from benchmarks.couplings import Coupling
from benchmarks.tables import Row
from momconv import MomentumSequential
from recipes.paper.report import MOMENTUM, REVNET, Claim, panels, report
from recipes.paper.tied import trace

DIMENSIONS = 4
GAMMA = 0.9
DEPTH = 200
DRAWS = 100

State = Callable[[Tensor], Tensor]  # one layer, of the state (v, x)


class Pull(nn.Module):
    """f(x) = −W tanh(Wᵀ(x − x*)), which vanishes at x*."""

    fixed_point: Tensor

    def __init__(self, fixed_point: Tensor) -> None:
        super().__init__()
        size = len(fixed_point)
        self.register_buffer("fixed_point", fixed_point)
        noise = torch.randn(size, size, dtype=torch.float64)
        self.weight = nn.Parameter(torch.eye(size, dtype=torch.float64) / 2 + noise / (4 * size))

    def forward(self, x: Tensor) -> Tensor:
        """f(x), of the shape of x: (…, dimensions)."""
        return -torch.tanh((x - self.fixed_point) @ self.weight) @ self.weight.T


class Block(Pull):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of the shape of x."""
        return x + super().forward(x)


@dataclass(frozen=True, slots=True)
class Result:
    """Of one kind of network: eigenvalues at the fixed point, and distances from it by layer."""

    name: str
    eigenvalues: Tensor  # (draws, 2 · dimensions), complex
    distances: Tensor  # (depth + 1,)

    @property
    def radii(self) -> Tensor:
        """The largest modulus of each draw."""
        return self.eigenvalues.abs().amax(1)


def momentum_layer(f: nn.Module, gamma: float = GAMMA) -> State:
    """Equation (2) for the state (v, x)."""

    def layer(state: Tensor) -> Tensor:
        v, x = state.chunk(2)
        v = gamma * v + (1 - gamma) * f(x)
        return torch.cat([v, x + v])

    return layer


def revnet_layer(f: nn.Module) -> State:
    """A coupling for the state (v, x)."""
    coupling = Coupling(f, f)

    def layer(state: Tensor) -> Tensor:
        image: Tensor = coupling(state[None])
        return image[0]

    return layer


def analyse(seed: int = 0, draws: int = DRAWS, depth: int = DEPTH) -> list[Result]:
    """Eigenvalues for random f, and what two deep networks of the last f do beside x*."""
    torch.manual_seed(seed)
    fixed_point = torch.ones(DIMENSIONS, dtype=torch.float64)
    momentum, revnet = [], []
    for _ in range(draws):
        f = Pull(fixed_point)
        at_rest = torch.cat([torch.zeros_like(fixed_point), fixed_point])
        momentum.append(eigenvalues(momentum_layer(f), at_rest))
        revnet.append(eigenvalues(revnet_layer(f), torch.cat([fixed_point, fixed_point])))
    block = Block(fixed_point)
    block.weight = f.weight
    start = fixed_point + 0.1 * torch.randn(1, DIMENSIONS, dtype=torch.float64)
    couplings = MomentumSequential(*[Coupling(f, copy.deepcopy(f))] * depth, gamma=0)
    return [
        Result(
            f"Momentum ResNet, γ = {GAMMA}",
            torch.stack(momentum),
            distances(MomentumSequential(*[block] * depth, gamma=GAMMA), start, fixed_point),
        ),
        Result(
            "RevNet",
            torch.stack(revnet),
            distances(couplings, torch.cat([start, start], 1), fixed_point),
        ),
    ]


def eigenvalues(layer: State, state: Tensor) -> Tensor:
    """Of the layer's Jacobian at ``state``."""
    jacobian = jacrev(layer)(state).detach()
    values: Tensor = torch.linalg.eigvals(jacobian)
    return values


def distances(network: MomentumSequential, state: Tensor, fixed_point: Tensor) -> Tensor:
    """|x[n] − x*| before each layer and at the end; x is the last half of a RevNet's state."""
    x = trace(network, state)[:, 0, -len(fixed_point) :]
    norms: Tensor = (x - fixed_point).norm(dim=1)
    return norms


def judge(results: list[Result]) -> Claim:
    """Radii on both sides of 1, and only momentum arrives."""
    momentum, revnet = results
    stable = bool((momentum.radii < 1).all()) and momentum.distances[-1] < 1e-3
    unstable = bool((revnet.radii > 1 - 1e-9).all()) and revnet.distances[-1] > 1e-2
    return Claim(
        "momentum converges to a fixed point at which no RevNet can stay", bool(stable and unstable)
    )


def draw(results: list[Result]) -> Figure:
    """The eigenvalues in the complex plane, and the distance from x* over the layers."""
    figure, (plane, way) = panels(2, width=4.2)
    plane.add_patch(Circle((0, 0), 1, fill=False, color="#999999"))
    for result, colour in zip(results, (MOMENTUM, REVNET), strict=True):
        values = result.eigenvalues.flatten()
        plane.plot(values.real, values.imag, ".", color=colour, ms=3, label=result.name)
        way.semilogy(result.distances, color=colour, label=result.name)
    plane.set(title="eigenvalues at the fixed point", xlabel="real", ylabel="imaginary")
    plane.set_aspect("equal")
    plane.legend(fontsize="small")
    way.set(title="from a start beside x*", xlabel="layer", ylabel="|x − x*|")
    return figure


def main() -> None:
    """Compare the two at their fixed points."""
    results = analyse()
    rows: list[Row] = [
        {
            "network": result.name,
            "spectral radius": f"{result.radii.min():.4f} … {result.radii.max():.4f}",
            f"|x − x*| after {DEPTH} layers": f"{result.distances[-1]:.1e}",
        }
        for result in results
    ]
    report("prop1", rows, draw(results), judge(results))


if __name__ == "__main__":
    main()
