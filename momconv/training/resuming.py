"""A run that goes on where its state was saved, but for what its recipe changes."""

import shlex
from collections.abc import Iterable
from functools import partial

from torch import nn

from momconv.errors import UsageError
from momconv.files.atomic import write_text
from momconv.recipe import KEYS, Recipe, dump_recipe, recall_recipe
from momconv.training import network
from momconv.training.images import recall_images
from momconv.training.job import Job
from momconv.training.optimisation import make_optimizer
from momconv.training.parameters import require_stages
from momconv.training.planning import (
    BatchPlan,
    Setting,
    plan_again,
    plan_batches,
    tell_of_plan,
)
from momconv.training.progress import Progress
from momconv.training.provenance import describe_machine, read_provenance, tell_of_differences
from momconv.training.run_folder import RunFolder
from momconv.training.saving import publish, save, write_plan
from momconv.training.state import load_newest
from momconv.training.stopping import require_validation
from momconv.training.task import Task

# What a run is about: to change it is to start another.
_FIXED = [
    *("model.name", "model.arguments", "model.weights", "model.from_file"),
    *("momentum.gamma", "momentum.stages", "momentum.velocity", "momentum.gain"),
    *("momentum.calibrate", "momentum.anneal"),
    *("data.train_dir", "data.val_dir", "data.unknown_classes"),
    *("data.resolution", "data.val_frac", "data.split_seed", "data.limit", "data.max_images"),
    *("train.batch_size", "train.optimizer", "train.seed", "train.freeze", "train.freeze_bn"),
    *("train.ema", "train.monitor"),
]


def resume(task: Task) -> tuple[Job, Progress]:
    """A run as it was when its state was saved, but for what the recipe changes.

    Raises:
        UsageError: It changes what the run is about.
        ModelFileError: The state is missing or damaged.
        DataError: The images have changed.
        ResourceError: The run does not fit the memory any more.
    """
    recipe, run = task.recipe, task.run
    run.require_state()
    if task.processes.leads:
        run.make()
    before = recall_recipe(run.config)
    _refuse_changes(before, recipe, run)
    saved = load_newest(run, task.listener.tell, partial(network.make_own, recipe.model))
    model, progress = saved.model, saved.progress
    splits = recall_images(run.split, recipe.data.path, task.listener, progress=progress)
    require_stages(model, recipe.train)
    require_validation(recipe, splits)
    _tell_of_another_machine(task)
    network.place(model, task.device)
    network.start_training(model, recipe.train)
    setting = task.describe_setting(splits, model, fixed=("gamma", "resolution", "freeze"))
    plan = _recall_plan(run, setting, model)
    optimizer = make_optimizer(model, recipe.train)
    saved.restore_optimizer(optimizer, model)
    saved.restore_random_states()
    job = task.make_job(splits, model, optimizer, plan)
    job.restore_extras(saved.extras)
    if recipe.train.resolved_lr != before.train.resolved_lr:
        progress.lr_factor = 1.0
        save(job, progress)
    if task.processes.leads:
        write_text(run.config, dump_recipe(recipe.with_absolute_paths()))
    write_plan(job)
    publish(job, progress)
    _tell_of_resuming(job, progress, before)
    return job, progress


def _tell_of_another_machine(task: Task) -> None:
    if not task.run.provenance.is_file():
        return
    began = read_provenance(task.run.provenance)
    now = began.model_copy(update={"machine": describe_machine(task.device)})
    tell_of_differences(began, now, task.listener)


def _recall_plan(run: RunFolder, setting: Setting, model: nn.Module) -> BatchPlan:
    if not run.plan.is_file():
        return plan_batches(model, setting)
    return plan_again(BatchPlan.from_json(run.plan.read_text()), setting, model)


def _refuse_changes(before: Recipe, now: Recipe, run: RunFolder) -> None:
    changes = _list_changes(before, now.with_absolute_paths(), _FIXED)
    if now.train.lr == "auto":
        changes.append(f"train.lr from {before.train.resolved_lr:g} to auto")
    if changes:
        raise UsageError(
            f"a run that goes on cannot change {', '.join(changes)}",
            kind="usage.resume_changes",
            fix=f"{run.resume_command}\n-o {shlex.quote(str(run.find_unused()))}",
        )


def _list_changes(before: Recipe, now: Recipe, keys: Iterable[str]) -> list[str]:
    """Which of the ``keys`` have other values now, in words."""
    return [
        f"{key} from {getattr(old, name)} to {getattr(new, name)}"
        for key, (section, name) in {k: k.split(".") for k in keys}.items()
        for old, new in [(getattr(before, section), getattr(now, section))]
        if getattr(old, name) != getattr(new, name)
    ]


def _tell_of_resuming(job: Job, progress: Progress, before: Recipe) -> None:
    epochs = job.recipe.train.epochs
    if progress.epoch >= epochs:
        more = f"To go on: {job.folder.resume_command} --epochs {2 * progress.epoch}"
        job.listener.tell(
            f"note: {job.folder.path} is complete ({progress.epoch}/{epochs}). {more}"
        )
        return
    if changes := _list_changes(before, job.recipe, KEYS):
        job.listener.tell(f"note: changed since: {', '.join(changes)}")
    where = f"epoch {progress.epoch + 1}/{epochs}, step {progress.step}/{job.steps_per_epoch}"
    job.listener.tell(f"note: going on in {where}")
    tell_of_plan(job.plan, job.model, job.listener)
    if epochs != before.train.epochs:
        lr = job.rate_at(progress.epoch, progress.step)
        job.listener.tell(
            f"note: {epochs} epochs instead of {before.train.epochs}: the schedule "
            f"({job.recipe.train.schedule}) now ends there, and the learning rate goes on at "
            f"{lr:.3g}"
        )
