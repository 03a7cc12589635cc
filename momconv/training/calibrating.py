"""Calibrating the network of a run before its first step, on the training images."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from momconv.data.dataset import LabelledImages, make_loader, read_batches
from momconv.data.decoding import UnreadableImage
from momconv.data.source import ImageSet
from momconv.data.transforms import evaluation_transform
from momconv.errors import ResourceError
from momconv.planner.plan import Plan
from momconv.recipe import Recipe, TrainRecipe
from momconv.surgery.calibration import Calibration, calibrate
from momconv.training import network
from momconv.training.batches import split_epoch
from momconv.training.omission import leave_out
from momconv.training.planning import plan_batches
from momconv.training.progress import Listener
from momconv.training.run import TrainingRun
from momconv.training.steps import fewest_images
from momconv.zoo.description import describe
from momconv.zoo.networks import find_head

_IMAGES = 2000
_BATCH = 100
_SHARE = 2  # of the images that training sees
_WORK = 4  # steps of training, of which each image takes the time
_TITLES = ("adapting BatchNorm to momentum", "holding out images")  # of the first passes


def needs_calibration(model: nn.Module, recipe: Recipe) -> bool:
    """Return whether ``model`` was converted just now, from trained weights, and it is wanted."""
    start, wanted = recipe.model, recipe.momentum.calibrate
    just_converted = start.from_file is None and start.weights != "none"
    return wanted and just_converted and network.read_gamma(model) > 0


def estimate_seconds(images: int, plan: Plan, recipe: TrainRecipe) -> float | None:
    """Return about how long it takes on so many training images; None if no step was measured."""
    if not plan.is_calibrated or plan.seconds_per_image is None:
        return None
    seen = min(_WORK * min(images, _IMAGES), _SHARE * recipe.epochs * images)
    return seen * plan.seconds_per_image


def calibrate_network(run: TrainingRun) -> None:
    """Adapt the network of ``run`` to its original, which is loaded for that and then dropped.

    The original weighs no more than the gradients, which do not exist yet, and for which there is
    room unless they are to be released. In single precision, in which this is done, an image takes
    up to twice what it takes in half precision.

    Raises:
        KeyboardInterrupt: Ctrl-C came. No part of the run is on disk yet.
        ResourceError: One process alone has no room for what it keeps in a step.
        DataError: Too many images cannot be read any more.
    """
    recipe, plan, half = run.recipe, run.plan, run.plan.precision != "fp32"
    original = network.load_plain(recipe.model, network.read_preparation(recipe.data).side)
    network.place(original, run.device, run.recipe.train)
    alone = plan  # one process calibrates, which then takes more than its share of a batch
    if run.processes.count > 1 or plan.request.release_gradients:
        alone = _plan_alone(plan, run.model)
    calibrate_on(
        run.splits.train,
        run.model,
        original,
        recipe.train,
        batch_size=max(1, alone.micro_batch // 2) if half else alone.micro_batch,
        workers=run.workers,
        listener=run.listener,
        leave_out=partial(leave_out, run, "train"),
    )
    if alone is not plan:
        plan.apply(run.model)


def _plan_alone(plan: Plan, model: nn.Module) -> Plan:
    """Return the plan of one process that keeps gradients; as few images as can be if none fits."""
    request = replace(plan.request, processes=1, release_gradients=False, shards=1)
    try:
        return plan_batches(model, request)
    except ResourceError:
        if not plan.request.release_gradients and plan.request.shards == 1:
            raise
        return replace(plan, micro_batch=fewest_images(model))


def calibrate_on(  # noqa: PLR0913 (one for each choice)
    images: ImageSet,
    model: nn.Module,
    original: nn.Module,
    recipe: TrainRecipe,
    *,
    batch_size: int,
    workers: int,
    listener: Listener,
    leave_out: Callable[[UnreadableImage], None],
) -> None:
    """Adapt ``model`` to its ``original``, on some of the training images, without labels.

    This sees at most twice as many images as the training, unless those are very few.
    ``leave_out`` hears of each that cannot be read any more, and may raise.

    The statistics of BatchNorm stay those of the original's training wherever that is closer to it:
    many more images than these know what an image is like, and a few classes are not all.

    Raises:
        KeyboardInterrupt: Ctrl-C came. No part of the run is on disk yet.
    """
    batches = _Batches(images, model, batch_size, workers, listener, leave_out)
    # A head for new classes says nothing.
    with network.wearing(model, original.get_submodule(find_head(original))):
        done = calibrate(
            model,
            batches,
            original,
            most_images=_SHARE * recipe.epochs * len(images.samples),
            progress=lambda done, steps, _left: listener.advance("calibrating", done, steps),
        )
    if done.imitation and done.imitation.interrupted:
        raise KeyboardInterrupt
    listener.tell(_describe_calibration(done, batches.images))


class _Batches:
    """Some of the training images in batches of one size, as they are evaluated.

    In place of one that cannot be read any more there is another one, twice.
    """

    def __init__(
        self,
        images: ImageSet,
        model: nn.Module,
        batch_size: int,
        workers: int,
        listener: Listener,
        leave_out: Callable[[UnreadableImage], None],
    ) -> None:
        chosen = split_epoch(len(images.samples), _IMAGES, seed=0, epoch=0)[0]
        self._size = min(batch_size, _BATCH, len(chosen))
        self.images = len(chosen) // self._size * self._size  # every batch counts the same
        self._chosen = images.select(chosen[: self.images])
        self._preprocessing = describe(model).preprocessing
        self._workers, self._leave_out = workers, leave_out
        self._loader = self._make_loader()
        self.titles = [*_TITLES]
        self._listener = listener

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches; the listener hears of the first passes, and then of the steps."""
        title = self.titles.pop(0) if self.titles else None
        for done, pictures in enumerate(self._read()):
            if title is not None:
                self._listener.advance(title, done * self._size, self.images)
            yield pictures

    def _read(self) -> Iterator[Tensor]:
        done = 0
        while done < self.images // self._size:
            try:
                for pictures, _ in itertools.islice(read_batches(self._loader), done, None):
                    yield pictures
                    done += 1
            except UnreadableImage as error:
                self._leave_out(error)
                self._replace(error.path)

    def _replace(self, path: Path) -> None:
        samples = self._chosen.samples
        rest = itertools.cycle([sample for sample in samples if sample.path != path])
        others = tuple(next(rest) if sample.path == path else sample for sample in samples)
        self._chosen = replace(self._chosen, samples=others)
        self._loader = self._make_loader()

    def _make_loader(self) -> "DataLoader[tuple[Tensor, Tensor]]":
        transform = evaluation_transform(self._preprocessing)
        ranges = self._preprocessing.ranges
        dataset = LabelledImages(self._chosen, transform, seed=None, ranges=ranges)
        workers = self._workers
        return make_loader(
            dataset, workers=workers, batch_size=self._size, persistent_workers=workers > 0
        )


def _describe_calibration(done: Calibration, images: int) -> str:
    if done.imitation is None:
        return (
            f"note: re-estimated BatchNorm's statistics on {images} training images; refining gains"
            " and norms too takes micro-batches of 5 or more"
        )
    before, after = done.imitation.before, done.imitation.after
    return (
        f"note: calibrated on {images} training images; the mean divergence from the original fell "
        f"from {before:.3g} to {after:.3g} nats"
    )
