"""Where results go: a table on the terminal, and a CSV named after machine and torch version.

``python -m benchmarks.results`` writes RESULTS.md from all CSV files.
"""

import csv
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
FOLDER = HERE / "results"


def machine(device: torch.device) -> str:
    """The GPU or the processor that did the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).replace(" ", "-")
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}-threads"


def report(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], device: torch.device
) -> None:
    """Print ``rows`` and write them to results/TITLE_MACHINE_torch-VERSION.csv."""
    cells = [
        [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    table = Table(*columns, title=title)
    for row in cells:
        table.add_row(*row)
    Console().print(table)
    FOLDER.mkdir(exist_ok=True)
    version = torch.__version__.partition("+")[0]
    path = FOLDER / f"{title}_{machine(device)}_torch-{version}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *cells])


def render() -> str:
    """All results as one Markdown document."""
    parts = ["# Results", "Written by `python -m benchmarks.results` from the files in results/."]
    for path in sorted(FOLDER.glob("*.csv")):
        title, _, rest = path.stem.partition("_")
        where, _, version = rest.rpartition("_")  # the machine's name may have underscores
        parts.append(f"## {title}\n\n`python -m benchmarks.{title}` on {where}, {version}")
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        lines = [columns, ["---"] * len(columns), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(render(), encoding="utf-8")
