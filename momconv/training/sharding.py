"""Weights, gradients and optimiser state that are divided among the processes, by PyTorch's FSDP2.

Each process has some rows of every parameter. A block's weights come together for its forward pass,
once more for its backward pass, and are given up after either; its gradients are summed where their
rows are. So all processes go through the network at the same time, block by block.

In a state of such a run each process writes its own tensors, by torch.distributed.checkpoint, and
any number of processes read them. They are in safetensors files, of which nothing is run.
"""

import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from momconv.errors import ResourceError
from momconv.planner.gathering import find_units
from momconv.zoo.checkpoints import sha256


def is_divided(tensor: Tensor) -> bool:
    """Return whether each process has a part of ``tensor``."""
    return is_traceable_wrapper_subclass(tensor)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of ``model`` are divided."""
    return is_divided(next(model.parameters()))


def shard(model: nn.Module, device: torch.device, processes: int) -> None:
    """Divide the weights of ``model`` among all processes, in place.

    Gradients are the sums over the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second

    model.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (processes,))
    for unit in (*find_units(model), model):
        divided = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(enable=True)


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of ``tensor``: all of it unless it is divided."""
    divided: Any = tensor
    return divided.to_local() if is_divided(tensor) else tensor


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's part of each."""
    return [*map(own_part, tensors)]


def whole(tensor: Tensor) -> Tensor:
    """Return all of ``tensor``, for which all processes have to ask if it is divided."""
    divided: Any = tensor
    return divided.full_tensor() if is_divided(tensor) else tensor


def divide_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor``, which all processes have, as ``like`` is divided."""
    divided: Any = like
    if not is_divided(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device).contiguous()
    return distribute_tensor(tensor, divided.device_mesh, divided.placements, src_data_rank=None)


def lay_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return ``value``, of the shape of ``parameter``, as that lies in memory; on the CPU if whole.

    Fused kernels go through the memory of both.
    """
    if is_divided(parameter):
        return divide_like(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)


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
