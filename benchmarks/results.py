"""Where results go: a table on the terminal, and a CSV named after machine and torch version."""

import csv
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent / "results"


def machine(device: torch.device) -> str:
    """The processor or GPU that did the work, for file names."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).replace(" ", "-")
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}threads"


def report(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], device: torch.device
) -> None:
    """Print ``rows`` and write them to results/TITLE-MACHINE-torchVERSION.csv."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)
    FOLDER.mkdir(exist_ok=True)
    version = torch.__version__.partition("+")[0]
    path = FOLDER / f"{title}-{machine(device)}-torch{version}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
