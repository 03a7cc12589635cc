"""Accuracy on CIFAR-10's 10,000 test images after a conversion, over γ; no label is used for it.

Run ``python -m benchmarks.conversion``, which takes hours, or for a part of the table
``python -m benchmarks.conversion --networks cifar_resnet20 --gammas 0.9 --no-distil``. Images and
weights are looked for in the folder ``shared`` beside the repository unless they are named.
"""

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.results import FOLDER, HERE, report
from momconv import calibrate, convert, load_network
from momconv.data.calibration_images import CalibrationImages, choose_images
from momconv.data.folder import read_classes_folder
from momconv.momentum.sequential import momentum_stages
from momconv.surgery.distillation import distill
from momconv.zoo.description import describe

SHARED = HERE.parents[1] / "shared"
WEIGHTS = {"cifar_resnet20": "resnet20-12fca82f.th", "cifar_resnet32": "resnet32-d509ac18.th"}
GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
COUNTS = (100, 500, 2000)  # images to calibrate on
DISTILLED = 5000
BATCH = 250
COLUMNS = ("network", "γ", "method", "images", "accuracy in %")
Row = tuple[str, float, str, int, float]


@dataclass(frozen=True, slots=True)
class Case:
    """A network with its images for calibration and for the test."""

    name: str
    plain: nn.Module
    train: CalibrationImages
    test: list[Tensor]
    labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """In percent."""
        model.eval()
        with torch.no_grad():
            guesses = torch.cat([model(batch).argmax(1) for batch in self.test])
        return 100 * float((guesses == self.labels).double().mean())


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
        swapped = swap(case.plain, gamma)
        yield case.name, gamma, "momentumnet", 0, case.accuracy(swapped)
    for count in COUNTS:
        model = convert(case.plain, gamma, stages="all")
        images = list(CalibrationImages(case.train.paths[:count], describe(model).preprocessing))
        calibrate(model, images, case.plain)
        yield case.name, gamma, "momconv", count, case.accuracy(model)
    if with_distillation:
        distill(model, case.plain, list(case.train))
        yield case.name, gamma, "momconv, distilled", DISTILLED, case.accuracy(model)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over γ, a panel for each network."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row[0] for row in rows))
    figure = Figure(figsize=(4.6 * len(networks), 3.8), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        own = [row for row in rows if row[0] == network]
        original = next(row[4] for row in own if row[2] == "original")
        axes.axhline(original, color="#000000", linestyle=":", label="original")
        for method, images in dict.fromkeys((row[2], row[3]) for row in own if row[1]):
            points = [(row[1], row[4]) for row in own if (row[2], row[3]) == (method, images)]
            label = f"{method}, {images:,} images" if images else method
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(title=network, xlabel="γ", ylabel="accuracy on CIFAR-10 (%)", ylim=(0, 100))
        axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=100)


@contextmanager
def unpacked(data: Path) -> Iterator[Path]:
    """The folder ``data``, or what the ZIP file ``data`` contains."""
    if data.is_dir():
        yield data
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(data) as archive:
        archive.extractall(folder)
        yield Path(folder) / "cifar10"


def parse() -> argparse.Namespace:
    """The arguments, of which the folders exist."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "cifar10-images.zip")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights")
    parser.add_argument("--networks", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--gammas", nargs="+", type=float, default=GAMMAS)
    parser.add_argument("--no-distil", action="store_true")
    options = parser.parse_args()
    for path in (options.data, options.weights):
        if not path.exists():
            parser.exit(3, f"error: {path} does not exist; name it with --data or --weights\n")
    return options


def main() -> None:
    """Measure the networks of the command line, write the table and the picture."""
    options, rows = parse(), list[Row]()
    with unpacked(options.data) as data:
        for name in options.networks:
            case = load_case(name, options.weights, data)
            rows.append((name, 0.0, "original", 0, case.accuracy(case.plain)))
            for gamma in options.gammas:
                for row in compare(case, gamma, with_distillation=not options.no_distil):
                    rows.append(row)
                    print(*row, file=sys.stderr, flush=True)  # noqa: T201 (it takes hours)
    report("conversion", COLUMNS, rows, torch.device("cpu"))
    draw(rows, FOLDER / "conversion.png")


if __name__ == "__main__":
    main()
