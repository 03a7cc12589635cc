"""An optimisation step: its images in micro-batches, their gradients, the change that they make."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from momconv.data.dataset import LabelledImages, end_workers, make_loader, read_batches
from momconv.data.transforms import training_transform
from momconv.pixels import taking_bytes
from momconv.planner.measurement import autocast
from momconv.planner.outlook import has_batch_norm
from momconv.states import in_eval_mode
from momconv.training.batches import (
    MicroBatches,
    Mixer,
    Part,
    are_bytes,
    draw,
    repeat,
    split_batch,
    split_epoch,
    split_order,
    weigh_images,
)
from momconv.training.network import find_layout
from momconv.training.optimisation import set_rate
from momconv.training.run import TrainingRun
from momconv.zoo.description import describe


def fewest_images(model: nn.Module) -> int:
    """Return how many images ``model`` needs at once: one alone may be too few for BatchNorm."""
    return 2 if has_batch_norm(model) else 1


@dataclass(frozen=True, slots=True)
class Step:
    """The images of one optimisation step, their number, and this process's micro-batches.

    Attributes:
        indices: Of the images, of all processes.
        parts: The micro-batches.
        is_undivided: Whether it is one micro-batch in each of the processes.
        own: How many micro-batches there are.
        most: Those of the process that has most of them.
    """

    indices: list[int]
    parts: Iterator[Part]
    is_undivided: bool = False
    own: int = 1
    most: int = 1

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.indices)


class Steps:
    """Reads the steps of an epoch, in the order that its number and the seed give."""

    def __init__(self, run: TrainingRun) -> None:
        images = run.splits.train
        self._weights = None
        if run.recipe.data.balance == "sampler":
            self._weights, images = weigh_images(images), repeat(images)
        preprocessing = describe(run.model).preprocessing
        data = run.recipe.data
        transform = training_transform(
            preprocessing, level=data.augment, flip=data.flip, as_bytes=are_bytes(run.recipe)
        )
        self._dataset = LabelledImages(
            images, transform, seed=run.recipe.train.seed, ranges=preprocessing.ranges
        )
        self._micro_batches = MicroBatches()
        self._mixer = Mixer(run.recipe.train, len(images.classes))
        self._loader = make_loader(
            self._dataset,
            workers=run.workers,
            batch_sampler=self._micro_batches,
            persistent_workers=run.workers > 0,
            pin_memory=run.device.type == "cuda",
        )
        self._run, self._recipe = run, run.recipe.train
        self._count = len(run.splits.train.samples)

    def read(
        self, epoch: int, *, first: int, left_out: Collection[int] = frozenset()
    ) -> Iterator[Step]:
        """Yield the steps of ``epoch`` from its step ``first`` on. Each must be used up in turn.

        The images ``left_out`` are missing from theirs.
        """
        batches = self._fill_up(self._split(epoch), left_out)[first:]
        self._dataset.set_epoch(epoch)
        self._micro_batches.steps = list(map(self._read_share, batches))
        parts = read_batches(self._loader)
        for step, batch in enumerate(batches):
            count = len(self._micro_batches.steps[step])
            own = itertools.islice(parts, count)
            indices = [index % self._count for index in batch]
            parts_of_step = self._mixer.mix(own, epoch=epoch, step=first + step)
            is_undivided, most = self._is_undivided(len(batch)), self._count_most(len(batch))
            yield Step(indices, map(self._lay_out, parts_of_step), is_undivided, count, most)

    def close(self) -> None:
        """End the processes that read."""
        end_workers(self._loader)

    def _lay_out(self, part: Part) -> Part:
        """Return ``part`` as the network wants it; a GPU lays it out itself, after the transfer.

        Nobody keeps what it was before, so it never takes memory twice.
        """
        images, labels = part
        if self._run.device.type == "cpu":
            images = images.contiguous(memory_format=find_layout(self._run.recipe.train))
        return images, labels

    def _read_share(self, batch: list[int]) -> list[list[int]]:
        """Return the micro-batches of this process's share of ``batch``.

        All processes have equally many if BatchNorm sees those of all at once.
        """
        together, processes = self._recipe.sync_bn, self._run.processes
        fewest = 1 if together else fewest_images(self._run.model)
        own = processes.share(len(batch), fewest=fewest)
        largest = math.ceil(len(batch) / processes.count) if together else None
        share, micro_batch = batch[own.start : own.stop], self._run.plan.micro_batch
        parts = split_batch(share, micro_batch, largest=largest)
        return self._mixer.extend(parts, before=batch[own.start - 1])

    def _count_most(self, images: int) -> int:
        """Return the micro-batches of the first process, whose share is the largest."""
        run = self._run
        own = replace(run.processes, rank=0).share(images, fewest=fewest_images(run.model))
        return len(split_batch(own, run.plan.micro_batch))

    def _is_undivided(self, images: int) -> bool:
        """Return whether so many are one micro-batch in each process; they all know that."""
        run, count = self._run, self._run.processes.count
        largest = math.ceil(images / count)
        return largest <= run.plan.micro_batch and images >= count * fewest_images(run.model)

    def _fill_up(self, batches: list[list[int]], left_out: Collection[int]) -> list[list[int]]:
        """Return ``batches`` without ``left_out``; too small ones take the epoch's first images.

        That is, where images are left out or every process needs one.
        """
        fewest = self._run.processes.count if self._recipe.sync_bn else 0
        if left_out:
            fewest = max(fewest, fewest_images(self._run.model))
            batches = [[i for i in batch if i % self._count not in left_out] for batch in batches]
        order = [*itertools.chain(*batches)]
        for batch in batches:
            if len(batch) < fewest:
                others = [i for i in order if i not in batch]
                batch += others[: fewest - len(batch)]
        return batches

    def _split(self, epoch: int) -> list[list[int]]:
        size, seed = self._recipe.batch_size, self._recipe.seed
        if self._weights is None:
            return split_epoch(self._count, size, seed=seed, epoch=epoch)
        return split_order(draw(self._weights, seed=seed, epoch=epoch), size)


def add_gradients(
    run: TrainingRun,
    images: Tensor,
    labels: Tensor,
    share: float,
    before_backward: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add the gradients of a micro-batch, ``share`` of its batch; return its part of the loss.

    The parts' losses, weighted so, sum to the mean loss over the batch, whatever their sizes.
    Weights of classes, whose mean over all images is 1, do not change what that is divided by.
    """
    layout = find_layout(run.recipe.train)
    images = images.to(run.device, non_blocking=True, memory_format=layout)
    labels = labels.to(run.device, non_blocking=True)
    smoothing = run.recipe.train.label_smoothing
    if run.class_weights is not None:
        labels, smoothing = weigh_labels(labels, run.class_weights, smoothing), 0.0
    with _taking(run, images.dtype), autocast(run.plan.precision, run.device):
        outputs = run.model(images)
        total = F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
        loss = share / len(labels) * total
        before_backward()
        run.scaler.scale(loss).backward()
    return loss.detach()


def _taking(run: TrainingRun, kind: torch.dtype) -> AbstractContextManager[None]:
    """Inside, the network takes images of that kind."""
    if kind != torch.uint8:
        return nullcontext()
    p = describe(run.model).preprocessing
    return taking_bytes(run.model, p.mean, p.std, run.device)


def keep_company(run: TrainingRun) -> None:
    """Go through the network and back with nothing to learn, as all have to where it is divided.

    Buffers stay as they are, and gradients too.
    """
    side = run.plan.request.resolution
    nothing = torch.zeros(1, 3, side, side, device=run.device)
    with in_eval_mode(run.model):
        with autocast(run.plan.precision, run.device):
            outputs = run.model(nothing)
        (0 * outputs.float().sum()).backward()


def weigh_labels(labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Return smoothed probabilities (images, classes) with the weight of each image's class.

    ``F.cross_entropy(weight=…)`` would weigh the share of smoothing that other classes get by
    *their* weights: of a common image, the loss would be lowest where it is taken for a rare one.

    >>> weigh_labels(torch.tensor([0, 1]), torch.tensor([0.5, 4.0]), smoothing=0.2)
    tensor([[0.4500, 0.0500],
            [0.4000, 3.6000]])
    """
    if not labels.is_floating_point():  # not mixed
        labels = F.one_hot(labels, len(weights)).to(weights.dtype)
    weighed = labels * weights
    return torch.lerp(weighed, weighed.mean(1, keepdim=True), smoothing)


def take_step(run: TrainingRun, lr: float) -> None:
    """Change the weights by the gradients that have been added up, unless they did in backward.

    Until they are gone, all that training holds is there: the first time, the plan learns of it.
    """
    set_rate(run.optimizer, lr)
    if (clip := run.recipe.train.clip) is not None:
        clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)  # not where a gradient is too large for fp16
    run.scaler.update()
    if run.plan.measured_static_bytes is None and not run.head_only:
        run.plan = replace(run.plan, measured_static_bytes=run.count_static())
    run.optimizer.zero_grad()
    if run.average:
        run.average.update(run.model)
