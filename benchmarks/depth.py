"""Peak memory over depth, in the setting of figure 2 of Sander et al. 2021.

k residual blocks with f(x) = W₂ᵀ σ(W₁ x + b) on 500 samples of 500 dimensions, γ = 1 − 1/(50k).
f is 500 wide inside, σ is ReLU, and the loss is the mean square of the output. Numbers are the peak
in MiB of one forward and backward pass; weights, the gradients that an earlier micro-batch left,
and the samples are left out. "store all" is the ResNet. momentumnet keeps the gradients of all
blocks until the last one is done, which here weigh as much as the activations; "gradients apart" is
its number less these bytes.
"""

import math
from importlib.util import find_spec

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.checkpointing import Checkpointed
from benchmarks.isolation import outcome, start_process
from benchmarks.tables import Log, Out, choose_device, show
from momconv import MomentumSequential
from momconv.planner.measurement import measure

DEPTHS = (10, 25, 50, 100, 200, 300)
SAMPLES = 500
DIMENSIONS = 500
MIB = 2**20
TITLE = "depth"
VALUE = "MiB"
KEY = ("method", "depth")


class Branch(nn.Module):
    """f(x) = W₂ᵀ σ(W₁ x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIMENSIONS, DIMENSIONS)
        self.second = nn.Linear(DIMENSIONS, DIMENSIONS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) for x of shape (samples, dimensions)."""
        residual: Tensor = self.second(self.first(x).relu_())
        return residual


class Block(Branch):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of the shape of ``x``."""
        return x + super().forward(x)


def store(depth: int) -> nn.Module:
    """The ResNet."""
    return nn.Sequential(*(Block() for _ in range(depth)))


def checkpoint_sqrt(depth: int) -> nn.Module:
    """The ResNet with a checkpoint after every √k blocks."""
    net = Checkpointed(*(Block() for _ in range(depth)))
    net.length = math.ceil(math.sqrt(depth))
    return net


def momentumnet(depth: int) -> nn.Module:
    """The package of the paper's authors."""
    from momentumnet import MomentumNet

    branches = [Branch() for _ in range(depth)]
    net: nn.Module = MomentumNet(branches, gamma=choose_gamma(depth), use_backprop=False)
    return net


def momconv(depth: int) -> nn.Module:
    """This package."""
    return MomentumSequential(*(Block() for _ in range(depth)), gamma=choose_gamma(depth))


_WITHOUT_GRADIENTS = "momentumnet, gradients apart"

METHODS = {
    "store all": store,
    "checkpoint √L blocks": checkpoint_sqrt,
    **(
        {"momentumnet": momentumnet, _WITHOUT_GRADIENTS: momentumnet}
        if find_spec("momentumnet")
        else {}
    ),
    "momconv": momconv,
}


def choose_gamma(depth: int) -> float:
    """γ = 1 − 1/(50k)."""
    return 1 - 1 / (50 * depth)


def measure_depth(method: str, depth: int, device: torch.device) -> float:
    """MiB at the peak."""
    torch.manual_seed(0)
    net = METHODS[method](depth).to(device)
    # The network's input needs a gradient in momentumnet, and gets one behind any other layer.
    x = torch.randn(SAMPLES, DIMENSIONS, device=device, requires_grad=True)
    for tensor in (x, *net.parameters()):
        tensor.grad = torch.zeros_like(tensor)

    def step() -> None:
        net(x).square().mean().backward()

    if device.type == "cuda":
        step()  # in which cuBLAS allocates its workspace
    peak = measure(step, device)
    if method == _WITHOUT_GRADIENTS:
        peak -= sum(parameter.nbytes for parameter in net.parameters())
    return peak / MIB


def main(out: Out = None) -> None:
    """Measure the memory of every method at every depth."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for method in METHODS:
        with start_process() as process:
            for depth in DEPTHS:
                value = outcome(process, measure_depth, method, depth, device)
                cell = value if isinstance(value, str) else f"{value:.2f}"
                row = {"method": method, "depth": str(depth), VALUE: cell}
                Console(stderr=True).print(*row.values())
                log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
