"""``momconv export``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from momconv.cli._console import err, out, print_json, warn
from momconv.cli._options import (
    ArgumentOption,
    JsonOption,
    ModelArgument,
    NetworkOption,
    OverwriteOption,
)
from momconv.cli._own import Function
from momconv.files.atomic import require_free
from momconv.opening import name_after
from momconv.units import format_bytes

if TYPE_CHECKING:
    from momconv.files.export import Export


def export(  # noqa: PLR0913 (one for each option)
    *,
    file: ModelArgument,
    format_: Annotated[
        Literal["torch-export", "onnx", "torchvision"],
        typer.Option("--format", help="torchvision is a plain state dict, without momentum."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write; a .json is written beside it.",
            show_default="FILE.pt2, .onnx, or FILE-plain.safetensors",
        ),
    ] = None,
    network: NetworkOption = None,
    arg: ArgumentOption = None,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Write a model for other programs, and check that it computes the same there."""
    from momconv.files.export import SUFFIXES, config_path, require_extra
    from momconv.files.export import export as write
    from momconv.files.plain_file import check_suffix

    plain = "-plain" if format_ == "torchvision" else ""
    path = output or Path(f"{name_after(file)}{plain}{SUFFIXES[format_]}")
    if format_ == "torchvision":
        check_suffix(path)
    require_extra(format_)
    for new in (path, config_path(path)):
        require_free(new, overwrite=overwrite)
    with err.status(f"exporting {file.name}"):
        done = write(Function(network, arg).load(file), path, format_)
    if done.lost:
        warn(done.lost)
    if json_output:
        print_json({"ok": True, "file": file, **asdict(done)})
    else:
        _print(done)


def _print(done: "Export") -> None:
    difference = f"{done.difference:.2g} in logits of up to {done.largest:.2g}"
    rows = {
        "written": f"{done.path} ({format_bytes(done.path.stat().st_size)})",
        "beside it": f"{done.config}: classes and preprocessing",
        "difference": f"at most {difference}, on images of noise",
        "Python": done.python,
    }
    for label, value in rows.items():
        out.print(Text(f"{label:<11}{value}"), soft_wrap=True)
