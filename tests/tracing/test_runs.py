"""Which blocks are runs."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Dropping, images
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from momconv import MomentumSequential, convert, revert
from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.surgery.conversion import apply_schemes, read_schemes


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


class Caching(nn.Module):
    """Keeps what it computes when it is called first."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.angles: Tensor | None = None
        self.by_length: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.angles is None:
            self.angles = torch.arange(float(x.shape[-1])).cos()
            self.by_length[x.shape[-1]] = self.angles
            self.register_buffer("shift", self.angles, persistent=False)
        return x + self.angles * self.by_length[x.shape[-1]] + self.shift


def test_what_blocks_keep_of_their_first_call_has_values() -> None:
    by_hand = MomentumSequential(*(Caching() for _ in range(3)))
    converted = convert(nn.Sequential(*(Caching() for _ in range(3))), inputs=[images()])
    for net in (by_hand, converted):
        y = net(images())
        assert type(y) is Tensor
        assert spans(momentum_stages(net)[""]) == [(0, 3)]
        for block in net.modules():
            if isinstance(block, Caching):
                kept = (block.angles, block.shift, *block.by_length.values())
                assert {*map(type, kept)} == {Tensor}


class Chain(nn.Module):
    """Calls its blocks in turn, without being a Sequential."""

    def __init__(self, *blocks: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        for n, block in enumerate(blocks):
            self.add_module(f"b{n}", block)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x if self.scale == 1 else x * self.scale


class Counted(Adding):
    """Gets a number of its own."""

    def __init__(self) -> None:
        super().__init__(torch.add)

    def forward(self, x: Tensor, *, rate: float = 0.0) -> Tensor:
        return super().forward(x)


class InDictionary(nn.Module):
    """Calls the items of a plain dictionary in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"{n}": BasicBlock(8, 8) for n in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


class Around(nn.ModuleDict):
    """Calls each of its items with another rate."""

    def __init__(self) -> None:
        super().__init__({f"{n}": Counted() for n in range(4)})

    def forward(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.values()):
            x = block(x, rate=n / 4)
        return x


def test_children_that_are_called_in_turn_become_a_stage() -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(8, 16, 1), *(BasicBlock(16, 16) for _ in range(3))]
    plain = nn.Sequential(Chain(*blocks), nn.ReLU()).eval()

    model = convert(plain, inputs=[images()])

    stage = model.get_submodule("0")
    assert isinstance(stage, MomentumSequential)
    assert spans(stage) == [(1, 4)]
    back = revert(model)
    assert type(back.get_submodule("0")) is Chain
    assert torch.equal(back(images()), plain(images()))
    assert torch.equal(
        apply_schemes(copy.deepcopy(plain), read_schemes(model))(images()), model(images())
    )


def test_children_of_a_module_that_does_more_stay() -> None:
    blocks = [BasicBlock(8, 8) for _ in range(3)]
    with pytest.raises(UsageError):
        convert(nn.Sequential(Chain(*blocks, scale=2.0)), inputs=[images()])


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (
            lambda: nn.Sequential(BasicBlock(8, 8), nn.Conv2d(8, 8, 1), BasicBlock(8, 8)),
            "BasicBlock 2 has no other residual block of its shape next to it",
        ),
        (
            lambda: nn.Sequential(*(nn.Dropout() for _ in range(3))),
            "Dropout 2 does not add something",
        ),
        (lambda: Bottleneck(8, 2), "it: no two modules of one class"),
        (
            lambda: nn.Sequential(Chain(*(BasicBlock(8, 8) for _ in range(3)), scale=2.0)),
            "0: its forward does more than to call one block after another",
        ),
        (InDictionary, "blocks: a loop calls its blocks, which belong in a ModuleList"),
        (Around, r"Counted 3 does not get the same further arguments .*: rate differs"),
    ],
)
def test_a_refusal_gives_the_real_reason(network: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        convert(network(), inputs=[images()], stages="all")


def test_transformers_are_converted_whole() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    x = torch.randn(2, 5, 8)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = convert(encoder, inputs=[x]).eval()
    stages = {name: spans(stage) for name, stage in momentum_stages(model).items()}
    assert stages == {"layers": [(0, 4)]}
    assert torch.equal(revert(model).eval()(x), encoder.eval()(x))
    both = nn.Transformer(8, 2, 4, 4, 16, batch_first=True)
    stages = {n: spans(s) for n, s in momentum_stages(convert(both, inputs=[x, x])).items()}
    assert stages == {"encoder.layers": [(0, 4)], "decoder.layers": [(0, 4)]}
