"""The inverse by itself: from where a run ends back to where it began, without any gradients."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from momconv.errors import InversionError, UsageError
from momconv.momentum.equations import Rule, integrate, remainder_bounds, reverse, to_grid
from momconv.momentum.ranging import keep_state
from momconv.momentum.replay import evaluate


class EndState(NamedTuple):
    """Where a run ends: all that its inverse needs, in double precision.

    Attributes:
        x: The output, on the grid.
        v: The velocity, a count of units of its own grid.
        remainders: The integers that the products with γ have left, the last ones last.
        exponent: The run is exact below 2^exponent, from which the grids follow; None: as far as
            the stage knows it to be.
        dtype: In which its blocks have read x; None: in that of their parameters.
    """

    x: Tensor
    v: Tensor
    remainders: tuple[Tensor, ...]
    exponent: int | None = None
    dtype: torch.dtype | None = None


def read_state(end: object) -> EndState:
    """Return ``end``, whose last two parts may be missing.

    Raises:
        UsageError: It is none, whatever its tensors are.
    """
    parts = end if isinstance(end, tuple) else ()
    is_whole = len(parts) in (3, len(EndState._fields)) and isinstance(parts[2], tuple | list)
    if not is_whole or not all(isinstance(leaf, Tensor) for leaf in tree_leaves(parts[:3])):
        kinds = ", ".join(type(leaf).__name__ for leaf in tree_leaves(parts))
        given = type(end).__name__ + (f" of {kinds}" if parts else "")
        raise UsageError(
            f"invert was given a {given}, not (x, v, remainders)",
            kind="usage.bad_value",
            fix="stage.invert(stage.integrate(x))",
        )
    return EndState(*parts)


@torch.no_grad()
def follow(
    blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...], rule: Rule
) -> EndState:
    """Return the end of the run that begins with x."""
    dtype = x.dtype
    calls = [partial(_call, block, args, dtype) for block in blocks]
    x, v, remainders = integrate(to_grid(x.double(), rule.ulp), calls, rule)
    return EndState(x, v, tuple(remainders), round(math.log2(rule.limit)), dtype)


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
        UsageError: This is no state, or not of what these blocks take.
        InversionError: The run does not end there, or the state is not finite.
    """
    _require_state(end, 1 + sum(full for full, _ in remainder_bounds(rule.gamma, len(blocks))))
    seen = [end.x.to(dtype)]

    def call(block: nn.Module, x: Tensor) -> Tensor:
        seen.append(x.to(dtype))
        try:
            return _call(block, args, dtype, x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"a {block._get_name()} does not take what this state leads to,"
                f" {_describe(seen[-1])}: {str(error).splitlines()[0]}",
                kind="usage.bad_state",
                fix="invert it with the stage that it is of, in the same type and on its device",
            ) from error

    restore = keep_state(blocks, end.x.device)
    try:
        _, v, remainders = reverse(*end[:3], [partial(call, block) for block in blocks], rule)
    finally:
        restore()
    if not any(part.any() for part in (v, *remainders)):
        return seen[::-1]
    if not end.x.isfinite().all():
        raise InversionError(
            "the state is not finite: from NaN or infinity nothing leads back",
            kind="inversion.not_finite",
            fix="state = stage.integrate(x), of the x whose outputs are finite",
        )
    raise InversionError(
        "the way back does not end where a run begins: the state is of another run, or a block"
        " computed something else",
        kind="inversion.wrong_state",
        fix="state = stage.integrate(x), with the same blocks, mode, autocast and arguments",
    )


def _require_state(end: EndState, remainders: int) -> None:
    """Do nothing if this can be a state of a run with so many remainders.

    Raises:
        UsageError: It cannot.
    """
    parts = [end.x, end.v, *end.remainders]
    kinds = [_describe(part) for part in parts]
    if len(parts) != 2 + remainders or {*kinds} != {_describe(end.x.double())}:
        raise UsageError(
            f"a state is x, v and here {remainders} remainders in double precision, of one shape,"
            f" on one device; this has {len(parts) - 2} and {', '.join(dict.fromkeys(kinds))}",
            kind="usage.bad_state",
            fix="state = stage.integrate(x)",
        )


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"


def _call(block: nn.Module, args: tuple[Tensor, ...], dtype: torch.dtype, x: Tensor) -> Tensor:
    return evaluate(block, x.to(dtype), *args)
