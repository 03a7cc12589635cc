"""Whether the plain network or its momentum network trains better within a limit of memory.

Momentum is a means: it changes what the network computes, and takes more time than storing. So it
is taken where it lets more images through the network at once, or saves a tenth of the time. That
is decided by estimated times, which are the same whenever it is planned.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from momconv.planner.outlook import FindSpeed, Outlook
from momconv.planner.plan import Alternative, Network, Plan, Request
from momconv.planner.refusal import does_not_fit
from momconv.planner.search import Found, find_best
from momconv.units import format_bytes, format_duration
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
    *,
    wanted: Network | None = None,
) -> NetworkChoice:
    """Return the network that trains better, and its plan with what was considered.

    Args:
        plain: The network, with stages of γ 0. It is loaded where it trains, unless ``wanted`` is.
        momentum: The same, with a larger γ; the one that is not loaded may be without memory.
        request: What is asked for.
        find_speed: Asked for the device's speed; None: it is estimated.
        wanted: The one that is taken whatever is better, which the plan's reason then says.

    Raises:
        ResourceError: Neither fits; the error says what would.
        UsageError: One image alone cannot be trained on.
    """
    models: dict[Network, nn.Module] = {"plain": plain, "momentum": momentum}
    limit = request.find_limit(models[wanted or "plain"])
    found = {name: find_best(model, request, limit, find_speed) for name, model in models.items()}
    looks = {
        name: best.outlook if (best := found[name]) else Outlook(model, request, limit, find_speed)
        for name, model in models.items()
    }
    better = _compare(found["plain"], found["momentum"])
    chosen = wanted or better or "momentum"
    best = found[chosen]
    if best is None:
        raise does_not_fit(looks[chosen])
    if wanted:
        reason = _regret(found) if better == "plain" else ""
        return NetworkChoice(wanted, replace(best.plan, reason=reason))
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


def _regret(found: Mapping[Network, Found | None]) -> str:
    """Return one sentence on what momentum, which is wanted, costs, if it costs anything."""
    plain, momentum = found["plain"], found["momentum"]
    assert plain is not None
    assert momentum is not None
    (size, seconds), (own_size, own_seconds) = (
        (best.plan.predicted_bytes, best.plan.epoch_seconds or 0.0) for best in (plain, momentum)
    )
    if seconds >= own_seconds and size >= own_size:
        return ""
    return (
        f"momentum, as it is asked for, in {format_bytes(own_size)} and about "
        f"{format_duration(own_seconds)} an epoch; the plain network (--momentum auto) would take "
        f"{format_bytes(size)} and {format_duration(seconds)}"
    )


def _count(found: Found) -> str:
    return plural(found.plan.micro_batch, "image")
