"""Fine-tuning from a recipe: from a folder of images to a folder with the best model."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from momconv.data.report import DataReport
from momconv.data.source import Source, Splits, to_sources
from momconv.determinism import deterministic
from momconv.errors import ModelFileError, ResourceError
from momconv.planner.plan import Plan
from momconv.recipe import Recipe, recall_recipe
from momconv.states import keeping_random_state
from momconv.training import network, resuming, starting
from momconv.training.images import examine_together, find_images, find_place, find_root
from momconv.training.loop import train
from momconv.training.memory import enforcing_limit
from momconv.training.omission import keep_rest
from momconv.training.optimisation import choose_precision
from momconv.training.planning import plan_together
from momconv.training.probing import compare
from momconv.training.processes import Processes, find_own_device, joined
from momconv.training.progress import SILENT, EpochRow, Listener, ProbeScore
from momconv.training.provenance import Provenance, read_provenance
from momconv.training.run import Assignment, TrainingRun
from momconv.training.run_folder import RunFolder
from momconv.training.saving import require_tensorboard, write_plan
from momconv.training.state import forget_parts
from momconv.units import parse_duration

Resume = bool | Literal["auto"]


class NothingLeft(Exception):
    """A run is done, and has kept no state from which it could be trained further."""


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
    plan: Plan
    probe: ProbeScore | None = None  # the baseline, if the recipe asks for one

    @property
    def root(self) -> Path:
        """Where the images are."""
        data = self.recipe.data
        return data.path or data.train_dir or self.splits.train.root

    def compare_to_probe(self) -> str | None:
        """Return both scores and what fine-tuning bought, in words; None without a baseline."""
        top1 = self.best_epoch.val_top1
        if self.probe is None or top1 is None:
            return None
        return compare(self.probe, top1, len(self.splits.val.samples))


def finetune(  # noqa: PLR0913 (one for each choice)
    recipe: Recipe,
    folder: str | Path,
    *,
    source: Source | tuple[Source, Source] | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    like: Path | None = None,
    listener: Listener = SILENT,
) -> Result:
    """Fine-tune the recipe's network on its images; all results go to ``folder``.

    Args:
        recipe: What to do. To resume, the folder's own (``config.yaml``), possibly with changes.
        folder: A new or empty folder, or one to resume.
        source: Images in other places than the recipe's folders, of which a part is held out; or
            those to train on and those to validate on. The same again to resume.
        resume: Whether to go on where the run in ``folder`` stopped; "auto": if there is one, which
            must be that of the whole ``recipe``, and otherwise to start it.
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
        NothingLeft: With "auto", the run is done, and has kept no state.
    """
    began = time.monotonic()
    before = read_provenance(like) if like else None
    with (
        _assigning(recipe, Path(folder), source, listener) as assignment,
        _claiming(assignment, resume=resume, overwrite=overwrite) as goes_on,
    ):
        if goes_on and resume == "auto":
            with assignment.processes.leader_first():
                agreed = resuming.agree(assignment)
            if agreed is None:
                raise NothingLeft
            assignment.recipe = agreed
        run = _begin(assignment, before, resume=goes_on, overwrite=overwrite)
        run.plan = plan_together(run.plan, run.model, run.processes)
        write_plan(run)
        if recipe.train.sync_bn and run.processes.count > 1:
            network.synchronise(run.model)
        if run.plan.request.shards > 1:
            run.shard()
        if recipe.train.time_limit is not None:
            run.ends = began + parse_duration(recipe.train.time_limit)
        train(run)
        result = _conclude(run)
        if run.processes.leads:
            run.folder.keep_states(run.recipe.train.keep)
            forget_parts(run.folder)
    return result


def _conclude(run: TrainingRun) -> Result:
    """Return what ``run`` came to.

    Raises:
        ModelFileError: The best model is lost.
    """
    folder, progress = run.folder, run.progress
    best = progress.find_best(run.recipe.train.monitor)
    if best is None:
        raise ModelFileError(
            f"the best model of {folder.path} is lost, and no epoch is left that could give "
            "another",
            kind="run.no_best",
            fix=f"{folder.resume_command} --epochs {progress.epoch + 1}",
        )
    return Result(
        recipe=run.recipe,
        folder=folder.path,
        best=folder.best,
        last=folder.last,
        best_epoch=best,
        epochs=progress.epoch,
        history=tuple(progress.history),
        splits=keep_rest(run),
        plan=run.plan,
        probe=progress.probe,
    )


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a run would work with."""

    report: DataReport
    plan: Plan


def rehearse(
    recipe: Recipe,
    folder: str | Path,
    *,
    source: Source | tuple[Source, Source] | None = None,
    overwrite: bool = False,
    like: Path | None = None,
    listener: Listener = SILENT,
) -> Rehearsal:
    """Do all that ``finetune`` does before it changes a weight; nothing is written.

    Raises:
        MomconvError: As ``finetune`` before its first step.
    """
    before = read_provenance(like) if like else None
    with _assigning(recipe, Path(folder), source, listener) as assignment:
        prepared = starting.prepare(assignment, overwrite=overwrite, like=before)
    return Rehearsal(prepared.images.report, prepared.run.plan)


@contextmanager
def _assigning(
    recipe: Recipe,
    folder: Path,
    source: Source | tuple[Source, Source] | None,
    listener: Listener,
) -> Iterator[Assignment]:
    """Prepare what this process is to do: its device, random numbers, other processes.

    Raises:
        UsageError: The recipe asks for what its device cannot do, or for TensorBoard without it.
        ResourceError: There is no such device.
    """
    device = find_own_device(recipe.train.device)
    choose_precision(recipe.train, device)
    network.require_synchronisable(recipe.train, device)
    require_tensorboard(recipe)
    with (
        joined() as processes,
        _seeded(recipe.train.seed, device),
        deterministic(wanted=recipe.train.deterministic),
        enforcing_limit(device, recipe.train.memory),
    ):
        yield Assignment(
            recipe=recipe,
            folder=RunFolder(folder),
            device=device,
            listener=listener if processes.leads else SILENT,
            processes=processes,
            sources=None if source is None else to_sources(source),
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, PyTorch's generators start from ``seed``; afterwards they are as before."""
    with keeping_random_state(device):
        torch.manual_seed(seed)
        yield


@contextmanager
def _claiming(assignment: Assignment, *, resume: Resume, overwrite: bool) -> Iterator[bool]:
    """Claim the folder for what is inside, if nothing about it is wrong at first sight.

    Give whether to go on with the run that is there, as the first process finds.
    """
    folder, goes_on = assignment.folder, resume is True
    with ExitStack() as held:
        if assignment.processes.leads:
            if resume == "auto":
                goes_on = folder.has_run
            elif resume:
                folder.require_state()
            if not goes_on:
                place = find_place(assignment.recipe.data, assignment.sources)
                folder.require_outside(find_root(place))
                folder.require_unused(overwrite=overwrite)
            held.enter_context(folder.claimed(assignment.listener.tell))
        yield _follow(assignment.processes, goes_on=goes_on)


def _follow(processes: Processes, *, goes_on: bool = False) -> bool:
    """Wait for the others, and return whether one of them ``goes_on``."""
    with _following(processes):
        return any(processes.largest(goes_on))


@contextmanager
def _following(processes: Processes) -> Iterator[None]:
    """Inside, a process that loses its leader ends, as that one has said why."""
    try:
        yield
    except ResourceError:
        if processes.leads:
            raise
        raise SystemExit(1) from None


def _begin(
    assignment: Assignment, like: Provenance | None, *, resume: bool, overwrite: bool
) -> TrainingRun:
    """Start a run, or go on with it; processes other than the first read it from its folder."""
    if resume:
        with assignment.processes.leader_first():
            return resuming.resume(assignment)
    if assignment.processes.leads:
        run = starting.start(assignment, overwrite=overwrite, like=like)
        _follow(assignment.processes)
        return run
    recipe, processes = assignment.recipe.data, assignment.processes
    with _following(processes):
        find = partial(find_images, find_place(recipe, assignment.sources), recipe, SILENT)
        examine_together(find, processes)
    _follow(processes)
    begun = recall_recipe(assignment.folder.config)
    return resuming.resume(replace(assignment, recipe=begun))
