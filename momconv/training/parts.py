"""The tensors of a state that is divided: each process writes its own, and any number read them.

By torch.distributed.checkpoint, in safetensors files, of which nothing is run.
"""

import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from momconv.errors import ResourceError
from momconv.zoo.checkpoints import sha256


def list_numbers(folder: Path) -> list[int]:
    """Return the numbers of the states whose tensors are in ``folder``, whole or not."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def save_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``tensors`` to the new ``folder``, as all processes do.

    Raises:
        ResourceError: One of them cannot, as all learn.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ResourceError(
            f"cannot write {folder}: {cause}", kind="output.unwritable", fix="-o FOLDER"
        ) from None


def sum_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of ``folder``."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def load_parts(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in ``folder``, whole, in this process alone."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    tensors = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in reader.read_metadata().state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is alone
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def sweep_parts(folder: Path, kept: Collection[int]) -> None:
    """Remove all states from ``folder`` but those of these numbers, and an empty folder."""
    for number in set(list_numbers(folder)) - {*kept}:
        shutil.rmtree(folder / str(number))
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
