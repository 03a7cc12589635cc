"""Fine-tuning from a recipe: from a folder of images to a folder with the best model."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from momconv.data.folder import Splits
from momconv.data.report import DataReport
from momconv.errors import ModelFileError, ResourceError
from momconv.recipe import Recipe, recall_recipe
from momconv.training import network, resuming, starting
from momconv.training.images import require_folder
from momconv.training.job import Job
from momconv.training.loop import train
from momconv.training.omission import keep_rest
from momconv.training.planning import BatchPlan, plan_together
from momconv.training.processes import Processes
from momconv.training.progress import SILENT, EpochRow, Listener, Progress
from momconv.training.run_folder import RunFolder
from momconv.training.saving import write_plan
from momconv.training.task import Task, task_of
from momconv.units import parse_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to."""

    recipe: Recipe  # with what was found or had to be changed
    folder: Path
    best: Path  # the model of the best epoch
    last: Path
    best_epoch: EpochRow
    epochs: int
    history: tuple[EpochRow, ...]
    splits: Splits
    plan: BatchPlan


def finetune(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    like: Path | None = None,
    listener: Listener = SILENT,
) -> Result:
    """Fine-tune the recipe's network on its images; all results go to ``folder``.

    Args:
        recipe: What to do. To resume, the folder's own (``config.yaml``), possibly with changes.
        folder: A new or empty folder, or one to resume.
        resume: Whether to go on where the run in ``folder`` stopped.
        overwrite: Whether an earlier run in ``folder`` is given up, once this one can begin.
        like: The ``run.json`` of another run; the listener hears what is not as it was there.
        listener: Hears how the run goes.

    Raises:
        UsageError: The recipe asks for something impossible, or the folder is in use.
        DataError: The images cannot be used.
        ModelFileError: The network's file, or the state to resume, is missing or damaged.
        ResourceError: Memory, disk, device or network is not there; another run has the folder.
        MomconvError: The loss is not finite.
        Interrupted: SIGINT or SIGTERM came; the run can be resumed.
        TimeUp: The recipe's time limit is reached; the run can be resumed.
    """
    began, run = time.monotonic(), RunFolder(Path(folder))
    with (
        task_of(recipe, run, like, listener, overwrite=overwrite) as task,
        _claiming(task, resume=resume),
    ):
        job, progress = _begin(task, resume=resume)
        job.plan = plan_together(job.plan, job.model, task.processes)
        write_plan(job)
        if recipe.train.sync_bn and task.processes.count > 1:
            network.synchronise(job.model)
        if recipe.train.time_limit is not None:
            job.ends = began + parse_duration(recipe.train.time_limit)
        train(job, progress)
    best = progress.find_best(recipe.train.monitor)
    if best is None:
        raise ModelFileError(
            f"the best model of {run.path} is lost, and no epoch is left that could give another",
            kind="run.no_best",
            fix=f"{run.resume_command} --epochs {progress.epoch + 1}",
        )
    return Result(
        recipe=job.recipe,
        folder=run.path,
        best=run.best,
        last=run.last,
        best_epoch=best,
        epochs=progress.epoch,
        history=tuple(progress.history),
        splits=keep_rest(job.splits, progress),
        plan=job.plan,
    )


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a run would work with."""

    report: DataReport
    plan: BatchPlan


def rehearse(
    recipe: Recipe,
    folder: str | Path,
    *,
    overwrite: bool = False,
    like: Path | None = None,
    listener: Listener = SILENT,
) -> Rehearsal:
    """Do all that ``finetune`` does before it changes a weight; nothing is written.

    Raises:
        MomconvError: As ``finetune`` before its first step.
    """
    with task_of(recipe, RunFolder(Path(folder)), like, listener, overwrite=overwrite) as task:
        ready = starting.prepare(task)
    return Rehearsal(ready.images.report, ready.plan)


@contextmanager
def _claiming(task: Task, *, resume: bool) -> Iterator[None]:
    """The folder belongs to this run inside, if nothing about it is wrong at first sight."""
    run = task.run
    with ExitStack() as held:
        if task.processes.leads:
            if resume:
                run.require_state()
            else:
                run.require_outside(require_folder(task.recipe.data))
                run.require_unused(overwrite=task.overwrite)
            held.enter_context(run.claimed(task.listener.tell))
        _follow(task.processes)
        yield


def _follow(processes: Processes) -> None:
    """Wait for the others; one that loses the leader ends, as that one has said why."""
    if processes.leads:
        processes.wait()
        return
    try:
        processes.wait()
    except ResourceError:
        raise SystemExit(1) from None


def _begin(task: Task, *, resume: bool) -> tuple[Job, Progress]:
    """A new run, or the one in the folder. It is the folder that tells all processes the same."""
    if resume:
        with task.processes.leader_first():
            return resuming.resume(task)
    if task.processes.leads:
        begun = starting.start(task)
        _follow(task.processes)
        return begun
    _follow(task.processes)
    return resuming.resume(replace(task, recipe=recall_recipe(task.run.config)))
