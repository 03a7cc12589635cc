"""What a GPU needs besides the tensors of a step, which no tracing can show.

``python -m benchmarks.gpu`` measures it and writes gpus.json anew, with a row for each GPU that it
has run on. For others there is a default: the sizes that NVIDIA's and PyTorch's documents name,
rounded up, and a share that no measurement supports.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from momconv.planner.devices import is_there

TABLE = Path(__file__).with_name("gpus.json")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Allowance:
    """What to allow for on one kind of GPU.

    Attributes:
        context: Bytes of the CUDA context, which are taken before the first tensor is.
        workspace: Bytes that cuBLAS and cuDNN take, and one partly filled segment each for small
            and for large blocks.
        fragmentation: The share of the tensors' bytes by which the allocator may need more. It
            rounds up to 512 bytes, which is traced, but leaves blocks whole that are up to 1 MiB
            too large (unless it has ``expandable_segments``), and keeps what fits nothing.
    """

    context: int
    workspace: int
    fragmentation: float

    def total(self, tensors: int) -> int:
        """Return the bytes to allow for besides so many bytes of tensors."""
        return self.context + self.workspace + int(self.fragmentation * tensors)


DEFAULT = Allowance(context=512 * _MIB, workspace=(64 + 2 + 20) * _MIB, fragmentation=0.03)


@cache
def read_table() -> dict[str, Allowance]:
    """Return what was measured, by the GPU's name."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Allowance(**row) for name, row in rows.items()}


def find_allowance(device: torch.device) -> Allowance:
    """Return that of the GPU ``device``, or the default if that is not there or not measured."""
    if not is_there(device):
        return DEFAULT
    return read_table().get(torch.cuda.get_device_name(device), DEFAULT)


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the bytes that ``device`` holds already: weights of ``model``, a GPU's context."""
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)
    return weights + (find_allowance(device).context if device.type == "cuda" else 0)
