"""Section 3.2, the bits to keep for the inverse: ``python -m recipes.paper.bits``.

Multiplying v by γ < 1 loses log2(1/γ) bits, which the inverse needs. They stay in a remainder r. A
network of 100 tanh blocks on 4,096 numbers shows how |r| grows: the slope of log2 of its root mean
square over the depth, beside log2(1/γ) and what the paper derives, (1 − γ) / ln 2 as γ → 1.
"""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.tables import Row
from momconv.momentum.equations import Rule, coefficients, step, to_grid, unstep
from recipes.paper.report import MOMENTUM, RESNET, Claim, panels, report

GAMMAS = (0.3, 0.5, 0.7, 0.9, 0.95, 0.98)
DEPTH = 100
MOST_BITS = 40.0  # r is exact below 2^53


@dataclass(frozen=True, slots=True)
class Result:
    """The bits in r after each block, and whether the way back ended exactly at the start."""

    gamma: float
    bits: Tensor
    is_exact: bool

    @property
    def slope(self) -> float:
        """Bits a block over the second half of the blocks."""
        half = len(self.bits) // 2
        return float(self.bits[-1] - self.bits[half]) / (len(self.bits) - 1 - half)


def measure(gamma: float, depth: int = DEPTH, seed: int = 0) -> Result:
    """Walk through ``depth`` blocks and back, keeping one remainder throughout."""
    torch.manual_seed(seed)
    depth = min(depth, int(MOST_BITS / math.log2(1 / gamma)))
    shifts = torch.randn(depth, 4096, dtype=torch.float64)
    blocks = [lambda x, shift=shift: x + torch.tanh(shift - x) for shift in shifts]
    rule = Rule(
        gamma,
        coefficients(gamma, [1.0] * depth, "zero"),
        ulp=2.0**-20,
        v_ulp=2.0**-20,
        dtype=torch.float64,
    )
    start = x = to_grid(torch.randn(4096, dtype=torch.float64), rule.ulp)
    v, r, bits = torch.zeros_like(x), torch.zeros_like(x), []
    for n, block in enumerate(blocks):
        x, v, r = step(x, v, r, block, rule, n)
        bits.append(r.square().mean().sqrt().log2())
    for n, block in reversed([*enumerate(blocks)]):
        x, v, r = unstep(x, v, r, block, rule, n)
    return Result(gamma, torch.stack(bits), torch.equal(x, start) and not v.any() and not r.any())


def judge(results: list[Result]) -> Claim:
    """Slopes within 5 % (0.005 bits where that is more), and exact inverses."""
    holds = all(
        result.is_exact
        and math.isclose(result.slope, math.log2(1 / result.gamma), rel_tol=0.05, abs_tol=5e-3)
        for result in results
    )
    return Claim("a block needs log2(1/γ) bits, and with them the inverse is exact", holds)


def draw(results: list[Result]) -> Figure:
    """Bits over the depth, and a block, over γ."""
    figure, (growth, slopes) = panels(2)
    for result in results:
        growth.plot(range(1, len(result.bits) + 1), result.bits, label=f"γ = {result.gamma}")
    growth.set(title="bits in the remainder", xlabel="block")
    growth.legend(fontsize="small")
    gammas = torch.linspace(0.25, 1, 100)
    slopes.plot(gammas, (1 / gammas).log2(), color=RESNET, label="log2(1/γ)")
    slopes.plot(gammas, (1 - gammas) / math.log(2), ":", color=RESNET, label="(1 − γ) / ln 2")
    slopes.plot(
        [r.gamma for r in results],
        [r.slope for r in results],
        "o",
        color=MOMENTUM,
        label="measured",
    )
    slopes.set(title="bits a block", xlabel="γ")
    slopes.legend(fontsize="small")
    return figure


def main() -> None:
    """Measure for each γ."""
    results = [measure(gamma) for gamma in GAMMAS]
    rows: list[Row] = [
        {
            "γ": f"{r.gamma:g}",
            "bits a block": f"{r.slope:.4f}",
            "log2(1/γ)": f"{math.log2(1 / r.gamma):.4f}",
            "(1 − γ) / ln 2": f"{(1 - r.gamma) / math.log(2):.4f}",
            "blocks": str(len(r.bits)),
            "inverse": "exact" if r.is_exact else "inexact",
        }
        for r in results
    ]
    report("bits", rows, draw(results), judge(results))


if __name__ == "__main__":
    main()
