"""The factor of the loss that keeps small gradients within the range of fp16."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from momconv.vocabulary import Precision

_STATE = ("scale", "_growth_tracker")


def make_scaler(precision: Precision, device: torch.device) -> GradScaler:
    """A scaler that changes its factor as it goes; except under fp16, one that does nothing."""
    return GradScaler(device.type, enabled=precision == "fp16")


def read_scaler(scaler: GradScaler) -> dict[str, Tensor]:
    """All that ``scaler`` remembers; nothing if it does nothing."""
    state = scaler.state_dict()
    return {name: torch.tensor(state[name], dtype=torch.float64) for name in _STATE if state}


def restore_scaler(scaler: GradScaler, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``read_scaler``."""
    if scaler.is_enabled() and tensors:
        scale, tracker = (tensors[name] for name in _STATE)
        own = {"scale": float(scale), "_growth_tracker": int(tracker)}
        scaler.load_state_dict(scaler.state_dict() | own)
