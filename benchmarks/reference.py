"""Images per second of a whole fine-tuning of a plain network: momconv's and torchvision's loop.

Both train the network on the same photographs of 224 pixels for one epoch, with the same batch, as
many processes that read images, and SGD with momentum: `momconv finetune` as a command, with what
it does by default (on a CPU a quicker allocator, if the machine has one), and the loop of
torchvision's references/classification/train.py in a process of its own, with ImageFolder and
its transforms. Weights are random. They take turns; the time of the epoch counts, without the start
of the program and validation. The folder shared beside the repository holds the images.
"""

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.cases import Networks
from benchmarks.loading import MEAN, SHARED, STD, Case
from benchmarks.tables import Log, Out, Row, show
from momconv.allocator import find_allocator
from momconv.zoo.description import Preprocessing
from momconv.zoo.networks import build

TITLE = "reference"
KEY = ("network", "allocator")
NETWORKS = ["resnet50", "mobilenet_v2"]
SIDE, WORKERS = 224, 1


def train_by_reference(network: str, folder: Path, batch: int) -> float:
    """Images per second of torchvision's loop over the images in ``folder``."""
    case = Case("photographs", folder, Preprocessing(SIDE, 256, MEAN, STD), train=True)
    images = ImageFolder(str(folder), case.theirs())
    model = build(network).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loader = DataLoader(images, batch, shuffle=True, num_workers=WORKERS, drop_last=True)
    began = time.perf_counter()
    for pictures, labels in loader:
        loss = criterion(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return len(loader) * batch / (time.perf_counter() - began)


def train_by_momconv(network: str, data: Path, batch: int) -> float:
    """Images per second of the epoch that ``momconv finetune`` reports."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        words = ["finetune", str(data), "--model", network, "--weights", "none", "--epochs", "1"]
        words += ["--momentum", "never", "--batch-size", str(batch), "--micro-batch", str(batch)]
        words += ["--workers", str(WORKERS), "--no-plots", "-o", str(run)]
        command = [sys.executable, "-m", "momconv", "-q", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with (run / "metrics.csv").open() as file:
            return float(next(csv.DictReader(file))["images_per_second"])


def compare(network: str, data: Path, batch: int, turns: int) -> Row:
    """Both in turns."""
    program = (
        "import sys; from pathlib import Path; from benchmarks.reference import train_by_reference;"
        "_, network, folder, batch = sys.argv;"
        "print(train_by_reference(network, Path(folder), int(batch)))"
    )
    words = [sys.executable, "-c", program, network, str(data / "train"), str(batch)]
    pairs = []
    for _ in range(turns):
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        pairs.append((float(done.stdout), train_by_momconv(network, data, batch)))
    found = None if os.environ.get("MOMCONV_ALLOCATOR") == "system" else find_allocator()
    return {
        "network": network,
        "allocator": found[0].name if found else "the system's",
        "batch": str(batch),
        "torchvision images/s": f"{statistics.median(a for a, _ in pairs):.2f}",
        "momconv images/s": f"{statistics.median(b for _, b in pairs):.2f}",
        "momconv / torchvision": f"{statistics.median(b / a for a, b in pairs):.2f}",
    }


def choose_images(folder: Path, images: int) -> None:
    """Copy so many photographs of each class to ``folder``, and two of each to validate on."""
    for kind, count in (("train", images // 2), ("val", 2)):
        for source in sorted((SHARED / "hymenoptera" / kind).iterdir()):
            target = folder / kind / source.name
            target.mkdir(parents=True)
            for path in sorted(source.iterdir())[:count]:
                shutil.copy(path, target)


def main(
    networks: Networks,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 32,
    images: Annotated[int, typer.Option(help="Of the epoch.")] = 128,
    turns: Annotated[int, typer.Option(help="Of both.")] = 3,
    out: Out = None,
) -> None:
    """Compare a whole fine-tuning with torchvision's."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    with tempfile.TemporaryDirectory() as name:
        choose_images(Path(name), images)
        for network in networks or NETWORKS:
            log.merge([compare(network, Path(name), batch, turns)], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
