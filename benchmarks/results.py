"""RESULTS.md: what the files in results/ say. ``python -m benchmarks.results`` writes it.

Of each file it has what a reader compares: a row for each case and a column for each method, or
how far figures are spread. All rows are in the file itself, which is named above the table.
"""

import inspect
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks import finetuning, frontier, gpu, hymenoptera, memory, speed, transfer
from benchmarks.tables import MISSING, RESULTS, Log, Row, find_logs, number

DOCUMENT = Path(__file__).parent / "RESULTS.md"

INTRODUCTION = """\
# Results

Written by `python -m benchmarks.results` from the CSV files in results/, which have every row. Each
section begins with the command and how it measures; the machine and the version of torch stand
above each table, the versions of the other packages in it. Networks have random weights. momconv
and momentumnet run with γ = 0.9 unless a table says otherwise. "failed" stands where a method does
not run.

The other packages are optional: `pip install '.[bench]'`. A method appears if its package is there.
"""

LOSSES = """\
Every measured case in which some method has a smaller number than momconv. One loss is in no table:
a converted network computes another function than the original, while checkpointing and
torch.compile keep the function. memcnn and revtorch train yet another network, with half of the
work.
"""


def show_all(rows: Sequence[Row]) -> list[Row]:
    """The rows as they were logged."""
    return list(rows)


def pivot(rows: Sequence[Row], case: Sequence[str], method: str, value: str) -> list[Row]:
    """The cells of the column ``value``: a row for each case, a column for each method.

    Args:
        rows: As they were logged.
        case: The columns that tell cases apart.
        method: The column whose cells become columns.
        value: The column to show.
    """
    cases: dict[tuple[str, ...], Row] = {}
    methods = dict.fromkeys(row[method] for row in rows)
    for row in rows:
        key = tuple(row[column] for column in case)
        cells = cases.setdefault(
            key, dict(zip(case, key, strict=True)) | dict.fromkeys(methods, MISSING)
        )
        cells[row[method]] = row[value].partition(":")[0]  # without why a method failed
    return list(cases.values())


def spread(rows: Sequence[Row], by: Sequence[str], values: Sequence[str]) -> list[Row]:
    """The least, the middle and the greatest number of each column in ``values``, in each group."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    return [
        dict(zip(by, key, strict=True))
        | {"cases": str(len(group))}
        | {f"{value}: least, median, greatest": _describe_spread(group, value) for value in values}
        for key, group in groups.items()
    ]


def _describe_spread(rows: Sequence[Row], value: str) -> str:
    numbers = [found for row in rows if (found := number(row, value)) is not None]
    three = (min(numbers), statistics.median(numbers), max(numbers))
    return ", ".join(f"{figure:.2f}" for figure in three)


_RATIO = "auto / best checkpointing"

# By the program that made them, in the order of the document. None: the picture says it all.
SECTIONS: dict[str, Callable[[Sequence[Row]], list[Row]] | None] = {
    "memory": partial(pivot, case=memory.KEY[:-1], method="method", value=memory.VALUE),
    "speed": partial(pivot, case=("network",), method="method", value=speed.VALUE),
    "frontier": frontier.present,
    "kernels": partial(pivot, case=("elements", "operation"), method="way", value="GB/s"),
    "exactness": show_all,
    "accuracy": show_all,
    "inversion": partial(pivot, case=("inverse", "γ"), method="depth", value="error of x[0]"),
    "depth": partial(pivot, case=("depth",), method="method", value="MiB"),
    "ladder": None,
    "timm": show_all,
    "zoo": partial(spread, by=(), values=(_RATIO,)),
    "batches": None,
    "conversion": None,
    "photographs": show_all,
    "prediction": partial(spread, by=("precision", "strategy"), values=("% of step", "% of whole")),
    "gpu": gpu.present,
    "loading": show_all,
    "processes": show_all,
    "reference": show_all,
    "fuzz": show_all,
    "budget": show_all,
    "whole": partial(pivot, case=("network",), method="method", value="MiB"),
    "estimates": partial(pivot, case=("network", "images"), method="tool", value="% of measured"),
    "cost": partial(
        spread, by=("strategy",), values=("measured ratio", "calibrated ratio", "assumed ratio")
    ),
    "transfer": transfer.present,
    "hymenoptera": hymenoptera.present,
    "finetuning": finetuning.present,
}


def render() -> str:
    """All results as one Markdown document."""
    return "\n".join([INTRODUCTION, *render_losses(), *map(render_section, SECTIONS)])


def render_section(title: str, folder: Path = RESULTS) -> str:
    """How a program measures, and its results on every machine, which are in ``folder``."""
    text = inspect.getdoc(import_module(f"benchmarks.{title}"))
    parts = [f"## {title.capitalize()}", f"`python -m benchmarks.{title}`", f"{text}"]
    present = SECTIONS[title]
    for log in find_logs(title, folder):
        parts.append(f"### {title.capitalize()} on {log.machine}, {log.torch}")
        parts.append(f"[all rows](results/{log.path.name})")
        if log.picture.is_file():
            parts.append(f"![{title}](results/{log.picture.name})")
        if present:
            parts.append(render_table(present(log.read())))
    return "\n\n".join(parts) + "\n"


def render_table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    if not rows:
        return "No rows."
    columns = list(rows[0])
    cells = ([cell.replace("|", "\\|") for cell in row.values()] for row in rows)
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_losses() -> Iterator[str]:
    """Every case in which another method needs less memory or less time than momconv."""
    yield "## Where momconv loses\n"
    yield LOSSES
    losses = [
        *(find_losses(log, memory.VALUE, memory.KEY[:-1]) for log in find_logs("memory")),
        *(find_losses(log, speed.VALUE, ("network",), "time ") for log in find_logs("speed")),
    ]
    yield "\n".join(line for lines in losses for line in lines) + "\n"


def find_losses(log: Log, column: str, case: Sequence[str], what: str = "") -> Iterator[str]:
    """A line for each case, naming the methods with smaller numbers than momconv's."""
    rows = log.read()
    for ours in rows:
        value = number(ours, column)
        if ours["method"] != "momconv" or value is None:
            continue
        others = [row for row in rows if all(row[key] == ours[key] for key in case)]
        better = {
            row["method"]: theirs
            for row in others
            if (theirs := number(row, column)) is not None and theirs < value
        }
        name = " ".join(ours[key] for key in case)
        names = ", ".join(f"{method} {theirs:g}" for method, theirs in better.items())
        if better:
            yield f"* {what}{column}, {name}: momconv {value:g}; {names} ({log.machine})"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
