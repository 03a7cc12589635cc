"""Which blocks are runs."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Dropping, images
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from momconv import MomentumSequential


def spans(net: MomentumSequential) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in net.runs or ()]


def test_runs_are_consecutive_residual_blocks_that_keep_the_shape() -> None:
    net = MomentumSequential(
        nn.Conv2d(8, 16, 1),
        BasicBlock(16, 16),
        BasicBlock(16, 16),
        Bottleneck(16, 4),
        BasicBlock(16, 16, stride=2, downsample=nn.Conv2d(16, 16, 1, 2)),
        Bottleneck(16, 4),
        Bottleneck(16, 4),
        Bottleneck(16, 4),
        nn.ReLU(),
    )

    net(images())

    assert spans(net) == [(1, 4), (5, 8)]


def branch(*after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), *after)


class Adding(nn.Module):
    """x + f(x), and what becomes of it."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.combine = branch(nn.ReLU()), combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.branch(x))


def turned(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


RESIDUAL: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: Adding(lambda x, f: x + f),
    "in place": lambda: Adding(lambda x, f: f.add_(x)),
    "difference": lambda: Adding(lambda x, f: x - f),
    "scaled branch": lambda: Adding(lambda x, f: x + 0.1 * f),
    "ReLU after it": lambda: Adding(lambda x, f: (x + f).relu_()),
    "norm after it": lambda: Adding(lambda x, f: nn.functional.layer_norm(x + f, (5,))),
    "other layout": lambda: Adding(lambda x, f: (turned(x) + turned(f)).permute(0, 3, 1, 2)),
    "two in a row": lambda: nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)),
}
NOT_RESIDUAL: dict[str, Callable[[], nn.Module]] = {
    "conv-bn-relu": lambda: branch(nn.ReLU()),
    "dropout": lambda: nn.Dropout(0.5),
    "identity": nn.Identity,
    "activation": nn.GELU,
    "product": lambda: Adding(lambda x, f: x * f.sigmoid()),
    "x subtracted": lambda: Adding(lambda x, f: f - x),
    "x left out": lambda: Adding(lambda x, f: f),
    "x scaled": lambda: Adding(lambda x, f: 0.5 * x + f),
    "constant added": lambda: Adding(lambda x, f: x + 1),
    "halves swapped": lambda: Adding(lambda x, f: torch.cat([f[:, :4], x[:, 4:]], 1)),
}


@pytest.mark.parametrize("block", RESIDUAL.values(), ids=RESIDUAL)
def test_a_block_is_residual_if_its_input_is_added_to(block: Callable[[], nn.Module]) -> None:
    net = MomentumSequential(block(), block())
    net(images())
    assert spans(net) == [(0, 2)]


@pytest.mark.parametrize("block", NOT_RESIDUAL.values(), ids=NOT_RESIDUAL)
def test_keeping_the_shape_makes_no_block_residual(block: Callable[[], nn.Module]) -> None:
    net = MomentumSequential(block(), block())
    with pytest.warns(UserWarning, match="no block follows the momentum rule: .* 1 does not add"):
        net(images())
    assert spans(net) == []
    net(images())  # which says nothing any more


def test_finding_runs_leaves_no_trace() -> None:
    net = MomentumSequential(*(Dropping() for _ in range(3)), BasicBlock(8, 8), BasicBlock(8, 8))
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(0)
    random = torch.get_rng_state()

    net.find_runs(images())

    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
