"""``momconv finetune``."""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from momconv.cli._console import Terminated, note, out, print_json, progress, tell, warn
from momconv.cli._display import Display
from momconv.cli._options import NetworkOption, RefetchOption
from momconv.cli._recipe_options import (
    RUN,
    find_options,
    read_options,
    to_parameter,
    with_recipe_options,
)
from momconv.cookbook import locate_recipe
from momconv.errors import MomconvError, ResourceError, UsageError
from momconv.recipe import Recipe, dump_recipe, load_recipe, shorten
from momconv.units import parse_path

if TYPE_CHECKING:
    from momconv.training.finetuning import Result, Resume
    from momconv.training.run_folder import RunFolder


_option = partial(typer.Option, rich_help_panel=RUN)


@with_recipe_options
def finetune(  # noqa: PLR0913 (one for each option)
    context: typer.Context,
    *,
    images: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="The images, as --data FOLDER."),
    ] = None,
    network: NetworkOption = None,
    refetch: RefetchOption = False,
    recipe: Annotated[
        Path | None,
        _option(metavar="FILE", help="A recipe in YAML, or the name of one that comes along."),
    ] = None,
    set_: Annotated[
        list[str] | None, _option("--set", metavar="KEY=VALUE", help="Change the recipe.")
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where the results go. (default: runs/MODEL-DATA)",
        ),
    ] = None,
    overwrite: Annotated[
        bool, _option("--overwrite", help="Give up an earlier run there.")
    ] = False,
    auto_name: Annotated[
        bool,
        _option("--auto-name", help="Put a number behind the name of a folder that is in use."),
    ] = False,
    check_env: Annotated[
        bool,
        _option(
            "--check-env", help="Compare versions, weights and images to those of the recipe's run."
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        _option(metavar="FOLDER", help="Go on with the run there, or with the last one."),
    ] = None,
    auto_resume: Annotated[
        bool,
        _option("--auto-resume", help="Go on with this run if its folder has it, or else start."),
    ] = False,
    dry_run: Annotated[
        bool,
        _option(
            "--dry-run", help="Check images, network, memory and disk, print the recipe, and stop."
        ),
    ] = False,
    fast_dev_run: Annotated[
        bool,
        _option(
            "--fast-dev-run",
            help="Go once through everything with two steps, keep nothing, and stop.",
        ),
    ] = False,
    json_output: Annotated[
        bool, _option("--json", help="One JSON document on stdout at the end.")
    ] = False,
    **_: object,  # those that set a key of the recipe
) -> None:
    """Fine-tune a network on a folder of images, within a limit of memory."""
    from momconv.training.run_folder import RunFolder, find_last_run, name_folder

    _refuse_contradictions(context.params)
    given = read_options(context.params)
    given |= {"data.path": str(_agree(images, given.get("data.path")))} if images else {}
    given |= {"model.name": network} if network else {}
    if resume == Path("last") and not resume.is_dir():
        resume = find_last_run()
    recipe = _mend(RunFolder(resume)) if resume else recipe and locate_recipe(recipe)
    wanted = load_recipe(recipe, set_ or [], os.environ, given)
    folder = resume or output or name_folder(wanted)
    if auto_name:
        folder = _find_unused(folder)
    choices = _Choices(
        resume="auto" if auto_resume else resume is not None,
        overwrite=overwrite,
        like=_find_like(recipe) if check_env and resume is None else None,
        as_json=json_output,
    )
    if dry_run:
        _rehearse(wanted, folder, choices)
    elif fast_dev_run:
        _try_out(wanted, folder, choices)
    elif auto_name:
        _run_beside(wanted, folder, choices)
    else:
        _run(wanted, folder, choices)


def _agree(images: Path, data: object) -> Path:
    """Return the folder of images, which may be given in two ways."""
    if data is not None and parse_path(str(data)).absolute() != images.absolute():
        raise UsageError(
            f"two folders of images: {images}, and --data {data}",
            kind="usage.exclusive_options",
            fix="--train-dir FOLDER --val-dir FOLDER",
        )
    return images


@dataclass(frozen=True, slots=True)
class _Choices:
    """How a run is begun and told of."""

    resume: "Resume"
    overwrite: bool
    like: Path | None
    as_json: bool


def _mend(run: "RunFolder") -> Path:
    """Return the recipe of the run from its state, once its files are mended and that is told."""
    from momconv.training.processes import is_leader
    from momconv.training.resuming import mend

    run.require_state()
    if is_leader():
        with run.claimed(tell):
            mend(run, tell)
    return run.config


def _find_unused(folder: Path) -> Path:
    from momconv.training.processes import is_alone
    from momconv.training.run_folder import RunFolder

    if not is_alone():
        raise UsageError(
            "--auto-name: each of several processes would choose a name of its own",
            kind="usage.auto_name",
            fix=f"-o {shlex.quote(str(RunFolder(folder).find_unused()))}",
        )
    return RunFolder(folder).find_unused()


def _find_like(recipe: Path | None) -> Path:
    """Return the file that says what the run of the ``recipe`` began with."""
    from momconv.training.run_folder import RunFolder

    if recipe is None:
        raise UsageError(
            "--check-env compares to the run of a recipe, and there is no recipe",
            kind="usage.nothing_to_compare",
            fix="--recipe runs/NAME/config.yaml --check-env",
        )
    return RunFolder(recipe.parent).provenance


def _rehearse(recipe: Recipe, folder: Path, choices: _Choices) -> None:
    from momconv.training.finetuning import rehearse
    from momconv.training.processes import is_leader

    with ExitStack() as bars:
        found = rehearse(
            recipe,
            folder,
            overwrite=choices.overwrite,
            like=choices.like,
            listener=Display(bars),
        )
    if not is_leader():
        return
    if choices.as_json:
        parts = {"plan": json.loads(found.plan.to_json()), "images": found.report.to_json()}
        print_json(
            {"ok": True, "folder": folder, "recipe": recipe.model_dump(mode="json"), **parts}
        )
    else:
        typer.echo(dump_recipe(recipe), nl=False)
        note(f"nothing was written; without --dry-run the results go to {folder}")


def _try_out(recipe: Recipe, folder: Path, choices: _Choices) -> None:
    """Run two steps in a folder beside the one that is asked for, and remove it."""
    from momconv.training.finetuning import finetune as run
    from momconv.training.interruption import Interrupted
    from momconv.training.processes import is_leader
    from momconv.training.run_folder import RunFolder

    RunFolder(folder).require_unused(overwrite=choices.overwrite)
    named, short = folder.absolute(), shorten(recipe)
    place = named.with_name(f".{named.name}.fast-dev-run")
    try:
        with ExitStack() as bars:
            result = run(short, place, overwrite=True, like=choices.like, listener=Display(bars))
        if is_leader():
            _report(result)
    except Interrupted as interrupted:
        if interrupted.signal == signal.SIGTERM:
            raise Terminated(128 + interrupted.signal) from None
        raise
    finally:
        if is_leader():
            with suppress(MomconvError), RunFolder(place).claimed():  # it may be another's
                shutil.rmtree(place, ignore_errors=True)
    if is_leader() and choices.as_json:
        rows = [asdict(row) for row in result.history]
        print_json({"ok": True, "complete": False, "folder": folder, "history": rows})
    elif is_leader():
        note(f"all went well, and nothing was kept; the results of a run go to {folder}")


def _run_beside(recipe: Recipe, folder: Path, choices: _Choices) -> None:
    """Run in the next unused folder, should another process be quicker to take this one."""
    while True:
        try:
            return _run(recipe, folder, choices)
        except ResourceError as error:
            if error.kind != "output.in_use":
                raise
        folder = _find_unused(folder)


def _run(recipe: Recipe, folder: Path, choices: _Choices) -> None:
    from momconv.training.finetuning import NothingLeft
    from momconv.training.finetuning import finetune as run
    from momconv.training.interruption import Interrupted, TimeUp
    from momconv.training.processes import is_leader

    try:
        with ExitStack() as bars:
            result = run(
                recipe,
                folder,
                resume=choices.resume,
                overwrite=choices.overwrite,
                like=choices.like,
                listener=Display(bars),
            )
    except Interrupted as interrupted:
        code = 128 + interrupted.signal
        if is_leader():
            _tell_of_stop("stopped", _go_on(folder, recipe), code, as_json=choices.as_json)
        raise typer.Exit(code) from None
    except TimeUp:
        if is_leader():
            what = f"stopped after {recipe.train.time_limit}"
            _tell_of_stop(what, _go_on(folder, recipe), 0, as_json=choices.as_json)
        return
    except NothingLeft:
        if is_leader():
            _tell_of_end(folder, as_json=choices.as_json)
        return
    if is_leader():
        _conclude(result, recipe, as_json=choices.as_json)


def _conclude(result: "Result", recipe: Recipe, *, as_json: bool) -> None:
    """Describe what a run came to, in its folder and here."""
    try:
        _report(result)
    except (KeyboardInterrupt, Terminated):
        note(f"the run is done, and saved. To describe it: {_go_on(result.folder, recipe)}")
        raise
    if as_json:
        _print_document(result)
    else:
        _print_result(result, recipe)


def _tell_of_stop(what: str, command: str, code: int, *, as_json: bool) -> None:
    if not as_json:
        note(f"{what}, and saved. To go on: {command}")
    elif code:
        error = {"code": code, "kind": "interrupted", "message": what, "hints": [command]}
        print_json({"ok": False, "error": error})
    else:
        print_json({"ok": True, "complete": False, "next": command})


def _tell_of_end(folder: Path, *, as_json: bool) -> None:
    from momconv.training.run_folder import RunFolder

    run = RunFolder(folder)
    if as_json:
        models = {"folder": folder, "best": run.best, "last": run.last}
        print_json({"ok": True, "complete": True, **models})
    else:
        note(f"{folder} is complete, without a state to go on from; the model is {run.best}")


def _print_document(result: "Result") -> None:
    history = [asdict(row) for row in result.history]
    document: dict[str, object] = {
        "folder": result.folder,
        "best": result.best,
        "last": result.last,
    }
    document |= {"best_epoch": asdict(result.best_epoch), "history": history}
    document |= {"uncovered_classes": result.splits.uncovered}
    document |= {"probe": result.probe and asdict(result.probe)}
    print_json({"ok": True, "complete": True, **document})


def _refuse_contradictions(given: Mapping[str, object]) -> None:
    for option, *others in (
        ("resume", "recipe", "output", "overwrite", "auto_name", "dry_run", "fast_dev_run"),
        ("auto_resume", "resume", "overwrite", "auto_name", "dry_run", "fast_dev_run"),
        ("auto_name", "overwrite"),
        ("fast_dev_run", "dry_run"),
        ("network", "model.name"),
        ("model.from_file", "model.name", "model.weights", "momentum.gamma"),
    ):
        values = {_flag(name): given[to_parameter(name)] or None for name in (option, *others)}
        _refuse_together(_flag(option), values.pop(_flag(option)), values)


def _flag(name: str) -> str:
    """Return how an option is typed that sets a key of the recipe, or that is called ``name``."""
    option = find_options().get(name)
    return option.flags if option else f"--{name.replace('_', '-')}"


def _refuse_together(option: str, value: object, others: Mapping[str, object]) -> None:
    clash = [name for name, other in others.items() if other is not None]
    if value is not None and clash:
        raise UsageError(
            f"{option} and {clash[0]} exclude each other",
            kind="usage.exclusive_options",
        )


def _report(result: "Result") -> None:
    """Add to the folder what people want to see; a run that cannot be described is still done."""
    from momconv.reports.run import report_run

    total = len(result.splits.val.samples)
    try:
        with progress("describing the run", total) as report:
            report_run(result, lambda done, _: report(done, ""))
    except MomconvError as error:
        warn(f"the run is done, but could not be described\n{error}")


def _go_on(folder: Path, recipe: Recipe) -> str:
    from momconv.training.run_folder import RunFolder

    return f"{RunFolder(folder).resume_command}{_name_own(recipe)}"


def _name_own(recipe: Recipe) -> str:
    """Return the options that a command needs for a network of the user's own, after a space."""
    from momconv.zoo.own import is_own, write_options

    name, arguments = recipe.model.name, recipe.model.arguments
    if not is_own(name):
        return ""
    return f" {shlex.join(['--network', name, *write_options(arguments)])}"


def _print_result(result: "Result", recipe: Recipe) -> None:
    from momconv.training.run_folder import RunFolder
    from momconv.words import describe_classes, printable

    run = RunFolder(result.folder)
    best, own = result.best_epoch, _name_own(recipe)
    if best.val_top1 is not None:
        by, where = recipe.train.monitor, f"epoch {best.epoch} of {result.epochs}"
        label, why = ("best top-1", "") if by == "val/top1" else ("top-1", f", the best by {by}")
        out.print(f"{label:<11} {best.val_top1:.1%} ({where}{why})")
        if uncovered := result.splits.uncovered:
            text = f"{'':<11} not of {describe_classes(uncovered)}, without a validation image"
            out.print(Text(text), soft_wrap=True)
    if comparison := result.compare_to_probe():
        out.print(f"{'probe':<11} {comparison}", soft_wrap=True)
    data = shlex.quote(str(recipe.data.path or recipe.data.val_dir or recipe.data.train_dir))
    rows = {
        "best model": result.best,
        "last model": result.last,
        **({"probe model": run.probe} if result.probe else {}),
        "numbers": run.metrics,
        "card": run.card,
        "report": run.report,
        "next": f"momconv eval {shlex.quote(str(result.best))} --data {data}{own}",
    }
    for label, value in rows.items():
        out.print(Text(f"{label:<11} {printable(str(value))}"), soft_wrap=True)
