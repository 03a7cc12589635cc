"""What is known of a whole tensor by one number or two, which stay on its device.

The tensors have no gaps in memory.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from momconv.states import is_fake

_PRIMES = (1021, 1019, 1013, 1009)  # of columns
_STEP = 0x10_1356_8DE0_4F67  # by which their places are told apart; 1023 of them are below 2⁶³
_FACTOR = 0x2545_F491_4F6C_DD1D  # odd, so that no two products are the same


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
    """Return a hash of x's bit patterns and their order, an int64 scalar on x's device.

    They are read eight bytes at a time: sum() would make a copy in int64 of anything narrower. A
    sum is blind to exchanges, and to pairs of changes in the highest bit, whose carries are lost:
    the signs of every channel, for example. So many columns are summed by themselves, and scrambled
    before they are added, each in its own way. Their number is a prime that divides no dimension,
    so that what is exchanged or changed in pairs is hardly ever in one column.
    """
    x = x.detach().resolve_conj().resolve_neg()  # a copy only if these are still to be computed
    in_order = sorted(range(x.dim()), key=x.stride, reverse=True)
    flat = x.permute(in_order).reshape(-1).view(torch.uint8)  # a copy only if there are gaps
    if flat.storage_offset() % 8:
        flat = flat.clone()  # in a place where eight bytes can be read
    whole = len(flat) - len(flat) % 8
    words, rest = flat[:whole].view(torch.int64), flat[whole:]
    width = next(prime for prime in _PRIMES if x.numel() % prime or not whole)
    table = len(words) - len(words) % width
    columns = words[table:]
    if table:
        sums = words[:table].view(-1, width).sum(0)
        sums[: len(columns)] += columns
        columns = sums
    if len(rest):
        columns = torch.cat([columns, pad(rest, (0, 8 - len(rest))).view(torch.int64)])
    # Of what is transposed, the bytes may be the same.
    order = [dim for dim in in_order if x.shape[dim] > 1]
    start = 0 if order == sorted(order) else hash((*order,)) % _STEP
    offsets = torch.arange(start, start + len(columns) * _STEP, _STEP, device=x.device)
    mixed = offsets.add_(columns, alpha=_FACTOR)
    mixed.bitwise_xor_(mixed >> 32).mul_(_FACTOR)
    return mixed.bitwise_xor_(mixed >> 32).sum()
