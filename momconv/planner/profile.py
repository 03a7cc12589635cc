"""The memory of a training step under each strategy, measured side by side."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from torch import nn

from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.measurement import Precision, StepUsage, measure_step, static_bytes
from momconv.planner.micro_batch import Line, StaticBytes

# "plain" is the network before its conversion; the others are strategies of the converted one.
Variant = Literal["plain", "store", "checkpoint", "momentum", "auto"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

_BATCHES = (2, 3)  # images; see momconv.planner.measurement.per_image
MEASUREMENTS = len(VARIANTS) * len(_BATCHES)
_FLOAT = 4  # bytes of one of an image's values


@dataclass(frozen=True, slots=True)
class Profile:
    """What one variant needs.

    Attributes:
        variant: Which one.
        peak: The peak of one training step as a function of its images, which it includes; all
            that training holds whatever the batch is comes on top.
        peak_stage: Whose forward or backward pass ran at the peak.
        held_bytes: What each stage holds for one image at the end of the forward pass.
    """

    variant: Variant
    peak: Line
    peak_stage: str
    held_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What all variants need, each on top of the same ``static`` bytes."""

    static: StaticBytes
    profiles: tuple[Profile, ...]

    def largest_batch(self, profile: Profile, budget_bytes: int) -> int:
        """The most images that one training step can take within ``budget_bytes``, all included.

        >>> peak = Line(fixed_bytes=50, bytes_per_image=10)
        >>> momentum = Profile("momentum", peak, peak_stage="layer1", held_bytes={})
        >>> MemoryProfile(StaticBytes(10, 10, 10), (momentum,)).largest_batch(momentum, 120)
        4
        """
        return profile.peak.largest_batch(budget_bytes - self.static.total)


def profile(
    model: nn.Module,
    resolution: int,
    *,
    precision: Precision = "fp32",
    optimizer: Literal["sgd", "adamw"] = "sgd",
    device: torch.device,
    progress: Callable[[int, str], None] | None = None,
) -> MemoryProfile:
    """Measure training steps of ``model``, which is converted and stays as it is.

    ``progress`` hears how many of the ``MEASUREMENTS`` are done, and which one is next.

    Raises:
        UsageError: The model cannot be inverted: it is not converted, or γ is 0.
    """
    model = copy.deepcopy(model).to(device).train()
    set_strategy(model, "momentum")  # raises at once
    gammas = {name: stage.gamma for name, stage in momentum_stages(model).items()}
    steps: list[StepUsage] = []
    for variant, images in product(VARIANTS, _BATCHES):
        if progress:
            progress(len(steps), f"{variant}, {images} images")
        _become(model, variant, gammas)
        steps.append(measure_step(model, images, resolution, precision=precision, device=device))
    image_bytes = 3 * resolution**2 * _FLOAT
    profiles = (
        _profile(variant, few, many, image_bytes)
        for variant, few, many in zip(VARIANTS, steps[::2], steps[1::2], strict=True)
    )
    return MemoryProfile(static_bytes(model, optimizer), tuple(profiles))


def _become(model: nn.Module, variant: Variant, gammas: dict[str, float]) -> None:
    for name, stage in momentum_stages(model).items():
        stage.gamma = 0.0 if variant == "plain" else gammas[name]
    set_strategy(model, "store" if variant == "plain" else variant)


def _profile(variant: Variant, few: StepUsage, many: StepUsage, image_bytes: int) -> Profile:
    """The line through the peaks of two batches, and what one image more makes each stage hold."""
    peaks = [
        (images, step.peak_bytes + images * image_bytes)
        for images, step in zip(_BATCHES, (few, many), strict=True)
    ]
    added = _BATCHES[1] - _BATCHES[0]
    held = {
        stage: (many.held_bytes[stage] - few.held_bytes[stage]) // added
        for stage in many.held_bytes
    }
    return Profile(variant, Line.through(*peaks), many.peak_stage, held)
