"""The device that a run computes on."""

import os

import torch

from momconv.errors import ResourceError, UsageError
from momconv.words import plural, quoted


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
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError(
            f"unknown device {quoted(name)}", kind="usage.unknown_device", fix="--device auto"
        )
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise _missing(name)
    device = torch.device(name)
    if device.index is not None and kind == "cuda":
        torch.cuda.set_device(device)
    return device


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
