"""Networks whose layers share one block, as in figures 1 and 5, and the way points take in them."""

import torch
from torch import Tensor, nn

from momconv import MomentumSequential

HIDDEN = 16
DEPTH = 15


class Block(nn.Module):
    """x + f(x) with f(x) = W₂ tanh(W₁ x + b₁) + b₂."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.first = nn.Linear(dimensions, HIDDEN)
        self.second = nn.Linear(HIDDEN, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for x of shape (points, dimensions)."""
        residual: Tensor = self.second(torch.tanh(self.first(x)))
        return x + residual


def make_network(dimensions: int, gamma: float, seed: int) -> MomentumSequential:
    """The same block 15 times, in double precision; γ = 0 is the ResNet."""
    torch.manual_seed(seed)
    block = Block(dimensions).double()
    return MomentumSequential(*[block] * DEPTH, gamma=gamma, strategy="store")


def trace(network: MomentumSequential, x: Tensor) -> Tensor:
    """x[0] … x[depth], of shape (depth + 1, points, dimensions)."""
    path: list[Tensor] = []
    network.find_runs(x)  # which calls the layers, on tensors without values
    hook = network[0].register_forward_pre_hook(lambda _, inputs: path.append(inputs[0]))
    with torch.no_grad():
        path.append(network(x))
    hook.remove()
    return torch.stack(path)
