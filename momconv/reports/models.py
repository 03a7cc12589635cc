"""The networks that momconv converts, as a table."""

from collections.abc import Iterable

from rich.table import Table

from momconv.planner.catalogue import Entry
from momconv.planner.saving import IMAGES

MIB = 2**20


def show_models(entries: Iterable[Entry]) -> Table:
    """A row for each network."""
    caption = f"MiB for an image in a training step of {IMAGES}, predicted"
    table = Table("network", box=None, pad_edge=False, caption=caption, caption_justify="left")
    for title in ("parameters", "pixels", "runs", "deepest", "store", "auto", "saved"):
        table.add_column(title, justify="right")
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.parameters / 1e6:.1f} M",
            str(entry.resolution),
            str(entry.runs),
            str(entry.deepest),
            f"{entry.store_bytes / MIB:.1f}",
            f"{entry.auto_bytes / MIB:.1f}",
            f"{entry.saved:.0%}",
        )
    return table
