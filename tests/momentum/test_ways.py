"""Ways that divide a stage: the values, gradients and buffers of "store", bit for bit."""

from collections import Counter
from typing import Any

import pytest
import torch
from networks import (
    Dropping,
    aftermath,
    differences,
    images,
    square,
    stack,
    under_bf16_autocast,
)
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import momconv
from momconv import MomentumSequential, set_strategy
from momconv.errors import NotReproducible, UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.momentum.ways import Way
from momconv.planner.measurement import measure
from momconv.zoo.networks import build

WAYS = [
    "checkpoint:3",
    "checkpoint+store:2",
    "checkpoint:2+store:5+parts",
    "segment:3",
    "segment:2+store:3",
    "segment+store:4",
    "momentum+store:1",
    "momentum+store:4+parts",
    "momentum+store:9",
    "momentum+store:99",
]


def mixed(gamma: float) -> MomentumSequential:
    """Layers, a run, a block that changes the shape, another run that draws numbers, a layer."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
    layers = [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    blocks = [*(BasicBlock(8, 8) for _ in range(4)), wide, *(Dropping(12) for _ in range(3))]
    return MomentumSequential(*layers, *blocks, nn.ReLU(), gamma=gamma)


def in_double_precision(net: nn.Module, x: Tensor) -> Tensor:
    return square(net.double()(x.double()))


def in_fp32(net: nn.Module, x: Tensor) -> Tensor:
    return square(net(x))


@pytest.mark.parametrize(
    ("gamma", "step"),
    [
        *((gamma, in_fp32) for gamma in (0, 0.5, 0.9, 1)),
        *((gamma, in_double_precision) for gamma in (0, 0.9)),
        *((gamma, under_bf16_autocast) for gamma in (0, 0.9)),
    ],
)
def test_gradients_and_buffers_are_those_of_storing_everything(gamma: float, step: Any) -> None:
    net, x = mixed(gamma), images()
    stored = aftermath(net, x, "store", step)
    assert len(stored) == 3 + len([*net.parameters(), *net.buffers()])
    for way in WAYS:
        own = way if gamma else way.replace("momentum", "checkpoint")
        assert (own, differences(aftermath(net, x, {"": own}, step), stored)) == (own, [])


@pytest.mark.parametrize("way", ["checkpoint:2", "segment:2", "momentum+store:2"])
def test_a_pass_that_finds_the_range_is_like_the_others(way: str) -> None:
    net = stack(5)
    set_strategy(net, {"": way})
    square(net(images())).backward()

    found = net.runs
    assert not differences(aftermath(net, images(), {"": way}), aftermath(net, images(), "store"))
    assert net.runs == found != stack(5).runs


def test_a_stored_block_runs_once_and_the_others_twice() -> None:
    net = stack(5)
    net.find_runs(images())
    calls = Counter[int]()
    for n, block in enumerate(net):
        block.register_forward_hook(lambda *_, n=n: calls.update([n]))
    set_strategy(net, {"": "momentum+store:2"})
    net(images())  # finds the range
    calls.clear()

    square(net(images())).backward()

    assert calls == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}


def test_the_way_back_is_checked_from_the_border_on() -> None:
    class Fickle(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x) + self.calls

    net = MomentumSequential(Dropping(), Fickle(), Dropping(), Dropping())
    set_strategy(net, {"": "momentum+store:2"})
    loss = square(net(images()))
    with pytest.raises(NotReproducible):
        loss.backward()


def peak(gamma: float, way: str) -> float:
    """Peak bytes of one training step, in tensors of x's size."""
    net = stack(16, channels=16, gamma=gamma)
    set_strategy(net, {"": way})
    x = images(channels=16, side=32, count=8)
    net.find_runs(x)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return measure(lambda: square(net(x)).backward(), torch.device("cpu")) / x.nbytes


def test_each_stored_block_takes_what_a_block_stores() -> None:
    few, some, many, all_ = (
        peak(0.9, way) for way in ("momentum", "momentum+store:4", "momentum+store:12", "store")
    )
    assert few < some < many < all_
    assert (many - some) / 8 == pytest.approx(5, abs=0.2)


def test_every_fourth_input_is_less_than_each_and_segments_of_four_less_still() -> None:
    each, fourth, segments = (peak(0, way) for way in ("checkpoint", "checkpoint:4", "segment:4"))
    assert segments < each - 6 < each < peak(0, "store") - 20
    assert fourth == pytest.approx(each - 12 + 3 * 4, abs=0.2)  # and what is input is output too


def test_a_way_is_read_as_it_is_written() -> None:
    for text in (*WAYS, "store", "checkpoint", "segment", "momentum", "momentum+parts"):
        assert str(Way.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "auto", "store:3", "momentum:2", "checkpoint:0", "store+store:2", "segment:2+"]
)
def test_what_is_no_way_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="unknown strategy"):
        set_strategy(stack(2), {"": text})


def test_stages_that_are_not_named_stay_as_they_are() -> None:
    model = momconv.convert(build("cifar_resnet20"), stages="all")
    set_strategy(model, {"layer1": "checkpoint:2", "layer3": "momentum+store:1"})
    ways = [str(stage.way) for stage in momentum_stages(model).values()]
    assert ways == ["checkpoint:2", "momentum", "momentum+store:1"]
    with pytest.raises(UsageError, match="unknown stage 'layer4'"):
        set_strategy(model, {"layer4": "store"})
    with pytest.raises(UsageError, match="gamma is 0"):
        set_strategy(momconv.convert(build("cifar_resnet20"), 0), {"layer1": "momentum"})
