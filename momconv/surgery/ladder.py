"""The largest γ that changes a network little enough."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from momconv.errors import ThresholdNotMet
from momconv.surgery.adaptation import Adaptation
from momconv.surgery.drift import Drift

LADDER = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One γ, and how far the calibrated network was from the original."""

    gamma: float
    drift: Drift


@dataclass(frozen=True, slots=True)
class Choice:
    """A γ, the adaptation with it, and all attempts in the order in which they were made."""

    gamma: float
    adaptation: Adaptation
    tried: tuple[Attempt, ...] = ()


def find_gamma(attempt: Callable[[float], Adaptation], max_drift: float) -> Choice:
    """Return the adaptation with the largest γ of ``LADDER`` on which few enough images disagree.

    A smaller γ is taken to drift less, so bisection tries three of the seven at most. A
    KeyboardInterrupt during an attempt ends the search with the best that was good enough.

    Args:
        attempt: Converts and calibrates with a γ.
        max_drift: The share of images on which the two networks may name different classes.

    Raises:
        ThresholdNotMet: None is good enough.
    """
    best: Choice | None = None
    tried: list[Attempt] = []
    low, high = 0, len(LADDER)
    while low < high:
        middle = (low + high) // 2
        candidate = attempt(LADDER[middle])
        tried.append(Attempt(LADDER[middle], candidate.drift))
        if candidate.drift.is_within(max_drift):
            best, high = Choice(LADDER[middle], candidate), middle
        else:
            low = middle + 1
        if candidate.interrupted:
            break
    if best is None:
        raise _unmet(tried, max_drift) if low == high else KeyboardInterrupt
    return replace(best, tried=tuple(tried))


def _unmet(tried: list[Attempt], max_drift: float) -> ThresholdNotMet:
    found = ", ".join(f"γ {a.gamma:g}: {1 - a.drift.agreement:.1%}" for a in tried)
    least = min(1 - attempt.drift.agreement for attempt in tried)
    return ThresholdNotMet(
        f"no γ keeps the top-1 disagreement with the original at {max_drift:.2%} or less\n{found}",
        kind="conversion.drift",
        fix=f"--max-drift {100 * least + 0.1:.1f}%\n--gamma 0.9 --distill 6",
    )
