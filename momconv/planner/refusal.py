"""What to say if no plan fits: where the memory goes, and options with which one would."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from momconv.errors import ResourceError, UsageError
from momconv.planner.outlook import GAMMAS, SLACK, Outlook, list_strategies, raise_gamma
from momconv.planner.prediction import PeakMemory
from momconv.units import format_bytes
from momconv.vocabulary import OPTIMIZERS, StrategyChoice
from momconv.words import plural
from momconv.zoo.stages import find_stages, freeze

_GRID = 32  # pixels; the resolutions that classification networks divide evenly
_RELEASE = "--set train.release_gradients=true"
_TRIES = 3  # resolutions, or stages to freeze, that are tried out


def does_not_fit(outlook: Outlook) -> ResourceError:
    """Return the error, with a breakdown of the leanest strategy and options that would fit.

    ``outlook`` is of no further use: its network has frozen stages.
    """
    request = outlook.request
    size = request.sizes[-1]
    # They may need the same at the peak, but the last of them less where the options change it.
    totals = {name: outlook.predict(name, size).peak.total for name in outlook.strategies}
    leanest = min(reversed(totals), key=lambda name: totals[name] // 2**20)
    peak, images = outlook.predict(leanest, size).peak, request.largest_part(size)
    attempt = _Attempt(outlook, leanest, size, peak)
    leaner = {option: total for option, total in _find_leaner(attempt) if total < peak.total}
    fitting = [option for option, total in leaner.items() if total <= outlook.usable_bytes]
    needs = [f"with {option}: {format_bytes(total)}" for option, total in leaner.items()]
    return ResourceError(
        f"a micro-batch of {plural(images, 'image')} does not fit: it needs "
        f"{format_bytes(peak.total)} ({leanest}), the limit is "
        f"{format_bytes(outlook.limit_bytes)}\n" + "\n".join([_break_down(peak), *needs]),
        kind="memory.does_not_fit",
        fix="\n".join([*fitting, *_find_fixes(attempt)]),
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
        "gathered from other processes": peak.gathered,
        "recomputed and gradients of activations": peak.transients,
        "GPU context and libraries": peak.allowance,
    }
    return " · ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What did not fit."""

    outlook: Outlook
    strategy: StrategyChoice
    size: int  # of the micro-batch
    peak: PeakMemory

    def would_fit(
        self, strategy: StrategyChoice | None = None, size: int | None = None, **changes: Any
    ) -> bool:
        """Return whether a step would fit under ``changes``, or with the network as it is now."""
        outlook = self.outlook
        peak = outlook.try_out(strategy or self.strategy, size or self.size, **changes)
        return peak.total <= outlook.usable_bytes


def _find_leaner(attempt: _Attempt) -> Iterator[tuple[str, int]]:
    """Yield options with which optimiser state, gradients or both take less, each with its peak.

    Where gradients are released, it is the peak of the whole batch at once.
    """
    outlook, request = attempt.outlook, attempt.outlook.request
    smaller, whole = f"{request.optimizer}-8bit", request.share_size + 1
    of_state = {"optimizer": smaller} if smaller in OPTIMIZERS else {}
    of_gradients = {"release_gradients": True} if not request.release_gradients else {}
    if request.shards > 1:  # then neither is to be had
        return
    for changes in (of_state, of_gradients, of_state | of_gradients):
        if not changes or changes.keys() & request.fixed:
            continue
        size = whole if "release_gradients" in changes else attempt.size
        texts = {"optimizer": f"--optimizer {smaller}", "release_gradients": _RELEASE}
        option = " ".join(texts[name] for name in changes)
        yield option, outlook.try_out(attempt.strategy, size, **changes).total


def _find_fixes(attempt: _Attempt) -> Iterator[str]:
    """Yield options that would fit, each tried out by a prediction."""
    request = attempt.outlook.request
    others = list_strategies(attempt.outlook.model, "auto")
    if request.strategy != "auto" and any(map(attempt.would_fit, others)):
        yield "--strategy auto"
    if request.micro_batch != "auto" and attempt.size > 2 and attempt.would_fit(size=2):
        yield "--micro-batch auto"
    few = min(2, attempt.size)
    if request.release_gradients and attempt.would_fit(size=few, release_gradients=False):
        yield "--set train.release_gradients=auto"
    if request.precision == "fp32" and attempt.would_fit(precision="bf16"):
        yield "--set train.precision=bf16"
    yield f"--memory {math.ceil(attempt.peak.total / (1 - SLACK) / 2**20)}MiB"
    searches = {"resolution": _find_side, "gamma": _find_gamma, "freeze": _find_stages_to_freeze}
    for key, find in searches.items():
        if key not in request.fixed:
            yield from find(attempt)


def _find_side(attempt: _Attempt) -> Iterator[str]:
    """Yield the largest resolution that fits, if one is found."""
    request, peak = attempt.outlook.request, attempt.peak
    needed = peak.step + peak.batch
    share = max(0, attempt.outlook.usable_bytes - peak.total + needed) / needed
    largest = math.floor(request.resolution * math.sqrt(share) / _GRID) * _GRID
    for side in range(largest, 0, -_GRID)[:_TRIES]:
        try:
            if attempt.would_fit(resolution=side):
                yield f"--resolution {side}"
                return
        except (AssertionError, RuntimeError, UsageError, ValueError):
            return  # the network is for images of one size, or shrinks these to nothing


def _find_gamma(attempt: _Attempt) -> Iterator[str]:
    """Yield the least larger γ that fits, if one is found."""
    for gamma in GAMMAS:
        smaller = raise_gamma(attempt.outlook.model, gamma)
        fits = smaller and attempt.would_fit()
        for stage, before in smaller.items():
            stage.gamma = before
        if fits:
            yield f"--gamma {gamma:g}"
            return


def _find_stages_to_freeze(attempt: _Attempt) -> Iterator[str]:
    """Yield the fewest first stages that have to be frozen for it to fit, if they are found."""
    model = attempt.outlook.model
    *names, _head = find_stages(model)
    for count in range(1, min(_TRIES, len(names)) + 1):
        freeze(model, names[:count])
        if attempt.would_fit():
            yield " ".join(f"--freeze {name}" for name in names[:count])
            return
