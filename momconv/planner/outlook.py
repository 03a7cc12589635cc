"""What steps of a network would take, in memory and time, under each way to run them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import UsageError
from momconv.momentum.sequential import MomentumSequential, find_ways, momentum_stages
from momconv.momentum.ways import Way
from momconv.planner.combination import Combination, Combinations, Part
from momconv.planner.cost import Speed, Work, estimate_speed
from momconv.planner.micro_batch import split_evenly
from momconv.planner.plan import Request
from momconv.planner.prediction import PeakMemory, Predictor, StepPrediction, Training
from momconv.vocabulary import STRATEGIES, Strategies, StrategyChoice

GAMMAS = (0.95, 0.99)  # with less side information than the default
FEW = 8  # images; the statistics of fewer are noise
SLACK = 0.01  # of the limit; predictions were off by at most 0.1 % (benchmarks/RESULTS.md)
_WORTH_TRYING = 1.1  # of the limit, for an estimate
_TRIES = 4  # combinations, of which the first should fit
_CHANGE_COST = 0.05  # of the time, that a change of γ or precision has to save
FindSpeed = Callable[[Training, int], Speed]  # of the device, within a limit of bytes


class Rank(NamedTuple):
    """How good a plan is: less is better."""

    lacking: int  # images to those that should go through the network at once
    seconds: float  # of an image

    def at_cost(self, *, is_changed: bool) -> "Rank":
        """Return the rank of what is worth less where it is not what was asked for."""
        return self._replace(seconds=self.seconds * (1 + _CHANGE_COST * is_changed))


class Outlook:
    """What steps of a network are predicted to take."""

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        limit_bytes: int,
        find_speed: FindSpeed | None = None,
        *,
        gamma: float | None = None,
    ) -> None:
        """``gamma`` is for the stages that have a smaller one."""
        self.request, self.limit_bytes, self.gamma = request, limit_bytes, gamma
        self.usable_bytes = int(limit_bytes * (1 - SLACK))
        self._find_speed = find_speed
        self._predictor = Predictor(model, request)
        self.model = self._predictor.model
        self.strategies = list_strategies(model, request.strategy)
        if gamma is not None:
            raise_gamma(self.model, gamma)
            self.strategies = [
                name for name in self.strategies if STRATEGIES[name].depends_on_gamma
            ]
        if not model.training:  # else its frozen parts are in the mode that they are to be in
            self.model.train()
        self.latest: dict[str, tuple[int, StepPrediction]] = {}  # with the images

    def fits(self, strategy: Strategies, micro_batch: int) -> bool:
        """Return whether a step with such micro-batches is within the limit."""
        if not self._may_fit(strategy, micro_batch):
            return False
        return self.predict(strategy, micro_batch).peak.total <= self.usable_bytes

    def _may_fit(self, strategy: Strategies, micro_batch: int) -> bool:
        """Return whether a prediction is worth its time: what a step allocates is almost linear."""
        if str(strategy) not in self.latest:
            return True
        images, (peak, *_) = self.latest[str(strategy)]
        linear = (peak.step + peak.batch) * self.request.largest_part(micro_batch) / images
        estimate = peak.total - peak.step - peak.batch + linear
        return estimate <= _WORTH_TRYING * self.usable_bytes

    def predict(self, strategy: Strategies, micro_batch: int) -> StepPrediction:
        """Return the prediction of a step with micro-batches of at most so many images."""
        images, key = self.request.largest_part(micro_batch), str(strategy)
        if self.latest.get(key, (0,))[0] != images:
            self.latest[key] = images, self._predict(strategy, images)
        return self.latest[key][1]

    def try_out(self, strategy: Strategies, micro_batch: int, **changes: Any) -> PeakMemory:
        """Return the peak under ``changes``, or of a changed model; it is not remembered."""
        return self._predict(strategy, self.request.largest_part(micro_batch), **changes).peak

    def find_fastest(self, micro_batch: int, speed: Speed) -> Strategies | None:
        """Return the fastest combination that fits, or else the strategy to keep to, if it fits."""
        if self.can_combine:
            return self._combine(micro_batch, speed)
        strategy = self.strategies[0]
        return strategy if self.fits(strategy, micro_batch) else None

    @property
    def can_combine(self) -> bool:
        """Whether each stage may have its own way."""
        return self.request.strategy == "auto" and bool(momentum_stages(self.model))

    def _combine(self, micro_batch: int, speed: Speed) -> Strategies | None:
        """Return the fastest combination that fits.

        Of one that turns out not to fit, it is learnt how far expectations are off.
        """
        off: list[Part] | None = None
        for _ in range(_TRIES):
            found = self._expect(micro_batch, speed, off)
            if found is None:
                return None
            strategy = _simplify(found.ways, self.model)
            step = self.predict(strategy, micro_batch)
            if step.peak.total <= self.usable_bytes:
                return strategy
            off = self._combinations.compare(found, step, self._scale(micro_batch))
        return None

    def _expect(
        self, micro_batch: int, speed: Speed, off: list[Part] | None = None
    ) -> Combination | None:
        """Return the fastest combination that should fit, or else may fit if nothing is known.

        What a step allocates is taken to be linear in its images.
        """
        scale = self._scale(micro_batch)
        peak = self.predict("store", self.request.sizes[0]).peak
        fixed = peak.total - peak.step - peak.batch
        for optimism in (1,) if off else (1, 1 + SLACK / 2, _WORTH_TRYING):
            room = (optimism * self.usable_bytes - fixed) / scale - peak.batch
            found = self._combinations.find(room, speed, off) if room > 0 else None
            if found or (scale == 1 and optimism > 1):
                return found
        return None

    def _scale(self, micro_batch: int) -> float:
        """Return the images of a step, to those of the steps that were traced."""
        return self.request.largest_part(micro_batch) / self._combinations.images

    @cached_property
    def _combinations(self) -> Combinations:
        """The combinations for steps with the largest micro-batch."""
        images = self.request.largest_part(self.request.sizes[0])
        stored = self.predict("store", self.request.sizes[0])
        return Combinations(self._predictor, images, stored)

    def foresee(self, micro_batch: int) -> Rank | None:
        """Return how good steps with this micro-batch are at best; None if nothing should fit.

        Times are estimated.
        """
        speed = self.estimated_speed
        if not self.can_combine:
            return self.rank(self.strategies[0], micro_batch, speed)
        found, images = self._expect(micro_batch, speed), self._combinations.images
        return self._rank(micro_batch, speed, images, found.work) if found else None

    def rank(self, strategy: Strategies, micro_batch: int, speed: Speed) -> Rank:
        """Return how good ``strategy`` and ``micro_batch`` are, if they fit."""
        if str(strategy) not in self.latest:
            self.predict(strategy, micro_batch)
        images, prediction = self.latest[str(strategy)]
        return self._rank(micro_batch, speed, images, prediction.work)

    def _rank(self, micro_batch: int, speed: Speed, images: int, work: Work) -> Rank:
        parts = split_evenly(self.request.share, micro_batch)
        seconds = sum(speed.seconds(work.scale(part / images)) for part in parts)
        return Rank(max(0, self._enough - micro_batch), seconds / self.request.share)

    @property
    def _enough(self) -> int:
        """The images to go through the network at once, if possible."""
        batch = self.request.share
        return batch if has_batch_norm(self.model) else min(FEW, batch)

    @property
    def estimated_speed(self) -> Speed:
        """The speed that a device of this kind is taken to have."""
        return estimate_speed(self.request.device, self.request.precision)

    @cached_property
    def speed(self) -> Speed:
        """The speed of the device: measured if that was asked for, else estimated."""
        if self._find_speed is not None:
            return self._find_speed(self.request, self.limit_bytes)
        return self.estimated_speed

    def _predict(self, strategy: Strategies, images: int, **changes: Any) -> StepPrediction:
        chosen = strategy if momentum_stages(self.model) else None
        try:
            return self._predictor.predict(images, chosen, **changes)
        except ValueError as error:
            if images > 1:
                raise
            raise _cannot_take_one(replace(self.request, **changes), error) from error


def _cannot_take_one(request: Request, error: ValueError) -> UsageError:
    """Return the error for BatchNorm of a feature map that has shrunk to one pixel."""
    return UsageError(
        f"at {request.resolution} pixels the network cannot be trained on micro-batches of "
        f"1 image\n{error}",
        kind="usage.micro_batch_of_one",
        fix="--micro-batch 2" if request.share_size > 1 else "--batch-size 2",
    )


def _simplify(ways: Mapping[str, Way], model: nn.Module) -> Strategies:
    """Return the name of a strategy that comes to the same, if there is one."""
    stages = momentum_stages(model)
    for name in STRATEGIES:
        if find_ways(stages, name) == ways:
            return name
    return {stage: str(way) for stage, way in ways.items()}


def list_strategies(model: nn.Module, asked: StrategyChoice) -> list[StrategyChoice]:
    """Return those to choose from; the first of them does the least."""
    if not momentum_stages(model):
        return ["store"]
    turns = {row.turn: name for name, row in STRATEGIES.items() if row.turn is not None}
    return [asked] if asked != "auto" else [turns[turn] for turn in sorted(turns)]


def raise_gamma(model: nn.Module, gamma: float) -> dict[MomentumSequential, float]:
    """Give ``gamma`` to the momentum stages with a smaller γ; they, with the γ that they had."""
    smaller = {s: s.gamma for s in momentum_stages(model).values() if 0 < s.gamma < gamma}
    for stage in smaller:
        stage.gamma = gamma
    return smaller


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether what ``model`` computes for an image depends on the others."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
