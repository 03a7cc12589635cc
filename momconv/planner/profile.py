"""The memory of a training step under each strategy, side by side, and what converting saves."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from momconv.catalogue import Saving
from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.cost import Speed, Work, estimate_speed
from momconv.planner.measurement import available_bytes, per_image, time_step
from momconv.planner.micro_batch import Curve, Line, StaticBytes
from momconv.planner.prediction import PeakMemory, Predictor, StepPrediction, Training
from momconv.planner.speed import measure_speed
from momconv.planner.stages import assign_modules
from momconv.vocabulary import STRATEGIES, Strategies, StrategyChoice
from momconv.zoo.description import describe

# "plain" is the network before its conversion; the others are strategies of the converted one.
Variant = Literal["plain", StrategyChoice]
VARIANTS: tuple[Variant, ...] = ("plain", *(name for name in STRATEGIES if name != "store"))
EXAMPLE = 32  # images of the step that is broken down, or compared

_FEW = 2  # images; BatchNorm may refuse one
_TIMED = 4  # images
_USUAL_GAMMA = 0.9  # of a network that could have momentum, and was left plain


@dataclass(frozen=True, slots=True)
class Profile:
    """What one variant needs.

    Attributes:
        variant: Which one.
        predicted: The peak of a training step, everything included, as a function of its images.
        example: What is alive at the peak of a step with ``EXAMPLE`` images, predicted.
        course: The way of that step through the stages and back: how many are done, and what is
            alive then.
        measured: The same as ``predicted``, through two small steps that were run; None without.
        work: What that step amounts to.
        images_per_second: Of another small step, without an optimiser; None without.
    """

    variant: Variant
    predicted: Curve
    example: PeakMemory
    work: Work
    course: tuple[tuple[float, int], ...] = ()
    measured: Line | None = None
    images_per_second: float | None = None

    @property
    def peak(self) -> Curve:
        """The measured peak, or else the predicted one."""
        return self.predicted if self.measured is None else Curve((self.measured,))

    def predict_rate(self, images: int, speed: Speed) -> float | None:
        """Return about the images a second in steps with so many; None without any."""
        return images / speed.seconds(self.work.scale(images / EXAMPLE)) if images else None


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What all variants need, each with the same ``static`` bytes in it.

    ``rounding`` is how far outputs are from double precision, as a share; None where not measured.
    """

    static: StaticBytes
    gamma: float  # the least of the stages'
    stages: tuple[str, ...]  # from the image to the logits
    speed: Speed  # of the device: fitted to small steps if they were measured, else estimated
    profiles: tuple[Profile, ...]
    rounding: float | None = None

    def __getitem__(self, variant: Variant) -> Profile:
        return next(profile for profile in self.profiles if profile.variant == variant)

    def relative_seconds(self, variant: Variant) -> float:
        """Return the time of a step with ``EXAMPLE`` images as a multiple of plain's, about."""
        plain, other = (self.speed.seconds(self[name].work) for name in ("plain", variant))
        return other / plain


def profile(
    model: nn.Module,
    training: Training,
    *,
    measuring: bool = False,
    progress: Callable[[int, str], None] | None = None,
) -> MemoryProfile:
    """Predict training steps of ``model``, which is converted and stays as it is.

    Args:
        model: On any device, ``torch.device("meta")`` included unless it is measured.
        training: What a step is.
        measuring: Whether small steps are run as well, on the device of ``training``.
        progress: Hears how many of the ``VARIANTS`` are done, and which one is next.

    Raises:
        UsageError: The model cannot be inverted: it is not converted, or γ is 0.
    """
    model = copy.deepcopy(model).train()
    if measuring:
        model.to(torch.device(training.device))
    set_strategy(model, "momentum")  # raises at once
    gammas = {name: stage.gamma for name, stage in momentum_stages(model).items()}
    stages = tuple(dict.fromkeys(assign_modules(model).values()))
    profiles: list[Profile] = []
    predictor = Predictor(model, training)
    for variant in VARIANTS:
        if progress:
            progress(len(profiles), variant)
        _become(predictor.model, variant, gammas)
        few, example = (predictor.predict(images) for images in (_FEW, EXAMPLE))
        curve = Curve.through((_FEW, few.moments), (EXAMPLE, example.moments))
        course = tuple(_follow(example, stages))
        found = Profile(variant, curve, example.peak, example.work, course)
        if measuring:
            _become(model, variant, gammas)
            found = _measure(found, model, training)
        profiles.append(found)
    peak = profiles[-1].example
    static = StaticBytes(peak.weights, peak.gradients, optimizer=peak.optimizer, ema=peak.ema)
    least = min(gamma for gamma in gammas.values() if gamma)
    speed = _find_speed(model, training, measuring=measuring)
    return MemoryProfile(static, least, stages, speed, tuple(profiles))


def compare_peaks(
    model: nn.Module, training: Training, images: int, chosen: Strategies
) -> dict[str, PeakMemory]:
    """Predict the peak of a step with so many ``images``, in each way that people compare.

    Those are the plain network, the converted one checkpointed and with momentum, and as
    ``chosen``; the ``model`` in its current mode, with what is frozen of it.

    Raises:
        UsageError: Momentum has no place in the ``model``.
    """
    model = copy.deepcopy(model).to("meta")
    own = {name: stage.gamma for name, stage in momentum_stages(model).items()}
    gammas = own if any(own.values()) else dict.fromkeys(own, _USUAL_GAMMA)
    predictor, peaks = Predictor(model, training), dict[str, PeakMemory]()

    def predict(variant: Variant, name: str) -> None:
        _become(predictor.model, variant, gammas)
        peaks[name] = predictor.predict(images).peak

    predict("plain", "plain")
    predict("checkpoint", "checkpointed")
    predict("momentum", "momentum")
    for name, stage in momentum_stages(predictor.model).items():
        stage.gamma = own[name]
    set_strategy(predictor.model, chosen)
    return peaks | {"chosen": predictor.predict(images).peak}


def _find_speed(model: nn.Module, training: Training, *, measuring: bool) -> Speed:
    device = torch.device(training.device)
    if measuring:
        return measure_speed(model, training, available_bytes(device))
    return estimate_speed(device.type, training.precision)


def _become(model: nn.Module, variant: Variant, gammas: dict[str, float]) -> None:
    for name, stage in momentum_stages(model).items():
        stage.gamma = 0.0 if variant == "plain" else gammas[name]
    set_strategy(model, "store" if variant == "plain" else variant)


def _follow(prediction: StepPrediction, stages: Sequence[str]) -> Iterator[tuple[float, int]]:
    """Yield how far each operation is through the stages and back, and what is alive then."""
    operations, seen = Counter(prediction.places), Counter[tuple[bool, str]]()
    for place, alive in zip(prediction.places, prediction.moments, strict=True):
        in_forward, stage = place
        number = stages.index(stage)
        before = number if in_forward else 2 * len(stages) - 1 - number
        yield before + seen[place] / operations[place], alive
        seen[place] += 1


def _measure(found: Profile, model: nn.Module, training: Training) -> Profile:
    """Return the profile with what small steps of ``model`` take."""
    device = torch.device(training.device)
    step = per_image(model, training.resolution, precision=training.precision, device=device)
    image_bytes = 3 * training.resolution**2 * torch.float32.itemsize
    line = Line(found.example.static + step.fixed_bytes, step.bytes_per_image + image_bytes)
    seconds = time_step(model, _TIMED, training.resolution, training.precision, device)
    return replace(found, measured=line, images_per_second=_TIMED / seconds)


def predict_saving(plain: nn.Module, converted: nn.Module) -> Saving:
    """Predict what converting saves in steps of ``EXAMPLE`` images, and the time that it costs.

    They have the resolution that ``plain`` is described with.
    """
    resolution = describe(plain).preprocessing.resolution
    training = Training(resolution)
    store, auto = (_predict_example(model, training) for model in (plain, converted))
    speed = estimate_speed(training.device, training.precision)
    return Saving(
        resolution=resolution,
        store_bytes=store.peak.step // EXAMPLE,
        auto_bytes=auto.peak.step // EXAMPLE,
        relative_seconds=speed.seconds(auto.work) / speed.seconds(store.work),
    )


def _predict_example(model: nn.Module, training: Training) -> StepPrediction:
    predictor = Predictor(model, training)
    predictor.model.train()
    return predictor.predict(EXAMPLE)
