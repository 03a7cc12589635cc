"""Choosing the micro-batch from measured bytes, before the run."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from momconv.errors import ModelFileError, UsageError
from momconv.planner.measurement import (
    Precision,
    available_bytes,
    measure_step,
    per_image,
    static_bytes,
)
from momconv.planner.micro_batch import Line, choose_micro_batch
from momconv.training.batches import largest_part, split_batch
from momconv.units import format_bytes, parse_bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan depends on, besides the network."""

    images: int  # of an epoch
    batch_size: int
    micro_batch: int | Literal["auto"]
    resolution: int  # pixels
    strategy: str
    precision: Precision
    optimizer: Literal["sgd", "adamw"]
    device: str
    memory: str | None  # None: what is free

    @property
    def batch(self) -> int:
        """The images of a full batch."""
        return min(self.images, self.batch_size)

    @property
    def picture_bytes(self) -> int:
        """One image as the network's input."""
        return 3 * self.resolution**2 * 4


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a batch is split, and what it takes; without a measurement the bytes are unknown."""

    setting: Setting
    micro_batch: int
    predicted_bytes: int | None = None  # by a line through two small batches
    measured_bytes: int | None = None  # of a step with the largest micro-batch of the epoch
    limit_bytes: int | None = None

    @property
    def sizes(self) -> list[int]:
        """The images of each micro-batch of a full batch."""
        return [len(part) for part in split_batch(range(self.setting.batch), self.micro_batch)]

    def to_json(self) -> str:
        """The plan as a JSON document, with the sizes."""
        return json.dumps(asdict(self) | {"sizes": self.sizes}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of ``to_json``.

        Raises:
            ModelFileError: ``text`` is no plan.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            problem = f"plan.json: {error.errors()[0]['msg']}"
            raise ModelFileError(problem, kind="run.bad_plan", fix="rm it to plan anew") from error

    def __str__(self) -> str:
        sizes, setting = self.sizes, self.setting
        parts = f"{len(sizes)} micro-batches of {sizes[0]}" if len(sizes) > 1 else "one micro-batch"
        if sizes[-1] < sizes[0]:
            parts += f" or {sizes[-1]}"
        text = f"batch of {setting.batch} in {parts} ({setting.strategy}, {setting.precision})"
        if self.measured_bytes is None or self.limit_bytes is None:
            return f"{text}, as asked for"
        peak, limit = format_bytes(self.measured_bytes), format_bytes(self.limit_bytes)
        whose = "the limit" if setting.memory else "what is free"
        return f"{text}, {peak} at the peak; {whose} is {limit}"


def plan_batches(model: nn.Module, setting: Setting, device: torch.device) -> BatchPlan:
    """The largest micro-batch that fits, or the one that was asked for.

    ``model`` is measured as it is, in training mode and with its strategy. A line through two small
    batches may be low, so a step with the chosen micro-batch has the last word.

    Raises:
        ResourceError: Not even one image fits.
        UsageError: Only one image fits or is asked for, and BatchNorm cannot take it alone.
    """
    if setting.micro_batch != "auto":
        if largest_part(setting.images, setting.batch_size, setting.micro_batch) == 1:
            _measure(model, setting, device, 1)  # to know that it can be done
        return BatchPlan(setting, min(setting.micro_batch, setting.batch))
    static = static_bytes(model, setting.optimizer)
    limit = _limit(setting, device, static.weights)
    line = per_image(model, setting.resolution, precision=setting.precision, device=device)
    line = replace(line, bytes_per_image=line.bytes_per_image + setting.picture_bytes)
    size, predicted = setting.batch + 1, None
    while True:
        plan = choose_micro_batch(line, static, limit, setting.batch, resolution=setting.resolution)
        size = min(plan.sizes[0], size - 1)
        largest = largest_part(setting.images, setting.batch_size, size)
        predicted = predicted or static.total + line.at(largest)
        peak = _measure(model, setting, device, largest)
        if static.total + peak <= limit:
            return BatchPlan(setting, size, predicted, static.total + peak, limit)
        line = Line.through((0, line.fixed_bytes), (largest, peak)) if size > 1 else Line(0, peak)


def still_holds(plan: BatchPlan, setting: Setting, model: nn.Module, device: torch.device) -> bool:
    """Whether a run that goes on can keep its ``plan``, and with it its exact results."""
    if plan.setting != setting:
        return False
    if plan.measured_bytes is None:
        return True
    weights = static_bytes(model, setting.optimizer).weights
    return plan.measured_bytes <= _limit(setting, device, weights)


def _limit(setting: Setting, device: torch.device, loaded_bytes: int) -> int:
    """The memory for everything, the ``loaded_bytes`` of the network included."""
    if setting.memory is not None:
        return parse_bytes(setting.memory)
    return available_bytes(device) + loaded_bytes


def _measure(model: nn.Module, setting: Setting, device: torch.device, images: int) -> int:
    """The peak of a step besides weights, gradients and optimiser state."""
    try:
        step = measure_step(
            model, images, setting.resolution, precision=setting.precision, device=device
        )
    except ValueError as error:
        if images > 1:
            raise
        # BatchNorm, of a feature map that has shrunk to one pixel
        raise UsageError(
            f"at {setting.resolution} pixels the network cannot be trained on micro-batches of "
            f"1 image\n{error}",
            kind="usage.micro_batch_of_one",
            fix="--micro-batch 2, with --batch-size 2 or more",
        ) from error
    return step.peak_bytes + images * setting.picture_bytes
