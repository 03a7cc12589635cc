"""``momconv models``."""

from dataclasses import asdict
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from momconv.cli._console import out, print_json, progress
from momconv.cli._options import JsonOption
from momconv.errors import UsageError

if TYPE_CHECKING:
    from momconv.planner.catalogue import Entry

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

    Memory is predicted for training steps of 32 images at the network's own
    resolution: seconds for each network the first time, then remembered.
    """
    from momconv.planner.catalogue import list_entries
    from momconv.reports.inspection import show_models
    from momconv.zoo.networks import names

    wanted = [n for n in names() if not pattern or any(fnmatch(n, each) for each in pattern)]
    if not wanted:
        raise UsageError(
            f"no network is called {' or '.join(pattern or ())}",
            kind="usage.unknown_model",
            fix="momconv models",
        )
    with progress("predicting", len(wanted)) as report:
        entries = list_entries(wanted, report)
    if sort != "name":
        entries.sort(key=lambda entry: _key(entry, sort), reverse=True)
    if json_output:
        listed = [{"name": entry.name, **asdict(entry), "saved": entry.saved} for entry in entries]
        print_json({"ok": True, "models": listed})
        return
    out.print(show_models(entries))


def _key(entry: "Entry", sort: Order) -> float:
    return float(getattr(entry, "store_bytes" if sort == "store" else sort))
