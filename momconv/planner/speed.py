"""The speed of a device, fitted to two training steps, of which one is clearly longer.

A GPU works while further operations are launched: until the work takes longer than that, more
images take no more time. So these are steps of which twice the images take clearly longer.
"""

from collections.abc import Iterator

import torch
from torch import nn

from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.cost import Speed, Work, estimate_speed
from momconv.planner.measurement import time_step
from momconv.planner.prediction import Predictor, Training
from momconv.zoo.description import find_description
from momconv.zoo.networks import check_resolution

_FEW = 2  # images
_MOST = 256
_LONGER = 1.5  # times the step with half as many; of less, launches and noise are too much
_LARGEST_SIDE = 96  # pixels


def measure_speed(model: nn.Module, training: Training, limit: int) -> Speed:
    """Return the speed of the device, on which ``model`` is, with as many images as that takes.

    It is estimated where ``limit`` bytes are too few for them, or nothing makes a step longer. The
    model stores its activations then; its other state is afterwards what it was.
    """
    device = torch.device(training.device)
    if momentum_stages(model):
        set_strategy(model, "store")
    side = _find_side(model, training.resolution)
    predictor = Predictor(model, training)
    speed = estimate_speed(device.type, training.precision)
    half: tuple[Work, float] | None = None
    for images in _double(_FEW, _MOST):
        prediction = predictor.predict(images, resolution=side)
        work = prediction.work
        if prediction.peak.total > limit:
            return speed
        seconds = time_step(model, images, side, training.precision, device)
        if half is not None and seconds > _LONGER * half[1]:
            return speed.fit(half, (work, seconds))
        half = work, seconds
    return speed


def _double(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _find_side(model: nn.Module, resolution: int) -> int:
    """Return a smaller resolution, if it is known that the model takes it."""
    if find_description(model) is None:
        return resolution
    smaller = min(_LARGEST_SIDE, resolution)
    try:
        check_resolution(model, smaller)
    except UsageError:
        return resolution
    return smaller
