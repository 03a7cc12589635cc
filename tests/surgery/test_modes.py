import pytest
from torch import Tensor, nn

from momconv.surgery.modes import in_eval_mode, in_training_mode


def test_flags_are_restored_after_a_failure() -> None:
    network = nn.Linear(2, 2)

    def fail() -> Tensor:
        with in_eval_mode(network):
            assert not network.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert network.training


def test_a_network_in_training_keeps_its_frozen_part() -> None:
    network, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2).eval()
    network[0].eval()
    with in_training_mode(network, other):
        assert not network[0].training
        assert network[1].training
        assert other.training
        network.eval()
    assert network.training
    assert not other.training
