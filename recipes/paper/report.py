"""What every script ends with: its numbers, its picture, and whether the paper's claim holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.tables import Row, show

PICTURES = Path(__file__).parents[2] / "docs" / "paper"

# Okabe and Ito's colours, which colour-blind readers tell apart.
RESNET, MOMENTUM, REVNET, OTHER = "#000000", "#D55E00", "#0072B2", "#009E73"


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement of the paper, and whether these numbers bear it out."""

    text: str
    holds: bool


def report(name: str, rows: Sequence[Row], figure: Figure, *claims: Claim) -> None:
    """Print the numbers and a line for each claim, and write the picture ``name``.png."""
    show(name, rows)
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=80)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"picture: {path}")
    for claim in claims:
        verdict = "[green]holds" if claim.holds else "[red]does not hold"
        console.print(f"{verdict}[/]: {claim.text}")


def panels(columns: int, rows: int = 1, *, width: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels, row by row."""
    figure = Figure(figsize=(width * columns, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)
