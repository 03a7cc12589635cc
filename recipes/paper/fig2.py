"""Figure 2, memory over depth: ``python -m recipes.paper.fig2``.

Measures the depths of benchmarks/depth.py, whose head says what and how, up to 100 blocks; with
``--full`` up to 300. momentumnet, the authors' package, is measured if it is installed.
"""

from typing import Annotated

import typer
from rich.console import Console

from benchmarks import depth
from benchmarks.isolation import outcome, start_process
from benchmarks.pictures import Series, collect, draw_depth
from benchmarks.tables import Row, choose_device
from recipes.paper.report import Claim, report

MOMENTUM, STORE = "momconv", "store all"


def measure(depths: list[int]) -> list[Row]:
    """The peak in MiB of every method at every depth."""
    device, rows = choose_device(), []
    for method in depth.METHODS:
        with start_process() as process:
            for blocks in depths:
                value = outcome(process, depth.measure_depth, method, blocks, device)
                cell = value if isinstance(value, str) else f"{value:.2f}"
                Console(stderr=True).print(method, blocks, cell)
                rows.append({"method": method, "depth": str(blocks), depth.VALUE: cell})
    return rows


def judge(series: Series) -> Claim:
    """Momentum grows by less than a tenth of what the ResNet grows by."""
    (first, fewest), (last, most) = series[MOMENTUM][0], series[MOMENTUM][-1]
    plain = series[STORE][-1][1] - series[STORE][0][1]
    text = f"nearly flat from {first:.0f} to {last:.0f} blocks with momentum, linear in the ResNet"
    return Claim(text, most - fewest < plain / 10)


def main(
    full: Annotated[bool, typer.Option("--full", help="Up to 300 blocks.")] = False,
) -> None:
    """Measure, and draw what was measured."""
    rows = measure([n for n in depth.DEPTHS if full or n <= 100])
    report("fig2", rows, draw_depth(rows), judge(collect(rows, "depth")))


if __name__ == "__main__":
    typer.run(main)
