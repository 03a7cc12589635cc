"""The fastest way to train with a batch within a limit of memory, found by prediction.

A strategy is faster the less it recomputes, but needs more memory the more it stores; how long a
step takes is estimated from the operations of its prediction (cost.py). Gradients of micro-batches
add up to exactly those of the batch, but BatchNorm sees only one micro-batch at a time. So the
search takes the fastest way in which the whole batch fits at once; where none is, the fastest of
those that come closest, or, without BatchNorm, the fastest that leaves no tiny parts.

So that a plan can be repeated, times that were measured decide only what changes no value, which
is the strategy, and whether a precision is faster, where that may change.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

import torch
from torch import nn

from momconv.errors import ResourceError
from momconv.momentum.sequential import momentum_stages
from momconv.planner.allowance import held_bytes
from momconv.planner.measurement import available_bytes
from momconv.planner.micro_batch import split_evenly
from momconv.planner.outlook import GAMMAS, Change, Outlook, Rank, Request
from momconv.planner.prediction import PeakMemory, Training
from momconv.planner.refusal import does_not_fit
from momconv.units import parse_bytes
from momconv.vocabulary import STRATEGIES, OptimizerName, Precision, StrategyChoice


@dataclass(frozen=True, slots=True, kw_only=True)
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

    strategy: StrategyChoice
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


def plan(  # noqa: PLR0913 (each is a fact about the training)
    model: nn.Module,
    resolution: int,
    memory: int | str | None = None,
    batch_size: int = 32,
    *,
    micro_batch: int | Literal["auto"] = "auto",
    strategy: StrategyChoice = "auto",
    precision: Precision = "fp32",
    optimizer: OptimizerName = "sgd",
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
            bf16) or both, if more of the batch fits then, or it is faster by a twentieth or more.

    Raises:
        ResourceError: Nothing fits; the error says what would.
        UsageError: An argument is not allowed, or one image alone cannot be trained on.
    """
    if memory is None:
        place = torch.device(device)
        memory = available_bytes(place) + held_bytes(model, place)
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    training = Training(resolution, precision, optimizer, device=device)
    request = Request(
        training,
        batch_size=batch_size,
        limit_bytes=limit,
        micro_batch=micro_batch,
        strategy=strategy,
        may_change=may_change,
    )
    return search(model, request)


def search(model: nn.Module, request: Request) -> Plan:
    """The plan for a request; see :func:`plan`.

    Raises:
        ResourceError: Nothing fits; the error says what would.
        UsageError: One image alone cannot be trained on.
    """
    found: list[tuple[Rank, Plan]] = []
    refusals: list[ResourceError] = []
    for precision in _list_precisions(request):
        training = replace(request.training, precision=precision)
        try:
            rank, plan = _search(model, replace(request, training=training))
        except ResourceError as error:
            refusals.append(error)
        else:
            is_changed = precision != request.training.precision
            found.append((rank.at_cost(is_changed=is_changed), plan))
    if not found:
        raise refusals[0]
    return min(found, key=itemgetter(0))[1]


def _list_precisions(request: Request) -> list[Precision]:
    """Those to consider, what was asked for first."""
    asked = request.training.precision
    return ["fp32", "bf16"] if asked == "fp32" and "precision" in request.may_change else [asked]


def _search(model: nn.Module, request: Request) -> tuple[Rank, Plan]:
    """The best plan in a precision by estimated times, and how good it is by measured ones."""
    own = Outlook(model, request)
    strategy, size = own.strategies[0], request.sizes[0]
    if own.fits(strategy, size):  # it does the least
        return _choose(own, strategy, size)
    outlooks = [own, *(Outlook(model, request, gamma) for gamma in _list_gammas(model, request))]
    options = [
        (outlook, strategy, size)
        for size in request.sizes
        for outlook in outlooks
        for strategy in outlook.strategies
    ]
    for outlook, strategy, size in sorted(options, key=_rank):
        if outlook.fits(strategy, size):
            return _choose(outlook, outlook.find_fastest(size), size)
    raise does_not_fit(own)


def _list_gammas(model: nn.Module, request: Request) -> list[float]:
    """Larger γ to consider."""
    own = max((stage.gamma for stage in momentum_stages(model).values()), default=0.0)
    if (
        "gamma" not in request.may_change
        or not own
        or not STRATEGIES[request.strategy].depends_on_gamma
    ):
        return []
    return [gamma for gamma in GAMMAS if gamma > own]


def _rank(option: tuple[Outlook, StrategyChoice, int]) -> Rank:
    outlook, strategy, size = option
    rank = outlook.rank(strategy, size, outlook.estimated_speed)
    return rank.at_cost(is_changed=outlook.gamma is not None)


def _choose(outlook: Outlook, strategy: StrategyChoice, micro_batch: int) -> tuple[Rank, Plan]:
    rank, request = outlook.rank(strategy, micro_batch, outlook.speed), outlook.request
    peak = outlook.predict(strategy, micro_batch).peak
    return rank, Plan(
        strategy=strategy,
        batch_size=request.batch,
        micro_batch=micro_batch,
        peak=peak,
        limit_bytes=request.limit_bytes,
        precision=request.training.precision,
        gamma=outlook.gamma,
        seconds_per_image=rank.seconds,
        is_calibrated=outlook.speed.is_measured,
    )
