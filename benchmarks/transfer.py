"""Top-1 on held-out images after each epoch of fine-tuning, from several conversions.

A CIFAR ResNet-20 with the published weights, trained on CIFAR-10's training images, learns a task
of five classes, each of two unlike classes of CIFAR-10 (number i and number i + 5: airplanes and
dogs, …), from 500 images that it has not seen: 50 of each of the ten classes, from CIFAR-10's test
images. The five-class head is new. 1,000 other test images are held out. A seed decides the 500
images, the head, the order and the augmentation; it is the same for all methods. Learning rate,
batch and all else are the defaults of `momconv finetune`, for 5 epochs, with γ = 0.9 in all stages
where there is momentum:

* plain: the residual network itself (γ = 0), which is to be reached;
* swapped rule: no gains, no calibration, as other packages convert;
* gains: the gains of `convert`, no calibration;
* calibrated: the default, gains and calibration on the 500 images; also with γ = 0.5;
* annealed: gains, no calibration; γ rises from 0.1 to 0.9 in the first 3 epochs;
* default stages, swapped rule and calibrated: as above, but momentum only where `stages: auto` puts
  it, which is what `momconv finetune` does unless it is told otherwise: in runs of three blocks or
  more, here the first stage;
* plain, sgd-8bit, adamw, adamw-8bit: plain, by other optimisers (AdamW at a rate of 0.003, thirty
  times its default, which is for large networks). Those whose state has a byte a
  value are to be compared with those of the same name without.

In the table, the mean and the standard deviation over the seeds, in percent.
"""

import csv
import statistics
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from random import Random
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.cases import check_names
from benchmarks.tables import Log, Out, Row, show
from momconv import finetune
from momconv.recipe import load_recipe

SHARED = Path(__file__).parents[2] / "shared"
TITLE = "transfer"
KEY = ("method", "epoch", "seed")
VALUE = "top-1 in %"
SEEDS = 3
EPOCHS = 5
TRAIN, VAL = 50, 100  # images of each of the ten classes

METHODS = {
    "plain": ["momentum.gamma=0"],
    "swapped rule": ["momentum.gain=false", "momentum.calibrate=false"],
    "gains": ["momentum.calibrate=false"],
    "calibrated": [],
    "calibrated, γ = 0.5": ["momentum.gamma=0.5"],
    "annealed": ["momentum.calibrate=false", "momentum.anneal=3"],
    "default stages, swapped rule": [
        "momentum.stages=auto",
        "momentum.gain=false",
        "momentum.calibrate=false",
    ],
    "default stages, calibrated": ["momentum.stages=auto"],
    "plain, sgd-8bit": ["momentum.gamma=0", "train.optimizer=sgd-8bit"],
    "plain, adamw": ["momentum.gamma=0", "train.optimizer=adamw", "train.lr=3e-3"],
    "plain, adamw-8bit": ["momentum.gamma=0", "train.optimizer=adamw-8bit", "train.lr=3e-3"],
}
COMMON = [
    "model.name=cifar_resnet20",
    "momentum.stages=all",
    f"train.epochs={EPOCHS}",
    "train.device=cpu",
    "data.workers=0",
]


def unpack(archive: Path, folder: Path, seed: int) -> None:
    """Write the five-class task of a seed to ``folder``: train/ and val/."""
    with zipfile.ZipFile(archive) as images:
        names = [n for n in images.namelist() if "/val/" in n and not n.endswith("/")]
        classes = sorted({PurePosixPath(name).parent.name for name in names})
        for number, class_ in enumerate(classes):
            own = sorted(name for name in names if PurePosixPath(name).parent.name == class_)
            held_out, rest = own[:VAL], own[VAL:]
            parts = {"train": Random(seed).sample(rest, TRAIN), "val": held_out}
            for part, chosen in parts.items():
                target = folder / part / str(number % 5)
                target.mkdir(parents=True, exist_ok=True)
                for name in chosen:
                    file = target / f"{class_}-{PurePosixPath(name).name}"
                    file.write_bytes(images.read(name))


def run(method: str, seed: int, weights: Path, folder: Path) -> Iterator[Row]:
    """A row for each epoch of one run in ``folder``, where the task is in data/."""
    recipe = load_recipe(
        None,
        [
            *COMMON,
            *METHODS[method],
            f"model.weights={weights}",
            f"data.path={folder / 'data'}",
            f"train.seed={seed}",
        ],
    )
    for row in read_epochs(finetune(recipe, folder / method).folder):
        top1 = f"{100 * float(row['val_top1']):.2f}"
        yield {"method": method, "epoch": row["epoch"], "seed": str(seed), VALUE: top1}


def read_epochs(folder: Path) -> Iterator[Row]:
    """What is noted of each epoch in the folder of a run."""
    with (folder / "metrics.csv").open() as file:
        yield from csv.DictReader(file)


def present(rows: Sequence[Row]) -> list[Row]:
    """Mean ± standard deviation over the seeds: a row for each method, a column for each epoch."""
    seeds = Counter(row["method"] for row in rows if row["epoch"] == "1")
    return [
        {"method": method, "seeds": str(seeds[method])}
        | {f"epoch {n}": " ± ".join(f"{x:.1f}" for x in spread) for n, spread in epochs.items()}
        for method, epochs in summarise(rows).items()
    ]


def summarise(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, float]]]:
    """Mean and standard deviation over the seeds, by method and epoch."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        epochs = values.setdefault(row["method"], {})
        epochs.setdefault(int(row["epoch"]), []).append(float(row[VALUE]))
    return {
        method: {n: (statistics.mean(own), statistics.stdev(own)) for n, own in epochs.items()}
        for method, epochs in values.items()
    }


def main(
    methods: Annotated[list[str] | None, typer.Argument(show_default="all")] = None,
    *,
    data: Annotated[Path, typer.Option(help="The ZIP file.")] = SHARED / "data/cifar10-images.zip",
    weights: Annotated[Path, typer.Option()] = SHARED / "weights/resnet20-12fca82f.th",
    out: Out = None,
) -> None:
    """Fine-tune from every conversion with every seed; results of other methods stay."""
    check_names(methods or [], METHODS)
    for path in (data, weights):
        if not path.is_file():
            raise typer.BadParameter(f"{path} does not exist; name it with --data or --weights")
    log = Log.of(TITLE, torch.device("cpu"), out)
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            unpack(data, Path(folder) / "data", seed)
            for method in methods or METHODS:
                rows = list(run(method, seed, weights, Path(folder)))
                log.merge(rows, KEY)
                Console(stderr=True).print(method, seed, *(row[VALUE] for row in rows))
    show(TITLE, present(log.read()))


if __name__ == "__main__":
    typer.run(main)
