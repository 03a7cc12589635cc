"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

ArgumentOption = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="KEY=VALUE", help="An argument for it; again for more."),
]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead, on stdout.")
]
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
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the file.")]
