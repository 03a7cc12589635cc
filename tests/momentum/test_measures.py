from typing import Any

import pytest
import torch

from momconv.momentum.measures import checksum
from momconv.planner.measurement import measure


@pytest.mark.parametrize("size", [1, 7, 8, 29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int8])
def test_a_checksum_sees_a_single_changed_value(dtype: torch.dtype, size: int) -> None:
    x = torch.arange(size).reshape(1, size).to(dtype)

    assert checksum(x) == checksum(x.clone())
    for n in range(size):
        changed = x.clone()
        changed[0, n] += 1
        assert checksum(x) != checksum(changed)


def test_a_checksum_sees_an_exchange() -> None:
    x = torch.randn(6, 4, 4, 4)
    for y in (x.flip(0), x.flip(1), x.flip(2), x[[1, 0, 2, 3, 4, 5]], x.transpose(2, 3)):
        assert checksum(x) != checksum(y)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.float64])
def test_a_checksum_sees_exchanges_of_few_values(dtype: torch.dtype) -> None:
    arrangements = torch.cartesian_prod(*[torch.arange(3)] * 7).to(dtype)

    assert len({int(checksum(x)) for x in arrangements}) == 3**7


@pytest.mark.parametrize("width", [1021, 2042, 1021 * 1019])
def test_a_checksum_sees_an_exchange_of_rows_as_long_as_its_own(width: int) -> None:
    x = torch.randn(4, width, dtype=torch.float64)
    assert checksum(x) != checksum(x.flip(0))
    assert checksum(x) != checksum(-x)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(4, 8), (3, 64, 7, 7), (2, 2042)])
def test_a_checksum_sees_changes_of_signs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=dtype)
    changes: list[Any] = [(..., slice(n, None, n + 1)) for n in range(4)]
    changes += [(slice(None), n) for n in range(4)]  # of a channel
    for place in changes:
        y = x.clone()
        y[place] *= -1
        assert checksum(x) != checksum(y), place
    y = x.clone()
    y[0, 1], y[1, 3] = -x[0, 1], -x[1, 3]
    assert checksum(x) != checksum(y)
    assert not dtype.is_complex or checksum(x) != checksum(x.conj())


def test_a_checksum_is_one_of_values_wherever_they_are() -> None:
    x = torch.randn(4, 3)
    assert checksum(x[1:]) == checksum(x[1:].clone())
    z = torch.randn(4, 3, dtype=torch.complex128)
    assert checksum(z) != checksum(z.conj().resolve_conj())


def test_a_checksum_is_one_of_values_of_which_the_signs_are_still_to_be_changed() -> None:
    z = torch.randn(4, 3, dtype=torch.complex64).conj()
    assert checksum(z) == checksum(z.resolve_conj())
    assert z.imag.is_neg()
    assert checksum(z.imag) == checksum(z.imag.resolve_neg())
    assert checksum(z.imag) != checksum(-z.imag)


@pytest.mark.parametrize("size", [1_000_000, 1_000_003])
def test_a_checksum_takes_little_memory(size: int) -> None:
    x = torch.randn(size)
    assert measure(lambda: checksum(x), torch.device("cpu")) < 0.01 * x.nbytes
