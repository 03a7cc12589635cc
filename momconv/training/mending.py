"""The copies, for people, of what a run needs to go on: made what its state says that they are."""

from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from momconv.errors import ModelFileError, MomconvError
from momconv.files.atomic import remove, write_bytes
from momconv.recipe import KEYS, SECTIONS, Recipe, recall_recipe
from momconv.training.planning import BatchPlan
from momconv.training.provenance import read_provenance
from momconv.training.run_folder import RunFolder
from momconv.training.state import read_documents


def mend(run: RunFolder, tell: Callable[[str], None]) -> None:
    """Write config.yaml, run.json, plan.json and split.json of a run anew where they are wrong.

    Those of an earlier momconv, whose state has no copies, are as they are; what is not needed and
    damaged is removed.

    Args:
        run: The folder, claimed.
        tell: Hears of each that was wrong.

    Raises:
        ModelFileError: The state is damaged, or config.yaml, where the state does not have it.
        ResourceError: The folder cannot be written to.
    """
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
        problem = "is gone" if found is None else "is damaged, or was changed"
        tell(f"warning: {path} {problem}; it is written anew, from the state")
        write_bytes(path, wanted)


def _mend_config(path: Path, wanted: bytes, tell: Callable[[str], None]) -> None:
    found = _read(path)
    if found == wanted:
        return
    before = _recall_whole(path, wanted)
    write_bytes(path, wanted)
    if before is None:
        problem = "is gone" if found is None else "is damaged"
        tell(f"warning: {path} {problem}; it is written anew, from the state")
    elif changes := list_changes(recall_recipe(path), before):
        tell(
            f"warning: {path} was changed ({', '.join(changes)}); the run goes on as it was, and it"
            " is written anew. What may change is changed by options, or --set KEY=VALUE"
        )


def _recall_whole(path: Path, wanted: bytes) -> Recipe | None:
    """The recipe in ``path``, if it has all keys of that in ``wanted``."""
    try:
        complete = _list_keys(path.read_bytes()) >= _list_keys(wanted)
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
        sections = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        sections = None
    if not isinstance(sections, dict) or not sections.keys() >= SECTIONS.keys():
        raise ModelFileError(
            f"{path} is gone or damaged, and the state, of an earlier momconv, has no copy",
            kind="run.bad_config",
        )


def _remove_damaged(run: RunFolder, tell: Callable[[str], None]) -> None:
    """Remove what is damaged of plan.json and run.json."""
    damaged = [run.plan] if run.plan.is_file() and not _is_plan(_read(run.plan)) else []
    try:
        if run.provenance.is_file():
            read_provenance(run.provenance)
    except ModelFileError:
        damaged.append(run.provenance)
    for path in damaged:
        tell(f"warning: {path} is damaged, and was removed; it is not needed")
        remove(path)


def list_changes(before: Recipe, now: Recipe, keys: Iterable[str] = KEYS) -> list[str]:
    """Which of the ``keys`` have other values now, in words."""
    return [
        f"{key} from {getattr(old, name)} to {getattr(new, name)}"
        for key, (section, name) in {k: k.split(".") for k in keys}.items()
        for old, new in [(getattr(before, section), getattr(now, section))]
        if getattr(old, name) != getattr(new, name)
    ]


def _read(path: Path) -> bytes | None:
    """What is in ``path``; None where there is no such file, or it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _is_plan(content: bytes | None) -> bool:
    try:
        BatchPlan.from_json(content or b"")
    except ModelFileError:
        return False
    return True
