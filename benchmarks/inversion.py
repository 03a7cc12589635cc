"""How near an inverse comes to the input, over depth: ‖x − x[0]‖ / ‖x[0]‖ of what it returns.

"momconv" is ``stage.invert(stage.integrate(x))``, and x[0] the first of what its blocks have read;
"equation (3)" the same network and its inverse as the paper writes it, in single and in double
precision; "RevNet" as many additive couplings of two halves (benchmarks/couplings.py), undone one
by one. The blocks, their weights and the images are those of benchmarks/exactness.py.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import typer
from torch import Tensor, nn

from benchmarks.couplings import make_coupling
from benchmarks.exactness import DEPTHS, GAMMAS, make_blocks, make_images, relative_error
from benchmarks.tables import Log, Out, Row, show
from momconv import MomentumSequential

TITLE = "inversion"
KEY = ("inverse", "γ", "depth")

Blocks = Sequence[nn.Module]


def momconv(blocks: Blocks, x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """x[0] as the blocks read it, and what the inverse returns."""
    stage, read = MomentumSequential(*blocks, gamma=gamma), list[Tensor]()
    stage[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    end = stage.integrate(x)
    return read[-1], stage.invert(end)[0]


def by_equation(
    blocks: Blocks, x: Tensor, gamma: float, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same, of equations (2) and (3) as they are written."""
    blocks = [copy.deepcopy(block).to(dtype) for block in blocks]
    start = x = x.to(dtype)
    v = torch.zeros_like(x)
    for block in blocks:
        v = gamma * v + (1 - gamma) * (block(x) - x)
        x = x + v
    for block in reversed(blocks):
        x = x - v
        v = (v - (1 - gamma) * (block(x) - x)) / gamma
    return start, x


def revnet(blocks: Blocks, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of couplings."""
    couplings = [make_coupling(block) for block in blocks]
    start = x
    for coupling in couplings:
        x = coupling(x)
    y1, y2 = x.chunk(2, dim=1)
    for coupling in reversed(couplings):
        y2 = y2 - coupling.g(y1)
        y1 = y1 - coupling.f(y2)
    return start, torch.cat([y1, y2], dim=1)


# With the settings of γ that they have.
INVERSES: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], list[tuple[float, ...]]]] = {
    "momconv": (momconv, [(gamma,) for gamma in GAMMAS]),
    "equation (3), float32": (
        partial(by_equation, dtype=torch.float32),
        [(gamma,) for gamma in GAMMAS],
    ),
    "equation (3), float64": (
        partial(by_equation, dtype=torch.float64),
        [(gamma,) for gamma in GAMMAS],
    ),
    "RevNet, float32": (revnet, [()]),
}


@torch.no_grad()
def measure(name: str) -> Iterator[Row]:
    """The rows of one inverse."""
    invert, settings = INVERSES[name]
    for gamma in settings:
        for depth in DEPTHS:
            start, found = invert(make_blocks(depth), make_images(), *gamma)
            error = relative_error([found.double()], [start.double()])
            yield {
                "inverse": name,
                "γ": str(*gamma) or "–",
                "depth": str(depth),
                "error of x[0]": f"{error:.1e}" if error else "0",
            }


def main(out: Out = None) -> None:
    """Invert with all of them, on the CPU."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    for name in INVERSES:
        log.merge([*measure(name)], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
