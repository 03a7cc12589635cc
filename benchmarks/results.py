"""RESULTS.md: the files in results/ as one document. ``python -m benchmarks.results`` writes it."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks import finetuning, fuzz, memory, speed, transfer
from benchmarks.tables import Log, Row, find_logs, number

DOCUMENT = Path(__file__).parent / "RESULTS.md"

INTRODUCTION = """\
# Results

Written by `python -m benchmarks.results` from the CSV files in results/. Each section begins with
the command and how it measures; the machine and the version of torch stand above each table, the
versions of the other packages in it. Networks have random weights. momconv and momentumnet run with
γ = 0.9 unless a table says otherwise. "failed" stands where a method does not run, with the reason.

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


# By the program that made them, in the order of the document.
SECTIONS: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    "memory": memory.present,
    "speed": show_all,
    "kernels": show_all,
    "exactness": show_all,
    "depth": show_all,
    "ladder": show_all,
    "zoo": show_all,
    "batches": show_all,
    "conversion": show_all,
    "prediction": show_all,
    "loading": show_all,
    "fuzz": fuzz.present,
    "budget": show_all,
    "estimates": show_all,
    "cost": show_all,
    "transfer": transfer.present,
    "finetuning": finetuning.present,
}


def render() -> str:
    """All results as one Markdown document."""
    return "\n".join([INTRODUCTION, *render_losses(), *map(render_section, SECTIONS)])


def render_section(title: str) -> str:
    """How a program measures, and its results on every machine."""
    text = inspect.getdoc(import_module(f"benchmarks.{title}"))
    parts = [f"## {title.capitalize()}", f"`python -m benchmarks.{title}`", f"{text}"]
    for log in find_logs(title):
        parts.append(f"### {title.capitalize()} on {log.machine}, {log.torch}")
        if log.picture.is_file():
            parts.append(f"![{title}](results/{log.picture.name})")
        parts.append(render_table(SECTIONS[title](log.read())))
    return "\n\n".join(parts) + "\n"


def render_table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *(list(row.values()) for row in rows)]
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
