"""Fine-tuning from a recipe: from a folder of images to a folder with the best model."""

import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from momconv.data.dataset import count_workers, count_workers_that_fit
from momconv.data.folder import Splits
from momconv.data.report import DataReport
from momconv.errors import ResourceError, UsageError
from momconv.files.atomic import write_text
from momconv.planner.measurement import static_bytes
from momconv.planner.outlook import Fixed
from momconv.recipe import KEYS, Recipe, dump_recipe, recall_recipe
from momconv.surgery.conversion import set_gamma
from momconv.training import network
from momconv.training.balancing import describe_imbalance
from momconv.training.board import require_tensorboard
from momconv.training.determinism import deterministic
from momconv.training.images import (
    CheckedImages,
    find_images,
    keep_readable,
    recall_images,
    remember_images,
    require_folder,
)
from momconv.training.job import Job
from momconv.training.loop import train
from momconv.training.omission import keep_rest, omit
from momconv.training.optimisation import choose_precision, make_optimizer
from momconv.training.parameters import describe_frozen, require_stages
from momconv.training.planning import (
    BatchPlan,
    Setting,
    plan_again,
    plan_batches,
    plan_together,
    warn_of_noise,
)
from momconv.training.processes import Processes, find_own_device, joined
from momconv.training.progress import SILENT, EpochRow, Listener, Progress
from momconv.training.provenance import (
    Provenance,
    describe_machine,
    find_provenance,
    list_differences,
    read_provenance,
)
from momconv.training.rate_finder import find_rate
from momconv.training.run_folder import RunFolder
from momconv.training.saving import publish, save, write_plan
from momconv.training.state import load_newest, save_state
from momconv.units import format_bytes, parse_duration
from momconv.zoo.description import Preprocessing, describe

_NO_MOMENTUM = (
    "note: no run of blocks is long enough for momentum to save memory, so it stays plain; "
    "--set momentum.stages=all converts what there is"
)
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


@dataclass(frozen=True, slots=True)
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
        ResourceError: Memory, disk, device or network is not there.
        MomconvError: The loss is not finite.
        Interrupted: SIGINT or SIGTERM came; the run can be resumed.
        TimeUp: The recipe's time limit is reached; the run can be resumed.
    """
    began, run = time.monotonic(), RunFolder(Path(folder))
    with _task_of(recipe, run, like, listener, overwrite=overwrite) as task:
        job, progress = _begin(task, resume=resume)
        job.plan = plan_together(job.plan, job.model, task.processes)
        write_plan(job)
        if recipe.train.sync_bn and task.processes.count > 1:
            network.synchronise(job.model)
        if recipe.train.time_limit is not None:
            job.ends = began + parse_duration(recipe.train.time_limit)
        train(job, progress)
    best = progress.find_best(recipe.train.monitor)
    assert best is not None
    splits = keep_rest(job.splits, progress)
    done = (best, progress.epoch, tuple(progress.history), splits, job.plan)
    return Result(job.recipe, run.path, run.best, run.last, *done)


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
    with _task_of(recipe, RunFolder(Path(folder)), like, listener, overwrite=overwrite) as task:
        ready = _prepare(task)
    return Rehearsal(ready.images.report, ready.plan)


@dataclass(frozen=True, slots=True)
class _Task:
    """What was asked for, and of which process."""

    recipe: Recipe
    run: RunFolder
    overwrite: bool  # whether the folder may hold another run
    like: Provenance | None  # of a run that this one is to be compared to
    device: torch.device
    listener: Listener
    processes: Processes


@contextmanager
def _task_of(
    recipe: Recipe, run: RunFolder, like: Path | None, listener: Listener, *, overwrite: bool
) -> Iterator[_Task]:
    before = read_provenance(like) if like else None
    device = find_own_device(recipe.train.device)
    choose_precision(recipe.train, device)
    network.require_synchronisable(recipe.train, device)
    require_tensorboard(recipe)
    with (
        joined() as processes,
        _seeded(recipe.train.seed, device),
        deterministic(wanted=recipe.train.deterministic),
    ):
        heard = listener if processes.leads else SILENT
        yield _Task(recipe, run, overwrite, before, device, heard, processes)


def _begin(task: _Task, *, resume: bool) -> tuple[Job, Progress]:
    """A new run, or the one in the folder. It is the folder that tells all processes the same."""
    if resume:
        with task.processes.leader_first():
            return _resume(task)
    if task.processes.leads:
        begun = _start(task)
        task.processes.wait()
        return begun
    try:
        task.processes.wait()
    except ResourceError:
        raise SystemExit(1) from None  # the leader has said why
    return _resume(replace(task, recipe=recall_recipe(task.run.config)))


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a new run works with."""

    task: _Task  # with what the plan changed
    images: CheckedImages
    provenance: Provenance
    model: nn.Module
    plan: BatchPlan


def _prepare(task: _Task) -> _Ready:
    """Check images, network, memory and disk; nothing is written."""
    recipe, run, listener = task.recipe, task.run, task.listener
    folder = require_folder(recipe.data)
    run.require_outside(folder)
    run.require_unused(overwrite=task.overwrite)
    run.require_room(0)
    found = find_images(folder, recipe.data, listener)
    model = network.load(recipe)
    require_stages(model, recipe.train)
    if recipe.momentum.gamma and not network.read_gamma(model):
        listener.tell(_NO_MOMENTUM)
    images = keep_readable(found, recipe.data, listener)
    _check_images(recipe, images.splits, listener)
    provenance = find_provenance(recipe, model, images.report.fingerprint, task.device)
    if task.like:
        _tell_of_differences(task.like, provenance, listener)
    if recipe.data.resolution is not None:
        listener.tell(f"note: {_describe_resizing(describe(model).preprocessing)}")
    network.fit_head(model, images.splits.train.classes)
    network.place(model, task.device)
    network.start_training(model, recipe.train)
    if frozen := describe_frozen(model):
        listener.tell(frozen)
    task, plan = _plan(task, images.splits, model)
    _choose_workers(task, images.splits, plan)  # so that it fails now if at all
    return _Ready(task, images, provenance, model, plan)


def _start(task: _Task) -> tuple[Job, Progress]:
    """A run at its beginning, with a folder from which it can be resumed."""
    ready = _prepare(task)
    task, splits, model, plan = ready.task, ready.images.splits, ready.model, ready.plan
    recipe, run, listener = task.recipe, task.run, task.listener
    progress = Progress()
    if network.needs_calibration(model, recipe):
        _calibrate(ready, progress)
    job = _make_job(task, splits, model, make_optimizer(model, recipe.train), plan)
    if task.overwrite:
        run.clear()
    run.make()
    if recipe.train.lr == "auto":
        _choose_rate(job, progress)
    write_text(run.config, dump_recipe(_with_absolute_paths(job.recipe)))
    write_text(run.provenance, ready.provenance.model_dump_json(indent=1) + "\n")
    write_text(run.plan, job.plan.to_json())
    remember_images(ready.images, require_folder(recipe.data), run, listener)
    save_state(run, model, job.optimizer, progress, job.read_extras())
    return job, progress


def _plan(task: _Task, splits: Splits, model: nn.Module) -> tuple[_Task, BatchPlan]:
    """How the run fits the memory; it is told. ``model`` gets the γ that it takes.

    Raises:
        ResourceError: It does not, or what it writes does not fit the disk.
    """
    task.run.require_room(_disk_bytes(model, task.recipe))
    fixed: tuple[Fixed, ...] = ("gamma",) if _has_fixed_gamma(task.recipe) else ()
    may_change = [change for change in task.recipe.train.may_change if change not in fixed]
    asked = _describe_setting(task, splits, model, fixed)
    plan = plan_batches(model, replace(asked, may_change=tuple(may_change)))
    recipe = _change(task.recipe, asked, plan)
    if plan.gamma is not None:
        set_gamma(model, plan.gamma, gain=recipe.momentum.gain)
    if recipe != task.recipe:
        task.listener.tell(_describe_changes(recipe))
    _tell_of_plan(plan, model, task.listener)
    return replace(task, recipe=recipe), plan


def _change(recipe: Recipe, asked: Setting, plan: BatchPlan) -> Recipe:
    """The recipe with what the plan had to change, as if it had been asked for."""
    momentum, train = recipe.momentum, recipe.train
    if plan.gamma is not None:
        momentum = momentum.model_copy(update={"gamma": plan.gamma})
    if plan.setting.precision != asked.precision:
        train = train.model_copy(update={"precision": plan.setting.precision})
    return recipe.model_copy(update={"momentum": momentum, "train": train})


def _describe_changes(recipe: Recipe) -> str:
    return (
        f"note: as that is faster, or more of the batch fits (train.may_change): γ is "
        f"{recipe.momentum.gamma:g}, precision {recipe.train.precision}"
    )


def _describe_resizing(p: Preprocessing) -> str:
    return (
        f"to be validated, images get a shorter side of {p.resize} pixels, of which the middle "
        f"{p.resolution} × {p.resolution} are looked at"
    )


def _disk_bytes(model: nn.Module, recipe: Recipe) -> int:
    """What a run writes: two states, two models, and a file before it replaces another."""
    static = static_bytes(model, recipe.train.optimizer, ema=recipe.train.ema > 0)
    return 3 * (static.weights + static.optimizer + static.ema) + 3 * static.weights


def _choose_rate(job: Job, progress: Progress) -> None:
    """Look for a learning rate, which from then on is the recipe's own."""
    network.start_training(job.model, job.recipe.train)
    found = find_rate(job, progress)
    rate = found or job.recipe.train.resolved_lr
    train = job.recipe.train.model_copy(update={"lr": rate})
    job.recipe = job.recipe.model_copy(update={"train": train})
    job.optimizer = make_optimizer(job.model, train)
    job.listener.tell(
        f"note: learning rate {rate:g}, a tenth of that with the lowest loss (lr_finder.csv)"
        if found
        else f"warning: the loss fell at no rate (lr_finder.csv), so it is the default, {rate:g}"
    )


def _calibrate(ready: _Ready, progress: Progress) -> None:
    """Adapt the converted network to its original, which is loaded for that and then dropped.

    It weighs no more than the gradients, which do not exist yet. In single precision, in which this
    is done, an image takes up to twice what it takes in half precision.
    """
    task, splits, plan = ready.task, ready.images.splits, ready.plan
    recipe, listener, half = task.recipe, task.listener, plan.setting.precision != "fp32"
    original = network.load_plain(recipe.model, recipe.data.resolution)
    network.place(original, task.device)
    alone = plan  # one process calibrates, which then takes more than its share of a batch
    if task.processes.count > 1:
        alone = plan_batches(ready.model, replace(plan.setting, processes=1))
    network.calibrate_on(
        splits.train,
        ready.model,
        original,
        recipe.train,
        batch_size=max(1, alone.micro_batch // 2) if half else alone.micro_batch,
        workers=_choose_workers(task, splits, plan),
        listener=listener,
        leave_out=partial(omit, progress, "train", splits, recipe=recipe.data, listener=listener),
    )
    if alone is not plan:
        plan.apply(ready.model)


def _resume(task: _Task) -> tuple[Job, Progress]:
    """A run as it was when its state was saved, but for what the recipe changes."""
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
    _require_validation(recipe, splits)
    _tell_of_another_machine(task)
    network.place(model, task.device)
    network.start_training(model, recipe.train)
    setting = _describe_setting(task, splits, model, fixed=("gamma", "resolution", "freeze"))
    plan = _recall_plan(run, setting, model)
    optimizer = make_optimizer(model, recipe.train)
    saved.restore_optimizer(optimizer, model)
    saved.restore_random_states()
    job = _make_job(task, splits, model, optimizer, plan)
    job.restore_extras(saved.extras)
    if recipe.train.resolved_lr != before.train.resolved_lr:
        progress.lr_factor = 1.0
        save(job, progress)
    if task.processes.leads:
        write_text(run.config, dump_recipe(_with_absolute_paths(recipe)))
    write_plan(job)
    publish(job, progress)
    _tell_of_resuming(job, progress, before)
    return job, progress


def _tell_of_another_machine(task: _Task) -> None:
    if not task.run.provenance.is_file():
        return
    began = read_provenance(task.run.provenance)
    now = began.model_copy(update={"machine": describe_machine(task.device)})
    _tell_of_differences(began, now, task.listener)


def _recall_plan(run: RunFolder, setting: Setting, model: nn.Module) -> BatchPlan:
    if not run.plan.is_file():
        return plan_batches(model, setting)
    return plan_again(BatchPlan.from_json(run.plan.read_text()), setting, model)


def _check_images(recipe: Recipe, splits: Splits, listener: Listener) -> None:
    if imbalance := describe_imbalance(splits.train, recipe.data):
        listener.tell(imbalance)
    _require_validation(recipe, splits)


def _require_validation(recipe: Recipe, splits: Splits) -> None:
    if recipe.train.patience is not None and not splits.val.samples:
        raise UsageError(
            "train.patience: without held-out images nothing says when to stop",
            kind="usage.no_validation",
            fix="--val-frac 0.2\n--set train.patience=null",
        )


def _make_job(
    task: _Task, splits: Splits, model: nn.Module, optimizer: Optimizer, plan: BatchPlan
) -> Job:
    workers = _choose_workers(task, splits, plan)
    return Job(
        *(task.recipe, task.run, splits, model, optimizer, plan, task.device, workers),
        *(task.listener, task.processes),
    )


def _describe_setting(
    task: _Task, splits: Splits, model: nn.Module, fixed: tuple[Fixed, ...]
) -> Setting:
    recipe, train, processes = task.recipe, task.recipe.train, task.processes
    return Setting(
        images=len(splits.train.samples),
        batch_size=train.batch_size,
        micro_batch=train.micro_batch,
        resolution=describe(model).preprocessing.resolution,
        strategy=recipe.momentum.strategy,
        precision=choose_precision(train, task.device),
        optimizer=train.optimizer,
        device=str(task.device),
        memory=train.memory,
        headroom=train.headroom,
        ema=train.ema > 0,
        processes=processes.count,
        sharers=processes.on_this_machine if task.device.type == "cpu" else 1,
        fixed=fixed,
    )


def _has_fixed_gamma(recipe: Recipe) -> bool:
    """Whether γ is that of a network that was converted before, or anneals."""
    return recipe.model.from_file is not None or recipe.momentum.anneal > 0


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's generators start from ``seed`` inside, and are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _tell_of_differences(before: Provenance, now: Provenance, listener: Listener) -> None:
    for difference in list_differences(before, now):
        listener.tell(f"warning: not as in the run of {before.started}: {difference}")


def _tell_of_plan(plan: BatchPlan, model: nn.Module, listener: Listener) -> None:
    listener.tell(f"note: {plan}")
    if warning := warn_of_noise(plan, model):
        listener.tell(warning)


def _choose_workers(task: _Task, splits: Splits, plan: BatchPlan) -> int:
    """How many processes read images; not more than shared memory has room for.

    Raises:
        ResourceError: It has no room for those that the recipe asks for.
    """
    wanted, processes = task.recipe.data.workers, task.processes
    images = len(splits.train.samples) // processes.count
    most = count_workers(images) // processes.on_this_machine if wanted == "auto" else wanted
    batch_bytes = plan.sizes[0] * 3 * 4 * plan.setting.resolution**2
    fitting = count_workers_that_fit(most, batch_bytes * processes.on_this_machine)
    if fitting < most and wanted != "auto":
        raise ResourceError(
            f"{most} processes that read micro-batches of {format_bytes(batch_bytes)} need more "
            "shared memory than there is",
            kind="memory.shared",
            fix=f"--workers {fitting}\ndocker run --shm-size=8g …",
        )
    return fitting


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as it must be to be replayed from another working directory."""
    folders = {name: getattr(recipe.data, name) for name in ("path", "train_dir", "val_dir")}
    absolute = {name: folder and folder.absolute() for name, folder in folders.items()}
    data = recipe.data.model_copy(update=absolute)
    file = recipe.model.from_file
    model = recipe.model.model_copy(update={"from_file": file and file.absolute()})
    return recipe.model_copy(update={"data": data, "model": model})


def _refuse_changes(before: Recipe, now: Recipe, run: RunFolder) -> None:
    changes = _list_changes(before, _with_absolute_paths(now), _FIXED)
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
    _tell_of_plan(job.plan, job.model, job.listener)
    if epochs != before.train.epochs:
        lr = job.rate_at(progress.epoch, progress.step)
        job.listener.tell(
            f"note: {epochs} epochs instead of {before.train.epochs}: the schedule "
            f"({job.recipe.train.schedule}) now ends there, and the learning rate goes on at "
            f"{lr:.3g}"
        )
