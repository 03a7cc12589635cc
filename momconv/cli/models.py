"""``momconv models``."""

from dataclasses import asdict
from fnmatch import fnmatch
from typing import Annotated, Literal

import typer

from momconv.catalogue import Entry, read_catalogue
from momconv.cli._console import out, print_json
from momconv.cli._options import JsonOption
from momconv.errors import UsageError
from momconv.reports.models import show_models

Order = Literal["name", "parameters", "resolution", "runs", "deepest", "store", "saved"]


def models(
    *,
    pattern: Annotated[
        list[str] | None, typer.Argument(help="Only these, such as 'regnet_y*'; again for more.")
    ] = None,
    sort: Annotated[Order, typer.Option(help="The column to sort by.")] = "name",
    json_output: JsonOption = False,
) -> None:
    """List the networks that momconv converts, and what that saves.

    Memory was predicted for training steps of 32 images at the network's own resolution.
    """
    catalogue = read_catalogue()
    entries = [
        entry
        for entry in catalogue.entries
        if not pattern or any(fnmatch(entry.name, each) for each in pattern)
    ]
    if not entries:
        raise UsageError(
            f"no network is called {' or '.join(pattern or ())}",
            kind="usage.unknown_model",
            fix="momconv models",
        )
    if sort != "name":
        entries.sort(key=lambda entry: _key(entry, sort), reverse=True)
    if json_output:
        listed = [asdict(entry) | {"saved": entry.saved} for entry in entries]
        print_json({"ok": True, "predicted_by": catalogue.predicted_by, "models": listed})
        return
    out.print(show_models(catalogue, entries))


def _key(entry: Entry, sort: Order) -> float:
    return float(getattr(entry, "store_bytes" if sort == "store" else sort))
