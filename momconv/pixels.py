"""Images as bytes, a quarter of the memory of the values that a network takes.

A network that takes bytes makes the values itself, and where its stem is computed again in
backward, so are they: in between, where memory is mostly highest, they are not there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the values of bytes of shape (…, 3, height, width), in the same layout.

    They are the same for an image alone and in a batch, on a CPU and on a GPU.
    """
    if not pixels.is_contiguous(memory_format=torch.channels_last):
        return _scale(pixels, mean.view(3, 1, 1), std.view(3, 1, 1))
    # Whole rows at a time: the three values of a pixel are too few for a quick loop.
    width = pixels.shape[-1]
    rows = pixels.permute(0, 2, 3, 1).flatten(2)
    values: Tensor = _scale(rows, mean.repeat(width), std.repeat(width)).unflatten(2, (width, 3))
    return values.permute(0, 3, 1, 2)


def _scale(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # Divided by 255, as presets do; v2.ToDtype multiplies by 1/255: not the same. So does a GPU
    # where the divisor is a number.
    return pixels.float().div_(torch.full_like(mean, 255)).sub_(mean).div_(std)


@contextmanager
def taking_bytes(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Iterator[None]:
    """Inside, ``model`` takes bytes in place of values.

    Its backward pass has to be inside too, as it may begin with the bytes again.
    """
    forward, own = model.forward, vars(model).get("forward")
    scale = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    def normalise_first(pixels: Tensor) -> Any:
        return forward(normalise(pixels, *scale))

    model.forward = normalise_first
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
