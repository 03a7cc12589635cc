"""The inverse by itself: from where a run ends back to where it began, without any gradients."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from momconv.errors import InversionError
from momconv.momentum.equations import Block, Rule, integrate, reverse, to_grid
from momconv.momentum.replay import evaluate


class EndState(NamedTuple):
    """Where a run ends: all that its inverse needs, in double precision.

    Attributes:
        x: The output, on the grid.
        v: The velocity, a count of units of its own grid.
        remainders: The integers that the products with γ have left, the last ones last.
    """

    x: Tensor
    v: Tensor
    remainders: tuple[Tensor, ...]


@torch.no_grad()
def follow(
    blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...], rule: Rule
) -> EndState:
    """Return the end of the run that begins with x."""
    calls = [_call(block, args, x.dtype) for block in blocks]
    x, v, remainders = integrate(to_grid(x.double(), rule.ulp), calls, rule)
    return EndState(x, v, tuple(remainders))


@torch.no_grad()
def walk_back(
    blocks: Sequence[nn.Module],
    end: EndState,
    args: tuple[Tensor, ...],
    rule: Rule,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return x[0] to x[k] as the blocks have read them, of a run that ends there.

    Raises:
        InversionError: It does not, or the state is not finite.
    """
    if not end.x.isfinite().all():
        raise InversionError(
            "the state is not finite: from NaN or infinity nothing leads back",
            kind="inversion.not_finite",
            fix="state = stage.integrate(x), of the x whose outputs are finite",
        )
    seen = [end.x.to(dtype)]

    def keeping(call: Block, x: Tensor) -> Tensor:
        seen.append(x.to(dtype))
        return call(x)

    calls = [partial(keeping, _call(block, args, dtype)) for block in blocks]
    _, v, remainders = reverse(*end, calls, rule)
    if any(part.any() for part in (v, *remainders)):
        raise InversionError(
            "the way back does not end where a run begins: the state is of another run, or a block"
            " computed something else",
            kind="inversion.wrong_state",
            fix="state = stage.integrate(x), with the same blocks in the same mode",
        )
    return seen[::-1]


def _call(block: nn.Module, args: tuple[Tensor, ...], dtype: torch.dtype) -> Block:
    return lambda x: evaluate(block, x.to(dtype), *args)
