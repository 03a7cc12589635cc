"""The fastest way to train with a batch within a limit of memory, found by prediction.

A stage is faster the less it recomputes, but needs more memory the more it stores, and each may
have its own way (combination.py); how long a step takes is estimated from the operations of its
prediction (cost.py). Gradients of micro-batches add up to exactly those of the batch, but BatchNorm
sees only one micro-batch at a time. So the search takes the fastest way in which the whole batch
fits at once; where none is, the fastest of those that come closest, or, without BatchNorm, the
fastest that leaves no tiny parts.

So that a plan can be repeated, times that were measured decide only what changes no value, which
is the strategy, and whether a precision is faster, where that may change.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Literal, NamedTuple, cast

from torch import nn

from momconv.momentum.sequential import momentum_stages
from momconv.planner.outlook import GAMMAS, FindSpeed, Outlook, Rank
from momconv.planner.plan import Change, Plan, Request
from momconv.planner.refusal import does_not_fit
from momconv.vocabulary import (
    OPTIMIZERS,
    STRATEGIES,
    OptimizerName,
    Precision,
    Strategies,
    StrategyChoice,
)


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
    release_gradients: bool = False,
    processes: int = 1,
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
        release_gradients: Whether each is used and freed in the backward pass, which takes the
            whole batch at once.
        processes: Among which batch, weights, gradients and the optimiser's state are divided
            (``train.shard``); ``memory`` is that of each.
        may_change: "gamma" (to 0.95 or 0.99, with less side information) and "precision" (from fp32
            to bf16), if more of the batch fits then, or it is faster by a twentieth or more;
            "optimizer" (to the one whose state has 8 bits) and "release_gradients", if more of the
            batch fits then.

    Raises:
        ResourceError: Nothing fits; the error says what would.
        UsageError: An argument is not allowed, or one image alone cannot be trained on.
    """
    request = Request(
        resolution,
        precision,
        optimizer,
        device=device,
        release_gradients=release_gradients,
        batch_size=batch_size,
        micro_batch=micro_batch,
        strategy=strategy,
        memory=memory,
        processes=processes,
        shards=processes,
        may_change=tuple(may_change),
    )
    return search(model, request)


def search(model: nn.Module, request: Request, find_speed: FindSpeed | None = None) -> Plan:
    """Return the plan for a request; see :func:`plan`.

    Args:
        model: As there.
        request: What is asked for.
        find_speed: Asked for the device's speed; None: it is estimated.

    Raises:
        ResourceError: Nothing fits; the error says what would.
        UsageError: One image alone cannot be trained on.
    """
    limit = request.find_limit(model)
    found = find_best(model, request, limit, find_speed)
    if found is None:
        raise does_not_fit(Outlook(model, request, limit))
    return found.plan


class Found(NamedTuple):
    """The best plan, and how good it is.

    Attributes:
        rank: By times that were measured, if any were.
        foreseen: By times that were estimated, which are the same whenever it is planned.
        plan: The plan.
        outlook: What steps were predicted to take.
    """

    rank: Rank
    foreseen: Rank
    plan: Plan
    outlook: Outlook


def find_best(
    model: nn.Module, request: Request, limit: int, find_speed: FindSpeed | None = None
) -> Found | None:
    """Return the best plan within ``limit`` bytes, the loaded ``model`` included, if one fits.

    Raises:
        UsageError: One image alone cannot be trained on.
    """
    found: list[Found] = []
    for changed in _list_requests(request):
        is_leaner = changed != replace(request, precision=changed.precision)
        if is_leaner and found and not min(found, key=itemgetter(0)).rank.lacking:
            break
        if best := _search(model, partial(Outlook, model, changed, limit, find_speed)):
            rank = best.rank.at_cost(is_changed=changed != request)
            found.append(best._replace(rank=rank))
    return min(found, key=itemgetter(0), default=None)


def _list_requests(request: Request) -> Iterator[Request]:
    """Yield the request as it is, and as it may be changed; what only saves memory comes last."""
    whole = ("optimizer", "release_gradients") if request.shards > 1 else ()
    allowed = {change for change in request.may_change if change not in whole}
    leaner = f"{request.optimizer}-8bit"
    precisions: list[Precision] = [request.precision]
    if request.precision == "fp32" and "precision" in allowed:
        precisions.append("bf16")
    optimizers = [request.optimizer]
    if leaner in OPTIMIZERS and "optimizer" in allowed:
        optimizers.append(cast(OptimizerName, leaner))
    releases = [request.release_gradients]
    if not request.release_gradients and "release_gradients" in allowed:
        releases.append(True)
    for optimizer, release, precision in product(optimizers, releases, precisions):
        yield replace(request, precision=precision, optimizer=optimizer, release_gradients=release)


def _search(model: nn.Module, look: Callable[..., Outlook]) -> Found | None:
    """Return the best plan in a precision by estimated times.

    ``look`` gives the outlook on a γ.
    """
    own = look()
    strategy, size = own.strategies[0], own.request.sizes[0]
    if own.fits(strategy, size):  # it does the least
        return _choose(own, strategy, size, own.rank(strategy, size, own.estimated_speed))
    options = _list_options(own)
    if not own.can_combine or all(rank.lacking for rank, *_ in options):
        for gamma in _list_gammas(model, own.request):
            options += _list_options(look(gamma=gamma))
    for foreseen, outlook, size in sorted(options, key=itemgetter(0)):
        if found := outlook.find_fastest(size, outlook.estimated_speed):
            fastest = outlook.find_fastest(size, outlook.speed) or found
            return _choose(outlook, fastest, size, foreseen)
    return None


def _list_gammas(model: nn.Module, request: Request) -> list[float]:
    """Return the larger values of γ to consider."""
    own = max((stage.gamma for stage in momentum_stages(model).values()), default=0.0)
    if (
        "gamma" not in request.may_change
        or not own
        or not STRATEGIES[request.strategy].depends_on_gamma
    ):
        return []
    return [gamma for gamma in GAMMAS if gamma > own]


def _list_options(outlook: Outlook) -> list[tuple[Rank, Outlook, int]]:
    """Return the micro-batches that may fit, with how good each is at best."""
    is_changed = outlook.gamma is not None
    return [
        (rank.at_cost(is_changed=is_changed), outlook, size)
        for size in outlook.request.sizes
        if (rank := outlook.foresee(size))
    ]


def _choose(outlook: Outlook, strategy: Strategies, micro_batch: int, foreseen: Rank) -> Found:
    rank, request = outlook.rank(strategy, micro_batch, outlook.speed), outlook.request
    peak = outlook.predict(strategy, micro_batch).peak
    plan = Plan(
        request=replace(request, may_change=(), fixed=()),  # decided now
        strategy=strategy,
        micro_batch=micro_batch,
        predicted_bytes=peak.total,
        peak=peak,
        limit_bytes=outlook.limit_bytes,
        gamma=outlook.gamma,
        seconds_per_image=rank.seconds,
        is_calibrated=outlook.speed.is_measured,
    )
    return Found(rank, foreseen, plan, outlook)
