"""The range of a run's activations: found on its first pass, and widened where they outgrow it.

The grid must be coarse enough for the largest activation and should not be coarser. So a survey
before the first pass looks for that, and the grid has some headroom.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from momconv.errors import RangeOverflow
from momconv.momentum.equations import Rule, find_exponent, widen
from momconv.momentum.faults import is_postponing
from momconv.momentum.measures import note_magnitudes
from momconv.momentum.replay import evaluate, random_state, set_random_state
from momconv.states import is_fake, is_graph_made, keep_buffers, without_hooks


def has_values(x: Tensor) -> bool:
    """Return whether x has values to be looked at."""
    return not is_graph_made() and not is_fake(x) and x.numel() > 0


def find_range(measure: Callable[[], float], x: Tensor) -> tuple[int, bool]:
    """Return the exponent for a pass from x, and whether it serves for other passes too.

    It is not if x is 0 or something is not finite.
    """
    largest = measure()
    is_seen = math.isfinite(largest) and largest > 0
    return find_exponent(
        largest if is_seen else float(x.detach().nan_to_num(0, 0, 0).abs().max())
    ), is_seen


def require_range(
    measure: Callable[[], float], seen: Tensor, exponent: int, tell: Callable[[int], None]
) -> None:
    """Do nothing if the pass that has ``seen`` this was exact, which on a GPU waits for it.

    What is not finite has come out as such, as in any network, and is no matter of the range.

    Raises:
        RangeOverflow: It was not; ``tell`` has been called with a sufficient exponent or, where
            all processes would have to look for that, with the next one.
    """
    if float(seen) < 2.0**exponent:
        return
    # Values that were too large may have changed others.
    largest = 2.0**exponent if is_postponing() else measure()
    if math.isfinite(largest):
        tell(max(exponent + 1, find_exponent(largest)))
        raise RangeOverflow(
            f"an activation reached {largest:.4g}, and a momentum run was exact below"
            f" {2.0**exponent:.4g}; its range has been widened",
            kind="inversion.range_overflow",
            fix="repeat this step",
        )


def survey(blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...], rule: Rule) -> float:
    """Return the largest |x|, or |v| times ulp/v_ulp, of (2) in floating point.

    It leaves nothing behind: no hook learns of it, and buffers and random generators stay.
    """
    restore, dtype = _keep_state(blocks, x.device), x.dtype
    with torch.no_grad(), without_hooks(blocks):
        x = widen(x)
        v, largest, largest_v = torch.zeros_like(x), x.abs().max(), x.new_zeros(())
        for block, coefficient in zip(blocks, rule.coefficients, strict=True):
            y = evaluate(block, x.to(dtype), *args)
            v = v.mul_(rule.gamma).add_(y - x, alpha=coefficient)
            x = x + v
            note_magnitudes(largest, x)
            note_magnitudes(largest_v, v)
    restore()
    return max(float(largest), float(largest_v) * rule.ulp / rule.v_ulp)


def retrying(step: Callable[[], Tensor]) -> Tensor:
    """Return what ``step`` returns, done again where a range had to become wider for it."""
    while True:
        try:
            return step()
        except RangeOverflow:
            continue


def _keep_state(blocks: Sequence[nn.Module], device: torch.device) -> Callable[[], None]:
    """Return a function that restores buffers and random generators to their present values."""
    restore_buffers = keep_buffers(nn.ModuleList(blocks))
    restore_generators = partial(set_random_state, random_state(device), device)

    def restore() -> None:
        restore_buffers()
        restore_generators()

    return restore
