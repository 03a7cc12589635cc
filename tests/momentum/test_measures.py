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
