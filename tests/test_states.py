import pytest
import torch
from torch import Tensor, nn

from momconv.states import in_eval_mode, keep_buffers, keeping_random_state


def test_flags_are_restored_after_a_failure() -> None:
    network = nn.Linear(2, 2)

    def fail() -> Tensor:
        with in_eval_mode(network):
            assert not network.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert network.training


def test_buffers_get_their_values_again() -> None:
    norm = nn.BatchNorm1d(2)
    restore = keep_buffers(norm.modules())
    norm(torch.randn(4, 2))
    assert norm.running_mean is not None
    assert norm.running_mean.all()
    restore()
    assert not norm.running_mean.any()


def test_buffers_are_the_same_tensors_again() -> None:
    net = nn.Sequential(nn.Module())
    net[0].register_buffer("a", torch.zeros(2))
    net[0].register_buffer("b", None)
    buffer, restore = net[0].a, keep_buffers(net.modules())
    net[0].a, net[0].b = torch.ones(2), torch.ones(2)
    net[0].register_buffer("c", torch.ones(2))
    restore()
    assert net[0].a is buffer
    assert dict(net.named_buffers()).keys() == {"0.a", "0.c"}


def test_random_numbers_go_on_where_they_were() -> None:
    before = torch.get_rng_state()
    with keeping_random_state(torch.device("cpu")):
        torch.rand(1)
        assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)
