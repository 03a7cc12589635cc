"""What a run was started with, besides its recipe: ``run.json``."""

import platform
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from momconv._version import __version__
from momconv.determinism import describe_tf32
from momconv.errors import ModelFileError
from momconv.names import encode_name
from momconv.opening import read_regular
from momconv.recipe import Recipe
from momconv.training.progress import Listener
from momconv.zoo.checkpoints import sha256
from momconv.zoo.description import describe

_PACKAGES = ("torch", "torchvision", "safetensors", "numpy", "pillow")


class Provenance(BaseModel):
    """The software, machine, weights and images that a run began with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    started: str  # in ISO 8601
    command: tuple[str, ...]
    machine: dict[str, str]  # versions of the software, and the device
    weights: str  # what they are
    weights_sha256: str | None  # of their file
    images: str  # the fingerprint of all of them


def find_provenance(
    recipe: Recipe, model: nn.Module, fingerprint: str, device: torch.device
) -> Provenance:
    """Return what a run of ``model`` on the images of the ``fingerprint`` starts with here."""
    file, description = recipe.model.from_file, describe(model)
    return Provenance(
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=tuple(map(encode_name, sys.argv)),
        machine=describe_machine(device),
        weights=encode_name(file.absolute()) if file else description.source,
        weights_sha256=sha256(file) if file else description.source_sha256,
        images=fingerprint,
    )


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the versions of what computes, and on what."""
    is_gpu = device.type == "cuda"
    return {
        "momconv": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        **({"fp32 products": describe_tf32(device)} if is_gpu else {}),
    }


def read_provenance(path: Path) -> Provenance:
    """Return what is in the file ``path``.

    Raises:
        ModelFileError: It is missing or damaged.
    """
    try:
        return Provenance.model_validate_json(read_regular(path))
    except OSError as error:
        problem = f"cannot read {path}, which says what the run began with: {error.strerror}"
        raise ModelFileError(problem, kind="run.no_provenance") from error
    except ValidationError as error:
        problem = f"{path} is damaged: {error.errors()[0]['msg']}"
        raise ModelFileError(problem, kind="run.bad_provenance") from error


def list_differences(before: Provenance, now: Provenance) -> list[str]:
    """Return in words how ``now`` differs from ``before``."""
    then = before.machine
    machine = {k: (then.get(k), value) for k, value in now.machine.items()}
    pairs = machine | {
        "sha256 of the weights": (before.weights_sha256, now.weights_sha256),
        "fingerprint of the images": (before.images, now.images),
    }
    return [f"{name} is {new}, and was {old}" for name, (old, new) in pairs.items() if old != new]


def tell_of_differences(before: Provenance, now: Provenance, listener: Listener) -> None:
    """Tell how ``now`` differs from ``before``."""
    for difference in list_differences(before, now):
        listener.tell(f"warning: not as in the run of {before.started}: {difference}")
