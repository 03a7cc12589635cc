"""Small runs for the tests of momconv.training."""

import csv
import os
import random
import shutil
import signal
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from momconv.data.folder import find_splits
from momconv.planner.plan import Plan, Request
from momconv.recipe import Recipe, load_recipe
from momconv.training import run
from momconv.training.finetuning import Result, finetune
from momconv.training.progress import SILENT, EpochRow, Listener
from momconv.training.run import Assignment, TrainingRun
from momconv.training.run_folder import RunFolder
from momconv.zoo.networks import build

SMALL = [
    "model.name=cifar_resnet20",
    "model.weights=none",
    "momentum.use=always",
    "data.workers=0",
    "train.epochs=2",
    "train.batch_size=5",
    "train.micro_batch=2",
    "train.device=cpu",
]
CLOCKED = ("images_per_second", "seconds")


def save_weights(folder: Path) -> Path:
    """Write a checkpoint, of a network whose statistics are those of no images."""
    torch.manual_seed(0)
    path = folder / "trained.th"
    torch.save(build("cifar_resnet20").state_dict(), path)
    return path


def small(data: Path, *changes: str) -> Recipe:
    """A recipe that trains a CIFAR ResNet-20 on ``data`` in a second."""
    return load_recipe(None, [*SMALL, f'data.path="{data}"', *changes])


def resume(folder: Path, *changes: str, listener: Listener | None = None) -> Result:
    """Go on with the run in ``folder``, with changes of its recipe."""
    recipe = load_recipe(folder / "config.yaml", changes)
    return finetune(recipe, folder, resume=True, listener=listener or Log())


def copy_photos(shared: Path, folder: Path) -> Path:
    """Fill ``folder`` with 15 images of each class of CIFAR-10 to train on, and 20 others."""
    draw = random.Random(0)
    with zipfile.ZipFile(shared / "data" / "cifar10-images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".png")))
        for part, count in (("train", 15), ("val", 20)):
            own = [name for name in names if f"/{part}/" in name]
            for class_ in sorted({name.split("/")[-2] for name in own}):
                (folder / part / class_).mkdir(parents=True)
                for name in draw.sample([n for n in own if f"/{class_}/" in n], count):
                    path = folder / part / class_ / name.split("/")[-1]
                    path.write_bytes(archive.read(name))
    return folder


REQUEST = Request(32, images=18, batch_size=5, micro_batch=5, strategy="store")
PLAN = Plan(
    request=REQUEST,
    strategy="store",
    stages="store",
    micro_batch=5,
    predicted_bytes=2**20,
    limit_bytes=2**30,
)


def make_run(
    data: Path,
    model: nn.Module,
    *changes: str,
    plan: Plan = PLAN,
    folder: Path = Path(),
) -> TrainingRun:
    """A run on ``data``, with all that it works with, before it begins."""
    assignment = Assignment(
        recipe=small(data, *changes),
        folder=RunFolder(folder),
        device=torch.device("cpu"),
        listener=SILENT,
    )
    return run.make_run(assignment, find_splits(data), model, plan)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what depends on the clock."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors that a run keeps: weights, optimiser and random states, and the two models."""
    names = ("state", "best", "last")
    files = {name: load_file(folder / f"{name}.safetensors") for name in names}
    return {
        f"{name} {key}": value
        for name in names
        for key, value in files[name].items()
        if not key.startswith("document/")  # which say when, where and how fast
    }


def assert_same(one: Path, other: Path) -> None:
    """Two runs came to the same, bit for bit."""
    assert read_metrics(one) == read_metrics(other)
    assert_same_tensors(one, other)


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two runs came to the same but for what their metrics say, bit for bit."""
    ours, theirs = read_tensors(one), read_tensors(other)
    assert ours.keys() == theirs.keys()
    different = [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    assert not different


def flip_a_bit(path: Path) -> None:
    """Damage a file as little as possible."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.unlink()  # another file, as this one may be mapped into memory
    path.write_bytes(content)


class Log(Listener):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.shown: list[tuple[str, int, int, str]] = []
        self.rows: list[EpochRow] = []

    def tell(self, text: str) -> None:
        self.told.append(text)

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        self.shown.append((title, done, total, text))

    def finish_epoch(self, row: EpochRow, epochs: int) -> None:
        self.rows.append(row)


class Signals(Log):
    """Sends this process a signal when it hears of training for the n-th time."""

    def __init__(self, n: int, number: signal.Signals = signal.SIGINT, times: int = 1) -> None:
        super().__init__()
        self.left, self.number, self.times = n, number, times

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        super().advance(title, done, total, text)
        if title == "training":
            self.left -= 1
            if self.left == 0:
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)


class Damage(Signals):
    """Breaks ``files`` when it hears of training for the first time; then as ``Signals``."""

    def __init__(self, files: Iterable[Path], n: int = 0) -> None:
        super().__init__(n)
        self.files = files

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        if title == "training":
            for file in self.files:
                self.harm(file)
            self.files = ()
        super().advance(title, done, total, text)

    def harm(self, path: Path) -> None:
        path.write_bytes(b"")


class Copies(Damage):
    """Copies the run's folder at the first step after a message: what a kill would leave."""

    def __init__(self, folder: Path, copy: Path, message: str, files: Iterable[Path] = ()) -> None:
        super().__init__(files)
        self.folder, self.copy, self.message = folder, copy, message

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        super().advance(title, done, total, text)
        if not self.copy.exists() and any(self.message in told for told in self.told):
            shutil.copytree(self.folder, self.copy)
