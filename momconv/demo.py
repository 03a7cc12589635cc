"""The whole way on real images, in a minute or two: train, convert, fine-tune, compare.

The images are scikit-learn's 1,797 handwritten digits. One half of each digit's images trains a
plain network, which stands for a pretrained one. The other half is divided into images to fine-tune
on and images that no training sees. All networks are compared on the latter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from momconv.data.calibration_images import CalibrationImages, choose_images
from momconv.data.folder import read_classes_folder
from momconv.data.splits import hold_out
from momconv.errors import ResourceError, UsageError
from momconv.evaluation import Scores, evaluate
from momconv.files import claim
from momconv.files.atomic import remove
from momconv.files.model_file import load, save
from momconv.planner.devices import find_device
from momconv.planner.prediction import Training
from momconv.planner.profile import VARIANTS, MemoryProfile, profile
from momconv.recipe import DataRecipe, ModelRecipe, MomentumRecipe, Recipe, TrainRecipe
from momconv.surgery.calibration import calibrate
from momconv.surgery.conversion import convert
from momconv.training.finetuning import Result, finetune
from momconv.training.progress import SILENT, Listener
from momconv.training.run_folder import RunFolder
from momconv.zoo.description import describe

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARCHITECTURE = "cifar_resnet20"
SIDE = 32  # pixels
GAMMA = 0.9

_MARKER = ".momconv-demo"  # in a folder of the demo's own
_WRITTEN = ("digits", "pretraining", "converted.safetensors", "finetuning")  # in that folder
_CALIBRATION_IMAGES = 2000


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo came to: three networks, and the memory that training them takes."""

    original: Path
    converted: Path
    finetuned: Path
    scores: dict[Path, Scores]  # on the held-out images
    memory: MemoryProfile
    runs: tuple[Result, ...]  # that made the original and the fine-tuned one


def demonstrate(
    folder: Path,
    *,
    images: int | None = None,
    epochs: tuple[int, int] = (6, 2),
    listener: Listener = SILENT,
) -> Demo:
    """Run the demo in ``folder``.

    Args:
        folder: A new or empty folder, or one of an earlier demo, whose results are replaced.
        images: How many digits to use; None for all.
        epochs: Of pretraining and of fine-tuning.
        listener: Hears how it goes.

    Raises:
        UsageError: The folder holds something else.
        ResourceError: scikit-learn is not installed, or the folder cannot be written.
    """
    pictures, labels = _load_digits()
    _require_own(folder)
    with RunFolder(folder).claimed(listener.tell):
        return _demonstrate(folder, pictures[:images], labels[:images], epochs, listener)


def _demonstrate(
    folder: Path,
    pictures: "NDArray[np.uint8]",
    labels: list[int],
    epochs: tuple[int, int],
    listener: Listener,
) -> Demo:
    _clear(folder)
    digits = folder / "digits"
    listener.tell(f"note: writing handwritten digits to {digits}")
    _write_images(digits, pictures, labels)
    listener.tell(f"note: pretraining a {ARCHITECTURE}")
    pretrained = finetune(
        _pretraining(digits / "pretrain", epochs[0]), folder / "pretraining", listener=listener
    )
    original = pretrained.best
    listener.tell(f"note: converting it, γ = {GAMMA}")
    converted = folder / "converted.safetensors"
    _convert(original, digits / "pretrain", converted, listener)
    listener.tell("note: fine-tuning it with momentum")
    tuned = finetune(
        _finetuning(converted, digits / "train", epochs[1]),
        folder / "finetuning",
        listener=listener,
    )
    listener.tell("note: comparing")
    scores = {path: _score(path, digits / "val") for path in (original, converted, tuned.best)}
    memory = _profile(converted, listener)
    return Demo(original, converted, tuned.best, scores, memory, (pretrained, tuned))


def _load_digits() -> tuple["NDArray[np.uint8]", list[int]]:
    """Return 8×8 grey pictures and the digits that they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ResourceError(
            "the demo's images come with scikit-learn, which is not installed",
            kind="demo.no_scikit_learn",
            fix="pip install 'momconv[demo]'",
        ) from error
    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target.tolist()


def _require_own(folder: Path) -> None:
    """Do nothing if ``folder`` is new, empty, or of an earlier demo."""
    if not folder.is_dir() or (folder / _MARKER).is_file():
        return
    if any(path.name != claim.NAME for path in folder.iterdir()):
        raise UsageError(
            f"folder is not empty, and no demo made it: {folder}",
            kind="usage.output_exists",
            fix="-o FOLDER",
        )


def _clear(folder: Path) -> None:
    """Mark ``folder``, and take away what an earlier demo wrote there."""
    try:
        (folder / _MARKER).touch()
        for name in _WRITTEN:
            remove(folder / name)
    except OSError as error:
        raise ResourceError(
            f"cannot write {folder}: {error.strerror}",
            kind="output.unwritable",
            fix="-o FOLDER",
        ) from error


def _write_images(root: Path, pictures: "NDArray[np.uint8]", labels: Sequence[int]) -> None:
    """Write the pictures to pretrain/, train/ and val/, with one folder for each digit."""
    rest, pretrain = hold_out(labels, 0.5, seed=0)
    train, val = hold_out([labels[index] for index in rest], 0.5, seed=0)
    _write_split(root / "pretrain", pictures, labels, pretrain)
    _write_split(root / "train", pictures, labels, [rest[n] for n in train])
    _write_split(root / "val", pictures, labels, [rest[n] for n in val])


def _write_split(
    folder: Path, pictures: "NDArray[np.uint8]", labels: Sequence[int], indices: Sequence[int]
) -> None:
    for index in indices:
        path = folder / str(labels[index]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pictures[index]).convert("RGB")
        picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(path)


def _pretraining(images: Path, epochs: int) -> Recipe:
    return Recipe(
        model=ModelRecipe(name=ARCHITECTURE, weights="none"),
        momentum=MomentumRecipe(gamma=0, strategy="store"),
        data=_data(images),
        train=TrainRecipe(epochs=epochs, lr=0.1),
    )


def _finetuning(converted: Path, images: Path, epochs: int) -> Recipe:
    return Recipe(
        model=ModelRecipe(from_file=converted),
        data=_data(images),
        train=TrainRecipe(epochs=epochs),
    )


def _data(path: Path) -> DataRecipe:
    return DataRecipe(path=path, flip=False, workers=0)  # mirrored, a digit is none


def _convert(original: Path, images: Path, converted: Path, listener: Listener) -> None:
    """Write the original as a momentum network, calibrated on its own training images."""
    model = convert(load(original), GAMMA)
    files = choose_images(images, _CALIBRATION_IMAGES, seed=0)
    batches = CalibrationImages(
        files,
        describe(model).preprocessing,
        lambda done: listener.advance("calibrating", done, len(files)),
    )
    calibrate(model, batches)
    save(model, converted)


def _score(path: Path, images: Path) -> Scores:
    model = load(path)
    return evaluate(
        model, read_classes_folder(images, describe(model).classes), device=find_device()
    )


def _profile(converted: Path, listener: Listener) -> MemoryProfile:
    return profile(
        load(converted),
        Training(SIDE, device=find_device().type),
        progress=lambda done, text: listener.advance(
            "predicting memory", done, len(VARIANTS), text
        ),
    )
