"""``momconv predict``."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from momconv.cli._console import (
    describe_error,
    note,
    out,
    print_json,
    print_json_lines,
    progress,
    tell,
    warn,
)
from momconv.cli._options import (
    ArgumentOption,
    CropOption,
    DeviceOption,
    InterpolationOption,
    JsonOption,
    MeanOption,
    ModelArgument,
    NetworkOption,
    ResizeOption,
    StdOption,
)
from momconv.cli._own import Function
from momconv.errors import DataError, UsageError

if TYPE_CHECKING:
    from momconv.prediction import Predictions

_Format = Literal["table", "csv", "jsonl"]
_SHOWN = 10  # unreadable images that warnings name


def predict(  # noqa: PLR0913 (one for each option)
    *,
    file: ModelArgument,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH…", help="Images, folders of them, patterns, or - for a list on stdin."
        ),
    ],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Classes to name.")] = 5,
    format_: Annotated[
        _Format | None,
        typer.Option("--format", help="jsonl is an object a line.", show_default="table"),
    ] = None,
    network: NetworkOption = None,
    arg: ArgumentOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    device: DeviceOption = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if an image has no answer.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Say what is on images: the most probable classes of each."""
    if json_output and format_ is not None:
        raise UsageError(
            f"--json and --format {format_} exclude each other",
            kind="usage.exclusive_options",
        )
    from momconv.data.values import warn_of_values
    from momconv.planner.devices import find_device
    from momconv.prediction import list_files
    from momconv.prediction import predict as say
    from momconv.zoo.description import describe
    from momconv.zoo.preparation import parse_preparation

    where = find_device(device)
    said = parse_preparation(
        resize=resize, crop=crop, mean=mean, std=std, interpolation=interpolation
    )
    files = list_files(_read_list(paths))
    model = Function(network, arg).load_prepared(file, said)
    if describe(model).classes is None:
        note(f"{file} names no classes; they are called by their numbers, from 0")
    with progress("predicting", len(files)) as report:
        done = say(
            model,
            files,
            top=top,
            device=where,
            progress=lambda count, _: report(count, ""),
        )
    _warn_of_unreadable(done)
    for text in warn_of_values(done.outside, done.guessed):
        tell(text)
    failure = _refuse_unreadable(done, len(files)) if strict and done.unreadable else None
    if json_output:
        failed = {"error": describe_error(failure)} if failure else {}
        predictions = [image.to_json() for image in done.images]
        unreadable = [image.to_json() for image in done.unreadable]
        document = {"file": file, "predictions": predictions, "unreadable": unreadable}
        print_json({"ok": failure is None, **failed, **document})
        raise typer.Exit(failure.exit_code if failure else 0)
    _print(done, format_ or "table")
    if failure:
        raise failure


def _read_list(paths: Iterable[Path]) -> list[Path]:
    """Return the ``paths``, with those on the lines of stdin in place of ``-``."""
    listed: list[Path] = []
    for path in paths:
        lines = sys.stdin.buffer.read().splitlines() if str(path) == "-" else [os.fsencode(path)]
        listed += [Path(os.fsdecode(line)) for line in lines if line]
    return listed


def _warn_of_unreadable(done: "Predictions") -> None:
    from momconv.words import printable

    for bad in done.unreadable[:_SHOWN]:
        warn(f"left out: {printable(bad.path)}: {bad.error}")
    if len(done.unreadable) > _SHOWN:
        more = len(done.unreadable) - _SHOWN
        warn(f"left out: {more} more; --format csv and jsonl have a record of each")


def _refuse_unreadable(done: "Predictions", files: int) -> DataError:
    return DataError(
        f"{len(done.unreadable)} of {files} images have no answer (--strict)",
        kind="data.unreadable_image",
    )


def _print(done: "Predictions", format_: _Format) -> None:
    from momconv.reports.predictions import tabulate_predictions, to_csv

    if format_ == "table":
        out.print(tabulate_predictions(done))
    elif format_ == "csv":
        typer.echo(to_csv(done), nl=False, color=True)  # names may have escape sequences in them
    else:
        predictions = [image.to_json() for image in done.images]
        print_json_lines([*predictions, *(image.to_json() for image in done.unreadable)])
