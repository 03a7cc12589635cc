"""How good a network is on labelled images."""

import itertools
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader

from momconv.data.dataset import LabelledImages, make_loader, read_batches
from momconv.data.decoding import UnreadableImage
from momconv.data.folder import SPLITS
from momconv.data.source import ImageSet, Source, to_image_set
from momconv.data.transforms import evaluation_transform
from momconv.errors import DataError
from momconv.exhaustion import Parts
from momconv.names import encode_name
from momconv.planner.devices import make_current
from momconv.planner.measurement import autocast
from momconv.states import are_sharded, in_eval_mode
from momconv.surgery.drift import NONE, answers
from momconv.surgery.drift import wilson_interval as wilson_interval
from momconv.vocabulary import Precision
from momconv.words import plural
from momconv.zoo.description import describe

T = TypeVar("T")
_Counts = np.ndarray[Any, np.dtype[np.int64]]
_BINS = 15  # of confidence, as in Guo et al. 2017
_WORST = 10
_TOP = 5  # classes, among which the right one is, where there are more


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How one class fares. What is undefined, such as the precision without a prediction, is 0."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int  # its images


@dataclass(frozen=True, slots=True)
class Mistake:
    """An image for which the network says another class than the folder it is in."""

    path: Path
    said: str
    truth: str
    probability: float  # of what is said


@dataclass(frozen=True, slots=True)
class Scores:
    """How good a network is. All but the loss are fractions."""

    n: int
    top1: float
    interval: tuple[float, float]  # of the top-1, 95 % (Wilson)
    loss: float  # the mean cross-entropy, without label smoothing
    macro_f1: float  # over the classes that have images
    calibration_error: float  # |confidence − accuracy|, expected over 15 bins (Guo et al. 2017)
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]  # images of the row's class predicted as the column's
    mistakes: tuple[Mistake, ...]  # the most confident ones, the worst first
    said: tuple[int, ...]  # the class of each image, in their order; NONE without an answer
    top5: float | None = None  # among the five most probable; None with no more classes than that

    @property
    def unanswered(self) -> int:
        """The images for which the network's output is not finite, which count as mistakes."""
        return self.said.count(NONE)

    @property
    def macro_recall(self) -> float:
        """The mean recall over the classes that have images, or balanced accuracy."""
        present = [score.recall for score in self.classes if score.support]
        return sum(present) / len(present)

    @property
    def uncovered(self) -> list[str]:
        """The classes without an image, of which top-1 and macro F1 say nothing."""
        return [score.name for score in self.classes if not score.support]

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows, without what is said of each image."""
        mistakes = [
            asdict(mistake) | {"path": encode_name(mistake.path)} for mistake in self.mistakes
        ]
        document = asdict(self) | {"mistakes": mistakes, "unanswered": self.unanswered}
        del document["said"]
        return document

    def agreement(self, other: "Scores") -> float:
        """Return the fraction of the images of which both networks say the same."""
        pairs = zip(self.said, other.said, strict=True)
        return sum(a == b != NONE for a, b in pairs) / self.n


def evaluate(  # noqa: PLR0913 (one for each choice)
    model: nn.Module,
    images: ImageSet | Source,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    workers: int = 0,
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
    hear: Callable[[Tensor], None] | None = None,
) -> Scores:
    """Return the scores of ``model``, in eval mode, with the preprocessing that it describes.

    All ``images`` count, those of a source with the classes that the model knows by name;
    ``momconv.keep_unseen`` leaves out those that the model was trained on.

    The model moves to ``device``; its training flags are afterwards what they were. ``progress`` is
    called with the number of images done and the number of all, ``hear`` with the probabilities of
    each batch, in the order of this process's images. Where memory runs out, fewer than
    ``batch_size`` images go through the network at once.

    In a job of torch.distributed each process takes a share of the images, and all get the scores
    of all images.

    Raises:
        UsageError: The model has no description.
        DataError: There are no images, they have more or fewer classes than the model, or one
            cannot be decoded.
        OutOfMemory: Not even a single image fits.
        ResourceError: There is no such GPU.
    """
    description, device = describe(model), make_current(device)
    images = to_image_set(images, description.classes)
    _check(images, description.num_classes)
    preprocessing = description.preprocessing
    transform = evaluation_transform(preprocessing)
    rank, count = _find_share(images)
    own = images.select(range(rank, len(images.samples), count))
    dataset = LabelledImages(own, transform, seed=None, ranges=preprocessing.ranges)
    pinned = device.type == "cuda"
    loader = make_loader(dataset, workers=workers, batch_size=batch_size, pin_memory=pinned)
    found = _Answers()
    parts = Parts(batch_size if are_sharded([model]) else 1)
    finish = partial(_keep_company, model.to(device), len(images.samples) / (count * batch_size))
    with in_eval_mode(model), torch.no_grad():
        for pictures, labels in _read_together(loader, count, finish):
            with autocast(precision, device):
                outputs = parts.forward(model, pictures, device).float()
            probabilities = outputs.softmax(1)
            found.add(outputs, probabilities, labels.to(device))
            if hear:
                hear(probabilities.cpu())
            if progress:
                progress(len(found.said), len(dataset))
    return _summarise(images, found.gather(count))


@dataclass(slots=True)
class _Answers:
    """What is said of each image."""

    said: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    near: list[bool] = field(default_factory=list)  # whether the right class is among the first

    def add(self, outputs: Tensor, probabilities: Tensor, targets: Tensor) -> None:
        """Remember a batch."""
        named = answers(outputs)
        first = probabilities.topk(min(_TOP, probabilities.shape[1])).indices
        self.said += named.tolist()
        self.losses += F.cross_entropy(outputs, targets, reduction="none").tolist()
        self.confidences += probabilities.amax(1).tolist()
        self.near += ((first == targets[:, None]).any(1) & (named != NONE)).tolist()

    def gather(self, count: int) -> "_Answers":
        """Return what ``count`` processes found on their shares, in the order of the images."""
        parts = (self.said, self.losses, self.confidences, self.near)
        return _Answers(*(_gather(part, count) for part in parts))  # type: ignore[arg-type]


def _check(images: ImageSet, num_classes: int) -> None:
    if not images.samples:
        raise DataError(
            f"no images to evaluate on in {images.root}\n"
            "expected: a folder with a folder of images for each class",
            kind="data.no_images",
        )
    if len(images.classes) != num_classes:
        # Never to train on what is set aside for evaluation.
        is_part = images.root.name.lower() in SPLITS
        folder = images.root.parent if is_part else images.root
        raise DataError(
            f"{images.root} has {plural(len(images.classes), 'class')}, "
            f"the model tells {num_classes} apart\nfine-tuning gives it a head for these",
            kind="data.other_classes",
            fix=f"momconv finetune --from FILE --data {shlex.quote(str(folder))}",
        )


def _find_share(images: ImageSet) -> tuple[int, int]:
    """Return which share of how many this process takes: all of the images if they are too few."""
    if not dist.is_initialized() or len(images.samples) < dist.get_world_size():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _gather(own: Sequence[T], count: int) -> list[T]:
    """Return what ``count`` processes found on their shares, in the order of the images."""
    if count == 1:
        return list(own)
    shares: list[list[T]] = [[] for _ in range(count)]
    dist.all_gather_object(shares, list(own))
    rows = itertools.zip_longest(*map(enumerate, shares))
    return [entry[1] for row in rows for entry in row if entry is not None]


def _keep_company(model: nn.Module, most: float, done: int) -> None:
    """Go through a network that is divided as often as the process with ``most`` batches."""
    if are_sharded([model]):
        side, device = describe(model).preprocessing.resolution, next(model.parameters()).device
        for _ in range(math.ceil(most) - done):
            model(torch.zeros(1, 3, side, side, device=device))


def _read_together(
    loader: "DataLoader[Any]", count: int, finish: Callable[[int], None]
) -> Iterator[Any]:
    """Yield the batches of a loader; a file that cannot be read fails all of ``count`` processes.

    Before they speak of that, ``finish`` hears how many batches there were.

    Raises:
        UnreadableImage: Some process could not read the file that it names.
    """
    failed: UnreadableImage | None = None
    done = 0
    try:
        for done, batch in enumerate(read_batches(loader), start=1):  # noqa: B007
            yield batch
    except UnreadableImage as error:
        failed = error
    finish(done)
    if count > 1:
        shares: list[list[tuple[Path, str]]] = [[] for _ in range(count)]
        dist.all_gather_object(shares, [(failed.path, failed.reason)] if failed else [])
        failed = next((UnreadableImage(*file) for share in shares for file in share), None)
    if failed:
        raise failed


def _summarise(images: ImageSet, found: _Answers) -> Scores:
    n, truth = len(images.samples), [sample.label for sample in images.samples]
    table = _count_pairs(truth, found.said, len(images.classes))
    classes = tuple(_score_classes(images.classes, table))
    present = [score.f1 for score in classes if score.support]
    hits = int(table.trace())
    return Scores(
        n=n,
        top1=hits / n,
        interval=wilson_interval(hits, n),
        loss=float(np.mean(found.losses)),
        macro_f1=sum(present) / len(present),
        calibration_error=_calibration_error(truth, found),
        classes=classes,
        confusion=tuple(map(tuple, table[:, :-1].tolist())),
        mistakes=_find_mistakes(images, found.said, found.confidences),
        said=tuple(found.said),
        top5=sum(found.near) / n if len(images.classes) > _TOP else None,
    )


def _count_pairs(truth: Sequence[int], said: Sequence[int], classes: int) -> _Counts:
    """Return how often each class was said of each, (classes, classes + 1); the last is no answer.

    ``NONE`` is -1, which is the last column.
    """
    table = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(table, (truth, said), 1)
    return table


def _score_classes(names: Sequence[str], table: _Counts) -> Iterator[ClassScore]:
    for label, name in enumerate(names):
        hits, said, support = table[label, label], table[:, label].sum(), table[label].sum()
        yield ClassScore(
            name,
            precision=float(hits / max(said, 1)),
            recall=float(hits / max(support, 1)),
            f1=float(2 * hits / max(said + support, 1)),
            support=int(support),
        )


def _calibration_error(truth: Sequence[int], found: _Answers) -> float:
    """Return |confidence − accuracy|, expected over bins of confidence; no answer has none."""
    sure, right = np.nan_to_num(found.confidences), np.equal(truth, found.said)
    bins = np.minimum(sure * _BINS, _BINS - 1).astype(int)
    return float(np.abs(np.bincount(bins, right - sure)).sum() / len(sure))


def _find_mistakes(
    images: ImageSet, said: Sequence[int], confidences: Sequence[float]
) -> tuple[Mistake, ...]:
    """Return the mistakes that the network is surest of, without images that it cannot answer."""
    every = zip(images.samples, said, confidences, strict=True)
    wrong = [entry for entry in every if entry[0].label != entry[1] and math.isfinite(entry[2])]
    wrong.sort(key=lambda entry: -entry[2])
    return tuple(
        Mistake(sample.path, images.classes[label], images.classes[sample.label], confidence)
        for sample, label, confidence in wrong[:_WORST]
    )
