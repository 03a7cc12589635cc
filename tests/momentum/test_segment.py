"""The strategy that keeps a stage's input alone."""

from collections import Counter

import pytest
import torch
from networks import aftermath, differences, gradient_of, images, square, stack
from torch import Tensor, nn

from momconv import MomentumSequential, set_strategy
from momconv.errors import InversionError
from momconv.momentum.autograd import Strategy
from momconv.momentum.sequential import Run, momentum_stages

WITH_AND_WITHOUT_MOMENTUM = pytest.mark.parametrize("runs", [[], [Run(1, 4, (1.0,) * 3)]])


@WITH_AND_WITHOUT_MOMENTUM
def test_the_last_block_is_not_run_for_its_output(runs: list[Run]) -> None:
    net = stack(4, strategy="segment", runs=runs)
    calls: Counter[nn.Module] = Counter()
    for block in net:
        block.register_forward_hook(lambda block, *_: calls.update([block]))

    square(net(images())).backward()

    assert [calls[block] for block in net] == [3, 3, 3, 2]


@WITH_AND_WITHOUT_MOMENTUM
def test_exact_where_the_first_blocks_are_not_trained(runs: list[Run]) -> None:
    net = stack(4, runs=runs)
    for parameter in [*net[0].parameters(), *net[1].parameters()]:
        parameter.requires_grad = False

    ours = aftermath(net, images(), "segment", lambda net, x: square(net(x.detach())))

    expected = aftermath(net, images(), "store", lambda net, x: square(net(x.detach())))
    assert not differences(ours, expected)


@WITH_AND_WITHOUT_MOMENTUM
def test_a_graph_that_is_kept_can_be_used_again(runs: list[Run]) -> None:
    net = stack(4, strategy="segment", runs=runs)
    loss = square(net(images()))
    loss.backward(retain_graph=True)
    once = [gradient_of(parameter).clone() for parameter in net.parameters()]

    net.zero_grad()
    loss.backward()

    assert all(map(torch.equal, once, map(gradient_of, net.parameters())))


def test_weights_of_an_earlier_block_may_not_change_before_backward() -> None:
    net = stack(4, strategy="segment", runs=[])
    loss = square(net(images()))
    with torch.no_grad():
        net.get_parameter("0.conv1.weight").add_(1)

    with pytest.raises(InversionError, match="modified in place before backward"):
        loss.backward()


@WITH_AND_WITHOUT_MOMENTUM
@pytest.mark.parametrize("after", ["store", "momentum"])
def test_the_strategy_may_change_before_backward(runs: list[Run], after: Strategy) -> None:
    net = stack(4, runs=runs)
    net.append(nn.ReLU())  # joined to the block before it, unless all is stored

    def step(net: nn.Module, x: Tensor) -> Tensor:
        loss = square(net(x))
        if momentum_stages(net)[""].strategy == "segment":
            set_strategy(net, after)
        return loss

    ours = aftermath(net, images(), "segment", step)

    assert not differences(ours, aftermath(net, images(), "store", step))


def test_exact_where_pytorch_takes_other_kernels_without_a_graph() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)]
    net, x = MomentumSequential(*layers, gamma=0).eval(), torch.randn(2, 5, 16)
    gradients = []
    strategies: list[Strategy] = ["store", "segment"]
    for strategy in strategies:
        set_strategy(net, strategy)
        net.zero_grad()
        square(net(x)).backward()
        gradients.append([gradient_of(parameter) for parameter in net.parameters()])
    assert all(map(torch.equal, *gradients))
