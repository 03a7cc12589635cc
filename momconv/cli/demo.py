"""``momconv demo``."""

import shlex
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from momconv.cli._console import out
from momconv.cli._display import Display

if TYPE_CHECKING:
    from momconv.demo import Demo


def demo(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where everything goes.")
    ] = Path("momconv-demo"),
) -> None:
    """Train on handwritten digits, convert, fine-tune and compare, in a minute or two."""
    from momconv.demo import demonstrate
    from momconv.reports.memory import judge
    from momconv.reports.run import report_run

    with ExitStack() as bars:
        display = Display(bars)
        done = demonstrate(output, listener=display)
        for run in done.runs:
            report_run(run, partial(display.advance, f"describing {run.folder.name}"))
    out.print(_tabulate(done))
    out.print(Text(f"\n{judge(done.memory)}"))
    file, data = (shlex.quote(str(p)) for p in (done.finetuned, output / "digits" / "val"))
    out.print(Text(f"report: {done.runs[-1].folder / 'report.html'}"), soft_wrap=True)
    out.print(Text(f"next: momconv eval {file} --data {data}"), soft_wrap=True)


def _tabulate(done: "Demo") -> Table:
    needs = {p.variant: p.peak.bytes_per_image for p in done.memory.profiles}
    table = Table("network", box=None, pad_edge=False)
    for title in ("top-1", "MiB an image"):
        table.add_column(title, justify="right")
    table.add_column("file", overflow="fold")
    for name, path, need in (
        ("original", done.original, needs["plain"]),
        ("converted", done.converted, needs["auto"]),
        ("fine-tuned", done.finetuned, needs["auto"]),
    ):
        table.add_row(name, f"{done.scores[path].top1:.1%}", f"{need / 2**20:.2f}", Text(str(path)))
    return table
