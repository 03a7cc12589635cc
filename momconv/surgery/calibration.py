"""Making up, on unlabelled images, for what a conversion has changed."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import DataError
from momconv.exhaustion import Parts
from momconv.states import in_eval_mode, keep_buffers
from momconv.surgery.fitting import Fitting
from momconv.surgery.imitation import (
    CHUNK,
    Images,
    Imitation,
    OnStep,
    Schedule,
    imitate,
    measure_divergence,
    norm_parameters,
    read_repeatedly,
    trainable_gains,
)
from momconv.surgery.stem import leave_stem

_STEPS = 32  # of a pass, unless that takes very small ones or large ones
_PASSES = 2  # in which gains and norms are refined
_FEWEST_IMAGES = 2  # at once: BatchNorm may not be able to take one alone
_RATE, _RATE_OF_FITTED = 1e-2, 1e-3  # of what is refined


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was adapted.

    Attributes:
        layers: How many BatchNorm layers have new statistics; 0 if the old ones were better.
        imitation: How close fitting layers and refining gains and norms brought it to the original
            network; None without that.
    """

    layers: int
    imitation: Imitation | None


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    original: nn.Module | None = None,
    *,
    most_images: int | None = None,
    progress: OnStep | None = None,
) -> Calibration:
    """Adapt ``model`` to the momentum rule, which shifts the distribution of its activations.

    First, BatchNorm's running statistics become their average over ``batches``; given the
    ``original``, only if that brings the network closer to it. Then, in one pass over them, the
    first and the last layer of the blocks in runs are fitted to what the original computes, in
    closed form; and in two more the gains of the runs and the scales and shifts of all
    normalisation layers are trained to reproduce its logits and the outputs of its stages. No label
    is used. On a fifth of the images, held out, the result is never further from the original than
    the network was before. Where memory runs out, batches go through the network in smaller parts.

    Args:
        model: The converted network, on any device. Its training flags stay as they are.
        batches: Images (B, 3, H, W), preprocessed as for evaluation; with ``original``, something
            that can be iterated several times. Every batch counts the same for the statistics, so
            they should be of one size, and large: 100 images or more.
        original: The network that ``model`` was converted from, on the same device. It stays as it
            is.
        most_images: Take fewer steps, but one of each kind at least, so as not to read more than so
            many images, each time that one is read counted.
        progress: Hears of steps done, of all steps, and of the time left. A KeyboardInterrupt
            during these, from here too, ends it early with the best values so far.

    Raises:
        DataError: There are no batches. The statistics are then, as after any exception, as before.
    """
    images = Images(batches) if original is not None else None
    layers = adapt_statistics(model, batches, original, images)
    if original is None or images is None or not images.held_out:
        return Calibration(layers, None)
    return Calibration(layers, refine(model, original, images, most_images, progress))


def adapt_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    original: nn.Module | None,
    images: Images | None,
) -> int:
    """Re-estimate BatchNorm's statistics, the first half of :func:`calibrate`.

    If ``images``, those of ``batches``, hold some out, the statistics with which ``model`` is
    closer to its ``original`` on these are kept.

    Returns:
        How many BatchNorm layers have new statistics.
    """
    if original is None or images is None or not images.held_out:
        return _estimate_statistics(model, batches)
    return _estimate_if_closer(model, batches, original, images)


def refine(
    model: nn.Module,
    original: nn.Module,
    images: Images,
    most_images: int | None = None,
    progress: OnStep | None = None,
) -> Imitation:
    """Fit layers, gains and norms, the second half of :func:`calibrate`.

    Some of the ``images`` must be held out.
    """
    chunk, most = images.find_chunk(_STEPS), most_images or math.inf
    share = most / (1 + _PASSES)
    fits = _count_steps(images, CHUNK, share)
    steps = _PASSES * _count_steps(images, chunk, share)

    def tell(before: int, done: int, _: int, left: str) -> None:
        if progress:
            progress(before + done, fits + steps, left)

    before = measure_divergence(model, original, images.held_out)
    fitting = Schedule(fits, partial(tell, 0))
    fitted, interrupted = _fit_if_closer(model, original, images, fitting, before)
    if interrupted:
        return Imitation(0, before, fitted, interrupted=True)
    rate = _RATE_OF_FITTED if fitted < before else _RATE
    with trainable_gains(model) as gains:
        groups = [(gains + norm_parameters(model), rate)]
        chunks = read_repeatedly(images, Schedule(steps, partial(tell, fits)), chunk)
        done = imitate(model, original, groups, chunks, images.held_out, trial=steps // _PASSES)
    return replace(done, before=before)


def _count_steps(images: Images, chunk: int, most: float) -> int:
    """Return the steps of one pass, or of the part of it that does not read more images."""
    return int(min(images.count_steps(chunk), max(1, most / chunk)))


def _fit_if_closer(
    model: nn.Module, original: nn.Module, images: Images, schedule: Schedule, before: float
) -> tuple[float, bool]:
    """Fit layers, but undo that if ``model`` is no closer to the original than ``before``.

    Returns:
        How far it is then, and whether a KeyboardInterrupt has ended it early.
    """
    example = images.held_out[0][:1].to(next(model.parameters()).device)
    fitting, interrupted = Fitting(model, original, example, images.count), False
    try:
        with in_eval_mode(model, original):
            for few, _ in read_repeatedly(images, schedule, CHUNK) if fitting.layers else ():
                fitting.take(few)
    except KeyboardInterrupt:
        leave_stem(model)
        leave_stem(original)
        interrupted = True
    except BaseException:
        fitting.undo()
        raise
    after = measure_divergence(model, original, images.held_out)
    if after < before:
        return after, interrupted
    fitting.undo()
    return before, interrupted


def _estimate_if_closer(
    model: nn.Module, batches: Iterable[Tensor], original: nn.Module, images: Images
) -> int:
    """Re-estimate, but keep the statistics with which ``model`` is closer to the original.

    Re-estimated ones also fit images unlike those of the original's training, to which the original
    itself does not adapt; for a small γ, which changes little, that is the larger change.
    """
    restore = keep_buffers(model.modules())
    before = measure_divergence(model, original, images.held_out)
    layers = _estimate_statistics(model, batches)
    if measure_divergence(model, original, images.held_out) <= before:
        return layers
    restore()
    return 0


def _estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> int:
    restore, is_empty, parts = keep_buffers(model.modules()), True, Parts(_FEWEST_IMAGES)
    try:
        with _estimating(model) as layers, torch.no_grad():
            for images in batches:
                parts.work(lambda few: _take_in(model, few), images)
                is_empty = False
        if is_empty:
            raise DataError(
                "there are no images to estimate BatchNorm's statistics on",
                kind="data.no_images",
                fix="give batches of images; an iterator gives them only once",
            )
    except BaseException:  # Ctrl-C too
        restore()
        raise
    return len(layers)


def _take_in(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take ``batches`` into the averages; if that fails, none of them."""
    device, restore = next(model.parameters()).device, keep_buffers(model.modules())
    try:
        for images in batches:
            model(images.to(device))
    except BaseException:
        restore()
        raise


@contextmanager
def _estimating(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Inside, BatchNorm alone is in training mode, and averages from nothing."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = {layer: layer.momentum for layer in layers}
    with in_eval_mode(model):
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # the plain average of all batches
        try:
            yield layers
        finally:
            for layer, momentum in momenta.items():
                layer.momentum = momentum
