"""catalogue.json: what ``momconv models`` says of every network that momconv knows.

Sizes are counted. Memory is predicted for a training step of 32 images at the network's own
resolution on a CPU, of the plain network with everything stored and of
``momconv.convert(model)`` under "auto"; weights, gradients and optimiser state are left out. About
ten minutes on one core; to predict some anew, name them.
"""

import json
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Annotated

import torch
import torchvision
import typer
from rich.console import Console

from momconv import __version__, convert
from momconv.catalogue import TABLE, Entry, read_catalogue
from momconv.files.atomic import write_text
from momconv.momentum.sequential import momentum_stages
from momconv.planner.profile import EXAMPLE, predict_saving
from momconv.zoo.networks import names, outline


def predict_entry(name: str) -> Entry:
    """What is to be said about the network ``name``; only shapes are computed."""
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


def main(pattern: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Predict for all networks, or those that are called like a PATTERN or are not in it yet."""
    known = {entry.name: entry for entry in read_catalogue().entries} if TABLE.is_file() else {}
    console = Console(stderr=True)
    for name in names():
        if name in known and pattern and not any(fnmatch(name, each) for each in pattern):
            continue
        known[name] = predict_entry(name)
        console.print(name, f"{known[name].saved:.0%}")
        _write(known)


def _write(entries: dict[str, Entry]) -> None:
    versions = {
        "momconv": __version__,
        "torch": torch.__version__.partition("+")[0],
        "torchvision": torchvision.__version__.partition("+")[0],
    }
    models = [asdict(entries[name]) for name in names() if name in entries]
    document = {"predicted_by": versions, "images": EXAMPLE, "models": models}
    write_text(TABLE, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
