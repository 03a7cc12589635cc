"""The fastest way to train with a batch within a limit of memory, found by prediction.

A strategy is faster the less it recomputes, but needs more memory the more it stores; how long a
step takes is estimated from the operations of its prediction (cost.py). Gradients of micro-batches
add up to exactly those of the batch, but BatchNorm sees only one micro-batch at a time. So the
search takes the fastest strategy under which the whole batch fits at once; where none is, the
fastest of those that come closest, or, without BatchNorm, the fastest that leaves no tiny parts.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import ResourceError, UsageError
from momconv.momentum.sequential import MomentumSequential, momentum_stages
from momconv.planner.cost import Speed, estimate_speed
from momconv.planner.measurement import Precision, available_bytes, find_stages, static_bytes
from momconv.planner.micro_batch import largest_part, split_evenly
from momconv.planner.prediction import Choice, PeakMemory, Prediction, Predictor, Training
from momconv.surgery.modes import in_eval_mode
from momconv.units import format_bytes, parse_bytes

STRATEGIES: tuple[Choice, ...] = ("store", "checkpoint", "auto", "segment")  # auto has momentum
Change = Literal["gamma", "precision"]
FEW = 8  # images; the statistics of fewer are noise
_SLACK = 0.01  # of the limit; predictions were off by at most 0.1 % (benchmarks/RESULTS.md)
_GRID = 32  # pixels; the resolutions that classification networks divide evenly
_WORTH_TRYING = 1.1  # of the limit, for an estimate
_TRIES = 3  # resolutions, or stages to freeze, that an error tries out
_GAMMAS = (0.95, 0.99, 1.0)  # with less side information than the default


@dataclass(frozen=True, slots=True)
class Plan:
    """How a batch goes through a network within a limit of memory.

    Attributes:
        strategy: For ``momconv.set_strategy``; "store" if the model has nothing to set.
        batch_size: Images of an optimisation step.
        micro_batch: The most images that go through the network at once.
        peak: What is alive at the peak of a step with the largest micro-batch, predicted.
        limit_bytes: The limit.
        precision: The one that was asked for, unless it was allowed to change.
        gamma: A larger one for the model's momentum stages, if that was allowed and needed.
        seconds_per_image: The time of a step, about; see cost.py.
        is_calibrated: Whether that comes from steps that were measured on the device.
    """

    strategy: Choice
    batch_size: int
    micro_batch: int
    peak: PeakMemory
    limit_bytes: int
    precision: Precision
    gamma: float | None
    seconds_per_image: float
    is_calibrated: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The images of each micro-batch."""
        return split_evenly(self.batch_size, self.micro_batch)


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be planned for.

    Attributes:
        training: What a step is.
        batch_size: Images of an optimisation step.
        limit_bytes: For everything, what is loaded already included.
        micro_batch: A number to keep to, or "auto".
        strategy: One to keep to, or "auto" for the fastest that fits.
        images: Of an epoch, whose last batch may be larger by one; None: one batch.
        find_speed: Asked for the device's speed where strategies have to be compared; None: it is
            estimated.
        may_change: What may be changed where the whole batch does not fit at once otherwise.
    """

    training: Training
    batch_size: int
    limit_bytes: int
    micro_batch: int | Literal["auto"] = "auto"
    strategy: Choice = "auto"
    images: int | None = None
    find_speed: Callable[[], Speed] | None = None
    may_change: Collection[Change] = ()

    @property
    def batch(self) -> int:
        """The images of a full batch."""
        return min(self.batch_size, self.images or self.batch_size)

    @property
    def sizes(self) -> list[int]:
        """The micro-batches to consider, evenly filled, the largest first."""
        if self.micro_batch != "auto":
            return [min(self.micro_batch, self.batch)]
        evenly = {split_evenly(self.batch, size)[0] for size in range(1, self.batch + 1)}
        return sorted(evenly, reverse=True)

    @property
    def usable_bytes(self) -> int:
        """The limit, less what predictions may be off by."""
        return int(self.limit_bytes * (1 - _SLACK))

    def largest_part(self, micro_batch: int) -> int:
        """The images that go through the network at once, at most."""
        return largest_part(self.images or self.batch_size, self.batch_size, micro_batch)


def plan(  # noqa: PLR0913 (each is a fact about the training)
    model: nn.Module,
    resolution: int,
    memory: int | str | None = None,
    batch_size: int = 32,
    *,
    micro_batch: int | Literal["auto"] = "auto",
    strategy: Choice = "auto",
    precision: Precision = "fp32",
    optimizer: Literal["sgd", "adamw"] = "sgd",
    device: str = "cpu",
    may_change: Collection[Change] = (),
) -> Plan:
    """Plan how ``model`` is trained fastest within ``memory``; nothing is run, ``model`` stays.

    Args:
        model: A network for RGB images, converted or not.
        resolution: Pixels of their sides.
        memory: For everything: bytes, or text like "3GiB"; None: what is free on ``device``.
        batch_size: Images of an optimisation step. Memory never changes it.
        micro_batch: Images that go through the network at once, or "auto" for as many as fit.
        strategy: One to keep to; "auto" for the fastest that fits.
        precision: "bf16" and "fp16" are autocast.
        optimizer: Whose state counts.
        device: "cpu" or "cuda".
        may_change: "gamma" (to 0.95 or 0.99, with less side information), "precision" (from fp32 to
            bf16) or both, if the whole batch does not fit at once otherwise.

    Raises:
        ResourceError: Nothing fits; the error says what would.
        UsageError: An argument is not allowed, or one image alone cannot be trained on.
    """
    if memory is None:
        place = torch.device(device)
        memory = available_bytes(place) + static_bytes(model, optimizer).weights
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    training = Training(resolution, precision, optimizer, device=device)
    request = Request(training, batch_size, limit, micro_batch, strategy, may_change=may_change)
    return search(model, request)


def search(model: nn.Module, request: Request) -> Plan:
    """The plan for a request; see :func:`plan`.

    Raises:
        ResourceError: Nothing fits; the error says what would.
        UsageError: One image alone cannot be trained on.
    """
    best, refusal = None, None
    for precision, gamma in _list_changes(model, request):
        training = replace(request.training, precision=precision)
        outlook = _Outlook(model, replace(request, training=training), gamma)
        try:
            found = _search(outlook)
        except ResourceError as error:
            refusal = refusal or error
            continue
        if best is None or found.micro_batch > best.micro_batch:
            best = found
        if best.micro_batch == request.sizes[0]:
            break
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def _list_changes(model: nn.Module, request: Request) -> list[tuple[Precision, float | None]]:
    """Precisions and γ (None: the model's own) to consider, what was asked for first."""
    precisions, gammas = [request.training.precision], list[float | None]([None])
    if "precision" in request.may_change and precisions == ["fp32"]:
        precisions.append("bf16")
    own = max((stage.gamma for stage in momentum_stages(model).values()), default=0.0)
    if "gamma" in request.may_change and own:
        gammas += [gamma for gamma in _GAMMAS if own < gamma < 1]  # 1 is another kind of network
    return list(itertools.product(precisions, gammas))


def _search(outlook: "_Outlook") -> Plan:
    request = outlook.request
    for strategy, size in _list_options(outlook, request):
        if outlook.may_fit(strategy, size):
            peak = outlook.predict(strategy, size).peak
            if peak.total <= request.usable_bytes:
                return Plan(
                    *(strategy, request.batch, size, peak, request.limit_bytes),
                    precision=request.training.precision,
                    gamma=outlook.gamma,
                    seconds_per_image=outlook.seconds_per_image(strategy, size),
                    is_calibrated=outlook.speed.is_measured,
                )
    raise _does_not_fit(outlook)


Option = tuple[Choice, int]  # a strategy and the size of a micro-batch


def _list_options(outlook: "_Outlook", request: Request) -> Iterator[Option]:
    """Strategies and micro-batches, the best first."""
    strategies = _list_strategies(outlook.model, request.strategy)
    enough = request.batch if has_batch_norm(outlook.model) else min(FEW, request.batch)
    large = [size for size in request.sizes if size >= enough]
    yield from _sort(outlook, list(itertools.product(strategies, large)))
    for size in request.sizes[len(large) :]:
        yield from _sort(outlook, [(strategy, size) for strategy in strategies])


def _sort(outlook: "_Outlook", options: Sequence[Option]) -> Iterator[Option]:
    """The fastest first. That is the first of all, before which nothing need be compared."""
    yield from options[:1]
    yield from sorted(options[1:], key=lambda option: outlook.seconds_per_image(*option))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether what ``model`` computes for an image depends on the others."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


class _Outlook:
    """What steps of a network are predicted to take."""

    def __init__(self, model: nn.Module, request: Request, gamma: float | None = None) -> None:
        """``gamma`` is for the stages that have a smaller one."""
        self.request, self.gamma = request, gamma
        self._predictor = Predictor(model, request.training)
        self.model = self._predictor.model
        if gamma is not None:
            _raise_gamma(self.model, gamma)
        if not model.training:  # else its frozen parts are in the mode that they are to be in
            self.model.train()
        self.latest: dict[Choice, tuple[int, Prediction]] = {}  # by strategy, with its images

    def may_fit(self, strategy: Choice, micro_batch: int) -> bool:
        """Whether a prediction is worth its time: what a step allocates is almost linear."""
        if strategy not in self.latest:
            return True
        images, (peak, *_) = self.latest[strategy]
        linear = (peak.step + peak.batch) * self.request.largest_part(micro_batch) / images
        estimate = peak.total - peak.step - peak.batch + linear
        return estimate <= _WORTH_TRYING * self.request.usable_bytes

    def predict(self, strategy: Choice, micro_batch: int) -> Prediction:
        """A step with micro-batches of at most so many images."""
        images = self.request.largest_part(micro_batch)
        if self.latest.get(strategy, (0,))[0] != images:
            self.latest[strategy] = images, self._predict(strategy, images)
        return self.latest[strategy][1]

    def try_out(self, strategy: Choice, micro_batch: int, **changes: Any) -> PeakMemory:
        """The same under ``changes``, or of a model that was changed; not to be remembered."""
        return self._predict(strategy, self.request.largest_part(micro_batch), **changes).peak

    def seconds_per_image(self, strategy: Choice, micro_batch: int) -> float:
        """About the time that an image takes in micro-batches of at most so many."""
        if strategy not in self.latest:
            self.predict(strategy, micro_batch)
        images, prediction = self.latest[strategy]
        parts = split_evenly(self.request.batch, micro_batch)
        seconds = (self.speed.seconds(prediction.work.scale(part / images)) for part in parts)
        return sum(seconds) / self.request.batch

    @cached_property
    def speed(self) -> Speed:
        """Of the device, measured if that was asked for."""
        training = self.request.training
        if self.request.find_speed is not None and len(self.latest) > 1:
            return self.request.find_speed()
        return estimate_speed(training.device, training.precision)

    def _predict(self, strategy: Choice, images: int, **changes: Any) -> Prediction:
        chosen = strategy if momentum_stages(self.model) else None
        try:
            return self._predictor.predict(images, chosen, **changes)
        except ValueError as error:
            if images > 1:
                raise
            training = replace(self.request.training, **changes)
            raise _cannot_take_one(training, error) from error


def _cannot_take_one(training: Training, error: ValueError) -> UsageError:
    """The error for BatchNorm of a feature map that has shrunk to one pixel."""
    return UsageError(
        f"at {training.resolution} pixels the network cannot be trained on micro-batches of "
        f"1 image\n{error}",
        kind="usage.micro_batch_of_one",
        fix="--micro-batch 2 --batch-size 2",
    )


def _list_strategies(model: nn.Module, asked: Choice) -> list[Choice]:
    """Those to choose from; the first of them does the least."""
    if not momentum_stages(model):
        return ["store"]
    return [asked] if asked != "auto" else list(STRATEGIES)


# What to say if nothing fits


def _does_not_fit(outlook: _Outlook) -> ResourceError:
    """The error, with a breakdown of the leanest strategy and changes that would fit."""
    request = outlook.request
    latest = {strategy: prediction.peak for strategy, (_, prediction) in outlook.latest.items()}
    leanest = min(latest, key=lambda strategy: latest[strategy].total)
    size = request.sizes[-1]
    peak, images = outlook.predict(leanest, size).peak, request.largest_part(size)
    return ResourceError(
        f"a micro-batch of {images} image{'s' if images > 1 else ''} does not fit: it needs "
        f"{format_bytes(peak.total)} ({leanest}), the limit is "
        f"{format_bytes(request.limit_bytes)}\n{_break_down(peak)}",
        kind="memory.does_not_fit",
        fix="\n".join(_find_fixes(outlook, leanest, peak)),
    )


def _break_down(peak: PeakMemory) -> str:
    activations = sum(peak.activations.values())
    parts = {
        "weights": peak.weights,
        "gradients": peak.gradients,
        "optimizer": peak.optimizer,
        "average of the weights": peak.ema,
        "images": peak.batch,
        "activations": activations,
        "side information": peak.side_information,
        "recomputed and gradients of activations": peak.transients,
        "GPU context and libraries": peak.allowance,
    }
    return " · ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)


def _find_less_training(outlook: _Outlook, strategy: Choice, size: int) -> Iterator[str]:
    """The fewest stages from the input on that are to be frozen, and the least larger γ."""
    usable = outlook.request.usable_bytes
    stages = find_stages(outlook.model)
    *names, _head = dict.fromkeys(stages.values())
    for count in range(1, min(_TRIES, len(names)) + 1):
        with _frozen([module for module, name in stages.items() if name in names[:count]]):
            if outlook.try_out(strategy, size).total <= usable:
                yield f"--set train.freeze=[{','.join(names[:count])}]"
                break
    for gamma in _GAMMAS:
        with _larger_gamma(outlook.model, gamma) as is_larger:
            if is_larger and outlook.try_out(strategy, size).total <= usable:
                yield f"--gamma {gamma:g}, if the network is yet to be converted"
                break


@contextmanager
def _frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, ``modules`` are not trained, and BatchNorm in them has its statistics."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    with in_eval_mode(*modules):
        try:
            for parameter in trained:
                parameter.requires_grad = False
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad = True


@contextmanager
def _larger_gamma(model: nn.Module, gamma: float) -> Iterator[bool]:
    """Inside, no momentum stage has a smaller γ; whether that changes one."""
    smaller = _raise_gamma(model, gamma)
    try:
        yield bool(smaller)
    finally:
        for stage, before in smaller.items():
            stage.gamma = before


def _raise_gamma(model: nn.Module, gamma: float) -> dict[MomentumSequential, float]:
    """Give ``gamma`` to the momentum stages with a smaller γ; they, with the γ that they had."""
    smaller = {s: s.gamma for s in momentum_stages(model).values() if 0 < s.gamma < gamma}
    for stage in smaller:
        stage.gamma = gamma
    return smaller


def _find_fixes(outlook: _Outlook, strategy: Choice, peak: PeakMemory) -> Iterator[str]:
    """What would fit, each tried out by a prediction."""
    request, size = outlook.request, outlook.request.sizes[-1]
    training, usable = request.training, request.usable_bytes

    def fits(strategy: Choice, size: int, **changes: Any) -> bool:
        return outlook.try_out(strategy, size, **changes).total <= usable

    others = _list_strategies(outlook.model, "auto")
    if strategy == request.strategy != "auto" and any(fits(other, size) for other in others):
        yield "--strategy auto"
    if request.micro_batch != "auto" and size > 2 and fits(strategy, 2):
        yield "--micro-batch auto"
    if training.precision == "fp32" and fits(strategy, size, precision="bf16"):
        yield "--set train.precision=bf16"
    yield from _find_less_training(outlook, strategy, size)
    needed = peak.step + peak.batch
    share = max(0, usable - peak.total + needed) / needed
    largest = math.floor(training.resolution * math.sqrt(share) / _GRID) * _GRID
    for side in range(largest, 0, -_GRID)[:_TRIES]:
        if fits(strategy, size, resolution=side):
            yield f"--resolution {side}"
            break
    yield f"--memory {math.ceil(peak.total / (1 - _SLACK) / 2**20)}MiB, if there is as much"
