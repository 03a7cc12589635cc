"""The networks that momconv converts, as a table. No PyTorch is imported for it."""

from collections.abc import Sequence

from rich.table import Table

from momconv.catalogue import Catalogue, Entry

_MIB = 2**20


def show_models(catalogue: Catalogue, entries: Sequence[Entry]) -> Table:
    """Return a row for each of the ``entries``, and what the columns mean below."""
    versions = ", ".join(f"{name} {version}" for name, version in catalogue.predicted_by.items())
    caption = (
        "parameters: numbers that it learns · pixels: side of its images\n"
        "runs: sequences of residual blocks, which momentum reverses · deepest: blocks of the "
        "longest\n"
        f"store, auto: MiB for an image in a training step of {catalogue.images}, everything "
        "stored, and converted\nsaved: of these, by the conversion; 0 % where momentum hardly "
        f"helps\npredicted by {versions}; momconv profile-memory NAME for your own setting"
    )
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
            f"{entry.store_bytes / _MIB:.1f}",
            f"{entry.auto_bytes / _MIB:.1f}",
            f"{entry.saved:.0%}",
        )
    return table
