"""What is known of a whole tensor by one number, which stays on its device.

The tensors have no gaps in memory.
"""

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def note_magnitudes(largest: Tensor, *tensors: Tensor) -> None:
    """Let ``largest``, a scalar, grow to the largest |element|; it is not finite if one is not."""
    for x in tensors:
        if x.numel():
            torch.maximum(largest, x.abs().max().to(largest.dtype), out=largest)


def magnitude(x: Tensor) -> Tensor:
    """The largest |x|, a scalar on x's device; not finite if anything in x is not, 0 of nothing."""
    if x.numel() == 0:
        return x.new_zeros(())
    return torch.stack(torch.aminmax(x.as_strided((x.numel(),), (1,)))).abs().max()


def checksum(x: Tensor) -> Tensor:
    """The sum of x's bit patterns, an int64 scalar on x's device.

    They are read eight bytes at a time: sum() would make a copy in int64 of anything narrower.
    """
    in_order = sorted(range(x.dim()), key=x.stride, reverse=True)
    flat = x.detach().permute(in_order).reshape(-1)  # a copy only if there are gaps
    whole = x.numel() - x.numel() % (8 // x.element_size())
    rest = flat[whole:].view(_BITS[x.element_size()]).sum()
    return rest + flat[:whole].view(torch.int64).sum()
