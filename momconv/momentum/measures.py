"""What is known of a whole tensor by one number or two, which stay on its device.

The tensors have no gaps in memory.
"""

import torch
from torch import Tensor

from momconv.states import is_fake

_COLUMNS = 1021  # a prime, so that what is exchanged is hardly ever in one column
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def no_magnitudes(x: Tensor) -> Tensor:
    """Return what :func:`note_magnitudes` raises: two zeros of x's type, on its device."""
    return x.new_zeros(2)


def note_magnitudes(largest: Tensor, *tensors: Tensor) -> None:
    """Raise ``largest``: its first number to the largest finite |element|.

    The second stays 0 as long as all elements are finite, and is not finite from then on.
    """
    for x in tensors:
        if x.numel() == 0:
            continue
        sizes = x.abs().to(largest.dtype)
        most = sizes.max()
        is_known = most.is_cpu and not is_fake(most)  # a GPU would have to be waited for
        is_finite = is_known and bool(most.isfinite())
        finite = most if is_finite else sizes.nan_to_num_(0, 0, 0).max()
        other = torch.where(most.isfinite(), 0, most)
        torch.maximum(largest, torch.stack([finite, other]), out=largest)


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
