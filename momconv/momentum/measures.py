"""What is known of a whole tensor by one number, which stays on its device.

The tensors have no gaps in memory.
"""

import torch
from torch import Tensor

_COLUMNS = 1021  # a prime, so that what is exchanged is hardly ever in one column
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def note_magnitudes(largest: Tensor, *tensors: Tensor) -> None:
    """Raise ``largest``, a scalar, to the largest |element|; it is not finite if one is not."""
    for x in tensors:
        if x.numel():
            torch.maximum(largest, x.abs().max().to(largest.dtype), out=largest)


def magnitude(x: Tensor) -> Tensor:
    """Return the largest |x|, a scalar on x's device; not finite if x is not, 0 of nothing."""
    if x.numel() == 0:
        return x.new_zeros(())
    return torch.stack(torch.aminmax(x.as_strided((x.numel(),), (1,)))).abs().max()


def checksum(x: Tensor) -> Tensor:
    """Return a weighted sum of x's bit patterns, an int64 scalar on x's device.

    They are read eight bytes at a time: sum() would make a copy in int64 of anything narrower. The
    weights are odd, so that a single change is seen, and differ, so that an exchange of two is:
    images in another order, for example, or mirrored ones.
    """
    x = torch.view_as_real(x) if x.is_complex() else x
    in_order = sorted(range(x.dim()), key=x.stride, reverse=True)
    flat = x.detach().permute(in_order).reshape(-1)  # a copy only if there are gaps
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # in a place where eight bytes can be read
    whole = x.numel() - x.numel() % (8 // x.element_size())
    rest = flat[whole:].view(_BITS[x.element_size()]).sum()
    words = flat[:whole].view(torch.int64)
    table = len(words) - len(words) % _COLUMNS
    columns = words[:table].view(-1, _COLUMNS).sum(0)
    columns[: len(words) - table] += words[table:]
    if flat.dtype == torch.float64:  # of whose signs, the highest bits, two would cancel
        rest = rest + flat.sum().view(torch.int64)
    return rest + columns.mul_(torch.arange(1, 2 * _COLUMNS, 2, device=x.device)).sum()
