"""Top-1 on held-out images after fine-tuning with momconv's defaults and with torchvision's.

* hymenoptera: a ResNet-18 from random weights on the ants and bees of PyTorch's tutorial (244
  images, 153 held out), at 96 × 96 pixels so that it ends today on a CPU. The network has no run
  of blocks that is long enough for momentum, so momconv leaves it plain.
* cifar: the task of benchmarks/transfer.py, with the published weights of a CIFAR ResNet-20: 500
  images (50 of each of CIFAR-10's classes) in five new classes, 1,000 held out.

Five epochs in batches of 32. The methods:

* torchvision reference: the loop and the defaults of torchvision's references/classification:
  SGD with momentum 0.9, weight decay 1e-4 on all parameters, rate 0.1 for 256 images (here 0.0125,
  by its linear rule) without a schedule so short a run would notice, crops of 8 to 100 % of the
  image and mirroring; at 32 pixels, where it has none, a shift by up to four pixels;
* momconv, plain: `momconv finetune --gamma 0`;
* momconv, plain, sgd-8bit: the same with an optimiser whose state has a byte a value;
* momconv: `momconv finetune`, with conversion and calibration where there is something to convert.

A seed decides the weights of new layers, the order, the augmentation and, of cifar, the images. In
the table, mean ± standard deviation over the seeds in percent: of the last epoch, which nothing has
chosen, and of the best one, which both would keep.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks import transfer
from benchmarks.tables import Log, Out, Row, show
from momconv import finetune, load_network
from momconv.data.transforms import NormalisedTensor, evaluation_transform
from momconv.recipe import load_recipe
from momconv.zoo.description import Preprocessing, describe
from momconv.zoo.networks import replace_head

SHARED = Path(__file__).parents[2] / "shared"
TITLE = "finetuning"
KEY = ("task", "method", "epoch", "seed")
VALUE = "top-1 in %"
SEEDS = 3
EPOCHS = 5
BATCH = 32

TASKS = {
    "hymenoptera": ["model.name=resnet18", "model.weights=none", "data.resolution=96"],
    "cifar": ["model.name=cifar_resnet20", f"model.weights={SHARED}/weights/resnet20-12fca82f.th"],
}
REFERENCE = "torchvision reference"
METHODS: dict[str, list[str]] = {
    REFERENCE: [],
    "momconv, plain": ["momentum.gamma=0"],
    "momconv, plain, sgd-8bit": ["momentum.gamma=0", "train.optimizer=sgd-8bit"],
    "momconv": [],
}


def run(task: str, method: str, seed: int, data: Path) -> Iterator[Row]:
    """A row for each epoch of one run on the folder ``data``."""
    train = train_as_reference if method == REFERENCE else train_with_momconv
    for epoch, top1 in enumerate(train(task, METHODS[method], seed, data), start=1):
        key = {"task": task, "method": method, "epoch": str(epoch), "seed": str(seed)}
        yield key | {VALUE: f"{100 * top1:.2f}"}


def train_with_momconv(task: str, changes: list[str], seed: int, data: Path) -> Iterator[float]:
    """The top-1 after each epoch of momconv's own loop."""
    common = [f"data.path={data}", f"train.epochs={EPOCHS}", f"train.seed={seed}"]
    common += ["train.device=cpu", "data.workers=0"]
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(load_recipe(None, [*TASKS[task], *changes, *common]), folder)
        yield from [float(row["val_top1"]) for row in transfer.read_epochs(result.folder)]


def train_as_reference(task: str, _: list[str], seed: int, data: Path) -> Iterator[float]:
    """The top-1 after each epoch of a loop like torchvision's references/classification/train.py.

    https://github.com/pytorch/vision/blob/main/references/classification/train.py
    """
    torch.manual_seed(seed)
    start = load_recipe(None, TASKS[task])
    model = load_network(start.model.name, start.model.weights)
    preprocessing = describe(model).preprocessing
    if start.data.resolution is not None:
        preprocessing = preprocessing.at(start.data.resolution)
    training = ImageFolder(data / "train", transform_like_reference(preprocessing))
    held_out = ImageFolder(data / "val", evaluation_transform(preprocessing))
    replace_head(model, training.classes)
    optimizer = SGD(model.parameters(), lr=0.1 * BATCH / 256, momentum=0.9, weight_decay=1e-4)
    scheduler = StepLR(optimizer, step_size=30, gamma=0.1)
    for _epoch in range(EPOCHS):
        model.train()
        for images, labels in DataLoader(training, BATCH, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        yield evaluate(model, held_out)


def transform_like_reference(p: Preprocessing) -> v2.Compose:
    """The training preset of torchvision's references."""
    size = p.resolution
    crop = v2.RandomCrop(size, padding=4) if size == 32 else v2.RandomResizedCrop(size)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), NormalisedTensor(p)])


def evaluate(model: nn.Module, images: ImageFolder) -> float:
    """The share of ``images`` that ``model`` recognises."""
    model.eval()
    with torch.no_grad():
        hits = [
            int((model(pictures).argmax(1) == labels).sum())
            for pictures, labels in DataLoader(images, BATCH)
        ]
    return sum(hits) / len(images)


def present(rows: Sequence[Row]) -> list[Row]:
    """Mean ± standard deviation over the seeds: a row for each task and method."""
    runs: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        seeds = runs.setdefault((row["task"], row["method"]), {})
        seeds.setdefault(row["seed"], []).append(float(row[VALUE]))
    return [
        {
            "task": task,
            "method": method,
            "seeds": str(len(seeds)),
            "last epoch": _summarise([scores[-1] for scores in seeds.values()]),
            "best epoch": _summarise([max(scores) for scores in seeds.values()]),
        }
        for (task, method), seeds in runs.items()
    ]


def _summarise(scores: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def select(task: str) -> list[str]:
    """The methods that differ in a task: what stays plain is plain already."""
    return [name for name in METHODS if name != "momconv, plain" or task == "cifar"]


def main(
    data: Annotated[Path, typer.Option(help="Where both tasks are.")] = SHARED / "data",
    task: Annotated[list[str] | None, typer.Option(help="Some of the tasks.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Some of the seeds.")] = None,
    out: Out = None,
) -> None:
    """Train with every method and every seed; results so far are kept."""
    if not data.is_dir():
        raise typer.BadParameter(f"{data} does not exist; name it with --data")
    log = Log.of(TITLE, torch.device("cpu"), out)
    for name in task or TASKS:
        for number in seed or range(SEEDS):
            with tempfile.TemporaryDirectory() as folder:
                images = data / "hymenoptera"
                if name == "cifar":
                    images = Path(folder)
                    transfer.unpack(data / "cifar10-images.zip", images, number)
                for method in select(name):
                    rows = list(run(name, method, number, images))
                    log.merge(rows, KEY)
                    Console(stderr=True).print(name, method, number, *(r[VALUE] for r in rows))
    show(TITLE, present(log.read()))


if __name__ == "__main__":
    typer.run(main)
