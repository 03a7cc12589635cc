"""The whole state of a run in one file, so that its parts always belong together.

A safetensors file: the tensors of the model, of the optimiser and of the random generators; the
rest is JSON in the metadata. Nothing that is read from it is run.
"""

import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from momconv.eightbit import ORDER, SCALES, count_blocks
from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.files.atomic import write_atomically
from momconv.files.tensor_file import write_tensors
from momconv.surgery.conversion import apply_schemes, read_schemes
from momconv.training.progress import Progress
from momconv.training.run_folder import RunFolder
from momconv.training.sharding import is_divided, lay_out_like, load_parts, sum_files, sweep_parts
from momconv.zoo import checkpoints
from momconv.zoo.description import Description, attach, describe
from momconv.zoo.own import remake, require_made

_KEY = "momconv.run"
_MODEL, _OPTIMIZER, _EXTRAS, _RANDOM = "model/", "optimizer/", "extra/", "random/"
_DOCUMENTS = "document/"  # compressed: the list of the images may be long


class _Parts(BaseModel):
    """Where the tensors are, of which each process wrote some."""

    model_config = ConfigDict(extra="forbid")

    number: int  # the name of their folder
    files: dict[str, str]  # the SHA-256 of each


class _Record(BaseModel):
    """All that is not a tensor."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    description: Description
    stages: dict[str, dict[str, Any]]
    progress: Progress
    parts: _Parts | None = None


def save_state(  # noqa: PLR0913 (the parts of a state)
    folder: RunFolder,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    extras: Mapping[str, Tensor] | None = None,
    documents: Mapping[str, bytes] = MappingProxyType({}),
    number: int | None = None,
) -> None:
    """Write the state of a run, all or nothing, and keep the one before.

    What was written is read again before the state before the last is given up.

    ``extras`` are further tensors, such as the average of the weights. ``documents`` are files, by
    their names, without which the run could not go on. With a ``number``, all processes have
    written the tensors that are divided to the folder of that name.

    Raises:
        ResourceError: The file cannot be written, or does not hold what was written.
    """
    record = _Record(description=describe(model), stages=read_schemes(model), progress=progress)
    tensors = collect_tensors(model, optimizer, extras or {})
    tensors = {key: value for key, value in tensors.items() if not is_divided(value)}
    if number is not None:
        files = sum_files(folder.parts / str(number))
        record = record.model_copy(update={"parts": _Parts(number=number, files=files)})
    tensors |= {f"{_RANDOM}{device}": value for device, value in read_random_states().items()}
    for name, content in documents.items():
        packed = bytearray(zlib.compress(content, level=1))
        tensors[f"{_DOCUMENTS}{name}"] = torch.frombuffer(packed, dtype=torch.uint8)
    metadata = {_KEY: record.model_dump_json()}

    def write(path: Path) -> None:
        write_tensors(path, tensors, metadata)
        _verify(path)

    write_atomically(folder.state, write, previous=folder.previous)
    forget_parts(folder)


def collect_tensors(
    model: nn.Module, optimizer: Optimizer, extras: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a state but for random generators."""
    tensors = {f"{_MODEL}{key}": value for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{key}/{name}"] = value
    tensors |= {f"{_EXTRAS}{key}": value for key, value in extras.items()}
    return tensors


def forget_parts(folder: RunFolder) -> None:
    """Remove the tensors that are no state's any more."""
    kept: set[int] = set()
    for path in filter(Path.is_file, (folder.state, folder.previous)):
        with suppress(ModelFileError, ValidationError, KeyError):
            record = _Record.model_validate_json(checkpoints.read_metadata(path)[_KEY])
            kept |= {record.parts.number} if record.parts else set()
    sweep_parts(folder.parts, kept)


@dataclass(frozen=True, slots=True)
class SavedState:
    """What ``save_state`` wrote."""

    model: nn.Module  # on the CPU
    progress: Progress
    tensors: dict[str, Tensor]

    def restore_optimizer(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Give ``optimizer``, made for the parameters of ``model``, its state back."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
        shaped = dict(model.named_parameters())
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in _select(self.tensors, _OPTIMIZER).items():
            kind, _, name = key.partition("/")
            if value.shape == shaped[name].shape:  # fused kernels go through the memory of both
                value = lay_out_like(value, shaped[name])
            states.setdefault(ordered.index(name), {})[kind] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})

    @property
    def extras(self) -> dict[str, Tensor]:
        """The further tensors."""
        return _select(self.tensors, _EXTRAS)

    def restore_random_states(self) -> None:
        """Set the random generators to where they were.

        Raises:
            ModelFileError: They cannot have been there.
        """
        try:
            set_random_states(_select(self.tensors, _RANDOM))
        except (KeyError, RuntimeError, TypeError) as error:
            problem = "the state of the run has no state of the random generators, or a damaged one"
            raise ModelFileError(problem, kind="run.bad_state") from error


def load_newest(
    folder: RunFolder, tell: Callable[[str], None], make: Callable[[], nn.Module | None]
) -> SavedState:
    """Return the newest whole state of a run.

    A damaged one is put aside, so that it never takes the place of the one before.

    Args:
        folder: Where the run is.
        tell: Hears of a damaged state.
        make: What gives :func:`load_state` its ``network``.

    Raises:
        ModelFileError: There is none.
    """
    try:
        return load_state(folder.state, make())
    except ModelFileError as error:
        if not folder.previous.is_file():
            raise
        saved = load_state(folder.previous, make())
        if folder.state.exists():
            os.replace(folder.state, folder.damaged)
            tell(f"warning: {error.message}")
        os.replace(folder.previous, folder.state)
        tell(f"warning: going on from the state before, of {folder.previous.name}")
        return saved


def read_documents(folder: RunFolder) -> dict[str, bytes]:
    """Return the documents in the newest state that has them whole; read nothing else of it.

    An earlier momconv wrote none.

    Raises:
        ModelFileError: There is no state, or only damaged ones.
    """
    try:
        return _unpack_documents(folder.state)
    except ModelFileError:
        if not folder.previous.is_file():
            raise
        return _unpack_documents(folder.previous)


def _unpack_documents(path: Path) -> dict[str, bytes]:
    packed = _select(checkpoints.read_unverified(path, _DOCUMENTS), _DOCUMENTS)
    try:  # each has a checksum of its own
        return {name: zlib.decompress(value.numpy().tobytes()) for name, value in packed.items()}
    except zlib.error as error:
        raise _damaged(path, str(error)) from error


def load_state(path: Path, network: nn.Module | None = None) -> SavedState:
    """Read a state, and rebuild its network, or fill ``network`` if it is the user's own.

    Raises:
        ModelFileError: The file is missing, damaged or no state.
        UsageError: Its network is the user's own, and there is no ``network``.
    """
    metadata = checkpoints.read_metadata(path)
    if _KEY not in metadata:
        raise ModelFileError(f"{path} is not the state of a run", kind="run.bad_state")
    tensors = checkpoints.read_state(path)
    try:
        record = _Record.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from error
    if record.parts:
        tensors |= _read_parts(path, record.parts)
    require_made(path, record.description, network)
    try:
        model = apply_schemes(remake(record.description, network), record.stages)
    except (UsageError, ModelFileError) as error:
        raise _damaged(path, error.message) from error
    weights = _select(tensors, _MODEL)
    if difference := checkpoints.difference(model, weights):
        raise _damaged(path, f"tensors {difference}")
    if unfitting := _find_unfitting(model, _select(tensors, _OPTIMIZER)):
        raise _damaged(path, f"{_OPTIMIZER}{unfitting} fits no parameter")
    checkpoints.fill(model, weights)
    attach(model, record.description)
    return SavedState(model, record.progress, tensors)


def _read_parts(path: Path, parts: _Parts) -> dict[str, Tensor]:
    """Return the tensors of the state in ``path`` that are beside it.

    Raises:
        ModelFileError: A file is missing or damaged.
    """
    folder = RunFolder(path.parent).parts / str(parts.number)
    try:
        found = sum_files(folder)
    except OSError as error:
        raise _damaged(path, f"cannot read {folder}: {error.strerror}") from error
    if found != parts.files:
        wrong = min(name for name, _ in found.items() ^ parts.files.items())
        raise _damaged(path, f"{folder / wrong} is missing, damaged or another one")
    return load_parts(folder)


def read_random_states() -> dict[str, Tensor]:
    """Return the states of PyTorch's generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restore what ``read_random_states`` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def _verify(path: Path) -> None:
    """Do nothing if the file holds what was written to it.

    Raises:
        ResourceError: It does not.
    """
    try:
        checkpoints.verify(path)
    except ModelFileError as error:
        raise ResourceError(
            f"{path.parent} does not keep what is written to it: {error.message}",
            kind="output.unreliable",
            fix="-o FOLDER",
        ) from error


def _find_unfitting(model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Return a name in the optimiser's state that no parameter has, or not in this shape."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None:
            return key
        shape = parameter.shape
        if kind.endswith(SCALES):
            shape = torch.Size([count_blocks(parameter.numel())])
        is_order = kind == ORDER and sorted(value.flatten().tolist()) == [*range(parameter.ndim)]
        if not is_order and value.shape not in (shape, torch.Size([])):
            return key
    return None


def _select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _damaged(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(f"{path} contradicts itself: {reason}", kind="run.bad_state")
