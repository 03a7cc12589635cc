"""``momconv convert``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from momconv.cli._console import err, out, print_json, progress, warn
from momconv.errors import InversionError

if TYPE_CHECKING:
    from torch import nn

    from momconv.reports.conversion import Calibration, Conversion

_FEW = 100  # images, below which BatchNorm's statistics are poor
_OUTPUT = "MODEL-gGAMMA.safetensors"
_SHOWN = 3  # unreadable files that a warning names
_LARGEST = 112  # pixels: the self-test is as good on small images, and several times faster


def convert(  # noqa: PLR0913 (one for each option)
    *,
    model: Annotated[str, typer.Argument(help="A network, such as resnet50 or cifar_resnet20.")],
    weights: Annotated[
        str, typer.Option(metavar="NAME", help="A torchvision name, a file, or none.")
    ] = "DEFAULT",
    gamma: Annotated[
        float, typer.Option(metavar="G", help="0 … 1; 0 keeps the plain network.")
    ] = 0.9,
    stages: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="auto: where it saves memory; all; or as layer3,layer4."
        ),
    ] = "auto",
    velocity: Annotated[
        Literal["zero", "residual"], typer.Option(help="v starts at 0, or at the first residual.")
    ] = "zero",
    gain: Annotated[
        bool, typer.Option(help="Give every block the weight that it had in the sum.")
    ] = True,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images, on which to re-estimate BatchNorm."),
    ] = None,
    max_images: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images of that folder, chosen at random.")
    ] = 2000,
    seed: Annotated[int, typer.Option(metavar="N", help="Of that choice.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="[default: MODEL-gGAMMA.safetensors]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")
    ] = False,
) -> None:
    """Turn a residual network into a momentum network with the same weights, in one file."""
    from momconv.data.calibration_images import choose_images
    from momconv.files.atomic import require_free
    from momconv.files.model_file import save
    from momconv.reports.conversion import Conversion, show_conversion
    from momconv.surgery.conversion import convert as convert_network
    from momconv.surgery.conversion import summarise
    from momconv.zoo.description import describe
    from momconv.zoo.networks import check_name
    from momconv.zoo.weights import load_network

    check_name(model)
    path = output or Path(f"{model}-g{gamma:g}.safetensors")
    require_free(path, overwrite=overwrite)
    files = choose_images(calibrate, max_images, seed) if calibrate else []
    plain = load_network(model, weights)
    with err.status(f"converting {model}"):
        network = convert_network(plain, gamma, _read_stages(stages), velocity, gain=gain)
    calibration = _calibrate(network, files) if files else None
    if gamma:
        _test(network)
    save(network, path, extra={"calibration": calibration and asdict(calibration)})
    done = Conversion(
        architecture=model,
        source=describe(network).source,
        gamma=gamma,
        velocity=velocity,
        gain=gain,
        stages=tuple(summarise(network)),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        calibration=calibration,
        path=path,
        bytes=path.stat().st_size,
    )
    _warn(done)
    if json_output:
        print_json({"ok": True, **done.to_json()})
        return
    for part in show_conversion(done):
        out.print(part, soft_wrap=True)


def _read_stages(text: str) -> "Literal['auto', 'all'] | list[str]":
    if text == "all":
        return "all"
    return "auto" if text == "auto" else text.split(",")


def _calibrate(network: "nn.Module", files: list[Path]) -> "Calibration":
    from momconv.data.calibration_images import CalibrationImages
    from momconv.reports.conversion import Calibration
    from momconv.surgery.calibration import calibrate
    from momconv.zoo.description import describe

    with progress("calibrating", len(files)) as report:
        images = CalibrationImages(files, describe(network).preprocessing, lambda n: report(n, ""))
        layers = calibrate(network, images).layers
    unreadable = tuple(images.unreadable)
    return Calibration(len(files) - len(unreadable), layers, unreadable)


def _test(network: "nn.Module") -> None:
    from momconv.surgery.certificate import gradients_are_exact
    from momconv.zoo.description import describe

    resolution = min(describe(network).preprocessing.resolution, _LARGEST)
    with err.status("comparing gradients"):
        exact = gradients_are_exact(network, resolution)
    if not exact:
        raise InversionError(
            "this network's gradients are not those of ordinary backpropagation, bit for bit",
            kind="inversion.not_exact",
        )


def _warn(done: "Conversion") -> None:
    if done.gamma and not any(stage.momentum for stage in done.stages):
        warn("no run of blocks is long enough for momentum to save memory; --stages all takes any")
    if done.calibration is None:
        if done.gamma and done.source != "none":
            warn(
                "BatchNorm's statistics are still those of the plain network, which costs accuracy;"
                " --calibrate FOLDER re-estimates them on your images"
            )
        return
    if bad := done.calibration.unreadable:
        listed = "\n".join(f"  {reason}" for reason in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        warn(f"{len(bad)} images left out because they are unreadable\n{listed}{more}")
    if done.calibration.images < _FEW:
        warn(f"only {done.calibration.images} images to calibrate on; {_FEW} or more are better")
