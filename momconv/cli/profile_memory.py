"""``momconv profile-memory``."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from momconv.cli._console import err, out, print_json, progress
from momconv.cli._options import ArgumentOption, DeviceOption, JsonOption, NetworkOption
from momconv.cli._own import Function
from momconv.errors import UsageError
from momconv.opening import find_model_file, is_special
from momconv.units import parse_bytes
from momconv.vocabulary import OptimizerName
from momconv.words import quoted

if TYPE_CHECKING:
    from torch import nn

    from momconv.planner.prediction import Training
    from momconv.planner.profile import MemoryProfile

_RECORDED = 4  # images of the step in a snapshot
_BUDGETS = ["3GiB,8GiB,24GiB,80GiB"]


def profile_memory(  # noqa: PLR0913 (one for each option)
    *,
    model: Annotated[
        str,
        typer.Argument(
            help="A network, such as resnet50, or your own, as model.py:make, or a converted file,"
            " or a run's folder."
        ),
    ] = "resnet152",
    network: NetworkOption = None,
    arg: ArgumentOption = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", min=16, help="Side of an image.", show_default="the weights' own"
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(metavar="G", help="Up to 1.", show_default="0.9, or the file's own"),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="bf16 is automatic mixed precision.")
    ] = "fp32",
    budget: Annotated[
        list[str], typer.Option(metavar="AMOUNTS", help="Memory to fill, as 3GiB or 8GiB,24GiB.")
    ] = _BUDGETS,
    batch_sizes: Annotated[
        list[str] | None,
        typer.Option(metavar="NUMBERS", help="Images of a step whose peak to show, as 8,32,64."),
    ] = None,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="What holds a state for each parameter.")
    ] = "sgd",
    release_gradients: Annotated[
        bool, typer.Option("--release-gradients", help="Each is used and freed in backward.")
    ] = False,
    processes: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Among which weights, gradients and state are divided."
        ),
    ] = 1,
    device: DeviceOption = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Run small steps as well, and trust them instead.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw memory over batch and depth, .png or .svg."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table as CSV.")
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --measure on a GPU: its memory in a step, for memory_viz."
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Predict what an image costs in training: stored, checkpointed, or with momentum.

    No step is run, unless it is measured: shapes are enough, also of a GPU that is not there.
    """
    budgets = {name: parse_bytes(name, "--budget") for name in _split(budget)}
    sizes = [_parse_size(text) for text in _split(batch_sizes or [])]
    from momconv.files.atomic import write_text
    from momconv.planner.devices import find_device
    from momconv.planner.prediction import Training
    from momconv.planner.profile import VARIANTS
    from momconv.reports.memory import show_memory, to_csv, to_json
    from momconv.reports.memory_plot import draw_memory
    from momconv.zoo.description import describe
    from momconv.zoo.networks import check_resolution

    _require_outputs(plot, csv, snapshot)
    where = str(find_device(device)) if measure or device == "auto" else device
    _require_measurable(snapshot, where, processes, measuring=measure)
    with err.status(f"converting {model}"):
        measured = _load(Function(network, arg), model, gamma, "cpu" if measure else "meta")
    side = resolution or describe(measured).preprocessing.resolution
    check_resolution(measured, side)
    training = Training(
        side,
        precision,
        optimizer,
        device=where,
        release_gradients=release_gradients,
        shards=processes,
    )
    with progress("measuring" if measure else "predicting", len(VARIANTS)) as report:
        found = _profile(measured, training, report, measuring=measure)
    writers: dict[Path | None, Callable[[Path], None]] = {
        snapshot: partial(_record, measured, training),
        csv: lambda target: write_text(target, to_csv(found, budgets, sizes)),
        plot: partial(draw_memory, found, budgets),
    }
    for path, write in writers.items():
        if path is not None:
            write(path)
    setting = {
        "model": model,
        "resolution": side,
        "precision": precision,
        "optimizer": optimizer,
        "release_gradients": release_gradients,
        "processes": processes,
        "device": where,
    }
    if json_output:
        print_json({"ok": True, **setting, **to_json(found, budgets, sizes)})
        return
    out.print(", ".join(f"{key} {value}" for key, value in setting.items()), soft_wrap=True)
    out.print("", *show_memory(found, budgets, sizes), sep="\n")


def _profile(
    model: "nn.Module", training: "Training", report: Callable[[int, str], None], *, measuring: bool
) -> "MemoryProfile":
    """Return what steps need and, where they are measured, how exact outputs for noise are."""
    import torch

    from momconv.planner.profile import profile
    from momconv.surgery.certificate import measure_rounding

    found = profile(model, training, measuring=measuring, progress=report)
    if not measuring:
        return found
    side, generator = training.resolution, torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, side, side, generator=generator)
    return replace(found, rounding=measure_rounding(model, noise))


def _require_measurable(
    snapshot: Path | None, device: str, processes: int, *, measuring: bool
) -> None:
    """Do nothing if a step can be measured here as it is asked for, or need not be.

    PyTorch tells the history of the memory of GPUs alone.
    """
    if measuring and processes > 1:
        raise UsageError(
            f"--measure runs a step in one process alone, and --processes is {processes}",
            kind="usage.conflict",
            fix=f"--processes {processes}\n--measure --processes 1",
        )
    if snapshot is not None and not (measuring and device.startswith("cuda")):
        raise UsageError(
            f"--snapshot: PyTorch records the memory of GPUs in steps that are run, not of {device}"
            if measuring
            else "--snapshot: a step has to be run for it",
            kind="usage.snapshot",
            fix="--measure --device cuda --snapshot FILE",
        )


def _record(model: "nn.Module", training: "Training", path: Path) -> None:
    from momconv.files.atomic import write_atomically
    from momconv.planner.measurement import write_snapshot

    model.to(training.device).train()
    write_atomically(
        path,
        lambda target: write_snapshot(
            model, _RECORDED, training.resolution, training.precision, target
        ),
    )


def _require_outputs(plot: Path | None, csv: Path | None, snapshot: Path | None) -> None:
    """Do nothing if all can be written."""
    from momconv.files.atomic import require_writable
    from momconv.reports.memory_plot import require_picture_name

    if plot is not None:
        require_picture_name(plot)
        require_writable(plot, "--plot")
    for path, option in ((csv, "--csv"), (snapshot, "--snapshot")):
        if path is not None:
            require_writable(path, option)


def _split(texts: list[str]) -> list[str]:
    """Return the parts between the commas of all."""
    return [part.strip() for text in texts for part in text.split(",")]


def _parse_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"{quoted(text)} is not a number of images",
            kind="usage.bad_value",
            fix="--batch-sizes 8,32",
        )
    return int(text)


def _load(function: Function, model: str, gamma: float | None, device: str) -> "nn.Module":
    """Return the converted network; one by name with random weights: memory is the same."""
    from momconv.momentum.sequential import momentum_stages
    from momconv.surgery.conversion import convert
    from momconv.zoo.networks import build, is_known, outline
    from momconv.zoo.own import is_own, make, parse_arguments

    if gamma == 0:
        raise UsageError(
            "--gamma 0 is the plain network, which is compared anyway",
            kind="usage.gamma",
            fix="--gamma 0.9",
        )
    if not is_known(model):
        model = str(find_model_file(Path(model)))
    if not _names_a_file(model):
        if is_own(model):
            network = make(model, parse_arguments(function.arguments or []))
        else:
            network = build(model) if device == "cpu" else outline(model)
        return convert(network, 0.9 if gamma is None else gamma)
    network = function.load(Path(model))
    is_plain = not any(stage.gamma for stage in momentum_stages(network).values())
    if gamma is None and not is_plain:
        return network
    return convert(network, 0.9 if gamma is None else gamma)


def _names_a_file(model: str) -> bool:
    path = Path(model)
    return (
        path.is_file() or is_special(path) or (":" not in model and ("." in model or "/" in model))
    )
