"""Options that several commands have."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from momconv.cli._recipe_options import find_options


def ask_to_refetch(wanted: bool) -> bool:  # noqa: FBT001 (Typer calls it)
    """Let what is read from now on be fetched again where it is damaged."""
    if wanted:
        os.environ["MOMCONV_REFETCH"] = "1"
    return wanted


def _input(name: str) -> Any:
    """Return the option that sets ``data.name`` of a recipe, for a command without one."""
    option = find_options()[f"data.{name}"]
    return typer.Option(
        option.flags,
        metavar=option.metavar,
        help=option.help,
        rich_help_panel="How images become the input",
    )


ArgumentOption = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="KEY=VALUE", help="An argument for it; again for more."),
]
CropOption = Annotated[str | None, _input("crop")]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1.")]
InterpolationOption = Annotated[str | None, _input("interpolation")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead, on stdout.")
]
MeanOption = Annotated[str | None, _input("mean")]
ModelArgument = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A converted or fine-tuned model, or a run's folder."),
]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        "--network",
        metavar="FUNCTION",
        help="For a file of a network of your own: what makes it, as model.py:make.",
    ),
]
RefetchOption = Annotated[
    bool,
    typer.Option(
        "--refetch",
        callback=ask_to_refetch,
        help="Download weights again whose copy here is damaged.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]
ResizeOption = Annotated[str | None, _input("resize")]
StdOption = Annotated[str | None, _input("std")]
