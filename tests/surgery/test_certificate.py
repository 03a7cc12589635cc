import copy

import pytest
import torch
from torch import nn

from momconv.errors import InversionError, UsageError
from momconv.momentum.autograd import Strategy
from momconv.surgery import certificate
from momconv.surgery.certificate import gradients_are_exact
from momconv.surgery.conversion import convert
from momconv.zoo.networks import build


def network() -> nn.Module:
    torch.manual_seed(0)
    return convert(build("cifar_resnet20"), 0.9, stages="all")


def test_a_converted_network_passes_and_stays_as_it_is() -> None:
    net = network().eval()
    before = copy.deepcopy(net.state_dict())
    random_state = torch.get_rng_state()
    assert gradients_are_exact(net, 16)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module.training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_frozen_parameters_are_no_obstacle() -> None:
    net = network()
    net.get_submodule("layer1").requires_grad_(False)
    assert gradients_are_exact(net, 16)


def test_the_smallest_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_strategy(model: nn.Module, strategy: Strategy) -> None:
        if strategy == "momentum":
            bias = model.get_parameter("linear.bias")
            bias.data[0] = torch.nextafter(bias[0], torch.tensor(9.0))

    monkeypatch.setattr(certificate, "set_strategy", set_strategy)
    assert not gradients_are_exact(network(), 16)


def test_a_block_that_computes_something_else_the_second_time_fails() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * (1 + self.calls / 100)

    net = network()
    stage = net.get_submodule("layer1")
    assert isinstance(stage, nn.Sequential)
    stage[1].bn2 = Counting()
    with pytest.raises(InversionError):
        gradients_are_exact(net, 16)


def test_a_plain_network_has_nothing_to_certify() -> None:
    with pytest.raises(UsageError):
        gradients_are_exact(build("cifar_resnet20"), 16)
    with pytest.raises(UsageError):
        gradients_are_exact(convert(build("cifar_resnet20"), 0), 16)
