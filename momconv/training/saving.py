"""When a run is saved, and in which order.

The state comes first, and the rest follows from it: a run that is killed in between writes the rest
when it is resumed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from momconv.errors import MomconvError, ResourceError
from momconv.files import model_file
from momconv.files.atomic import write_text
from momconv.training.annealing import anneal
from momconv.training.board import write_board
from momconv.training.history import write_history
from momconv.training.interruption import Interrupted, TimeUp
from momconv.training.job import Job
from momconv.training.network import make_own
from momconv.training.progress import Progress, Rollback
from momconv.training.state import load_newest, save_state
from momconv.units import parse_duration


def save(job: Job, progress: Progress) -> None:
    """Write the state; then, for people, the models and the numbers."""
    _save_state(job, progress)
    publish(job, progress)


def save_event(job: Job, progress: Progress) -> None:
    """Write the state after what went wrong in a step, then the plan and the numbers.

    A run that is killed afterwards goes on with what was changed because of it.
    """
    _save_state(job, progress)
    write_plan(job)
    if job.processes.leads:
        write_history(job.folder, progress)


def _save_state(job: Job, progress: Progress) -> None:
    if job.processes.leads:
        save_state(job.folder, job.model, job.optimizer, progress, job.read_extras())


def publish(job: Job, progress: Progress) -> None:
    """Write the models and the numbers that belong to the state."""
    if not job.processes.leads:
        return
    epoch_ended = progress.history and not progress.step
    best = progress.find_best(job.recipe.train.monitor)
    if epoch_ended and best is progress.history[-1]:
        _save_model(job, job.folder.best, progress)
    _save_model(job, job.folder.last, progress)
    write_history(job.folder, progress)
    if job.recipe.log.tensorboard:
        write_board(job.folder, progress.history)


def write_plan(job: Job) -> None:
    """Write how batches are split now."""
    if job.processes.leads:
        write_text(job.folder.plan, job.plan.to_json())


@contextmanager
def saving_on_failure(job: Job, progress: Progress) -> Iterator[None]:
    """Save if what happens inside is interrupted, or fails for a reason that is known.

    Not if the numbers are spoilt: then the last saved state is the one to keep.
    """
    try:
        yield
    except (NotFinite, HalfDone):
        raise
    except (Interrupted, TimeUp, MomconvError):
        save(job, progress)
        raise


def anneal_networks(job: Job, progress: Progress) -> None:
    """Give the network and its average the γ of the next step."""
    done = progress.epoch + progress.step / job.steps_per_epoch
    for network in job.networks:
        anneal(network, job.recipe.momentum, done)


class NotFinite(MomconvError):
    """A loss, a gradient or a weight is infinite or not a number."""


class HalfDone(ResourceError):
    """Memory ran out in one of several processes after it may have changed some weights."""


def go_back(job: Job, progress: Progress) -> None:
    """Return to the state that was saved last.

    Raises:
        ModelFileError: It is damaged or gone.
    """
    with job.processes.leader_first():
        make = partial(make_own, job.recipe.model)
        saved = load_newest(job.folder, job.listener.tell, make)
    job.model.load_state_dict(saved.model.state_dict())
    job.optimizer.zero_grad()
    job.scaler.update()  # for which gradients are scaled again; its scale is restored below
    saved.restore_optimizer(job.optimizer, job.model)
    job.restore_extras(saved.extras)
    saved.restore_random_states()
    progress.go_back(saved.progress)
    anneal_networks(job, progress)


def go_back_and_slow_down(job: Job, progress: Progress, error: NotFinite) -> None:
    """Return to the state that was saved last, with half the learning rate, but only once.

    Raises:
        NotFinite: It happened before.
    """
    if progress.lr_factor < 1:
        raise error
    progress.rollbacks.append(Rollback(progress.epoch + 1, progress.step + 1))
    what = error.message.partition("\n")[0]
    go_back(job, progress)
    progress.lr_factor = 0.5
    save(job, progress)
    job.listener.tell(
        f"warning: {what}; going back to epoch {progress.epoch + 1}, step {progress.step}, and on "
        "with half the learning rate"
    )


class Autosave:
    """Saves the state inside an epoch whenever ``train.save_every`` has passed since the last one.

    To be called after each step. Nothing but the state is written, which changes nothing in a run.
    """

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._saved = time.monotonic()

    def __call__(self) -> None:
        """Save if it is time."""
        if self._is_due():
            _save_state(self._job, self._progress)
            self._saved = time.monotonic()

    def _is_due(self) -> bool:
        every = self._job.recipe.train.save_every
        if isinstance(every, int):
            return self._progress.step % every == 0
        return time.monotonic() - self._saved >= parse_duration(every)


def _save_model(job: Job, path: Path, progress: Progress) -> None:
    metrics = asdict(progress.history[-1]) if progress.history else None
    finished: dict[str, object] = {"epochs": progress.epoch, "metrics": metrics}
    if progress.step:
        finished["steps_into_next"] = progress.step
    data = {"fingerprint": job.splits.fingerprint}
    model_file.save(job.networks[-1], path, {"training": finished, "data": data})
