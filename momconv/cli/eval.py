"""``momconv eval``."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from momconv.cli._console import describe_error, note, out, print_json, progress, tell, warn
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
from momconv.errors import ModelFileError, ThresholdNotMet, UsageError
from momconv.units import parse_share

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from momconv.data.source import ImageSet
    from momconv.data.unseen import Exposure
    from momconv.evaluation import Scores
    from momconv.reports.evaluation import EvaluationFolder
    from momconv.zoo.description import Description, Preprocessing
    from momconv.zoo.preparation import Preparation


def evaluate(  # noqa: PLR0913 (one for each option)
    *,
    file: ModelArgument,
    data: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The folder of classes, or one with val/ in it.")
    ],
    split: Annotated[
        Literal["val", "test", "train"], typer.Option(help="Which of the folders in it.")
    ] = "val",
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Classes from a CSV: columns file and label."),
    ] = None,
    unknown_classes: Annotated[
        Literal["error", "skip"], typer.Option(help="What to do with classes of its own.")
    ] = "error",
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Another one, or an unconverted checkpoint; may be given again."
        ),
    ] = None,
    min_top1: Annotated[
        str | None,
        typer.Option("--min-top1", metavar="SHARE", help="Exit with 6 below it, such as 90%."),
    ] = None,
    network: NetworkOption = None,
    arg: ArgumentOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at once.")] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-j", metavar="N", min=0, help="Processes that read.", show_default="auto"
        ),
    ] = None,
    device: DeviceOption = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Write a report there, and what is said of each image.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier evaluation there.")
    ] = False,
    max_bad_fraction: Annotated[
        float, typer.Option(metavar="F", min=0, max=1, help="Of unreadable images, left out.")
    ] = 0.05,
    json_output: JsonOption = False,
) -> None:
    """Say how good a model is on a folder of images: top-1, each class, the worst mistakes."""
    from momconv.data.dataset import count_workers
    from momconv.data.folder import find_evaluation_set
    from momconv.data.unseen import leave_out_seen
    from momconv.planner.devices import find_device
    from momconv.zoo.preparation import parse_preparation

    said = parse_preparation(
        resize=resize, crop=crop, mean=mean, std=std, interpolation=interpolation
    )
    record = _open_record(output, data, said, overwrite=overwrite)
    least = None if min_top1 is None else parse_share(min_top1, "--min-top1")
    where = find_device(device)
    load = _make_loader(file, Function(network, arg), said)
    others, description = compare or [], load.first
    compared = [_describe_alike(other, file, load) for other in others]
    found = find_evaluation_set(
        data, description.classes, split=split, unknown=unknown_classes, labels=labels
    )
    _note_classes(file, found, description)
    images, exposure = leave_out_seen(
        _check(found, max_bad_fraction, description.preprocessing),
        [known.seen for known in (description, *compared)],
        keep_all=split == "train",
    )
    _warn_of_counted(exposure, images)
    reading = {
        "batch_size": batch_size,
        "workers": count_workers(len(images.samples), where) if workers is None else workers,
    }
    scores = {
        file: _score(load(file), file, images, where, reading, record.hear if record else None)
    }
    scores |= {path: _score(load(path), path, images, where, reading) for path in others}
    if record:
        record.write(file, images, description, scores[file], exposure.describe(scores[file].n))
        note(f"a report is in {record.report}")
    failure = _judge(file, scores[file], least)
    if json_output:
        _print_json(scores, images, exposure, failure)
        raise typer.Exit(failure.exit_code if failure else 0)
    _print(scores, exposure)
    if failure:
        raise failure


def _open_record(
    output: Path | None, data: Path, said: "Preparation", *, overwrite: bool
) -> "EvaluationFolder | None":
    from momconv.reports.evaluation import EvaluationFolder

    if output is None:
        return None
    record = EvaluationFolder(output, data, said)
    record.require_free(overwrite=overwrite)
    return record


def _warn_of_counted(exposure: "Exposure", images: "ImageSet") -> None:
    if exposure.counted:
        warn(exposure.describe(len(images.samples)))


def _score(
    model: "nn.Module",
    file: Path,
    images: "ImageSet",
    device: "torch.device",
    reading: Mapping[str, int],
    hear: "Callable[[Tensor], None] | None" = None,
) -> "Scores":
    from momconv.evaluation import evaluate as score
    from momconv.words import plural

    with progress(f"evaluating {file.name}", len(images.samples)) as report:
        scores = score(
            model,
            images,
            batch_size=reading["batch_size"],
            device=device,
            workers=reading["workers"],
            progress=lambda done, _: report(done, ""),
            hear=hear,
        )
    if scores.unanswered == scores.n:
        raise ModelFileError(
            f"{file} gives no answer: its outputs are not finite for any of the images",
            kind="model_file.no_answers",
            fix="take a model from before its training diverged",
        )
    if scores.unanswered:
        silent = plural(scores.unanswered, "image")
        warn(f"the output of {file} is not finite for {silent} of {scores.n}: no answer, so wrong")
    return scores


@dataclass(frozen=True, slots=True)
class _Loader:
    """Reads what is evaluated: momconv's files, and checkpoints of the same architecture.

    A checkpoint gets the preprocessing of the first file, so that both see the same.
    """

    function: Function
    first: "Description"
    said: "Preparation"

    def __call__(self, path: Path) -> "nn.Module":
        """The network in ``path``."""
        from momconv.zoo.checkpoints import is_converted
        from momconv.zoo.description import attach, describe

        if is_converted(path):
            return self.function.load_prepared(path, self.said)
        model = self._load_checkpoint(path)
        attach(model, replace(describe(model), preprocessing=self.first.preprocessing))
        return model

    def _load_checkpoint(self, path: Path) -> "nn.Module":
        from momconv.zoo.own import is_own, parse_arguments, restate
        from momconv.zoo.weights import load_network

        name, own = self.first.architecture, is_own(self.first.architecture)
        if own and self.function.name is None:  # the file's own word for it is not to be run
            raise UsageError(
                f"--compare {path}: a checkpoint of a network of your own",
                kind="usage.no_network",
                fix=restate(self.first),
            )
        arguments = parse_arguments(self.function.arguments or []) if own else None
        return load_network(
            (own and self.function.name) or name,
            path,
            arguments,
            resolution=self.first.preprocessing.resolution,
        )

    def describe(self, path: Path) -> "Description":
        """Return what is in ``path``."""
        from momconv.files.model_file import read_description
        from momconv.zoo.checkpoints import is_converted
        from momconv.zoo.description import describe

        return read_description(path) if is_converted(path) else describe(self(path))


def _make_loader(file: Path, function: Function, said: "Preparation") -> _Loader:
    from momconv.files.model_file import read_description

    return _Loader(function, said.correct(read_description(file)), said)


def _describe_alike(other: Path, file: Path, load: _Loader) -> "Description":
    """Return the network in ``other``, which tells the same classes apart as that in ``file``.

    Raises:
        ModelFileError: It does not, as far as is known.
    """
    ours, theirs = load.first, load.describe(other)
    named = ours.classes is not None and theirs.classes is not None
    if ours.num_classes != theirs.num_classes or (named and ours.classes != theirs.classes):
        raise ModelFileError(
            f"{other} does not tell the same classes apart as {file}, in the same order",
            kind="model_file.other_classes",
            fix=f"momconv inspect {shlex.quote(str(file))}",
        )
    return theirs


def _judge(file: Path, scores: "Scores", least: float | None) -> ThresholdNotMet | None:
    if least is None or scores.top1 >= least:
        return None
    return ThresholdNotMet(
        f"top-1 of {file} is {scores.top1:.2%}, below {least:.2%}", kind="threshold.top1"
    )


def _print(scores: Mapping[Path, "Scores"], exposure: "Exposure") -> None:
    from momconv.reports.scores import compare_scores, show_scores

    compared = compare_scores(scores) if len(scores) > 1 else []
    own = next(iter(scores.values()))
    for part in (*compared, *show_scores(own, exposure.describe(own.n))):
        out.print(part, soft_wrap=isinstance(part, Text))


def _print_json(
    scores: Mapping[Path, "Scores"],
    images: "ImageSet",
    exposure: "Exposure",
    failure: ThresholdNotMet | None,
) -> None:
    """Print one document: the first file's scores, and below ``compared`` the others'."""
    (file, own), *others = scores.items()
    compared = [
        {"file": path, "agreement": own.agreement(other), **other.to_json()}
        for path, other in others
    ]
    document: dict[str, Any] = {"ok": failure is None}
    document |= {"error": describe_error(failure)} if failure else {}
    document |= {"file": file, "data": images.root, **own.to_json()}
    document |= {"training_images": exposure.to_json()}
    print_json({**document, "compared": compared})


def _note_classes(file: Path, images: "ImageSet", description: "Description") -> None:
    if description.classes is None and len(images.classes) == description.num_classes:
        note(f"{file} names no classes; taking those of the folder, in their order")


def _check(images: "ImageSet", max_bad_fraction: float, p: "Preprocessing") -> "ImageSet":
    """Return those of ``images`` that can be read."""
    from momconv.data.inspection import check_images, find_guessed, find_outside
    from momconv.data.values import warn_of_values

    with progress("checking images", len(images.samples)) as report:
        inspection = check_images(
            images,
            max_bad_fraction=max_bad_fraction,
            progress=lambda done, _: report(done, ""),
        )
    findings = inspection.findings
    outside, guessed = find_outside(findings, p.ranges), find_guessed(findings, p.ranges)
    values = warn_of_values(outside, guessed, approximate=True)
    for text in (*images.notes, *inspection.notes, *values):
        tell(text)
    return inspection.images
