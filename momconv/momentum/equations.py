"""The momentum rule and its exact inverse, side by side.

Sander, Ablin, Blondel, Peyré, *Momentum Residual Neural Networks*, ICML 2021:

    v[n+1] = γ v[n] + (1 − γ) f(x[n])      x[n+1] = x[n] + v[n+1]                          (2)
    x[n]   = x[n+1] − v[n+1]               v[n]   = (v[n+1] − (1 − γ) f(x[n])) / γ         (3)

The residual of a block is f(x) = block(x) − x. A step multiplies it by a coefficient, which is
(1 − γ) unless the block carries a gain: see :func:`coefficients`.

In floating point (3) does not undo (2): the rounding error grows like γ^−k over k blocks. So x and
v live on grids, of spacings ulp and ulp/2^k, on which sums are exact. x keeps its scale, as floats
that are multiples of ulp; v is counted in units of its own grid, which is finer where v is smaller
than x: see :meth:`Rule.of`. What multiplication by γ would round away stays in r, an integer that
starts at 0. Each line of ``step`` changes one of x, v, r by a rounded function of the others, so
``unstep``, the same lines upside down, undoes it exactly, whatever the rounding does.

x, v and r share one shape and are in double precision here; storage.py keeps them in fewer bytes.
The blocks read x rounded to their own precision. The functions here say what a network computes;
what computes the same numbers faster is in faster/kernels.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momconv.vocabulary import Velocity as Velocity

Block = Callable[[Tensor], Tensor]
State = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """The constants of a run: γ, the coefficient of each block, the grids, what the blocks read.

    Attributes:
        gamma: γ.
        coefficients: What each step multiplies its residual by.
        ulp: The spacing of x's grid.
        v_ulp: The spacing of v's grid, a power of two times finer.
        dtype: The precision in which the blocks read x, single or double.
    """

    gamma: float
    coefficients: tuple[float, ...]
    ulp: float
    v_ulp: float
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, gamma: float, coefficients: tuple[float, ...], exponent: int, dtype: torch.dtype
    ) -> "Rule":
        """Return the rule on the finest grids on which all is exact while |x| < 2^exponent.

        v keeps its direction for m = 1 + γ + γ² + … steps, so it is about m times smaller than x.
        """
        ulp = 2.0 ** (exponent - BITS[dtype])
        steps = sum(gamma**n for n in range(len(coefficients)))
        return cls(gamma, coefficients, ulp, ulp / 2 ** int(math.log2(steps)), dtype)

    @property
    def limit(self) -> float:
        """The bound on |x|, and on |v| times ulp/v_ulp, below which all sums are exact."""
        return self.ulp * 2.0 ** BITS[self.dtype]


# Of x and v: v is stored as int32 beside x in single precision, and as a double beside x in double
# precision, of whose 53 bits the shears of :func:`multiply` need some.
BITS = {torch.float32: 31, torch.float64: 51}


def integrate(
    x: Tensor, blocks: Sequence[Block], rule: Rule
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Follow (2) from x on the grid and v = 0; return x, v and the remainders."""
    x = x.double()
    v, remainders = torch.zeros_like(x), [torch.zeros_like(x)]
    for n, (is_full, _) in enumerate(remainder_bounds(rule.gamma, len(blocks))):
        if is_full:
            remainders.append(torch.zeros_like(x))
        x, v, remainders[-1] = step(x, v, remainders[-1], blocks[n], rule, n)
    return x, v, remainders


def reverse(
    x: Tensor, v: Tensor, remainders: Sequence[Tensor], blocks: Sequence[Block], rule: Rule
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Undo :func:`integrate` by (3); of v and r zeros are left."""
    remainders, emptied = list(remainders), []
    for n, (is_full, _) in reversed([*enumerate(remainder_bounds(rule.gamma, len(blocks)))]):
        x, v, remainders[-1] = unstep(x, v, remainders[-1], blocks[n], rule, n)
        if is_full:
            emptied.append(remainders.pop())
    return x, v, [*remainders, *emptied]


def to_grid(x: Tensor, ulp: float) -> Tensor:
    """Round x to multiples of ulp, in single precision at least, without negative zeros."""
    return torch.round(widen(x) * (1 / ulp)) * ulp + 0.0


def widen(x: Tensor) -> Tensor:
    """Return x in single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def step(x: Tensor, v: Tensor, r: Tensor, block: Block, rule: Rule, n: int) -> State:
    """Take step n of (2)."""
    v, r = multiply(v, r, rule.gamma)
    v = v + torch.round(residual(block, x, rule) * (rule.coefficients[n] / rule.v_ulp))
    x = x + to_grid(v * rule.v_ulp, rule.ulp)
    return x, v, r


def unstep(x: Tensor, v: Tensor, r: Tensor, block: Block, rule: Rule, n: int) -> State:
    """Take step n of (3): the lines of :func:`step`, read upwards."""
    x = x - to_grid(v * rule.v_ulp, rule.ulp)
    v = v - torch.round(residual(block, x, rule) * (rule.coefficients[n] / rule.v_ulp))
    v, r = divide(v, r, rule.gamma)
    return x, v, r


def residual(block: Block, x: Tensor, rule: Rule) -> Tensor:
    """Return f(x), of the x that the block reads."""
    x = x.to(rule.dtype)
    return block(x).double() - x.double()


def multiply(v: Tensor, r: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(v, r) ← (γ v, −r/γ): v to within about (1 + γ)/2 ulp, and nothing lost.

    diag(γ, −1/γ) is three shears and a swap ("lifting", Daubechies and Sweldens 1998). Rounded
    shears are still bijections of the integers.
    """
    if gamma == 1:
        return v, r
    v = v + torch.round(r * (-1 / gamma))
    r = r + torch.round(v * gamma)
    v = v + torch.round(r * (-1 / gamma))
    return r, v


def divide(v: Tensor, r: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`multiply`: its lines, read upwards."""
    if gamma == 1:
        return v, r
    r, v = v, r
    v = v - torch.round(r * (-1 / gamma))
    r = r - torch.round(v * gamma)
    v = v - torch.round(r * (-1 / gamma))
    return v, r


def coefficients(gamma: float, gains: Sequence[float], velocity: Velocity) -> tuple[float, ...]:
    """Return what each step multiplies its residual by: (1 − γ) · gain.

    At γ = 1 the factor (1 − γ) is left out, as in the paper. Starting from v[0] = f(x[0]) is the
    same as starting from 0 with γ + (1 − γ) in the first step, so ``velocity="residual"`` costs
    neither an evaluation nor the exactness of the inverse.
    """
    rate = 1 - gamma if gamma < 1 else 1.0
    head = gamma + rate if velocity == "residual" else rate
    return tuple(gain * (head if n == 0 else rate) for n, gain in enumerate(gains))


def weights(gamma: float, steps: Sequence[float]) -> list[float]:
    """Return how much of each residual is in the last x: x[k] = x[0] + Σ weights[j] f(x[j])."""
    total, result = 0.0, []
    for c in reversed(steps):  # the sum over m of γ^m, m = 0 … k - 1 - j
        total = 1 + gamma * total
        result.append(c * total)
    return result[::-1]


# In int16 a byte holds the most bits of remainder (log2(1/γ) a block, plus a constant).
FULL = 2**15 - 1


def remainder_bounds(gamma: float, steps: int) -> Iterator[tuple[bool, float]]:
    """Yield for each step whether the remainder is full before it, and its bound afterwards.

    A full remainder is put aside and a new one begun at 0. |r| grows to |r|/γ plus the errors of
    two rounded products, each at most 1 while |v| stays below :attr:`Rule.limit`.
    """
    bound = 0.0
    for _ in range(steps):
        grown = 0.0 if gamma == 1 else (bound + 1) / gamma + 1
        is_full = bound > 0 and grown > FULL
        bound = 1 / gamma + 1 if is_full else grown
        yield is_full, bound


HEADROOM = 2  # bits: activations may grow to four times what was seen
LOWEST, HIGHEST = -95, 1000  # exponents, between which ulp and 1/ulp are numbers


def find_exponent(largest: float) -> int:
    """Return the exponent of a grid for values up to ``largest``, with headroom.

    >>> find_exponent(1.0), find_exponent(3.9), find_exponent(4.0), find_exponent(0.0)
    (3, 4, 5, -95)
    """
    exponent = math.frexp(largest)[1] + HEADROOM if largest else LOWEST
    return min(max(exponent, LOWEST), HIGHEST)
