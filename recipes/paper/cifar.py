"""CIFAR for table 2 and figures 6 and 9: images, the two networks, and training that can go on."""

import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torchvision import datasets
from torchvision.models import resnet101
from torchvision.transforms import v2

from benchmarks.tables import choose_device
from momconv import load_network
from momconv.units import format_duration

ROOT = Path(__file__).parents[2]
ARCHIVE = ROOT.parent / "shared/data/cifar10-images.zip"
WEIGHTS = ROOT.parent / "shared/weights"
PUBLISHED = {"cifar_resnet20": "resnet20-12fca82f.th", "cifar_resnet32": "resnet32-d509ac18.th"}
RUNS = ROOT / "runs" / "paper"
BATCH = 128
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)

Part = Literal["train", "val"]
_AUGMENT = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


@dataclass(frozen=True, slots=True)
class Images:
    """Images (N, 3, 32, 32) of bytes and their labels (N,)."""

    x: Tensor
    y: Tensor

    def batches(self, device: torch.device, *, augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of 128 on ``device``, normalised; for training in random order and augmented."""
        order = torch.randperm(len(self.y)) if augment else torch.arange(len(self.y))
        for chosen in order.split(BATCH):
            x = self.x[chosen]
            if augment:
                x = torch.stack([_AUGMENT(image) for image in x])
            yield ((x / 255 - MEAN) / STD).to(device), self.y[chosen].to(device)


@cache
def read(archive: Path, part: Part, per_class: int) -> Images:
    """The first ``per_class`` images of each class in a ZIP file of …/train|val/CLASS/NAME.jpg."""
    if not archive.is_file():
        raise typer.BadParameter(f"{archive} does not exist; name a ZIP file with --data")
    images, labels = [], []
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if f"/{part}/" in n and n.endswith(".jpg"))
        classes = sorted({PurePosixPath(name).parent.name for name in names})
        for label, class_ in enumerate(classes):
            own = (name for name in names if PurePosixPath(name).parent.name == class_)
            for name in islice(own, per_class):
                with file.open(name) as stream, Image.open(stream) as image:
                    images.append(np.asarray(image.convert("RGB")))
                labels.append(label)
    return _as_images(np.stack(images), labels)


def download(classes: int, part: Part) -> Images:
    """All of CIFAR-10 or CIFAR-100, from where torchvision finds it."""
    kind = datasets.CIFAR100 if classes == 100 else datasets.CIFAR10
    folder = RUNS / "data"
    try:
        data = kind(folder, train=part == "train", download=True)
    except OSError as error:
        raise typer.BadParameter(f"{error}; put {kind.url} into {folder}") from error
    return _as_images(data.data, data.targets)


def _as_images(pixels: Any, labels: list[int]) -> Images:
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def make_small(classes: int = 10) -> nn.Module:
    """ResNet-20 for CIFAR, of 3, 2 and 2 blocks that keep their shape."""
    assert classes == 10
    return load_network("cifar_resnet20", weights="none")


def find_published(folder: Path) -> dict[str, Path]:
    """The files in ``folder`` with published weights for CIFAR-10, by network."""
    files = {name: folder / file for name, file in PUBLISHED.items()}
    return {name: file for name, file in files.items() if file.is_file()}


def make_large(classes: int) -> nn.Module:
    """ResNet-101 with a stem for 32² images: a 3×3 convolution, no pooling."""
    network: nn.Module = resnet101(num_classes=classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


@dataclass(frozen=True, slots=True)
class Schedule:
    """SGD with momentum 0.9 and weight decay 5e-4, at ``rate`` first.

    That decays as a cosine or, if there are ``drops``, to a tenth after each of so many epochs.
    """

    epochs: int
    rate: float = 0.1
    drops: tuple[int, ...] = ()

    def decay(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """The scheduler, for ``steps`` an epoch."""
        if self.drops:
            return MultiStepLR(optimizer, [epoch * steps for epoch in self.drops])
        return CosineAnnealingLR(optimizer, self.epochs * steps)


def teller(title: str) -> Callable[[str], None]:
    """Prints on stderr how far ``title`` is."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return lambda text: console.print(f"{title}: {text}")


def train(
    network: nn.Module,
    images: Images,
    schedule: Schedule,
    checkpoint: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Train on ``images``, going on from ``checkpoint``, which is written after each epoch."""
    device = choose_device()
    network.to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=schedule.rate, momentum=0.9, weight_decay=5e-4
    )
    scheduler = schedule.decay(optimizer, steps=-(-len(images.y) // BATCH))
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
    done = 0
    if checkpoint and checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        done = saved["epochs"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    tell(f"goes on after epoch {done}/{schedule.epochs}" if done else f"begins on {device}")
    began = time.monotonic()
    for epoch in range(done, schedule.epochs):
        torch.manual_seed(epoch)
        network.train()
        for x, y in images.batches(device, augment=True):
            optimizer.zero_grad()
            loss = cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
        if checkpoint:
            save(checkpoint, {"epochs": epoch + 1} | {n: p.state_dict() for n, p in parts.items()})
        left = (time.monotonic() - began) / (epoch + 1 - done) * (schedule.epochs - epoch - 1)
        progress = f"epoch {epoch + 1}/{schedule.epochs}, loss {loss.item():.3f}"
        tell(f"{progress}, {format_duration(left)} left")


def save(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the file in one piece, so that an interruption leaves the old one."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def accuracy(network: nn.Module, images: Images) -> float:
    """Top-1 in evaluation mode, in percent."""
    device = choose_device()
    network.to(device).eval()
    right = 0
    with torch.no_grad():
        for x, y in images.batches(device, augment=False):
            right += int((network(x).argmax(1) == y).sum())
    return 100 * right / len(images.y)
