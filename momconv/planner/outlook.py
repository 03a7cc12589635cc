"""What steps of a network would take, in memory and time, under each way to run them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import UsageError
from momconv.momentum.sequential import MomentumSequential, momentum_stages
from momconv.planner.cost import Speed, estimate_speed
from momconv.planner.micro_batch import split_evenly
from momconv.planner.plan import Request
from momconv.planner.prediction import PeakMemory, Predictor, StepPrediction, Training
from momconv.vocabulary import STRATEGIES, StrategyChoice

GAMMAS = (0.95, 0.99)  # with less side information than the default
FEW = 8  # images; the statistics of fewer are noise
SLACK = 0.01  # of the limit; predictions were off by at most 0.1 % (benchmarks/RESULTS.md)
_WORTH_TRYING = 1.1  # of the limit, for an estimate
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
        self.latest: dict[StrategyChoice, tuple[int, StepPrediction]] = {}  # with the images

    def fits(self, strategy: StrategyChoice, micro_batch: int) -> bool:
        """Return whether a step with such micro-batches is within the limit."""
        if not self._may_fit(strategy, micro_batch):
            return False
        return self.predict(strategy, micro_batch).peak.total <= self.usable_bytes

    def _may_fit(self, strategy: StrategyChoice, micro_batch: int) -> bool:
        """Return whether a prediction is worth its time: what a step allocates is almost linear."""
        if strategy not in self.latest:
            return True
        images, (peak, *_) = self.latest[strategy]
        linear = (peak.step + peak.batch) * self.request.largest_part(micro_batch) / images
        estimate = peak.total - peak.step - peak.batch + linear
        return estimate <= _WORTH_TRYING * self.usable_bytes

    def predict(self, strategy: StrategyChoice, micro_batch: int) -> StepPrediction:
        """Return a step with micro-batches of at most so many images."""
        images = self.request.largest_part(micro_batch)
        if self.latest.get(strategy, (0,))[0] != images:
            self.latest[strategy] = images, self._predict(strategy, images)
        return self.latest[strategy][1]

    def try_out(self, strategy: StrategyChoice, micro_batch: int, **changes: Any) -> PeakMemory:
        """Return the peak under ``changes``, or of a changed model, which is not remembered."""
        return self._predict(strategy, self.request.largest_part(micro_batch), **changes).peak

    def find_fastest(self, micro_batch: int) -> StrategyChoice:
        """Return the fastest of the strategies that fit, of which there must be one."""
        fitting = [name for name in self.strategies if self.fits(name, micro_batch)]
        return min(fitting, key=lambda name: self.rank(name, micro_batch, self.speed))

    def rank(self, strategy: StrategyChoice, micro_batch: int, speed: Speed) -> Rank:
        """Return how good a choice is, if it fits."""
        if strategy not in self.latest:
            self.predict(strategy, micro_batch)
        images, prediction = self.latest[strategy]
        parts = split_evenly(self.request.share, micro_batch)
        seconds = sum(speed.seconds(prediction.work.scale(part / images)) for part in parts)
        return Rank(max(0, self._enough - micro_batch), seconds / self.request.share)

    @property
    def _enough(self) -> int:
        """The images to go through the network at once, if possible."""
        batch = self.request.share
        return batch if has_batch_norm(self.model) else min(FEW, batch)

    @property
    def estimated_speed(self) -> Speed:
        """Of devices of the kind."""
        return estimate_speed(self.request.device, self.request.precision)

    @cached_property
    def speed(self) -> Speed:
        """Of the device, measured if that was asked for and there is something to compare."""
        is_compared = len(self.latest) > 1 or "precision" in self.request.may_change
        if self._find_speed is not None and is_compared:
            return self._find_speed(self.request, self.limit_bytes)
        return self.estimated_speed

    def _predict(self, strategy: StrategyChoice, images: int, **changes: Any) -> StepPrediction:
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
