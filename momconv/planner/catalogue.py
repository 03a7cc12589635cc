"""What momconv saves on each network that it knows, predicted once and then remembered."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from pydantic import TypeAdapter, ValidationError

from momconv._version import __version__
from momconv.files.atomic import write_text
from momconv.files.cache import cache_folder
from momconv.momentum.sequential import momentum_stages
from momconv.planner.saving import Saving, predict_saving
from momconv.surgery.conversion import convert
from momconv.zoo.networks import outline


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Saving):
    """One network, and what its conversion saves.

    Attributes:
        name: As for ``momconv convert``.
        parameters: How many numbers it learns.
        runs: How many runs of residual blocks it has.
        deepest: The blocks of the longest of them.
    """

    name: str
    parameters: int
    runs: int
    deepest: int


def list_entries(
    names: Iterable[str], progress: Callable[[int, str], None] | None = None
) -> list[Entry]:
    """Return the entries of networks, in the same order.

    Each is predicted once and then kept in ``$MOMCONV_CACHE`` or ``$XDG_CACHE_HOME/momconv``.

    Args:
        names: Some of ``zoo.networks.names()``.
        progress: Hears how many are done, and which one is next.
    """
    known = _read()
    entries = []
    for done, name in enumerate(names):
        if progress:
            progress(done, name)
        if name not in known:
            known = {**_read(), name: predict_entry(name)}
            _write(known)
        entries.append(known[name])
    return entries


def predict_entry(name: str) -> Entry:
    """Return what is to be said about the network ``name``; only shapes are computed."""
    plain = outline(name)
    model = convert(plain, stages="all")
    lengths = [len(run) for stage in momentum_stages(model).values() for run in stage.runs or ()]
    return Entry(
        name=name,
        parameters=sum(parameter.numel() for parameter in plain.parameters()),
        runs=len(lengths),
        deepest=max(lengths),
        **asdict(predict_saving(plain, convert(plain))),
    )


def _file() -> Path:
    """Predictions of other versions are not the same."""
    versions = f"{__version__}-{torch.__version__}-{torchvision.__version__}"
    return cache_folder() / f"models-{versions}.json"


def _read() -> dict[str, Entry]:
    """Return what is kept; nothing if that was damaged."""
    if not _file().is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Entry]).validate_json(_file().read_bytes())
    except ValidationError:
        return {}


def _write(entries: dict[str, Entry]) -> None:
    _file().parent.mkdir(parents=True, exist_ok=True)
    content = {name: asdict(entry) for name, entry in entries.items()}
    write_text(_file(), json.dumps(content, indent=1))
