import pytest
import torch

from momconv.momentum.measures import checksum


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
    for y in (x.flip(0), x.flip(1), x.flip(2), x[[1, 0, 2, 3, 4, 5]]):
        assert checksum(x) != checksum(y)


def test_a_checksum_is_one_of_values_wherever_they_are() -> None:
    x = torch.randn(4, 3)
    assert checksum(x[1:]) == checksum(x[1:].clone())
    z = torch.randn(4, 3, dtype=torch.complex128)
    assert checksum(z) != checksum(z.conj().resolve_conj())
