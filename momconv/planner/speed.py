"""The speed of a device, fitted to two small training steps."""

import torch
from torch import nn

from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.cost import Speed, estimate_speed
from momconv.planner.measurement import time_step
from momconv.planner.prediction import Predictor, Training
from momconv.zoo.description import find_description
from momconv.zoo.networks import check_resolution

_IMAGES = (2, 4)
_LARGEST_SIDE = 96  # pixels


def measure_speed(model: nn.Module, training: Training, device: torch.device, limit: int) -> Speed:
    """The speed of ``device``, on which ``model`` is; it is estimated if ``limit`` bytes are few.

    The model stores its activations then; its other state is afterwards what it was.
    """
    if momentum_stages(model):
        set_strategy(model, "store")
    side = _find_side(model, training.resolution)
    predictor = Predictor(model, training)
    speed = estimate_speed(device.type, training.precision)
    steps = []
    for images in _IMAGES:
        peak, *_, work = predictor.predict(images, resolution=side)
        if peak.total > limit:
            return speed
        steps.append((work, time_step(model, images, side, training.precision, device)))
    return speed.fit(*steps)


def _find_side(model: nn.Module, resolution: int) -> int:
    """A smaller resolution, if it is known that the model takes it."""
    if find_description(model) is None:
        return resolution
    smaller = min(_LARGEST_SIDE, resolution)
    try:
        check_resolution(model, smaller)
    except UsageError:
        return resolution
    return smaller
