"""The range of a run's activations: found on its first pass, and widened where they outgrow it.

The grid must be coarse enough for the largest activation and should not be coarser. So a survey
before the first pass looks for that, and the grid has some headroom. What is not finite comes out
as such, as in any network, and is no matter of the range, which is that of all other values.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from momconv.errors import RangeOverflow
from momconv.momentum.equations import BITS, HEADROOM, HIGHEST, Rule, find_exponent, widen
from momconv.momentum.faults import is_postponing, tell_fault
from momconv.momentum.measures import no_magnitudes, note_magnitudes
from momconv.momentum.replay import (
    evaluate,
    random_state,
    set_random_state,
    top_saved_tensors_hooks,
)
from momconv.states import (
    is_fake,
    is_graph_made,
    keep_buffers,
    keeping_attributes,
    without_hooks,
)

Survey = Callable[[], tuple[float, bool]]  # see :func:`survey`

SLACK = 4  # bits: activations may be so much smaller, beyond the headroom, than what was seen
FINENESS = BITS[torch.float32] - HEADROOM - SLACK - 1  # bits of the largest x, at least


class Misfit(Exception):
    """A pass was on a grid that is too fine or too coarse for it, and is to be done again."""


def has_values(x: Tensor) -> bool:
    """Return whether anything can be seen in x."""
    is_seen = not is_graph_made() and not is_fake(x) and x.numel() > 0
    return is_seen and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def find_range(measure: Survey, x: Tensor) -> tuple[int, bool]:
    """Return the exponent for a pass from x, and whether it serves for other passes too.

    It does not if all is 0 or something is not finite.
    """
    largest, is_whole = measure()
    if largest == 0:
        largest = float(x.detach().nan_to_num(0, 0, 0).abs().max())
    return find_exponent(largest), is_whole and largest > 0


def find_fitting(measure: Survey, seen: tuple[float, bool], y: Tensor, exponent: int) -> int:
    """Return the exponent for a pass to y that has ``seen`` this: the one it had, if that fits.

    The largest that is finite may be on its way to infinity. What stays finite decides.
    """
    largest, is_whole = seen
    is_outgrown = exponent < HIGHEST and largest >= 2.0**exponent
    if not is_outgrown and largest > 0 and find_exponent(largest) >= exponent - SLACK:
        return exponent
    if not is_repeatable():
        if is_outgrown and not is_whole:  # others may wait: no survey, in which they take part
            largest = _largest_in_finite_rows(y)
        is_wrong = is_outgrown and torch.is_grad_enabled() and largest >= 2.0**exponent
        return max(exponent + 1, find_exponent(largest)) if is_wrong else exponent
    largest, _ = measure()  # values that were too large may have changed others
    if largest == 0:
        return exponent
    fitting = find_exponent(largest)
    if not is_whole:  # a bit of headroom is enough
        return exponent if exponent - SLACK <= fitting < exponent + HEADROOM else fitting
    return max(exponent + 1, fitting) if is_outgrown else min(exponent, fitting)


def _largest_in_finite_rows(y: Tensor) -> float:
    sizes = widen(y.detach()).abs().reshape(len(y), -1).amax(1)
    return float(sizes.nan_to_num(0, 0, 0).max())


def ask_to_repeat(seen: float, exponent: int) -> None:
    """End a pass that has ``seen`` this and that its range does not fit, if it can be done again.

    Raises:
        Misfit: It can.
        RangeOverflow: It cannot, and was not exact.
    """
    if is_repeatable():
        raise Misfit
    tell_fault(
        RangeOverflow(
            f"an activation reached {seen:.4g}, and a momentum run was exact below"
            f" {2.0**exponent:.4g}; its range has been widened",
            kind="inversion.range_overflow",
            fix="repeat this step",
        )
    )


_this_thread = threading.local()  # is_repeatable: of the outermost stage's pass, inside one


@contextmanager
def one_pass() -> Iterator[bool]:
    """Let a stage compute, maybe within another one's pass; yield whether that is so.

    A pass is repeatable unless other processes take part in it, or somebody counts what it saves,
    such as a checkpoint around the whole stage.
    """
    if is_inside := hasattr(_this_thread, "is_repeatable"):
        yield is_inside
        return
    is_divided = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    is_counted = torch.is_grad_enabled() and top_saved_tensors_hooks() is not None
    _this_thread.is_repeatable = not (is_divided or is_counted or is_postponing())
    try:
        yield is_inside
    finally:
        del _this_thread.is_repeatable


def is_repeatable() -> bool:
    """Return whether the pass that is under way can be done again."""
    return bool(_this_thread.is_repeatable)


def survey(
    blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...], rule: Rule
) -> tuple[float, bool]:
    """Return the largest |x|, or |v| times ulp/v_ulp, of (2), and whether all are finite.

    Elements that do not stay finite do not count. It computes in floating point, and leaves nothing
    behind: no hook learns of it, and buffers and random generators stay.
    """
    largest, ratio = no_magnitudes(widen(x)), rule.ulp / rule.v_ulp
    for now, v in _approximate(blocks, x, args, rule):
        note_magnitudes(largest, now, v * ratio)
    most, other = largest.tolist()
    if math.isfinite(other):
        return most, True
    peak = torch.zeros_like(widen(x.detach()))  # of each element, which takes memory
    for now, v in _approximate(blocks, x, args, rule):
        peak = peak.maximum(now.abs()).maximum(v.abs() * ratio)
    return float(peak.nan_to_num_(0, 0, 0).max()), False


def _approximate(
    blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...], rule: Rule
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x and v of (2) in floating point, from the beginning on."""
    restore, dtype = keep_state(blocks, x.device), x.dtype
    modules = nn.ModuleList(blocks).modules()
    with keeping_attributes(modules), torch.no_grad(), without_hooks(blocks):
        x = widen(x)
        v = torch.zeros_like(x)
        yield x, v
        for block, coefficient in zip(blocks, rule.coefficients, strict=True):
            y = evaluate(block, x.to(dtype), *args)
            v = v.mul_(rule.gamma).add_(y - x, alpha=coefficient)
            x = x + v
            yield x, v
    restore()


def retrying(step: Callable[[], Tensor]) -> Tensor:
    """Return what ``step`` returns, done again where a range had to become wider for it."""
    while True:
        try:
            return step()
        except RangeOverflow:
            continue


def keep_state(blocks: Iterable[nn.Module], device: torch.device) -> Callable[[], None]:
    """Return a function that restores buffers and random generators to their present values.

    A norm that is not training has buffers that it never changes.
    """
    modules = nn.ModuleList(blocks).modules()
    restore_buffers = keep_buffers(
        module for module in modules if module.training or not isinstance(module, _NormBase)
    )
    restore_generators = partial(set_random_state, random_state(device), device)

    def restore() -> None:
        restore_buffers()
        restore_generators()

    return restore
