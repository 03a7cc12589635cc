"""A new run: images, network, memory and disk are checked, then its folder is made."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from momconv.data.inspection import find_guessed, find_outside
from momconv.data.source import Splits
from momconv.data.values import find_ranges, settle_ranges, warn_of_values
from momconv.files.atomic import write_text
from momconv.planner.measurement import static_bytes
from momconv.planner.plan import Change, Fixed, Plan, Request
from momconv.recipe import Recipe, dump_recipe
from momconv.surgery.conversion import set_gamma
from momconv.training import network
from momconv.training.batches import describe_imbalance
from momconv.training.calibrating import (
    calibrate_network,
    estimate_seconds,
    needs_calibration,
)
from momconv.training.images import (
    CheckedImages,
    examine_together,
    find_images,
    find_place,
    find_root,
    keep_readable,
    remember_images,
)
from momconv.training.optimisation import describe_frozen, require_stages
from momconv.training.planning import (
    choose_network,
    name_ways,
    plan_batches,
    plan_momentum,
    sharding_if_needed,
    tell_of_plan,
)
from momconv.training.probing import probe
from momconv.training.progress import Listener, require_validation
from momconv.training.provenance import Provenance, find_provenance, tell_of_differences
from momconv.training.rate_finder import find_rate
from momconv.training.run import Assignment, TrainingRun, make_run
from momconv.training.saving import begin
from momconv.units import format_duration
from momconv.vocabulary import MomentumUse
from momconv.zoo.description import Preprocessing, describe, mark_as_seen

_NO_MOMENTUM = (
    "note: no run of blocks is long enough for momentum to save memory, so it stays plain; "
    "--set momentum.stages=all converts what there is"
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that can begin, and what its files say of it."""

    run: TrainingRun
    images: CheckedImages
    provenance: Provenance


def prepare(
    assignment: Assignment, *, overwrite: bool = False, like: Provenance | None = None
) -> Prepared:
    """Check images, network, memory and disk. Nothing is written.

    Args:
        assignment: What was asked for.
        overwrite: Whether its folder may hold another run.
        like: Of a run that this one is to be compared to, which the listener hears of.

    Raises:
        MomconvError: The run cannot be.
    """
    recipe, listener, device = assignment.recipe, assignment.listener, assignment.device
    place = find_place(recipe.data, assignment.sources)
    assignment.folder.require_outside(find_root(place))
    assignment.folder.require_unused(overwrite=overwrite)
    assignment.folder.require_room(0)
    found = find_images(place, recipe.data, listener)
    model = network.load(recipe, listener.tell)
    require_stages(model, recipe.train)
    if recipe.momentum.use == "always" and not network.read_gamma(model):
        listener.tell(_NO_MOMENTUM)
    examine_together(lambda: found, assignment.processes)
    images = keep_readable(found, recipe.data, listener, describe(model).seen)
    _check_images(recipe, images.splits, listener)
    _settle_ranges(model, images, listener)
    provenance = find_provenance(recipe, model, images.report.fingerprint, device)
    if like:
        tell_of_differences(like, provenance, listener)
    if recipe.data.resolution is not None:
        listener.tell(f"note: {_describe_resizing(describe(model).preprocessing)}")
    train = images.splits.train
    network.fit_head(model, train.classes)
    mark_as_seen(model, images.train.sha256s(train.paths))
    network.place(model, device, recipe.train)
    network.start_training(model, recipe.train)
    if frozen := describe_frozen(model):
        listener.tell(frozen)
    changed, model, plan = _plan(assignment, model, images.splits)
    run = make_run(replace(assignment, recipe=changed), images.splits, model, plan)
    return Prepared(run, images, provenance)


def start(
    assignment: Assignment, *, overwrite: bool = False, like: Provenance | None = None
) -> TrainingRun:
    """Begin a run, with a folder from which it can be resumed.

    Raises:
        MomconvError: As ``prepare``, or an image, memory or disk is lost since.
    """
    prepared = prepare(assignment, overwrite=overwrite, like=like)
    run, folder = prepared.run, assignment.folder
    if needs_calibration(run.model, run.recipe):
        calibrate_network(run)
        run.equip()
    if overwrite:
        folder.clear()
    folder.make()
    if run.recipe.train.probe:
        probe(run)
    if run.recipe.train.lr == "auto":
        _choose_rate(run)
    write_text(folder.config, dump_recipe(run.recipe.with_absolute_paths()))
    write_text(folder.provenance, prepared.provenance.model_dump_json(indent=1) + "\n")
    write_text(folder.plan, run.plan.to_json())
    root = find_root(find_place(run.recipe.data, run.sources))
    remember_images(prepared.images, root, folder, run.listener)
    begin(run)
    return run


def _plan(
    assignment: Assignment, model: nn.Module, splits: Splits
) -> tuple[Recipe, nn.Module, Plan]:
    """Plan how a run fits the memory, and tell. Return recipe and network as that changes them.

    Raises:
        ResourceError: It does not, or what it writes does not fit the disk.
    """
    before, listener = assignment.recipe, assignment.listener
    assignment.folder.require_room(_disk_bytes(model, before))
    request, use = _request(assignment, model, splits), before.momentum.use
    if use == "auto" and before.model.from_file is None:
        choose = partial(choose_network, model, recipe=before.momentum)
        chosen, plan = sharding_if_needed(choose, request, before.train)
        use = "always" if chosen == "momentum" else "never"
        if chosen == "momentum":
            model = network.choose_rule(model, before.momentum, wanted=True)
        plan = name_ways(plan, model)
    elif use == "always" and before.model.from_file is None and network.read_gamma(model):
        plan = sharding_if_needed(partial(plan_momentum, model), request, before.train)
    else:
        plan = sharding_if_needed(partial(plan_batches, model), request, before.train)
    recipe = _adopt(before, use, plan, request)
    if plan.gamma is not None:
        set_gamma(model, plan.gamma, gain=recipe.momentum.gain)
    if plan.gamma is not None or plan.precision != request.precision:
        listener.tell(_describe_changes(recipe))
    tell_of_plan(plan, model, listener)
    if needs_calibration(model, recipe):
        _tell_of_calibrating(plan, recipe, len(splits.train.samples), listener)
    return recipe, model, plan


def _request(assignment: Assignment, model: nn.Module, splits: Splits) -> Request:
    """Return what is asked of the plan, with what it may change and what it must not."""
    recipe = assignment.recipe
    fixed: list[Fixed] = ["gamma"] if _has_fixed_gamma(recipe) else []
    may_change: list[Change] = [c for c in recipe.train.may_change if c not in fixed]
    if not recipe.train.can_release_gradients:
        fixed.append("release_gradients")
    elif recipe.train.release_gradients == "auto":
        may_change.append("release_gradients")
    return assignment.request_plan(model, splits, tuple(fixed), tuple(may_change))


def _adopt(recipe: Recipe, use: MomentumUse, plan: Plan, request: Request) -> Recipe:
    """Return the recipe with what the ``plan`` has decided, beyond what was asked of it."""
    decided = {name: getattr(plan.request, name) for name in ("precision", "optimizer")}
    gamma = recipe.momentum.gamma if plan.gamma is None else plan.gamma
    return recipe.change(
        momentum={"use": use, "gamma": gamma},
        train={name: v for name, v in decided.items() if v != getattr(request, name)},
    )


def _tell_of_calibrating(plan: Plan, recipe: Recipe, images: int, listener: Listener) -> None:
    if seconds := estimate_seconds(images, plan, recipe.train):
        listener.tell(f"note: calibrating takes about {format_duration(seconds)} before that")


def _describe_changes(recipe: Recipe) -> str:
    return (
        f"note: as that is faster, or more of the batch fits (train.may_change): γ is "
        f"{recipe.momentum.gamma:g}, precision {recipe.train.precision}, optimiser "
        f"{recipe.train.optimizer}"
    )


def _settle_ranges(model: nn.Module, images: CheckedImages, listener: Listener) -> None:
    """Let ``model`` know what is black and white in the training images, if these are not 8-bit."""
    train = images.train.select([*map(str, images.splits.train.paths)])
    odd = train.where(lambda kind: kind.values)
    told = settle_ranges(model, find_ranges(f.values for f in odd.values() if f.values))
    ranges = describe(model).preprocessing.ranges
    outside, guessed = dict[Path, int](), set[Path]()
    for findings in (images.train, images.val):
        outside |= find_outside(findings, ranges)
        guessed |= find_guessed(findings, ranges)
    for line in (*told, *warn_of_values(outside, guessed, approximate=True)):
        listener.tell(line)


def _describe_resizing(p: Preprocessing) -> str:
    return (
        f"to be validated, images get a shorter side of {p.resize} pixels, of which the middle "
        f"{p.resolution} × {p.resolution} are looked at"
    )


def _disk_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Return what a run writes: two states, its models, and a file before it replaces another."""
    static = static_bytes(model, recipe.train.optimizer, ema=recipe.train.ema > 0)
    models = 4 if recipe.train.probe else 3
    return 3 * (static.weights + static.optimizer + static.ema) + models * static.weights


def _choose_rate(run: TrainingRun) -> None:
    """Look for a learning rate, and take it into the recipe."""
    network.start_training(run.model, run.recipe.train)
    found = find_rate(run)
    rate = found or run.recipe.train.resolved_lr
    run.recipe = run.recipe.change(train={"lr": rate})
    run.equip()
    run.listener.tell(
        f"note: learning rate {rate:g}, a tenth of that with the lowest loss (lr_finder.csv)"
        if found
        else f"warning: the loss fell at no rate (lr_finder.csv), so it is the default, {rate:g}"
    )


def _check_images(recipe: Recipe, splits: Splits, listener: Listener) -> None:
    if imbalance := describe_imbalance(splits.train, recipe.data):
        listener.tell(imbalance)
    require_validation(recipe, splits)


def _has_fixed_gamma(recipe: Recipe) -> bool:
    """Return whether γ is that of a network that was converted before, or anneals."""
    momentum = recipe.momentum
    return recipe.model.from_file is not None or momentum.use == "never" or momentum.anneal > 0
