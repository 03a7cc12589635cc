"""Whether the plain network or its momentum network trains better within a limit of memory.

Momentum is a means: it changes what the network computes, and takes more time than storing. So it
is taken where it lets more images through the network at once, or saves a tenth of the time. That
is decided by estimated times, which are the same whenever it is planned.
"""

from dataclasses import replace
from typing import NamedTuple

from torch import nn

from momconv.planner.outlook import FindSpeed, Outlook
from momconv.planner.plan import Alternative, Network, Plan, Request
from momconv.planner.refusal import does_not_fit
from momconv.planner.search import Found, find_best
from momconv.units import format_bytes
from momconv.vocabulary import Strategies
from momconv.words import plural

WORTH = 1.1  # times the seconds of momentum: what the plain network may take, to be preferred


class NetworkChoice(NamedTuple):
    """A network, and the plan for it."""

    network: Network
    plan: Plan


def choose(
    plain: nn.Module,
    momentum: nn.Module,
    request: Request,
    find_speed: FindSpeed | None = None,
) -> NetworkChoice:
    """Return the network that trains better, and its plan with what was considered.

    Args:
        plain: The network, with stages of γ 0; it is loaded where it trains.
        momentum: The same, with a larger γ; it may be without memory.
        request: What is asked for.
        find_speed: Asked for the device's speed; None: it is estimated.

    Raises:
        ResourceError: Neither fits; the error says what would.
        UsageError: One image alone cannot be trained on.
    """
    limit = request.find_limit(plain)
    models: dict[Network, nn.Module] = {"plain": plain, "momentum": momentum}
    found = {name: find_best(model, request, limit, find_speed) for name, model in models.items()}
    looks = {
        name: best.outlook if (best := found[name]) else Outlook(model, request, limit, find_speed)
        for name, model in models.items()
    }
    chosen = _compare(found["plain"], found["momentum"])
    if chosen is None:
        raise does_not_fit(looks["momentum"])
    best = found[chosen]
    assert best is not None  # it is the better of the two
    alternatives = (
        _take_stored(looks["plain"]),
        _take(looks["plain"], found["plain"], "plain"),
        _take(looks["momentum"], found["momentum"], "momentum"),
    )
    reason = _explain(chosen, found, alternatives)
    return NetworkChoice(chosen, replace(best.plan, alternatives=alternatives, reason=reason))


def _compare(plain: Found | None, momentum: Found | None) -> Network | None:
    if plain is None or momentum is None:
        return "plain" if plain else "momentum" if momentum else None
    slower = momentum.foreseen._replace(seconds=momentum.foreseen.seconds * WORTH)
    return "momentum" if slower < plain.foreseen else "plain"


def _take_stored(outlook: Outlook) -> Alternative:
    """Return the whole batch at once, or the micro-batch that is asked for, with all stored."""
    size = outlook.request.sizes[0]
    return _describe(outlook, "store", size, "plain", is_stored=True)


def _take(outlook: Outlook, found: Found | None, network: Network) -> Alternative:
    """Return what fits with some activations computed again, or is leanest where all are stored.

    The plain network may be stored whole. Then this is what it could do in less memory.
    """
    if found and found.plan.strategy != "store":
        plan = found.plan
        return _describe(outlook, plan.strategy, plan.micro_batch, network, is_stored=False)
    sizes = outlook.request.sizes
    return _describe(outlook, "auto", sizes[0] if found else sizes[-1], network, is_stored=False)


def _describe(
    outlook: Outlook, strategy: Strategies, size: int, network: Network, *, is_stored: bool
) -> Alternative:
    peak = outlook.predict(strategy, size).peak
    return Alternative(
        network=network,
        is_stored=is_stored,
        micro_batch=size,
        predicted_bytes=peak.total,
        seconds_per_image=outlook.rank(strategy, size, outlook.speed).seconds,
        fits=peak.total <= outlook.usable_bytes,
    )


def _explain(
    chosen: Network, found: dict[Network, Found | None], alternatives: tuple[Alternative, ...]
) -> str:
    """Return in a sentence why that network is ``chosen``."""
    plain, momentum = found["plain"], found["momentum"]
    if chosen == "plain":
        assert plain is not None
        text = f"the plain network, {_count(plain)} at once"
        if plain.plan.strategy == "store":
            return f"{text} with all activations stored; momentum would only take time"
        if momentum is None:
            return f"{text}; momentum does not fit"
        return f"{text}, some of it computed again; momentum would be no faster by a tenth"
    assert momentum is not None
    if plain is None:
        return f"momentum, {_count(momentum)} at once; the plain network does not fit"
    if plain.plan.micro_batch < momentum.plan.micro_batch and plain.foreseen.lacking:
        return f"momentum, {_count(momentum)} at once, where the plain network has room for " + str(
            plain.plan.micro_batch
        )
    saved = 1 - momentum.foreseen.seconds / plain.foreseen.seconds
    limit = format_bytes(momentum.plan.limit_bytes)
    return f"momentum, in {saved:.0%} less time than the plain network within {limit}"


def _count(found: Found) -> str:
    return plural(found.plan.micro_batch, "image")
