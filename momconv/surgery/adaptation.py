"""A converted network on its way back to its original, with the effect of every step measured."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from momconv.errors import ThresholdNotMet
from momconv.momentum.sequential import forget_ranges
from momconv.surgery import calibration
from momconv.surgery.calibration import adapt_statistics
from momconv.surgery.distillation import distill
from momconv.surgery.drift import Drift, Reference
from momconv.surgery.imitation import Images

OnProgress = Callable[[str, int, int], None]  # what is done, how far, of how much
LADDER = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)  # γ to try
_FOREVER = 10**6  # epochs


@dataclass(frozen=True, slots=True)
class AdaptationStep:
    """A step of the way, and the distance that is left after it.

    Attributes:
        name: The rule "swapped" (gains included), "statistics" of BatchNorm re-estimated where
            that helps, layers fitted and gains and norms "refined", or all parameters "distilled".
        drift: From the original, on images that no step uses.
    """

    name: Literal["swapped", "statistics", "refined", "distilled"]
    drift: Drift

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return {"name": self.name, "drift": self.drift.to_json()}


@dataclass(frozen=True, slots=True)
class Distillation:
    """How long to distil: so many epochs, or so many minutes."""

    epochs: int = _FOREVER
    minutes: float | None = None


class Adaptation:
    """Brings a converted network back towards its original, step by step.

    Attributes:
        model: The network, which the steps change.
        steps: Those taken.
        layers: How many BatchNorm layers have new statistics.
        interrupted: Whether a KeyboardInterrupt ended a step early. The model is then the best so
            far, and further steps do nothing.
    """

    def __init__(
        self, model: nn.Module, reference: Reference, progress: OnProgress | None = None
    ) -> None:
        """``reference`` is the original's, on images to measure the drift on."""
        self.model = model
        self.steps: list[AdaptationStep] = []
        self.layers = 0
        self.interrupted = False
        self._reference = reference
        self._progress = progress or (lambda _what, _done, _total: None)
        self._note("swapped")

    @property
    def drift(self) -> Drift:
        """What is left after the last step."""
        return self.steps[-1].drift

    def calibrate(self, batches: Iterable[Tensor], count: int, *, refine: bool = True) -> None:
        """Re-estimate statistics on ``count`` images in ``batches``, then fit layers and refine.

        See :func:`momconv.calibrate`, which does not keep new statistics that are worse.
        """
        told = _counted(batches, lambda done: self._progress("statistics", done, count))
        images = Images(batches) if refine else None
        self.layers = adapt_statistics(self.model, told, self._reference.network, images)
        self._note("statistics")
        if images is None or not images.held_out:
            return
        imitation = calibration.refine(
            self.model,
            self._reference.network,
            images,
            progress=lambda done, total, _: self._progress("refining", done, total),
        )
        self.interrupted = imitation.interrupted
        self._note("refined")

    def distill(self, batches: Iterable[Tensor], length: Distillation) -> None:
        """Train all parameters towards the original's outputs. See :func:`momconv.distill`."""
        if self.interrupted:
            return
        imitation = distill(
            self.model,
            self._reference.network,
            batches,
            epochs=length.epochs,
            minutes=length.minutes,
            progress=self._watch(length),
        )
        self.interrupted = imitation.interrupted
        self._note("distilled")

    def _watch(self, length: Distillation) -> Callable[[int, int, str], None]:
        """Return who hears of progress in steps, or in seconds where they are limited."""
        if length.minutes is None:
            return lambda done, total, _: self._progress("distilling", done, total)
        began, seconds = time.monotonic(), round(60 * length.minutes)
        return lambda _done, _total, _: self._progress(
            "distilling (seconds)", min(seconds, round(time.monotonic() - began)), seconds
        )

    def _note(self, name: Literal["swapped", "statistics", "refined", "distilled"]) -> None:
        forget_ranges(self.model)  # those of other weights
        self.steps.append(AdaptationStep(name, self._reference.compare(self.model)))


def _counted(batches: Iterable[Tensor], tell: Callable[[int], None]) -> Iterator[Tensor]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        tell(done)


# The largest γ that changes a network little enough


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
