"""``momconv eval``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from momconv.cli._console import note, out, print_json, progress, tell

if TYPE_CHECKING:
    from momconv.data.folder import ImageSet
    from momconv.zoo.description import Description


def evaluate(  # noqa: PLR0913 (one for each option)
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A converted or fine-tuned model.")],
    data: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The folder of classes, or one with val/ in it.")
    ],
    split: Annotated[
        Literal["val", "test", "train"], typer.Option(help="Which of the folders in it.")
    ] = "val",
    unknown_classes: Annotated[
        Literal["error", "skip"], typer.Option(help="What to do with classes of its own.")
    ] = "error",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at once.")] = 32,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1.")
    ] = "auto",
    max_bad_fraction: Annotated[
        float, typer.Option(metavar="F", min=0, max=1, help="Of unreadable images, left out.")
    ] = 0.05,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout instead of tables.")
    ] = False,
) -> None:
    """Say how good a model is on a folder of images: top-1, each class, the confusions."""
    from momconv.data.dataset import count_workers
    from momconv.data.folder import find_evaluation_set
    from momconv.evaluation import evaluate as score
    from momconv.files.model_file import load
    from momconv.planner.devices import find_device
    from momconv.reports.scores import show_scores
    from momconv.zoo.description import describe

    where = find_device(device)
    model = load(file)
    held_out = _find_held_out(file, data, describe(model)) if split == "val" else None
    found = held_out or find_evaluation_set(
        data, describe(model).classes, split=split, unknown=unknown_classes
    )
    _note_classes(file, found, describe(model))
    images = _check(found, max_bad_fraction)
    with progress("evaluating", len(images.samples)) as report:
        scores = score(
            model,
            images,
            batch_size=batch_size,
            device=where,
            workers=count_workers(len(images.samples)),
            progress=lambda done, _: report(done, ""),
        )
    if json_output:
        print_json({"ok": True, "file": file, "data": images.root, **scores.to_json()})
        return
    for part in show_scores(scores):
        out.print(part)


def _find_held_out(file: Path, data: Path, description: "Description") -> "ImageSet | None":
    """The images of ``data`` that the run of ``file`` held out, if it did."""
    from momconv.data.folder import plural, printable
    from momconv.training.images import find_held_out
    from momconv.training.run_folder import RunFolder

    images = find_held_out(RunFolder(file.parent).split, data)
    if images is None or images.classes != description.classes:
        return None
    count = plural(len(images.samples), "image")
    note(f"only the {count} that the run held out of {printable(data)}")
    return images


def _note_classes(file: Path, images: "ImageSet", description: "Description") -> None:
    if description.classes is None and len(images.classes) == description.num_classes:
        note(f"{file} names no classes; taking those of the folder, in their order")


def _check(images: "ImageSet", max_bad_fraction: float) -> "ImageSet":
    """Those of ``images`` that can be read."""
    from momconv.data.inspection import check_images

    with progress("checking images", len(images.samples)) as report:
        inspection = check_images(
            images,
            max_bad_fraction=max_bad_fraction,
            progress=lambda done, _: report(done, ""),
        )
    for text in (*images.notes, *inspection.notes):
        tell(text)
    return inspection.images
