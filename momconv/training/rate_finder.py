"""A learning rate from a short run in which it grows, as in fastai's ``lr_find``.

The rate grows by a constant factor a step, over steps as in training, until the loss explodes or
the steps are done. The suggestion is a tenth of the rate with the lowest smoothed loss. (fastai's
``valley``, the middle of the longest fall, took 0.0013 for the task of benchmarks/transfer.py,
where 0.01 learns much faster: a loss that hardly moves at low rates makes the fall long.)
Afterwards the network, and all that is random, is as before.
"""

import copy
import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from momconv.data.decoding import UnreadableImage
from momconv.errors import MomconvError, NotReproducible, OutOfMemory
from momconv.exhaustion import naming_exhaustion
from momconv.files.atomic import write_atomically, write_text
from momconv.files.tensor_file import write_tensors
from momconv.training.gradients import changing_in_backward
from momconv.training.memory import halve
from momconv.training.omission import leave_out
from momconv.training.optimisation import set_rate
from momconv.training.processes import ALONE
from momconv.training.run import TrainingRun
from momconv.training.state import read_random_states, set_random_states
from momconv.training.steps import Step, Steps, add_gradients, take_step
from momconv.vocabulary import OPTIMIZERS
from momconv.zoo import checkpoints

STEPS, FEWEST = 60, 20
_PART = 3  # of the steps one in so many has to succeed; a curve of fewer says nothing
_SHARE = 4  # of the run's steps one in so many, at most
_SMOOTHING = 0.9  # fastai's 0.98 is for its 100 steps
_EXPLODED = 4.0  # times the lowest loss


@dataclass(frozen=True, slots=True)
class Point:
    """A step of the search."""

    lr: float
    loss: float
    smoothed: float


def find_rate(run: TrainingRun) -> float | None:
    """Return a good highest learning rate for the ``run`` that is about to start.

    None if the loss was lowest at the first, and so fell at no rate.

    The curve is written to the run folder as lr_finder.csv. A plan whose micro-batch turns out too
    large is halved, and an image that cannot be read any more left out, as in training.

    Raises:
        MomconvError: The loss explodes at once, even at the lowest rates.
        ResourceError: Memory is exhausted.
        DataError: Too many images cannot be read any more.
    """
    trial = copy.copy(run)
    trial.recipe, trial.processes = run.recipe.change(train={"ema": 0.0}), ALONE
    trial.equip()
    rates = _list_rates(trial)
    with _as_before(run):
        points = list(_search(trial, rates))
    run.plan = trial.plan
    if len(points) < len(rates) // _PART:
        raise _exploded(trial, points)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["lr", "loss", "smoothed"])
    writer.writerows((point.lr, point.loss, point.smoothed) for point in points)
    write_text(run.folder.rates, table.getvalue())
    return choose_rate(points)


def count_trials(run_steps: int) -> int:
    """Return the steps of the search before a run of so many, which it should not outlast.

    >>> count_trials(1000), count_trials(200), count_trials(8)
    (60, 50, 20)
    """
    return min(STEPS, max(FEWEST, run_steps // _SHARE))


def choose_rate(points: Sequence[Point]) -> float | None:
    """Return a tenth of the rate at which the smoothed loss is lowest (fastai's ``minimum``).

    None if that is the first, of which the loss knows nothing yet.

    >>> choose_rate([Point(0.1, 2.0, 2.0), Point(0.2, 1.0, 1.5), Point(0.4, 9.0, 5.2)])
    0.02
    """
    best = min(points, key=lambda point: point.smoothed)
    return None if best is points[0] else float(f"{best.lr / 10:.3g}")


def _exploded(run: TrainingRun, points: Sequence[Point]) -> MomconvError:
    low, _ = OPTIMIZERS[run.recipe.train.optimizer].rates
    return MomconvError(
        f"--lr auto: the loss explodes within {len(points) + 1} steps, at rates from {low:g} on",
        kind="train.no_rate",
        fix=f"--lr {low:g}",
    )


def _list_rates(run: TrainingRun) -> list[float]:
    low, high = OPTIMIZERS[run.recipe.train.optimizer].rates
    count = count_trials(run.recipe.train.epochs * run.steps_per_epoch)
    return [low * (high / low) ** (n / (count - 1)) for n in range(count)]


def _search(run: TrainingRun, rates: Sequence[float]) -> Iterator[Point]:
    average, lowest = 0.0, math.inf
    for n, (rate, loss) in enumerate(_try(run, rates), start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed = average / (1 - _SMOOTHING**n)
        lowest = min(lowest, smoothed)
        if not smoothed < _EXPLODED * lowest:  # not a number, perhaps
            return
        yield Point(rate, loss, smoothed)


def _try(run: TrainingRun, rates: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield each rate and the loss before its step."""
    steps = Steps(run)
    n = 0
    for epoch in itertools.count():
        for step in steps.read(epoch, first=0, left_out=run.progress.left_out("train")):
            rate = rates[n]
            try:
                with naming_exhaustion():
                    loss = _add_up(run, step, rate)
            except (OutOfMemory, NotReproducible) as error:
                run.model.zero_grad()
                run.renew_scaler()
                halve(run, error)
                break  # and go on with the next epoch's images
            except UnreadableImage as error:
                run.model.zero_grad()
                leave_out(run, "train", error)
                break
            yield rate, loss
            take_step(run, rate)
            n += 1
            run.listener.advance("looking for a learning rate", n, len(rates), f"{rate:.2g}")
            if n == len(rates):
                return


def _add_up(run: TrainingRun, step: Step, rate: float) -> float:
    """Return the loss, with the gradients there for a step at ``rate``, or used up by it.

    Where this fails within backward, some weights may have changed; the search goes on anyway.
    """
    if is_released := step.is_undivided and run.plan.request.release_gradients:
        set_rate(run.optimizer, rate)
    with changing_in_backward(run.optimizer, ALONE) if is_released else nullcontext():
        loss = sum(add_gradients(run, x, y, len(y) / step.images) for x, y in step.parts)
    run.scaler.unscale_(run.optimizer)
    return float(loss)


@contextmanager
def _as_before(run: TrainingRun) -> Iterator[None]:
    """Put network and random state back afterwards.

    The weights wait in a file: nobody has planned memory for a copy.
    """
    random_states = read_random_states()
    with TemporaryDirectory(".tmp", ".weights.", run.folder.path) as folder:
        file = Path(folder) / "weights.safetensors"
        write_atomically(file, lambda target: write_tensors(target, run.model.state_dict(), {}))
        yield
        run.model.load_state_dict(checkpoints.read_state(file))
    run.model.zero_grad()
    set_random_states(random_states)
