"""When a run is saved, in which order, and its numbers for people.

The state comes first, and the rest follows from it: a run that is killed in between writes the rest
when it is resumed.
"""

import csv
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from momconv.errors import MomconvError, UsageError
from momconv.files import model_file
from momconv.files.atomic import write_text
from momconv.recipe import Recipe, dump_recipe
from momconv.training.interruption import Interrupted, TimeUp
from momconv.training.network import anneal, make_own
from momconv.training.progress import EpochRow, Progress, Rollback
from momconv.training.run import TrainingRun
from momconv.training.run_folder import RunFolder
from momconv.training.sharding import divide_like, is_divided, save_parts, whole
from momconv.training.state import collect_tensors, load_newest, save_state
from momconv.units import parse_duration


def save(run: TrainingRun) -> None:
    """Write the state; then, for people, the models and the numbers."""
    _save_state(run)
    publish(run)


def begin(run: TrainingRun) -> None:
    """Write the first state, once the folder has what the run begins with."""
    remember_documents(run)
    _save_state(run)


def remember_documents(run: TrainingRun) -> None:
    """Remember what the run began with, as it is in the folder now, for all states."""
    run.has_begun = True
    kept = [path for path in (run.folder.provenance, run.folder.split) if path.is_file()]
    run.documents = {path.name: path.read_bytes() for path in kept}


def save_event(run: TrainingRun) -> None:
    """Write the state after what went wrong in a step, then the plan and the numbers.

    A run that is killed afterwards goes on with what was changed because of it.
    """
    _save_state(run)
    write_plan(run)
    if run.processes.leads:
        write_history(run.folder, run.progress)


def _save_state(run: TrainingRun) -> None:
    """Let the leader write the state; where it is divided, all write their tensors before."""
    extras, number = run.read_extras(), None
    if run.is_sharded:
        run.saved_parts += 1
        number = run.saved_parts
        tensors = collect_tensors(run.model, run.optimizer, extras)
        divided = {key: value for key, value in tensors.items() if is_divided(value)}
        save_parts(divided, run.folder.parts / str(number))
    if run.processes.leads:
        documents, progress = _collect_documents(run), run.progress
        save_state(run.folder, run.model, run.optimizer, progress, extras, documents, number)


def _collect_documents(run: TrainingRun) -> dict[str, bytes]:
    """Return what the run needs to go on besides tensors and counters, as files for people."""
    recipe = dump_recipe(run.recipe.with_absolute_paths())
    texts = {run.folder.config.name: recipe, run.folder.plan.name: run.plan.to_json()}
    return run.documents | {name: text.encode() for name, text in texts.items()}


def publish(run: TrainingRun) -> None:
    """Write the models and the numbers that belong to the state."""
    progress, network = run.progress, run.networks[-1]
    if not (run.processes.leads or run.is_sharded):
        return
    weights = {key: whole(value) for key, value in network.state_dict().items()}
    if not run.processes.leads:
        return
    epoch_ended = progress.history and not progress.step
    best = progress.find_best(run.recipe.train.monitor)
    if epoch_ended and best is progress.history[-1]:
        _save_model(run, weights, run.folder.best)
    _save_model(run, weights, run.folder.last)
    write_history(run.folder, progress)
    if run.recipe.log.tensorboard:
        write_board(run.folder, progress.history)


def write_plan(run: TrainingRun) -> None:
    """Write the plan as it is now."""
    if run.processes.leads:
        write_text(run.folder.plan, run.plan.to_json())


@contextmanager
def saving_on_failure(run: TrainingRun) -> Iterator[None]:
    """Save if what happens inside is interrupted, or fails for whatever reason.

    Not if the numbers are spoilt, or a step is half done: then the last saved state is the one to
    keep. That is also so if the state is divided, unless all processes know that they end.
    """
    try:
        yield
    except NotFinite:
        raise
    except (Interrupted, TimeUp, MomconvError) as error:
        is_known = isinstance(error, Interrupted | TimeUp)
        if run.is_whole and (is_known or not run.is_sharded):
            save(run)
        raise
    except Exception:
        _save_if_possible(run)
        raise


def _save_if_possible(run: TrainingRun) -> None:
    """Save, and tell how to go on, after what nobody expected, which may be in the way of that."""
    saved = run.is_whole and not run.is_sharded
    with suppress(Exception):
        if saved:
            save(run)
    where = "this step" if saved else "the last time that the run was saved"
    run.listener.tell(f"note: the state of {where} is kept. To go on: {run.folder.resume_command}")


@contextmanager
def saving_together(run: TrainingRun) -> Iterator[None]:
    """Save a divided state if what happens inside ends the run, in all processes alike."""
    try:
        yield
    except MomconvError:
        if run.is_sharded:
            save(run)
        raise


@contextmanager
def indivisible(run: TrainingRun) -> Iterator[None]:
    """Take what is inside for one change: where it fails, the run is not whole any more."""
    run.is_whole = False
    yield
    run.is_whole = True


def anneal_networks(run: TrainingRun) -> None:
    """Give the network and its average the γ of the next step."""
    done = run.progress.epoch + run.progress.step / run.steps_per_epoch
    for network in run.networks:
        anneal(network, run.recipe.momentum, done)


class NotFinite(MomconvError):
    """A loss, a gradient or a weight is infinite or not a number."""


def go_back(run: TrainingRun) -> None:
    """Return to the state that was saved last.

    Raises:
        ModelFileError: It is damaged or gone.
    """
    with run.processes.leader_first():
        make = partial(make_own, run.recipe.model)
        saved = load_newest(run.folder, run.listener.tell, make)
    with indivisible(run):
        own = run.model.state_dict()
        values = saved.model.state_dict()
        run.model.load_state_dict({key: divide_like(v, own[key]) for key, v in values.items()})
        run.optimizer.zero_grad()
        run.renew_scaler()
        saved.restore_optimizer(run.optimizer, run.model)
        run.restore_extras(saved.extras)
        saved.restore_random_states()
        run.progress.go_back(saved.progress)
        anneal_networks(run)


def go_back_and_slow_down(run: TrainingRun, error: NotFinite) -> None:
    """Return to the state that was saved last, with half the learning rate, but only once.

    Raises:
        NotFinite: It happened before.
    """
    progress = run.progress
    if progress.lr_factor < 1:
        raise error
    progress.rollbacks.append(Rollback(progress.epoch + 1, progress.step + 1))
    what = error.message.partition("\n")[0]
    go_back(run)
    progress.lr_factor = 0.5
    save(run)
    run.listener.tell(
        f"warning: {what}; going back to epoch {progress.epoch + 1}, step {progress.step}, and on "
        "with half the learning rate"
    )


class Autosave:
    """Saves the state inside an epoch whenever ``train.save_every`` has passed since the last one.

    To be called after each step. Nothing but the state is written, which changes nothing in a run.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._saved = time.monotonic()

    def __call__(self) -> None:
        """Save if it is time."""
        if self._is_due():
            _save_state(self._run)
            self._saved = time.monotonic()

    def _is_due(self) -> bool:
        every = self._run.recipe.train.save_every
        if isinstance(every, int):
            return self._run.progress.step % every == 0
        return time.monotonic() - self._saved >= parse_duration(every)


def _save_model(run: TrainingRun, weights: Mapping[str, Tensor], path: Path) -> None:
    progress = run.progress
    metrics = asdict(progress.history[-1]) if progress.history else None
    finished: dict[str, object] = {"epochs": progress.epoch, "metrics": metrics}
    if progress.step:
        finished["steps_into_next"] = progress.step
    data = {"fingerprint": run.splits.fingerprint}
    extra = {"training": finished, "data": data}
    model_file.save(run.networks[-1], path, extra, weights=weights)


def write_history(folder: RunFolder, progress: Progress) -> None:
    """Write ``metrics`` and ``events``, whole: after a resume they hold nothing twice."""
    rows = [asdict(row) for row in progress.history]
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder.metrics, table.getvalue())
    events = [{"event": "epoch"} | _finite(row) for row in rows]
    events += [{"event": "out_of_memory"} | asdict(halving) for halving in progress.halvings]
    events += [{"event": "not_finite"} | asdict(back) for back in progress.rollbacks]
    events += [{"event": "unreadable_image"} | asdict(one) for one in progress.omissions]
    events.sort(key=lambda event: (event["epoch"], event["event"] == "epoch"))
    baseline = [{"event": "probe", "epoch": 0} | asdict(progress.probe)] if progress.probe else []
    lines = (json.dumps(event) + "\n" for event in (*baseline, *events))
    write_text(folder.events, "".join(lines))


def _finite(row: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the row without numbers that JSON does not have."""
    return {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}


def require_tensorboard(recipe: Recipe) -> None:
    """Do nothing if TensorBoard is there, or not asked for.

    Raises:
        UsageError: It is missing.
    """
    if recipe.log.tensorboard and find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard needs tensorboard, which is not installed",
            kind="usage.missing_extra",
            fix="pip install 'momconv[tensorboard]'",
        )


def write_board(folder: RunFolder, history: Sequence[EpochRow]) -> None:
    """Write what metrics.csv has, whole, in place of what was there."""
    from torch.utils.tensorboard import SummaryWriter

    before = [*folder.board.glob("events.out.*")]
    # purge_step: a TensorBoard that is running forgets what it has read.
    with SummaryWriter(folder.board, purge_step=0) as writer:
        for row in history:
            numbers = asdict(row)
            epoch = numbers.pop("epoch")
            for name, number in numbers.items():
                if number is not None:
                    writer.add_scalar(name, number, epoch)
    for file in before:
        file.unlink()
