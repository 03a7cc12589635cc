import copy

import pytest
import torch
from torch import Tensor, nn

from momconv.momentum.sequential import momentum_stages
from momconv.surgery.conversion import convert, revert
from momconv.surgery.drift import measure_drift
from momconv.surgery.fitting import Fitting


class Block(nn.Module):
    """A residual block that ends in a ReLU, as ResNet's do, or in the sum."""

    def __init__(self, *, cut: bool, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Conv2d(16, 4, 1, bias=not cut)
        self.after = nn.BatchNorm2d(4) if cut else nn.Identity()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = x + torch.as_tensor(self.after(self.last(torch.relu(self.depthwise(y)))))
        return y.relu_() if self.cut else y


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.down(torch.relu(self.up(self.norm(x)))))


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def images(count: int = 60) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(*blocks: nn.Module, before: nn.Module | None = None) -> nn.Module:
    """A network of random weights, with the statistics of :func:`images`."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), before or nn.Identity())
    head = nn.Linear(4, 5) if before else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(stem, nn.Sequential(*blocks), head)
    net(images())
    return net.eval()


def conv_net(*, cut: bool, kernel: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return network(*(Block(cut=cut, kernel=kernel) for _ in range(3)))


def distance(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        z, other = original(images()), model(images())
    return measure_drift(other.flatten(1), z.flatten(1)).distance


def fit(model: nn.Module, original: nn.Module, count: int = 60) -> Fitting:
    fitting = Fitting(model, original, images()[:1], count)
    for chunk in images(count).split(20):
        fitting.take(chunk)
    return fitting


@pytest.mark.parametrize(
    ("cut", "kernel", "gamma"),
    [(False, 1, 0.9), (False, 3, 0.5), (False, 1, 1.0), (True, 1, 0.9), (True, 3, 0.5)],
)
def test_it_comes_closer_to_the_original(cut: bool, kernel: int, gamma: float) -> None:
    original = conv_net(cut=cut, kernel=kernel)
    model = convert(original, gamma, stages="all").eval()
    before = distance(model, original)
    assert fit(model, original).layers == 6
    assert distance(model, original) < (0.98 if cut else 0.6) * before


def test_long_runs_come_closer_too_and_closer_with_more_images() -> None:
    torch.manual_seed(0)
    original = network(*(Block(cut=False, kernel=3) for _ in range(12)))
    few = convert(original, 0.9, stages="all").eval()
    before = distance(few, original)
    fit(few, original)
    more = convert(original, 0.9, stages="all").eval()
    fit(more, original, 160)
    assert distance(more, original) < distance(few, original) < before / 2


def test_linear_layers_on_tokens_are_fitted_too() -> None:
    torch.manual_seed(0)
    original = network(*(Tokens() for _ in range(3)), before=Flat())
    model = convert(original, 0.9, stages="all").eval()
    before = distance(model, original)
    assert fit(model, original).layers == 6
    assert distance(model, original) < 0.8 * before


def test_where_nothing_is_to_be_made_up_for_weights_stay() -> None:
    original = conv_net(cut=False)
    model = convert(original, 1e-6, stages="all").eval()  # changes next to nothing
    before = copy.deepcopy(model.state_dict())
    fit(model, original)
    after = model.state_dict()
    assert all(torch.allclose(after[key], before[key], atol=1e-3) for key in after)
    assert distance(model, original) < 1e-4


def test_undone_it_is_bit_for_bit_as_before() -> None:
    original = conv_net(cut=True)
    model = convert(original, 0.9, stages="all").eval()
    before = copy.deepcopy(model.state_dict())
    fitting = fit(model, original)
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    fitting.undo()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    names = ("first.weight", "last.weight", "norm.running_mean", "after.running_mean")
    assert changed <= {f"1.{n}.{name}" for n in range(3) for name in names}
    assert {"1.1.first.weight", "1.2.last.weight"} <= changed


def test_nothing_of_it_is_left_behind() -> None:
    original = conv_net(cut=True)
    model = convert(original, 0.9, stages="all").eval()
    hooks = [len(m._forward_hooks) for net in (model, original) for m in net.modules()]
    before = copy.deepcopy(original.state_dict())
    fit(model, original)
    assert [len(m._forward_hooks) for net in (model, original) for m in net.modules()] == hooks
    assert all(value.equal(before[key]) for key, value in original.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_blocks_that_are_used_twice_are_left_alone() -> None:
    torch.manual_seed(0)
    block, other = Block(cut=False, kernel=1), Block(cut=False, kernel=1)
    original = network(block, block, other)
    model = convert(original, 0.9, stages="all").eval()
    assert fit(model, original).layers == 2


def test_networks_without_momentum_and_of_momentum_have_nothing_to_fit() -> None:
    original = conv_net(cut=False)
    model = convert(original, 0.9, stages="all").eval()
    assert Fitting(original, original, images()[:1], 60).layers == 0
    assert Fitting(revert(model), model, images()[:1], 60).layers == 0
    assert momentum_stages(model)


def test_outputs_that_are_dead_stay_so() -> None:
    original = conv_net(cut=True)
    with torch.no_grad():
        for block in original[1]:  # type: ignore[index]
            block.after.weight[0], block.after.bias[0] = 0, -1e3
    model = convert(original, 0.9, stages="all").eval()
    fit(model, original)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
