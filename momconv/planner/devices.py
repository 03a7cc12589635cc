"""The device that a run computes on."""

import os
import platform
import re
from pathlib import Path

import torch

from momconv.errors import ResourceError, UsageError
from momconv.words import plural, quoted

_NAME = re.compile(r"cpu|cuda(:(0|[1-9][0-9]?))?")
_CPU_INFO = Path("/proc/cpuinfo")


def name_processor() -> str:
    """Return the model of the processor where the system tells it, else its architecture.

    It can be part of a file's name, and of a link: there are no spaces or signs of trademarks.
    """
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = re.sub(r"\((?:R|TM)\)", "", next(models, platform.machine()))
    return re.sub(r"[\s/]+", "-", name)


def find_device(name: str = "auto") -> torch.device:
    """Return the device ``name``; "auto" is the first GPU, and the CPU where there is none.

    A GPU that has a number becomes the current one, whose random generator is saved and which
    pinned memory belongs to; else they would be those of GPU 0, whatever the network is on.

    Raises:
        UsageError: ``name`` is not a device that momconv computes on.
        ResourceError: This machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parse_device(name)
    if not is_there(device):
        raise _missing(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def make_current(device: torch.device | str) -> torch.device:
    """Return ``device``, as ``find_device`` does if it is a GPU.

    Raises:
        ResourceError: This machine has no such GPU.
    """
    device = torch.device(device)
    return find_device(str(device)) if device.type == "cuda" else device


def parse_device(name: str) -> torch.device:
    """Return the device ``name``, which this machine need not have.

    Raises:
        UsageError: It is not one that momconv computes on.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"unknown device {quoted(name)}", kind="usage.unknown_device", fix="--device auto"
        )
    return torch.device(name)


def is_there(device: torch.device) -> bool:
    """Return whether this machine has ``device``."""
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def _missing(name: str) -> ResourceError:
    count = torch.cuda.device_count()
    seen = "no GPU" if count == 0 else f"{plural(count, 'GPU')}, numbered from 0"
    return ResourceError(
        f"--device {name}: this PyTorch ({torch.__version__}) sees {seen}\n"
        f"built for: {_built_for()} · "
        f"CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}",
        kind="device.missing",
        fix="--device cpu" if count == 0 else f"--device cuda:{count - 1}",
    )


def _built_for() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU only"
