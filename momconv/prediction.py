"""What a network says about images without labels."""

import glob
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from momconv.data.calibration_images import CalibrationImages
from momconv.data.decoding import read_bytes
from momconv.data.folder import list_images
from momconv.data.source import Source
from momconv.errors import DataError, ModelFileError
from momconv.exhaustion import Parts
from momconv.names import encode_name
from momconv.planner.devices import make_current
from momconv.states import in_eval_mode
from momconv.surgery.drift import NONE, answers
from momconv.words import find_like, plural, printable
from momconv.zoo.description import Description, describe

_SILENT = "the network's output is not finite (NaN or infinite)"


@dataclass(frozen=True, slots=True)
class Guess:
    """A class, and how probable the network finds it."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is said about one image: the most probable classes, the first one first."""

    path: Path
    guesses: tuple[Guess, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return {
            "path": encode_name(self.path),
            "guesses": [asdict(guess) for guess in self.guesses],
        }


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image about which nothing can be said, and why."""

    path: Path
    error: str

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return {"path": encode_name(self.path), "error": self.error}


@dataclass(frozen=True, slots=True)
class Predictions:
    """What is said about some images.

    Attributes:
        images: What is said about each.
        unreadable: Those that cannot be read.
        outside: How many values of an image that is not 8-bit are black or white for being outside
            of the range that the network was trained with, where any are.
        guessed: Images that are not 8-bit and for which the network knows no such range.
    """

    images: tuple[Prediction, ...]
    unreadable: tuple[Unreadable, ...]
    outside: Mapping[Path, int] = field(default_factory=dict)
    guessed: frozenset[Path] = frozenset()


def predict(
    model: nn.Module,
    paths: Iterable[str | Path] | Source,
    *,
    top: int = 5,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Return the ``top`` most probable classes of each image, preprocessed as ``model`` says.

    Where memory runs out, fewer images go through the network at once.

    The model moves to ``device``; its training flags are afterwards what they were.

    Args:
        model: A network with a description. Without names, its classes are called by numbers.
        paths: Image files, folders of which every image is taken, and patterns such as ``*.jpg``;
            or a source, with images in other places.
        top: How many classes to name of each.
        device: Where to compute, in fp32.
        progress: Hears of the images done and of all.

    Raises:
        UsageError: The model has no description.
        DataError: No path exists, there is none, or no image can be read.
        ModelFileError: The network's output is not finite for any image.
        ResourceError: There is no such GPU.
    """
    description, device = describe(model), make_current(device)
    files, reader = _find_images(paths)
    images = CalibrationImages(
        files,
        description.preprocessing,
        (lambda done: progress(done, len(files))) if progress else None,
        reader,
    )
    names = name_outputs(description)
    predictions, silent = list[Prediction](), list[Unreadable]()
    parts = Parts()
    with in_eval_mode(model.to(device)), torch.no_grad():
        for pictures, read in images.read():
            outputs = parts.forward(model, pictures, device)
            values, labels = outputs.softmax(1).topk(min(top, len(names)))
            entries = zip(read, answers(outputs), values.tolist(), labels.tolist(), strict=True)
            for path, said, row, numbers in entries:
                if said == NONE:
                    silent.append(Unreadable(path, _SILENT))
                    continue
                guesses = (Guess(names[n], p) for n, p in zip(numbers, row, strict=True))
                predictions.append(Prediction(path, tuple(guesses)))
    unreadable = (Unreadable(error.path, error.reason) for error in images.unreadable)
    if not predictions and silent:
        raise ModelFileError(
            f"{_SILENT}, for any of {plural(len(silent), 'image')}",
            kind="model_file.no_answers",
            fix="take a model from before its training diverged",
        )
    return Predictions(
        tuple(predictions), (*unreadable, *silent), images.outside, frozenset(images.guessed)
    )


def _find_images(
    images: Iterable[str | Path] | Source,
) -> tuple[list[Path], Callable[[Path], bytes]]:
    """Return the paths of all ``images``, and what reads them."""
    if isinstance(images, Source):
        found, _ = images.list()
        return [path for paths in found.values() for path in paths], images.read
    return list_files(map(Path, images)), read_bytes


def list_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among ``paths``, and every image below the folders among them, each once.

    What does not exist may be a pattern, in which ``**`` stands for any folders. If it is none, it
    is in the list, as a file that cannot be read.

    Raises:
        DataError: None exists, a folder has no images, or there are no paths at all.
    """
    found, missing = dict[Path, None](), set[Path]()
    for path in paths:
        matches = [path] if path.exists() else _match(path)
        if not matches:
            missing.add(path)
        for match in matches or [path]:
            found |= dict.fromkeys(list_images(match) if match.is_dir() else [match])
    if found and found.keys() == missing:
        raise _missing(next(iter(found)))
    if not found:
        raise DataError("the list of images is empty", kind="data.no_images", fix="name a folder")
    return list(found)


def _match(pattern: Path) -> list[Path]:
    return sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))


def name_outputs(description: Description) -> tuple[str, ...]:
    """Return a name for each of the network's outputs, its number where it has no other."""
    return description.classes or tuple(map(str, range(description.num_classes)))


def _missing(path: Path) -> DataError:
    like = find_like(path)
    return DataError(
        f"no such image or folder: {printable(path)}",
        kind="data.missing_image",
        fix=f"closest existing path is {printable(like)}" if like else None,
    )
