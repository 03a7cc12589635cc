"""``momconv predict``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from momconv.cli._console import note, out, print_json, print_json_lines, progress, warn
from momconv.cli._options import (
    ArgumentOption,
    DeviceOption,
    JsonOption,
    MaxBadFractionOption,
    NetworkOption,
)
from momconv.cli._own import Function
from momconv.errors import UsageError

if TYPE_CHECKING:
    from momconv.prediction import Predictions

Format = Literal["table", "csv", "jsonl"]


def predict(  # noqa: PLR0913 (one for each option)
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A converted or fine-tuned model.")],
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Images, and folders of them.")
    ],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Classes to name.")] = 5,
    format_: Annotated[
        Format | None,
        typer.Option("--format", help="jsonl is an object a line.", show_default="table"),
    ] = None,
    network: NetworkOption = None,
    arg: ArgumentOption = None,
    device: DeviceOption = "auto",
    max_bad_fraction: MaxBadFractionOption = 0.05,
    json_output: JsonOption = False,
) -> None:
    """Say what is on images: the most probable classes of each."""
    if json_output and format_ is not None:
        raise UsageError(
            f"--json and --format {format_} exclude each other",
            kind="usage.exclusive_options",
            fix="leave out one of them",
        )
    from momconv.planner.devices import find_device
    from momconv.prediction import list_files
    from momconv.prediction import predict as say
    from momconv.zoo.description import describe

    where = find_device(device)
    files = list_files(paths)
    model = Function(network, arg).load(file)
    if describe(model).classes is None:
        note(f"{file} names no classes; they are called by their numbers, from 0")
    with progress("predicting", len(files)) as report:
        done = say(
            model,
            files,
            top=top,
            device=where,
            max_bad_fraction=max_bad_fraction,
            progress=lambda count, _: report(count, ""),
        )
    for reason in done.unreadable:
        warn(f"left out: {reason}")
    if json_output:
        predictions = [image.to_json() for image in done.images]
        document = {"file": file, "predictions": predictions, "unreadable": done.unreadable}
        print_json({"ok": True, **document})
    else:
        _print(done, format_ or "table")


def _print(done: "Predictions", format_: Format) -> None:
    from momconv.reports.predictions import tabulate_predictions, to_csv

    if format_ == "table":
        out.print(tabulate_predictions(done))
    elif format_ == "csv":
        typer.echo(to_csv(done), nl=False)
    else:
        print_json_lines([image.to_json() for image in done.images])
