"""Images per second that a DataLoader gives: momconv's datasets and torchvision's own, paired.

Both read the same files with as many processes (0: the program's own), in batches of 32.
torchvision's side is ImageFolder with the transforms of its references: for photographs of 224
pixels a random crop and mirroring, or the preset of the weights; for CIFAR-10 a shift by up to four
pixels and mirroring, or none. They take turns; the table has medians over the turns, and of the
ratio within a turn. What momconv does beside (orientation, bit depth, transparency, random numbers
that depend on no process) is in its time, and so is starting the processes. The folder shared
beside the repository holds the images.
"""

import statistics
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import ImageClassification

from benchmarks.tables import Log, Out, Row, show
from momconv.data.dataset import LabelledImages, make_loader, read_batches
from momconv.data.folder import Folder
from momconv.data.source import ImageSet, Sample
from momconv.data.transforms import evaluation_transform, training_transform
from momconv.zoo.description import Preprocessing

TITLE = "loading"
KEY = ("images", "for", "processes")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 32
CIFAR_IMAGES = 2000
WORKERS = (0, 2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Case:
    """Images, and what happens to them."""

    name: str
    folder: Path
    preprocessing: Preprocessing
    train: bool

    def theirs(self) -> Any:
        """Torchvision's transform."""
        p = self.preprocessing
        if not self.train:
            return ImageClassification(
                crop_size=p.resolution, resize_size=p.resize, mean=MEAN, std=STD
            )
        mode = InterpolationMode.BILINEAR
        crop = (
            v2.RandomCrop(p.resolution, padding=4)
            if p.resolution < 64
            else v2.RandomResizedCrop(p.resolution, interpolation=mode, antialias=True)
        )
        # The steps of ClassificationPresetTrain in references/classification/presets.py.
        steps = [v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD)]
        return v2.Compose([crop, v2.RandomHorizontalFlip(), *steps, v2.ToPureTensor()])

    def ours(self) -> Any:
        """The transform of momconv."""
        transform = training_transform if self.train else evaluation_transform
        return transform(self.preprocessing)


def count_per_second(loader: Any) -> float:
    """Images that a loader gives in a second, over all of its images."""
    began, images = time.perf_counter(), 0
    for batch, _ in loader:
        images += len(batch)
    return images / (time.perf_counter() - began)


def make_loaders(case: Case, workers: int) -> tuple["DataLoader[Any]", "DataLoader[Any]"]:
    """Torchvision's and momconv's, of the same files."""
    reference = ImageFolder(str(case.folder), case.theirs())
    samples = tuple(Sample(Path(path), label) for path, label in reference.samples)
    images = ImageSet(Folder(case.folder), tuple(reference.classes), samples)
    ours = LabelledImages(images, case.ours(), seed=0 if case.train else None)
    return (
        DataLoader(reference, BATCH, num_workers=workers),
        make_loader(ours, workers=workers, batch_size=BATCH),
    )


def compare(case: Case, workers: int, turns: int) -> Row:
    """Both loaders in turns, of which the first does not count."""
    theirs, ours = make_loaders(case, workers)
    if not case.train:
        assert_equal(next(iter(theirs))[0], next(iter(ours))[0])
    pairs = [
        (count_per_second(theirs), count_per_second(read_batches(ours))) for _ in range(turns + 1)
    ][1:]
    return {
        "images": case.name,
        "for": "training" if case.train else "evaluation",
        "processes": str(workers),
        "torchvision images/s": f"{statistics.median(pair[0] for pair in pairs):.0f}",
        "momconv images/s": f"{statistics.median(pair[1] for pair in pairs):.0f}",
        "momconv / torchvision": f"{statistics.median(b / a for a, b in pairs):.2f}",
    }


def assert_equal(theirs: Tensor, ours: Tensor) -> None:
    """The same images come out of both, bit for bit, where nothing had to be turned."""
    equal = sum(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert equal >= 0.9 * len(theirs), f"only {equal} of {len(theirs)} images are the same"


@contextmanager
def find_cases() -> Iterator[list[Case]]:
    """Photographs and, unpacked for as long, images of CIFAR-10."""
    photographs = Preprocessing(224, 256, MEAN, STD)
    small = Preprocessing(32, 32, MEAN, STD)
    with tempfile.TemporaryDirectory() as name:
        with zipfile.ZipFile(SHARED / "cifar10-images.zip") as archive:
            members = [n for n in archive.namelist() if n.startswith("cifar10/train/")]
            step = len(members) // CIFAR_IMAGES
            archive.extractall(name, members[::step])
        folders = [
            ("photographs", SHARED / "hymenoptera" / "train", photographs),
            ("CIFAR-10", Path(name) / "cifar10" / "train", small),
        ]
        yield [
            Case(title, folder, preprocessing, train)
            for title, folder, preprocessing in folders
            for train in (True, False)
        ]


def main(
    workers: Annotated[list[int] | None, typer.Option(help="Numbers of processes.")] = None,
    turns: Annotated[int, typer.Option(help="That count.")] = 5,
    out: Out = None,
) -> None:
    """Compare momconv's loading with torchvision's."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    with find_cases() as cases:
        for case in cases:
            rows = [compare(case, number, turns) for number in workers or WORKERS]
            Console(stderr=True).print(f"{case.name}, {'train' if case.train else 'eval'}: done")
            log.merge(rows, KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
