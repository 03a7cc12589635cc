"""A converted network in one safetensors file: its tensors, and what is needed to rebuild it.

The metadata are text: ``momconv.schema`` is the number of this format, ``momconv.description``
and ``momconv.stages`` are JSON (what the network is, and where it is inverted and how), and so is
every other value that a caller adds. ``momconv.checksum`` is the SHA-256 of tensors and metadata.
Nothing that is read from a file is run.
"""

import json
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from pydantic_core import to_json
from torch import Tensor, nn

from momconv._version import __version__
from momconv.errors import ModelFileError, UsageError
from momconv.files.atomic import write_atomically
from momconv.files.tensor_file import write_tensors
from momconv.opening import find_model_file
from momconv.surgery.conversion import apply_schemes, read_schemes
from momconv.zoo import checkpoints
from momconv.zoo.description import Description, describe
from momconv.zoo.matching import recognise
from momconv.zoo.networks import find_head, head_name, is_known, without_memory
from momconv.zoo.own import remake, require_made, restate

SCHEMA = 2
_READABLE = (1, 2)  # 1 knew no ranges of runs
_PREFIX = "momconv."


class _Metadata(BaseModel):
    """What a file says about itself; further values are any JSON."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Json[Any]]

    schema_number: Json[int] = Field(alias="schema")
    version: str
    description: Json[Description]
    stages: Json[dict[str, dict[str, Any]]]
    torch: str
    torchvision: str
    created: str
    checksum: str | None = None


def check_suffix(path: Path) -> None:
    """Do nothing if a file called ``path`` is taken for what ``save`` writes.

    Raises:
        UsageError: Its name says something else.
    """
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path}: a converted network is in a .safetensors file",
            kind="usage.unknown_format",
            fix=f"-o {shlex.quote(str(path.with_suffix('.safetensors')))}",
        )


def save(
    model: nn.Module,
    path: str | Path,
    extra: Mapping[str, object] | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``model`` to ``path``, all or nothing.

    Two calls write the same bytes, but for the time and the checksum, which covers it.

    Args:
        model: A network with a description, converted or not, on any device.
        path: The file to write; its folder must exist.
        extra: JSON values to keep in the file, such as metrics. The file's own names win.
        weights: Its state dict, where it has only a part of it.

    Raises:
        UsageError: The model has no description.
        ResourceError: The file cannot be written.
    """
    metadata = _compose(model, extra or {})
    tensors = model.state_dict() if weights is None else weights
    write_atomically(Path(path), lambda target: write_tensors(target, tensors, metadata))


def load(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Return the network that ``save`` wrote, in eval mode.

    Args:
        path: The file, or the folder of a run, for its best model.
        network: For a file of a network of your own: one made by the same function, which is
            changed. Nothing in a file is ever run, so momconv does not call that function itself.

    Raises:
        ModelFileError: The file is missing, damaged, not converted, or of a newer momconv.
        UsageError: The file holds a network of your own, and there is no ``network``.
    """
    path = find_model_file(Path(path))
    state = checkpoints.read_state(path)
    metadata = _read(path)
    description = metadata.description
    if network is not None or is_known(description.architecture):
        head = find_head(network) if network is not None else head_name(description.architecture)
        if checkpoints.outputs_in(state, head) != description.num_classes:
            reason = f"there is no head of {description.num_classes} classes"
            raise _unfitting(path, metadata, network, reason)
    model = _build(metadata, path, network)
    if difference := checkpoints.difference(model, state):
        raise _unfitting(path, metadata, network, f"tensors {difference}")
    checkpoints.require_finite(path, model, state)
    checkpoints.fill(model, state)
    return model.eval()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what the file says about itself, as values that JSON knows; it is verified.

    Raises:
        ModelFileError: The file is missing, damaged, not converted, or of a newer momconv.
    """
    return _read_verified(find_model_file(Path(path))).model_dump(mode="json", by_alias=True)


def read_skeleton(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Return the network in ``path`` on the meta device, without its tensors.

    ``network`` is as for :func:`load`.

    Raises:
        ModelFileError: The file is missing, damaged, not converted, or of a newer momconv.
        UsageError: The file holds a network of your own, and there is no ``network``.
    """
    path = find_model_file(Path(path))
    metadata = _read_verified(path)
    if metadata.description.num_classes > path.stat().st_size:
        raise _inconsistent(path, "it has more classes than bytes")
    with without_memory():
        model = _build(metadata, path, network)
    return model.to("meta")


def read_description(path: str | Path) -> Description:
    """Return what the network in ``path`` is, without making it.

    Raises:
        ModelFileError: The file is missing, damaged, not converted, or of a newer momconv.
    """
    return _read_verified(find_model_file(Path(path))).description


def _compose(model: nn.Module, extra: Mapping[str, object]) -> dict[str, str]:
    own = {
        "schema": str(SCHEMA),
        "version": __version__,
        "description": to_json(describe(model)).decode(),
        "stages": json.dumps(read_schemes(model)),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    added = {key: json.dumps(value) for key, value in extra.items()}
    return {"format": "pt"} | {_PREFIX + key: value for key, value in (added | own).items()}


def _read_verified(path: Path) -> _Metadata:
    """Return what ``_read`` does, for callers that read no tensors, and verify these."""
    if checkpoints.is_safetensors(path):
        checkpoints.verify(path)
    return _read(path)


def _read(path: Path) -> _Metadata:
    """Return the validated metadata of ``path``."""
    found = checkpoints.read_metadata(path) if checkpoints.is_safetensors(path) else {}
    values = {k.removeprefix(_PREFIX): v for k, v in found.items() if k.startswith(_PREFIX)}
    if "schema" not in values:
        raise _unconverted(path)
    if values["schema"] not in map(str, _READABLE):
        raise ModelFileError(
            f"{path} was written by a newer momconv: its format is {values['schema']}, and "
            f"momconv {__version__} reads {SCHEMA}",
            kind="model_file.newer_schema",
            fix="pip install --upgrade momconv",
        )
    try:
        return _Metadata.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _inconsistent(path, f"{_PREFIX}{where}: {first['msg']}") from error


def _build(metadata: _Metadata, path: Path, network: nn.Module | None) -> nn.Module:
    """Return the network that ``metadata`` describe, with the weights that it was made with."""
    require_made(path, metadata.description, network)
    try:
        return apply_schemes(remake(metadata.description, network), metadata.stages)
    except (UsageError, ModelFileError) as error:
        raise _unfitting(path, metadata, network, error.message) from error


def _unfitting(
    path: Path, metadata: _Metadata, network: nn.Module | None, reason: str
) -> ModelFileError:
    if network is None:
        return _inconsistent(path, reason)
    return ModelFileError(
        f"{path} does not fit the network that was made for it\n{reason}",
        kind="model_file.wrong_architecture",
        fix=restate(metadata.description),
    )


def _unconverted(path: Path) -> ModelFileError:
    guess = recognise(checkpoints.read_state(path))
    return ModelFileError(
        f"{path} is an unconverted {guess or 'checkpoint'}; run momconv convert first",
        kind="model_file.unconverted",
        fix=checkpoints.convert_command(guess, path),
    )


def _inconsistent(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path} contradicts itself, so it was damaged or edited\n{reason}",
        kind="model_file.inconsistent",
    )
