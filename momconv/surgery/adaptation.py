"""A converted network on its way back to its original, with the effect of every step measured."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from momconv.momentum.sequential import forget_ranges
from momconv.surgery import calibration
from momconv.surgery.calibration import adapt_statistics
from momconv.surgery.distillation import distill
from momconv.surgery.drift import Drift, Reference
from momconv.surgery.imitation import Images

OnProgress = Callable[[str, int, int], None]  # what is done, how far, of how much
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
    """Takes the steps.

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
