"""Where results go: a table on the terminal, and a CSV named after machine and torch version."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from momconv.planner.devices import name_processor

Row = dict[str, str]  # cells by column

RESULTS = Path(__file__).parent / "results"
Out = Annotated[Path | None, typer.Option(help="Where the results go.", show_default="results/")]
_FAILED = "failed"
MISSING = "–"  # in place of a ratio where a method failed


@dataclass(frozen=True, slots=True)
class Log:
    """The CSV of one benchmark, ``title``, on one machine with one version of torch."""

    path: Path

    @classmethod
    def of(cls, title: str, device: torch.device, folder: Path | None) -> "Log":
        """The log that a run on ``device`` writes in ``folder``, or else with all others."""
        version = torch.__version__.partition("+")[0]
        return cls((folder or RESULTS) / f"{title}_{machine(device)}_torch-{version}.csv")

    @property
    def title(self) -> str:
        """The name of the program."""
        return self.path.stem.partition("_")[0]

    @property
    def machine(self) -> str:
        """What did the work."""
        return self.path.stem.partition("_")[2].rpartition("_")[0]  # it may have underscores

    @property
    def torch(self) -> str:
        """Such as ``torch-2.11.0``."""
        return self.path.stem.rpartition("_")[2]

    @property
    def picture(self) -> Path:
        """Where a picture of it goes."""
        return self.path.with_suffix(".png")

    def read(self) -> list[Row]:
        """All rows; none if there is no file yet."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def merge(self, rows: Sequence[Row], key: Sequence[str]) -> None:
        """Add ``rows``; one that agrees in the columns of ``key`` with an old one replaces it.

        Rows that agree in all of these columns but the last one stay together.
        """
        merged = {tuple(row[column] for column in key): row for row in (*self.read(), *rows)}
        cases = list(dict.fromkeys(index[:-1] for index in merged))
        ordered = sorted(merged, key=lambda index: cases.index(index[:-1]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(merged[index] for index in ordered)


def find_logs(title: str, folder: Path = RESULTS) -> Iterator[Log]:
    """The logs of one benchmark, from all machines."""
    return map(Log, sorted(folder.glob(f"{title}_*.csv")))


def machine(device: torch.device) -> str:
    """The GPU or the processor that does the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).replace(" ", "-")
    return f"{name_processor()}-{torch.get_num_threads()}-threads"


def choose_device() -> torch.device:
    """The first GPU if there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def show(title: str, rows: Sequence[Row]) -> None:
    """Print ``rows`` on the terminal."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def measure_each(
    networks: Sequence[str], measure: Callable[[str], Row], log: Log, key: Sequence[str]
) -> None:
    """Log what ``measure`` says of each network as soon as it does, and show these rows."""
    for name in networks:
        row = measure(name)
        Console(stderr=True).print(*row.values())
        log.merge([row], key)
    show(log.title, [row for row in log.read() if row["network"] in networks])


def number(row: Row, column: str) -> float | None:
    """The number in a cell; None where the method failed."""
    return None if row[column].startswith((_FAILED, MISSING)) else float(row[column])


def ratio(row: Row, base: Row | None, column: str) -> str:
    """How many times as much as ``base`` a row has; a dash where either has no number."""
    ours = number(row, column)
    theirs = number(base, column) if base else None
    return f"{ours / theirs:.2f}" if ours is not None and theirs else MISSING
