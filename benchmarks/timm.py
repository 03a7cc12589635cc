"""Which networks of timm have runs, one of each family: what momconv converts, or why not.

A family is a module of ``timm.models``, and stands for it the network in the middle of its names,
at its own resolution. "runs" has the blocks of each run, of ``momconv.convert(model,
stages="all")``. Only shapes are computed, so every row is the same on any machine. Some ten minutes
on one core; to look at others, name them.
"""

from fnmatch import fnmatch
from importlib.metadata import version
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.tables import MISSING, Log, Out, Row, measure_each
from momconv import convert
from momconv.errors import MomconvError
from momconv.momentum.sequential import momentum_stages
from momconv.zoo.networks import without_memory

TITLE = "timm"
KEY = ("network",)


def representatives() -> dict[str, str]:
    """The network in the middle of each family, by family."""
    from timm import list_models, list_modules

    families = {family: list_models(module=family) for family in list_modules()}
    wanted = {f: [n for n in names if not n.startswith("test_")] for f, names in families.items()}
    return {family: names[len(names) // 2] for family, names in wanted.items() if names}


def measure(name: str) -> Row:
    """The row of one network."""
    from timm import create_model

    row = {"network": name, "timm": version("timm"), "runs": MISSING, "why not": ""}
    try:
        with without_memory():
            plain = create_model(name)
    except RuntimeError:  # it computes something from its parameters
        plain = create_model(name)
    images = torch.empty(2, *plain.pretrained_cfg["input_size"], device="meta")
    try:
        model = convert(plain.to("meta"), stages="all", inputs=[images])
    except MomconvError as error:
        _, *reasons = error.message.splitlines()
        return row | {"why not": "; ".join(reasons) or error.message}
    return row | {"runs": " + ".join(map(str, run_lengths(model)))}


def run_lengths(model: nn.Module) -> list[int]:
    """How many blocks each run has."""
    return [len(run) for stage in momentum_stages(model).values() for run in stage.runs or ()]


def main(pattern: Annotated[list[str] | None, typer.Argument()] = None, out: Out = None) -> None:
    """Convert a network of each family, or those that are called like a PATTERN."""
    from timm import list_models

    log = Log.of(TITLE, torch.device("cpu"), out)
    chosen = [*representatives().values()]
    if pattern:
        chosen = [n for n in list_models() if any(fnmatch(n, each) for each in pattern)]
    measure_each(chosen, measure, log, KEY)


if __name__ == "__main__":
    typer.run(main)
