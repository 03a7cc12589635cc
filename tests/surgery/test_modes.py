import pytest
from torch import Tensor, nn

from momconv.surgery.modes import in_eval_mode


def test_flags_are_restored_after_a_failure() -> None:
    network = nn.Linear(2, 2)

    def fail() -> Tensor:
        with in_eval_mode(network):
            assert not network.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert network.training
