"""A new run: images, network, memory and disk are checked, then its folder is made."""

from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from momconv.data.folder import Splits
from momconv.data.inspection import find_guessed, find_outside
from momconv.data.values import find_ranges, settle_ranges, warn_of_values
from momconv.files.atomic import write_text
from momconv.planner.measurement import static_bytes
from momconv.planner.outlook import Fixed
from momconv.recipe import Recipe, dump_recipe
from momconv.surgery.conversion import set_gamma
from momconv.training import network
from momconv.training.batches import describe_imbalance
from momconv.training.calibrating import calibrate_on, needs_calibration
from momconv.training.images import (
    CheckedImages,
    find_images,
    keep_readable,
    remember_images,
    require_folder,
)
from momconv.training.job import Job
from momconv.training.omission import omit
from momconv.training.optimisation import describe_frozen, make_optimizer, require_stages
from momconv.training.planning import BatchPlan, Setting, plan_batches, tell_of_plan
from momconv.training.progress import Listener, Progress, require_validation
from momconv.training.provenance import Provenance, find_provenance, tell_of_differences
from momconv.training.rate_finder import find_rate
from momconv.training.saving import begin
from momconv.training.task import Task
from momconv.zoo.description import Preprocessing, describe, mark_as_seen

_NO_MOMENTUM = (
    "note: no run of blocks is long enough for momentum to save memory, so it stays plain; "
    "--set momentum.stages=all converts what there is"
)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a new run works with, before anything of it is written."""

    task: Task  # with what the plan changed
    images: CheckedImages
    provenance: Provenance
    model: nn.Module
    plan: BatchPlan


def prepare(task: Task) -> Ready:
    """Check images, network, memory and disk; nothing is written.

    Raises:
        MomconvError: The run cannot be.
    """
    recipe, run, listener = task.recipe, task.run, task.listener
    folder = require_folder(recipe.data)
    run.require_outside(folder)
    run.require_unused(overwrite=task.overwrite)
    run.require_room(0)
    found = find_images(folder, recipe.data, listener)
    model = network.load(recipe, listener.tell)
    require_stages(model, recipe.train)
    if recipe.momentum.gamma and not network.read_gamma(model):
        listener.tell(_NO_MOMENTUM)
    images = keep_readable(found, recipe.data, listener, describe(model).seen)
    _check_images(recipe, images.splits, listener)
    _settle_ranges(model, images, listener)
    provenance = find_provenance(recipe, model, images.report.fingerprint, task.device)
    if task.like:
        tell_of_differences(task.like, provenance, listener)
    if recipe.data.resolution is not None:
        listener.tell(f"note: {_describe_resizing(describe(model).preprocessing)}")
    network.fit_head(model, images.splits.train.classes)
    trained_on = (images.findings[sample.path].sha256 for sample in images.splits.train.samples)
    mark_as_seen(model, trained_on)
    network.place(model, task.device)
    network.start_training(model, recipe.train)
    if frozen := describe_frozen(model):
        listener.tell(frozen)
    task, plan = _plan(task, images.splits, model)
    task.choose_workers(images.splits, plan)  # so that it fails now if at all
    return Ready(task, images, provenance, model, plan)


def start(task: Task) -> tuple[Job, Progress]:
    """A run at its beginning, with a folder from which it can be resumed.

    Raises:
        MomconvError: As ``prepare``, or an image, memory or disk is lost since.
    """
    ready = prepare(task)
    task, splits, model, plan = ready.task, ready.images.splits, ready.model, ready.plan
    recipe, run, listener = task.recipe, task.run, task.listener
    progress = Progress()
    if needs_calibration(model, recipe):
        _calibrate(ready, progress)
    job = task.make_job(splits, model, make_optimizer(model, recipe.train), plan)
    if task.overwrite:
        run.clear()
    run.make()
    if recipe.train.lr == "auto":
        _choose_rate(job, progress)
    write_text(run.config, dump_recipe(job.recipe.with_absolute_paths()))
    write_text(run.provenance, ready.provenance.model_dump_json(indent=1) + "\n")
    write_text(run.plan, job.plan.to_json())
    remember_images(ready.images, require_folder(recipe.data), run, listener)
    begin(job, progress)
    return job, progress


def _plan(task: Task, splits: Splits, model: nn.Module) -> tuple[Task, BatchPlan]:
    """How the run fits the memory; it is told. ``model`` gets the γ that it takes.

    Raises:
        ResourceError: It does not, or what it writes does not fit the disk.
    """
    task.run.require_room(_disk_bytes(model, task.recipe))
    fixed: tuple[Fixed, ...] = ("gamma",) if _has_fixed_gamma(task.recipe) else ()
    may_change = [change for change in task.recipe.train.may_change if change not in fixed]
    asked = task.describe_setting(splits, model, fixed)
    plan = plan_batches(model, replace(asked, may_change=tuple(may_change)))
    recipe = _change(task.recipe, asked, plan)
    if plan.gamma is not None:
        set_gamma(model, plan.gamma, gain=recipe.momentum.gain)
    if recipe != task.recipe:
        task.listener.tell(_describe_changes(recipe))
    tell_of_plan(plan, model, task.listener)
    return replace(task, recipe=recipe), plan


def _change(recipe: Recipe, asked: Setting, plan: BatchPlan) -> Recipe:
    """The recipe with what the plan had to change, as if it had been asked for."""
    if plan.gamma is not None:
        recipe = recipe.change(momentum={"gamma": plan.gamma})
    if plan.setting.precision != asked.precision:
        recipe = recipe.change(train={"precision": plan.setting.precision})
    return recipe


def _describe_changes(recipe: Recipe) -> str:
    return (
        f"note: as that is faster, or more of the batch fits (train.may_change): γ is "
        f"{recipe.momentum.gamma:g}, precision {recipe.train.precision}"
    )


def _settle_ranges(model: nn.Module, images: CheckedImages, listener: Listener) -> None:
    """Let ``model`` know what is black and white in the training images, if these are not 8-bit."""
    findings = images.findings
    paths = [sample.path for sample in images.splits.train.samples]
    told = settle_ranges(
        model, find_ranges(values for path in paths if (values := findings[path].values))
    )
    ranges = describe(model).preprocessing.ranges
    outside, guessed = find_outside(findings, ranges), find_guessed(findings, ranges)
    for line in (*told, *warn_of_values(outside, guessed, approximate=True)):
        listener.tell(line)


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
    job.recipe = job.recipe.change(train={"lr": rate})
    job.optimizer = make_optimizer(job.model, job.recipe.train)
    job.listener.tell(
        f"note: learning rate {rate:g}, a tenth of that with the lowest loss (lr_finder.csv)"
        if found
        else f"warning: the loss fell at no rate (lr_finder.csv), so it is the default, {rate:g}"
    )


def _calibrate(ready: Ready, progress: Progress) -> None:
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
    calibrate_on(
        splits.train,
        ready.model,
        original,
        recipe.train,
        batch_size=max(1, alone.micro_batch // 2) if half else alone.micro_batch,
        workers=task.choose_workers(splits, plan),
        listener=listener,
        leave_out=partial(omit, progress, "train", splits, recipe=recipe.data, listener=listener),
    )
    if alone is not plan:
        plan.apply(ready.model)


def _check_images(recipe: Recipe, splits: Splits, listener: Listener) -> None:
    if imbalance := describe_imbalance(splits.train, recipe.data):
        listener.tell(imbalance)
    require_validation(recipe, splits)


def _has_fixed_gamma(recipe: Recipe) -> bool:
    """Whether γ is that of a network that was converted before, or anneals."""
    return recipe.model.from_file is not None or recipe.momentum.anneal > 0
