"""A run that goes on where its state was saved, but for what its recipe changes."""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from momconv.data.source import Splits
from momconv.errors import DataError, ModelFileError, MomconvError, UsageError
from momconv.files import model_file
from momconv.files.atomic import remove, write_bytes, write_text
from momconv.opening import is_special, read_regular
from momconv.planner.plan import Fixed, Plan, Request
from momconv.recipe import KEYS, SECTIONS, Recipe, dump_recipe, recall_recipe
from momconv.training import network
from momconv.training.images import list_new, recall_images
from momconv.training.optimisation import require_stages
from momconv.training.planning import (
    plan_again,
    plan_batches,
    sharding_if_needed,
    tell_of_plan,
)
from momconv.training.progress import require_validation
from momconv.training.provenance import describe_machine, read_provenance, tell_of_differences
from momconv.training.run import Assignment, TrainingRun, make_run
from momconv.training.run_folder import RunFolder
from momconv.training.saving import publish, remember_documents, save, write_plan
from momconv.training.state import load_newest, read_documents
from momconv.words import describe_classes, name_some, plural, printable
from momconv.zoo import checkpoints

# What a run is about: to change it is to start another.
_FIXED = [
    *("model.name", "model.arguments", "model.weights", "model.from_file"),
    *("momentum.use", "momentum.gamma", "momentum.stages", "momentum.velocity", "momentum.gain"),
    *("momentum.calibrate", "momentum.anneal"),
    *("data.train_dir", "data.val_dir", "data.labels", "data.unknown_classes"),
    *("data.resize", "data.crop", "data.mean", "data.std", "data.interpolation"),
    *("data.resolution", "data.val_frac", "data.split_seed", "data.limit", "data.max_images"),
    *("train.batch_size", "train.optimizer", "train.seed", "train.freeze", "train.freeze_bn"),
    *("train.ema", "train.monitor", "train.probe"),
]


def agree(assignment: Assignment) -> Recipe | None:
    """Return the recipe with which the folder's run goes on, if the assignment's would start it.

    What that leaves to momconv is as it was found or decided then. None is returned if the run is
    done, and has kept no state.

    Raises:
        UsageError: The folder has another run.
    """
    folder = assignment.folder
    if assignment.processes.leads and folder.has_state:
        folder.make()
        mend(folder, assignment.listener.tell)
    before = recall_recipe(folder.config)
    recipe = _adopt_decisions(assignment.recipe.with_absolute_paths(), before)
    if changes := list_changes(before, recipe, ["data.path", *_FIXED]):
        raise UsageError(
            f"{folder.path} has another run: {', '.join(changes)}",
            kind="usage.another_run",
            fix=f"-o {shlex.quote(str(folder.find_unused()))}",
        )
    return recipe if folder.has_state else None


def _adopt_decisions(recipe: Recipe, before: Recipe) -> Recipe:
    """Return ``recipe`` with what the run of ``before`` decided where both leave that open."""
    momentum, train, open_ = dict[str, Any](), dict[str, Any](), recipe.train.may_change
    if recipe.momentum.use == "auto":
        momentum["use"] = before.momentum.use
    if "gamma" in open_:
        momentum["gamma"] = before.momentum.gamma
    if recipe.train.lr == "auto":
        train["lr"] = before.train.lr
    train |= {name: getattr(before.train, name) for name in open_ if name != "gamma"}
    return recipe.change(momentum=momentum, train=train)


def resume(assignment: Assignment) -> TrainingRun:
    """Return the run as it was when its state was saved, but for what the recipe changes.

    Raises:
        UsageError: It changes what the run is about.
        ModelFileError: The state is missing or damaged.
        DataError: The images have changed.
        ResourceError: The run does not fit the memory any more.
    """
    recipe, folder, listener = assignment.recipe, assignment.folder, assignment.listener
    folder.require_state()
    if assignment.processes.leads:
        folder.make()
        mend(folder, listener.tell)
    before = recall_recipe(folder.config)
    _refuse_changes(before, recipe, folder)
    saved = load_newest(folder, listener.tell, partial(network.make_own, recipe.model))
    model = saved.model
    place = assignment.sources or recipe.data.path
    splits = recall_images(folder.split, place, listener, progress=saved.progress)
    require_stages(model, recipe.train)
    require_validation(recipe, splits)
    _tell_of_images(assignment, splits, before)
    _tell_of_another_machine(assignment)
    network.place(model, assignment.device, assignment.recipe.train)
    network.start_training(model, recipe.train)
    fixed: tuple[Fixed, ...] = ("gamma", "resolution", "freeze", "optimizer")
    request = assignment.request_plan(model, splits, fixed)
    plan = _recall_plan(assignment, request, model)
    run = make_run(assignment, splits, model, plan, saved.progress)
    saved.restore_optimizer(run.optimizer, model)
    saved.restore_random_states()
    run.restore_extras(saved.extras)
    remember_documents(run)
    _write_down(run, before)
    _tell_of_resuming(run, before)
    return run


def _write_down(run: TrainingRun, before: Recipe) -> None:
    """Let the state have what has changed, and the folder the files that follow from the state."""
    recipe = run.recipe.with_absolute_paths()
    if recipe.train.resolved_lr != before.train.resolved_lr:
        run.progress.lr_factor = 1.0
    if run.processes.leads:
        _tell_of_damage(run.folder.last, run.listener.tell)
    if _give_up_lost_model(run) or recipe != before:
        save(run)
    if run.processes.leads:
        write_text(run.folder.config, dump_recipe(recipe))
    write_plan(run)
    publish(run)


def _tell_of_images(assignment: Assignment, splits: Splits, before: Recipe) -> None:
    """Tell what has changed where the images are: the folder, further images and classes."""
    data, tell = assignment.recipe.with_absolute_paths().data, assignment.listener.tell
    root = data.path or splits.train.root
    if data.path != before.data.path:
        then = printable(before.data.path or splits.train.root)
        tell(f"note: the images are in {printable(root)} now, and were in {then}")
    try:
        new = list_new(splits, assignment.sources or root, data)
    except DataError as error:
        tell(f"warning: whether there are new images cannot be told: {error.message}")
        return
    added = [sample.path for part in (new.train, new.val) for sample in part.samples]
    if not added:
        return
    classes = [name for name in new.train.classes if name not in splits.train.classes]
    of_classes = f", of {describe_classes(classes)}, which are new too" if classes else ""
    folder = shlex.quote(str(assignment.folder.find_unused()))
    command = f"momconv finetune --from {shlex.quote(str(assignment.folder.best))} -o {folder}"
    if data.path:
        command += f" --data {shlex.quote(str(data.path))}"
    if assignment.sources:
        command = f"finetune(…, source=…) with model.from_file={assignment.folder.best}"
    are = "is" if len(added) == 1 else "are"
    tell(
        f"note: {plural(len(added), 'image')} in {printable(root)} {are} new and not part of this "
        f"run{of_classes}: {name_some(added, 3)}\nto train on them too: {command}"
    )


def _tell_of_another_machine(assignment: Assignment) -> None:
    if not assignment.folder.provenance.is_file():
        return
    began = read_provenance(assignment.folder.provenance)
    now = began.model_copy(update={"machine": describe_machine(assignment.device)})
    tell_of_differences(began, now, assignment.listener)


def _recall_plan(assignment: Assignment, request: Request, model: nn.Module) -> Plan:
    path, train = assignment.folder.plan, assignment.recipe.train
    if not path.is_file():
        return sharding_if_needed(partial(plan_batches, model), request, train)
    plan = Plan.from_json(read_regular(path))
    if train.shard == "auto" and train.can_shard and plan.request.shards > 1:
        request = replace(request, shards=request.processes)
    if train.release_gradients == "auto":
        release = plan.request.release_gradients and train.can_release_gradients
        request = replace(request, release_gradients=release)
    again = partial(plan_again, plan, model=model)
    return sharding_if_needed(again, request, train)


def _give_up_lost_model(run: TrainingRun) -> bool:
    """Return whether ``best`` is not the best epoch's model; if so, tell, and count it no more.

    That of the last epoch is in the state, as long as the next one has not begun.
    """
    progress = run.progress
    best, path = progress.find_best(run.recipe.train.monitor), run.folder.best
    if best is None:
        return False
    if best is progress.history[-1] and not progress.step:
        if run.processes.leads:
            _tell_of_damage(path, run.listener.tell)
        return False
    problem = _find_problem(path, best.epoch)
    if problem is None:
        return False
    progress.lost = progress.epoch if progress.step else progress.epoch - 1
    run.listener.tell(
        f"warning: the best model, of epoch {best.epoch}, is lost: {problem}\n"
        f"from now on the best of epoch {progress.lost + 1} and later ones counts"
    )
    return True


def _find_problem(path: Path, epoch: int) -> str | None:
    """Return why ``path`` is not the model of that ``epoch``."""
    try:
        record = model_file.read_metadata(path).get("training")
    except ModelFileError as error:
        return error.message
    if record is None or (record["epochs"], record.get("steps_into_next")) != (epoch, None):
        return f"{path} is another one"
    return None


def _refuse_changes(before: Recipe, now: Recipe, folder: RunFolder) -> None:
    changes = list_changes(before, now.with_absolute_paths(), _FIXED)
    if now.train.lr == "auto":
        changes.append(f"train.lr from {before.train.resolved_lr:g} to auto")
    if changes:
        raise UsageError(
            f"a run that goes on cannot change {', '.join(changes)}",
            kind="usage.resume_changes",
            fix=f"{folder.resume_command}\n-o {shlex.quote(str(folder.find_unused()))}",
        )


def _tell_of_resuming(run: TrainingRun, before: Recipe) -> None:
    progress = run.progress
    epochs = run.recipe.train.epochs
    if progress.epoch >= epochs:
        more = f"To go on: {run.folder.resume_command} --epochs {2 * progress.epoch}"
        run.listener.tell(
            f"note: {run.folder.path} is complete ({progress.epoch}/{epochs}). {more}"
        )
        return
    if changes := list_changes(before, run.recipe, KEYS):
        run.listener.tell(f"note: changed since: {', '.join(changes)}")
    where = f"epoch {progress.epoch + 1}/{epochs}, step {progress.step}/{run.steps_per_epoch}"
    run.listener.tell(f"note: going on in {where}")
    tell_of_plan(run.plan, run.model, run.listener)
    if epochs != before.train.epochs:
        lr = run.rate_at(progress.epoch, progress.step)
        run.listener.tell(
            f"note: {epochs} epochs instead of {before.train.epochs}: the schedule "
            f"({run.recipe.train.schedule}) now ends there, and the learning rate goes on at "
            f"{lr:.3g}"
        )


def mend(run: RunFolder, tell: Callable[[str], None]) -> None:
    """Write config.yaml, run.json, plan.json and split.json of a run anew where they are wrong.

    They are copies, for people, of what its state has. Those of an earlier momconv, whose state has
    no copies, are as they are; what is not needed and damaged is removed. A folder in place of a
    file of the run gets another name.

    Args:
        run: The folder, claimed.
        tell: Hears of each that was wrong.

    Raises:
        ModelFileError: The state is damaged, or config.yaml, where the state does not have it.
        ResourceError: The folder cannot be written to.
    """
    run.put_folders_aside(tell)
    documents = read_documents(run)
    if run.config.name not in documents:
        _require_config(run.config)
        _remove_damaged(run, tell)
        return
    _mend_config(run.config, documents[run.config.name], tell)
    for path in (run.provenance, run.plan, run.split):
        found, wanted = _read(path), documents.get(path.name)
        if wanted is None or found == wanted or (path == run.plan and _is_plan(found)):
            continue  # a plan may be newer
        problem = "is damaged, or was changed" if path.exists() else "is gone"
        tell(f"warning: {path} {problem}; it is written anew, from the state")
        _rewrite(path, wanted)


def _tell_of_damage(path: Path, tell: Callable[[str], None]) -> None:
    """Tell if the model ``path``, which the run will write anew, is damaged."""
    try:
        if path.exists():
            checkpoints.verify(path)
    except ModelFileError as error:
        tell(f"warning: {error.message}\nit is written anew, from the state")


def _rewrite(path: Path, wanted: bytes) -> None:
    """Write a copy, also in the place of a pipe."""
    if is_special(path):
        remove(path)
    write_bytes(path, wanted)


def _mend_config(path: Path, wanted: bytes, tell: Callable[[str], None]) -> None:
    found = _read(path)
    if found == wanted:
        return
    before = _recall_whole(path, wanted)
    problem = "is damaged" if path.exists() else "is gone"
    _rewrite(path, wanted)
    if before is None:
        tell(f"warning: {path} {problem}; it is written anew, from the state")
    elif changes := list_changes(recall_recipe(path), before):
        tell(
            f"warning: {path} was changed ({', '.join(changes)}); the run goes on as it was, and it"
            " is written anew. What may change is changed by options, or --set KEY=VALUE"
        )


def _recall_whole(path: Path, wanted: bytes) -> Recipe | None:
    """Return the recipe in ``path``, if it has all keys of that in ``wanted``."""
    try:
        complete = _list_keys(read_regular(path)) >= _list_keys(wanted)
        return recall_recipe(path) if complete else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError, MomconvError):
        return None


def _list_keys(content: bytes) -> set[str]:
    sections = yaml.safe_load(content)
    if not isinstance(sections, dict):
        return set()
    named = {name: own for name, own in sections.items() if isinstance(own, dict)}
    return {f"{name}.{key}" for name, own in named.items() for key in own}


def _require_config(path: Path) -> None:
    """Do nothing if ``path`` has all sections of a recipe, so is probably whole.

    Raises:
        ModelFileError: It has not.
    """
    try:
        sections = yaml.safe_load(read_regular(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        sections = None
    if not isinstance(sections, dict) or not sections.keys() >= SECTIONS.keys():
        raise ModelFileError(
            f"{path} is gone or damaged, and the state, of an earlier momconv, has no copy",
            kind="run.bad_config",
        )


def _remove_damaged(run: RunFolder, tell: Callable[[str], None]) -> None:
    """Remove what is damaged of plan.json and run.json."""
    damaged = [run.plan] if run.plan.exists() and not _is_plan(_read(run.plan)) else []
    try:
        if run.provenance.exists():
            read_provenance(run.provenance)
    except ModelFileError:
        damaged.append(run.provenance)
    for path in damaged:
        tell(f"warning: {path} is damaged, and was removed; it is not needed")
        remove(path)


def list_changes(before: Recipe, now: Recipe, keys: Iterable[str] = KEYS) -> list[str]:
    """Return which of the ``keys`` have other values now, in words."""
    return [
        f"{key} from {getattr(old, name)} to {getattr(new, name)}"
        for key, (section, name) in {k: k.split(".") for k in keys}.items()
        for old, new in [(getattr(before, section), getattr(now, section))]
        if getattr(old, name) != getattr(new, name)
    ]


def _read(path: Path) -> bytes | None:
    """Return what is in ``path``; None where there is no such file, or it cannot be read."""
    try:
        return read_regular(path)
    except OSError:
        return None


def _is_plan(content: bytes | None) -> bool:
    try:
        Plan.from_json(content or b"")
    except ModelFileError:
        return False
    return True
