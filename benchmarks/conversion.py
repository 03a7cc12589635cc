"""Accuracy on CIFAR-10's 10,000 test images after a conversion, over γ; no label is used for it.

"momentumnet" is the plain swap that the package of that name does. "momconv" calibrates on so many
unlabelled images, and "distilled" trains on 5,000 after that, six passes. Every stage with two or
more blocks of a shape follows the momentum rule. Seconds are those of the calibration, with reading
its images, or of the distilling alone. Run ``python -m benchmarks.conversion``, which takes an hour
on two cores, or for a part of the table
``python -m benchmarks.conversion --network cifar_resnet20 --gamma 0.9 --no-distil``. Images and
weights are looked for in the folder ``shared`` beside the repository unless they are named.
"""

import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from benchmarks.tables import Log, Out, Row, show
from momconv import calibrate, convert, load_network
from momconv.data.calibration_images import CalibrationImages, choose_images
from momconv.data.folder import read_classes_folder
from momconv.momentum.sequential import momentum_stages
from momconv.surgery.distillation import distill
from momconv.zoo.description import describe

TITLE = "conversion"
KEY = ("network", "γ", "images", "method")
VALUE = "accuracy (%)"
SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = {"cifar_resnet20": "resnet20-12fca82f.th", "cifar_resnet32": "resnet32-d509ac18.th"}
GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
COUNTS = (100, 500, 2000)  # images to calibrate on
DISTILLED = 5000
BATCH = 250


@dataclass(frozen=True, slots=True)
class Case:
    """A network with its images for calibration and for the test."""

    name: str
    plain: nn.Module
    train: CalibrationImages
    test: list[Tensor]
    labels: Tensor

    def row(
        self, gamma: float, method: str, images: int, model: nn.Module, seconds: float | None = None
    ) -> Row:
        """The accuracy of ``model``, which a method made of the network with so many images."""
        model.eval()
        with torch.no_grad():
            guesses = torch.cat([model(batch).argmax(1) for batch in self.test])
        accuracy = 100 * float((guesses == self.labels).double().mean())
        cells = (self.name, f"{gamma:g}", f"{images}", method, f"{accuracy:.2f}")
        spent = "–" if seconds is None else f"{seconds:.0f}"
        return dict(zip((*KEY, VALUE, "seconds"), (*cells, spent), strict=True))


def load_case(name: str, weights: Path, data: Path) -> Case:
    """The published network; 5,000 random training images, of which fewer are a part."""
    plain = load_network(name, weights / WEIGHTS[name]).eval()
    test = read_classes_folder(data / "val")
    preprocessing = describe(plain).preprocessing
    pictures = list(CalibrationImages([s.path for s in test.samples], preprocessing))
    train = CalibrationImages(choose_images(data / "train", DISTILLED, seed=0), preprocessing)
    return Case(name, plain, train, pictures, torch.tensor(test.labels))


def swap(plain: nn.Module, gamma: float) -> nn.Module:
    """What the package of the paper's authors makes of a pretrained network."""
    from momentumnet import transform_to_momentumnet

    names = list(momentum_stages(convert(plain, stages="all")))
    # is_residual=False: the blocks end in x + f(x), so the package subtracts x.
    swapped: nn.Module = transform_to_momentumnet(
        plain, sub_layers=names, gamma=gamma, use_backprop=False, is_residual=False
    )
    return swapped


def compare(case: Case, gamma: float, *, with_distillation: bool) -> Iterator[Row]:
    """All methods on one network at one γ."""
    if find_spec("momentumnet"):
        yield case.row(gamma, "momentumnet", 0, swap(case.plain, gamma))
    for count in COUNTS:
        began = time.perf_counter()
        model = convert(case.plain, gamma, stages="all")
        images = list(CalibrationImages(case.train.paths[:count], describe(model).preprocessing))
        calibrate(model, images, case.plain)
        yield case.row(gamma, "momconv", count, model, time.perf_counter() - began)
    if with_distillation:
        began = time.perf_counter()
        distill(model, case.plain, list(case.train))
        seconds = time.perf_counter() - began
        yield case.row(gamma, "momconv, distilled", DISTILLED, model, seconds)


def draw(rows: Sequence[Row]) -> Figure:
    """Accuracy over γ, a panel for each network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(4.6 * len(networks), 3.8), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["network"] == network:
                label = f"{row['method']}, {int(row['images']):,} images"
                label = label if row["images"] != "0" else row["method"]
                lines.setdefault(label, []).append((float(row["γ"]), float(row[VALUE])))
        ((_, accuracy),) = lines.pop("original")
        axes.axhline(accuracy, color="#000000", linestyle=":", label="original")
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set(title=network, xlabel="γ", ylabel="accuracy on CIFAR-10 (%)", ylim=(0, 100))
        axes.legend(loc="lower left", fontsize="small")
    return figure


@contextmanager
def unpacked(data: Path) -> Iterator[Path]:
    """The folder ``data``, or what the ZIP file ``data`` contains."""
    if data.is_dir():
        yield data
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(data) as archive:
        archive.extractall(folder)
        yield Path(folder) / "cifar10"


def main(
    *,
    data: Annotated[Path, typer.Option(help="The images.")] = SHARED / "data/cifar10-images.zip",
    weights: Annotated[Path, typer.Option(help="Their folder.")] = SHARED / "weights",
    network: Annotated[list[str] | None, typer.Option(help="Only this one.")] = None,
    gamma: Annotated[list[float] | None, typer.Option(help="Only this one.")] = None,
    distil: Annotated[bool, typer.Option(help="Distil, too.")] = True,
    out: Out = None,
) -> None:
    """Measure networks; other results stay as they are."""
    for path in (data, weights):
        if not path.exists():
            raise typer.BadParameter(f"{path} does not exist; name it with --data or --weights")
    log = Log.of(TITLE, torch.device("cpu"), out)
    with unpacked(data) as folder:
        for name in network or WEIGHTS:
            case = load_case(name, weights, folder)
            rows = [iter([case.row(0, "original", 0, case.plain)])]
            rows += [compare(case, each, with_distillation=distil) for each in gamma or GAMMAS]
            for row in chain.from_iterable(rows):
                Console(stderr=True).print(*row.values())
                log.merge([row], KEY)
    show(TITLE, log.read())
    draw(log.read()).savefig(log.picture, dpi=100)


if __name__ == "__main__":
    typer.run(main)
