"""What is trained: a network on so many images of some size."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import typer
from torch import nn

from benchmarks.methods import BASES, METHODS, make_network
from momconv.vocabulary import Precision

Trained = Literal["all", "all but BatchNorm", "head"]


@dataclass(frozen=True, slots=True)
class Case:
    """One network under one load."""

    network: str
    resolution: int
    batch: int
    precision: Precision = "fp32"
    trained: Trained = "all"  # what learns; only where that is compared

    @property
    def label(self) -> str:
        """Such as ``resnet50 224² ×24 fp32``."""
        return f"{self.network} {self.resolution}² ×{self.batch} {self.precision}"


def prepare(case: Case, key: str, device: torch.device) -> nn.Module:
    """The network under the method of that key; in bf16 with channels last, as in fine-tuning."""
    model = (METHODS | BASES)[key].prepare(make_network(case.network)).to(device)
    if case.precision == "bf16":
        model.to(memory_format=torch.channels_last)
    return model


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_methods(chosen: list[str]) -> list[str]:
    """The names, if there are methods of these names."""
    return check_names(chosen, METHODS)


def choose(cases: Iterable[Case], networks: list[str]) -> list[Case]:
    """The cases of some networks, or all.

    Raises:
        typer.BadParameter: A network has no case.
    """
    cases = list(cases)
    check_names(networks, dict.fromkeys(case.network for case in cases))
    return [case for case in cases if not networks or case.network in networks]


def check_names(chosen: list[str], known: Iterable[str]) -> list[str]:
    """``chosen`` itself.

    Raises:
        typer.BadParameter: One of the names is not known.
    """
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return chosen


Networks = Annotated[
    list[str],
    typer.Argument(default_factory=list, help="Only these networks.", show_default="all"),
]
Chosen = Annotated[
    list[str],
    typer.Option(
        "--method",
        default_factory=list,
        callback=check_methods,
        help="Only this method (again for more); all other results stay as they are.",
        show_default="all",
    ),
]
