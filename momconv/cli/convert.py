"""``momconv convert``."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from momconv.cli._console import out, print_json
from momconv.cli._display import Display
from momconv.cli._options import (
    ArgumentOption,
    CropOption,
    InterpolationOption,
    JsonOption,
    MeanOption,
    NetworkOption,
    OverwriteOption,
    RefetchOption,
    ResizeOption,
    StdOption,
)
from momconv.cli._own import Function
from momconv.errors import UsageError
from momconv.files.atomic import require_free
from momconv.opening import name_after
from momconv.units import parse_duration, parse_share
from momconv.vocabulary import Velocity
from momconv.words import quoted

if TYPE_CHECKING:
    from momconv.reports.conversion import Conversion, Reversion

_INTERRUPTED = 130  # exit code
_COUNTS = (2000, 5000)  # images, without and with distillation


def convert(  # noqa: PLR0913 (one for each option)
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A network, such as resnet50; momconv models lists them. Or your own: a function"
            " that makes it, as model.py:make or package.module:make. Or timm:NAME."
        ),
    ] = None,
    arg: ArgumentOption = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", min=16, help="Side of the network's images.", show_default="its own"
        ),
    ] = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    network: NetworkOption = None,
    refetch: RefetchOption = False,
    back: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instead of MODEL: write this file's network as a plain one."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A torchvision name, a file, or none.",
            show_default="DEFAULT",
        ),
    ] = None,
    gamma: Annotated[
        str | None,
        typer.Option(
            metavar="G",
            help="0 … 1, where 0 keeps the plain network; auto: the largest that drifts little.",
            show_default="0.9",
        ),
    ] = None,
    max_drift: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="With --gamma auto: of images with another top-1 than the original's.",
            show_default="1%",
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="auto: where it saves memory; all; or as layer3,layer4.",
            show_default="auto",
        ),
    ] = None,
    velocity: Annotated[
        Velocity | None,
        typer.Option(help="v starts at 0, or at the first residual.", show_default="zero"),
    ] = None,
    gain: Annotated[
        bool | None,
        typer.Option(
            help="Give every block the weight that it had in the sum.", show_default="gain"
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Images to re-estimate BatchNorm and refine gains and norms on; no labels needed.",
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTH",
            help="Then train all parameters towards the original: 6 epochs, or 5min.",
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Images to compare on.",
            show_default="a fifth of those to calibrate on",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Images of each folder, chosen at random.",
            show_default="2000; 5000 to distil",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of that choice.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="To calibrate and distil on: auto, cpu, cuda.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write; with --back also .pth.",
            show_default="MODEL-gGAMMA.safetensors; FILE-plain.safetensors",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Turn a residual network into a momentum network with the same weights, in one file.

    The effect of each step on the outputs is measured. Ctrl-C in a training keeps the best so far.
    """
    given = {
        "MODEL": model,
        "--weights": weights,
        "--resolution": resolution,
        "--resize": resize,
        "--crop": crop,
        "--mean": mean,
        "--std": std,
        "--interpolation": interpolation,
        "--gamma": gamma,
        "--max-drift": max_drift,
        "--stages": stages,
        "--velocity": velocity,
        "--gain or --no-gain": gain,
    }
    _check_combination(given, back, calibrate, distill)
    length = parse_distillation(distill) if distill else None
    limit, wanted = parse_share(max_drift or "1%", "--max-drift"), _read_gamma(gamma or "0.9")

    from momconv.converting import Means, Scheme, convert_network, revert_network
    from momconv.zoo.preparation import parse_preparation

    means = Means(calibrate, verify, max_images or _COUNTS[bool(length)], seed, length, device)
    scheme = Scheme(
        model=model or "",
        arguments=tuple(arg or []),
        resolution=resolution,
        preparation=parse_preparation(
            resize=resize, crop=crop, mean=mean, std=std, interpolation=interpolation
        ),
        weights=weights or "DEFAULT",
        gamma=wanted,
        max_drift=limit,
        stages=stages or "auto",
        velocity=velocity or "zero",
        gain=gain is not False,
    )
    path = output or Path(f"{name_after(back)}-plain.safetensors" if back else scheme.file_name)
    require_free(path, overwrite=overwrite)
    with ExitStack() as bars:
        done: Conversion | Reversion
        if back:
            load = Function(network, arg).load
            done = revert_network(back, means, path, Display(bars), load)
        else:
            done = convert_network(scheme, means, path, Display(bars))
    if json_output:
        print_json({"ok": True, **done.to_json()})
    else:
        for part in done.show():
            out.print(part, soft_wrap=True)
    if done.interrupted:
        raise typer.Exit(_INTERRUPTED)


def parse_distillation(text: str) -> int | float:
    """Return epochs, an int, or minutes, a float.

    >>> parse_distillation("6"), parse_distillation("90s")
    (6, 1.5)

    Raises:
        UsageError: ``text`` is neither.
    """
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return parse_duration(text) / 60
    except UsageError as error:
        raise UsageError(
            f"--distill {text}: {quoted(text)} is neither a number of epochs nor a duration",
            kind=error.kind,
            fix="--distill 6\n--distill 5min",
        ) from error


def _check_combination(
    given: Mapping[str, object], back: Path | None, calibrate: Path | None, distill: str | None
) -> None:
    """Refuse options that say different things, or nothing together."""
    names = [name for name, value in given.items() if value is not None]
    if back is not None and names:
        raise UsageError(
            f"--back takes the network as it is in the file, so {names[0]} means nothing",
            kind="usage.conflict",
        )
    if back is None and given["MODEL"] is None:
        raise UsageError(
            "no network to convert",
            kind="usage.missing_argument",
            fix="momconv convert resnet50\nmomconv convert --back FILE",
        )
    searches = given["--gamma"] == "auto"
    if given["--max-drift"] is not None and not searches:
        raise UsageError(
            "--max-drift is a limit for the choice of γ, which is not to be chosen",
            kind="usage.conflict",
            fix="--gamma auto",
        )
    if calibrate is None and (distill or searches):
        raise UsageError(
            f"{'--distill' if distill else '--gamma auto'} needs images to adapt the network on",
            kind="usage.missing_option",
            fix="--calibrate FOLDER",
        )


def _read_gamma(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"--gamma {text}: {quoted(text)} is not a number",
            kind="usage.bad_value",
            fix="--gamma 0.9\n--gamma auto",
        ) from None
