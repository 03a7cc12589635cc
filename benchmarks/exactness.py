"""Relative gradient error of reversible packages against storing all, over depth and γ.

‖g − h‖ / ‖h‖ over the gradients of the input and of all parameters, where h comes from the same
network with everything stored: momconv under strategy "store", momentumnet with
``use_backprop=True``, memcnn with ``disable=True``, revtorch's couplings under ordinary autograd
(these two have no γ). "rounding" is what cannot be seen there: the relative error of the output
against the same network in double precision. The networks are BasicBlocks of 16 channels, or as
many couplings of two halves of 8 (benchmarks/couplings.py), BatchNorm in training mode, random
weights, on 8 images of 16². "0" is equality of every bit, "nan" an overflow.
"""

import copy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from benchmarks.couplings import invert_with_memcnn, invert_with_revtorch, make_coupling
from benchmarks.isolation import outcome, start_process
from benchmarks.tables import Log, Out, Row, show
from momconv import MomentumSequential, set_strategy

DEPTHS = (10, 50, 200)
GAMMAS = (0.3, 0.5, 0.9)
CHANNELS = 16
TITLE = "exactness"
KEY = ("package", "depth", "γ")

Pair = tuple[nn.Module, nn.Module]  # the reversible network, and the same storing all


def make_blocks(depth: int) -> list[nn.Module]:
    """Residual blocks with BatchNorm in training mode."""
    torch.manual_seed(0)
    return [BasicBlock(CHANNELS, CHANNELS) for _ in range(depth)]


def make_images() -> Tensor:
    """A batch."""
    return torch.randn(8, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module) -> list[Tensor]:
    """Of the input and of every parameter, for a fixed loss."""
    x = make_images().requires_grad_()
    # Not a leaf, as behind other layers: memcnn sets its input's .grad, to which autograd adds.
    net(x.clone()).square().mean().backward()
    return [t.grad for t in (x, *net.parameters()) if t.grad is not None]


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all gradients; not a number where one overflowed."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)])
    return float(difference.norm() / torch.cat([b.flatten() for b in theirs]).norm())


def momconv(depth: int, gamma: float) -> Pair:
    """This package."""
    net = MomentumSequential(*make_blocks(depth), gamma=gamma)
    stored = copy.deepcopy(net)
    set_strategy(stored, "store")
    return net, stored


def momentumnet(depth: int, gamma: float) -> Pair:
    """The package of the paper's authors, in its two modes."""
    from momentumnet import MomentumNet

    reversible, stored = (
        MomentumNet(make_blocks(depth), gamma=gamma, is_residual=False, use_backprop=use_backprop)
        for use_backprop in (False, True)
    )
    return reversible, stored


def memcnn(depth: int) -> Pair:
    """RevNet couplings, each inverted by itself; the package can be told to store instead."""
    from memcnn import InvertibleModuleWrapper

    net = invert_with_memcnn([make_coupling(block) for block in make_blocks(depth)])
    stored = copy.deepcopy(net)
    for wrapper in stored.children():
        assert isinstance(wrapper, InvertibleModuleWrapper)
        wrapper.disable = True
    return net, stored


def revtorch(depth: int) -> Pair:
    """RevNet couplings, inverted in one sequence."""
    couplings = [make_coupling(block) for block in make_blocks(depth)]
    return invert_with_revtorch(copy.deepcopy(couplings)), nn.Sequential(*couplings)


# With the settings of γ that they have.
PACKAGES: dict[str, tuple[Callable[..., Pair], list[tuple[float, ...]]]] = {
    "momconv": (momconv, [(gamma,) for gamma in GAMMAS]),
    "momentumnet": (momentumnet, [(gamma,) for gamma in GAMMAS]),
    "memcnn": (memcnn, [()]),
    "revtorch": (revtorch, [()]),
}


def compare(make: Callable[..., Pair], *args: float) -> tuple[float, float]:
    """The errors of the gradients and of the output of the networks that ``make`` makes."""
    reversible, stored = make(*args)
    exact, x = copy.deepcopy(stored).double(), make_images()
    with torch.no_grad():
        rounding = relative_error([reversible(x).double()], [exact(x.double())])
    return relative_error(gradients(reversible), gradients(stored)), rounding


def measure(name: str) -> Iterator[Row]:
    """The package's rows of depth, γ and error."""
    make, settings = PACKAGES[name]
    with start_process() as process:
        for depth in DEPTHS:
            for gamma in settings:
                errors = outcome(process, compare, make, depth, *gamma)
                gradient, rounding = (errors, errors) if isinstance(errors, str) else errors
                yield {
                    "package": name if name == "momconv" else f"{name} {version(name)}",
                    "depth": str(depth),
                    "γ": str(*gamma) or "–",
                    "relative gradient error": _format(gradient),
                    "rounding": _format(rounding),
                }


def _format(error: float | str) -> str:
    if isinstance(error, str):
        return error
    return f"{error:.1e}" if error else "0"


def main(out: Out = None) -> None:
    """Compare the gradients of all packages that are installed, on the CPU."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    for name in filter(find_spec, PACKAGES):
        for row in measure(name):
            Console(stderr=True).print(*row.values())
            log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
