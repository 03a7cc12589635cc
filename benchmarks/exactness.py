"""Relative gradient error of reversible packages against storing all, over depth and γ.

For momconv "storing all" is its own network under strategy "store"; for momentumnet, its own with
``use_backprop=True``. Run ``python -m benchmarks.exactness``.
"""

import copy
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from benchmarks.results import report
from momconv import MomentumSequential, set_strategy

DEPTHS = (10, 50, 200)
GAMMAS = (0.3, 0.5, 0.9)
CHANNELS = 16


def make_blocks(depth: int) -> list[nn.Module]:
    """Residual blocks with BatchNorm in training mode."""
    torch.manual_seed(0)
    return [BasicBlock(CHANNELS, CHANNELS) for _ in range(depth)]


def gradients(net: nn.Module) -> list[Tensor]:
    """Of the input and of every parameter, for a fixed loss."""
    x = torch.randn(8, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    net(x).square().mean().backward()
    return [t.grad for t in (x, *net.parameters()) if t.grad is not None]


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all gradients; not a number where one overflowed."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)])
    return float(difference.norm() / torch.cat([b.flatten() for b in theirs]).norm())


def momconv(depth: int, gamma: float) -> tuple[nn.Module, nn.Module]:
    """The reversible network, and the same storing all."""
    net = MomentumSequential(*make_blocks(depth), gamma=gamma)
    stored = copy.deepcopy(net)
    set_strategy(stored, "store")
    return net, stored


def momentumnet(depth: int, gamma: float) -> tuple[nn.Module, nn.Module]:
    """The package of the paper's authors, in its two modes."""
    from momentumnet import MomentumNet

    reversible, stored = (
        MomentumNet(make_blocks(depth), gamma=gamma, is_residual=False, use_backprop=use_backprop)
        for use_backprop in (False, True)
    )
    return reversible, stored


def compare() -> Iterator[tuple[object, ...]]:
    """Rows of package, depth, γ and error."""
    packages = {"momconv": momconv}
    if find_spec("momentumnet"):
        packages["momentumnet"] = momentumnet
    for name, make in packages.items():
        for depth in DEPTHS:
            for gamma in GAMMAS:
                reversible, stored = make(depth, gamma)
                error = relative_error(gradients(reversible), gradients(stored))
                yield name, depth, gamma, f"{error:.1e}" if error else "0"


if __name__ == "__main__":
    columns = ("package", "depth", "γ", "relative gradient error")
    report("exactness", columns, list(compare()), torch.device("cpu"))
