"""BatchNorm's second run, which knows the statistics of the batch."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import aftermath, differences, gradient_of, images, square, stack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_of_torch
from torchvision.models.resnet import BasicBlock

from momconv import MomentumSequential
from momconv.errors import NotReproducible
from momconv.momentum.autograd import Strategy
from momconv.momentum.replay import Replay
from momconv.momentum.sequential import Run

KINDS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def watch_norms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a norm that remembers or recalls: whether it takes statistics."""
    calls: list[bool] = []
    compute = torch.native_batch_norm

    def observed(*args: Any) -> Any:
        calls.append(args[5])
        return compute(*args)

    monkeypatch.setattr(torch, "native_batch_norm", observed)
    return calls


@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=5).filter(
        lambda shape: torch.Size(shape).numel() > shape[1]
    ),
    layout=st.sampled_from(["contiguous", "channels last", "gaps"]),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.bfloat16, torch.float32),
        ]
    ),
    scale=st.sampled_from([1e-4, 1.0, 3e3]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=200)
def test_the_second_run_gives_the_same_bits(
    shape: list[int], layout: str, dtypes: tuple[torch.dtype, torch.dtype], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(shape) * scale + scale * torch.randn(())).to(dtypes[0])
    if layout == "channels last" and len(shape) > 3:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[len(shape)])
    elif layout == "gaps":
        x = torch.stack([x, x], -1)[..., 0]
    norm = KINDS[len(shape)](shape[1]).to(dtypes[1])
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    replay = Replay(norm)

    first = replay.first(x)

    assert torch.equal(replay.repeat(x), first)
    assert torch.equal(copy.deepcopy(norm)(x), first)


def test_statistics_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = stack(3, strategy="checkpoint")
    calls = watch_norms(monkeypatch)

    square(net(images())).backward()

    assert calls == [True] * 6 + [False] * 6


class Unusual(nn.Module):
    """A residual block with a norm of one's choice."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


class Doubling(nn.BatchNorm2d):
    """A norm with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Twice(nn.Module):
    """Calls its norm twice, and another not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.idle = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(torch.tanh(self.norm(x)))
        return y


class WithAndWithoutGaps(nn.Module):
    """Calls its norm on pixels that lie side by side in memory, and on some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x) + self.norm(x[:, :, ::2]).mean((2, 3), keepdim=True)
        return y


class Checkpointing(nn.Module):
    """Uses PyTorch's checkpointing, which updates a norm's statistics twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint_of_torch(self.norm, x, use_reentrant=False)
        return y


def with_own_forward() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.forward = torch.sin  # type: ignore[method-assign]
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(8),
    "without weights": lambda: nn.BatchNorm2d(8, affine=False),
    "without running statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "with a cumulative average": lambda: nn.BatchNorm2d(8, momentum=None),
    "in evaluation": lambda: nn.BatchNorm2d(8).eval(),
    "frozen": lambda: freeze(nn.BatchNorm2d(8), "weight", "bias"),
    "with a frozen weight": lambda: freeze(nn.BatchNorm2d(8), "weight"),
    "with a frozen bias": lambda: freeze(nn.BatchNorm2d(8), "bias"),
    "a subclass": lambda: Doubling(8),
    "with a forward of its own": with_own_forward,
    "called twice": Twice,
    "called with gaps in memory and without": WithAndWithoutGaps,
    "for groups": lambda: nn.GroupNorm(2, 8),
    "for instances": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "checkpointed": Checkpointing,
}


def freeze(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad = False
    return module


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum"])
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())
def test_exact_with_any_norm(make: Callable[[], nn.Module], strategy: Strategy) -> None:
    torch.manual_seed(0)
    net = MomentumSequential(*(Unusual(make()) for _ in range(3)), runs=[Run(0, 3, (1.0,) * 3)])

    ours = aftermath(net, images(), strategy)

    different = differences(ours, aftermath(net, images(), "store"))
    assert not different


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum"])
def test_exact_where_a_block_calls_a_norm_of_another(strategy: Strategy) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    net = MomentumSequential(*(Unusual(norm) for _ in range(3)))

    ours = aftermath(net, images(), strategy)

    assert not differences(ours, aftermath(net, images(), "store"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_both_runs_of_a_compiled_block_are_one_program() -> None:
    programs: list[nn.Module] = []

    def backend(program: nn.Module, _inputs: object) -> Callable[..., Any]:
        programs.append(program)
        return program.forward

    net = stack(2, strategy="checkpoint")
    for block in net:
        block.compile(backend=backend)
    loss = square(net(images()))
    compiled = len(programs)
    if not compiled:
        pytest.skip("this PyTorch compiles nothing while saved tensors have hooks")

    loss.backward()

    assert len(programs) == compiled


class Inverted(nn.Module):
    """Calls its norms in another order each time."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.backwards = False

    def forward(self, x: Tensor) -> Tensor:
        first, second = reversed(self.norms) if self.backwards else self.norms
        self.backwards = not self.backwards
        y: Tensor = second(torch.tanh(first(x)))
        return x + y


def test_another_order_of_calls_is_noticed() -> None:
    net = MomentumSequential(Inverted(), runs=[], strategy="checkpoint")

    with pytest.raises(NotReproducible, match="another order"):
        square(net(images())).backward()


@pytest.mark.parametrize("strategy", ["checkpoint", "momentum"])
def test_other_threads_find_the_norms_own_forward(strategy: Strategy) -> None:
    def step(net: nn.Module, x: Tensor) -> Tensor:
        waiting = {block for block in net.modules() if isinstance(block, BasicBlock)}

        def call_elsewhere(block: BasicBlock, y: Tensor) -> None:
            if block in waiting:  # not in backward
                waiting.remove(block)
                thread = threading.Thread(target=block.bn1, args=(y.detach(),))
                thread.start()
                thread.join()

        for block in [*waiting]:
            block.conv1.register_forward_hook(lambda _, __, y, at=block: call_elsewhere(at, y))
        return square(net(x))

    net = stack(2, runs=[Run(0, 2, (1.0, 1.0))])

    ours = aftermath(net, images(), strategy, step)

    assert not differences(ours, aftermath(net, images(), "store", step))


@pytest.mark.parametrize("fails", [False, True])
def test_the_norms_get_their_own_forward_back(*, fails: bool) -> None:
    net = stack(2, strategy="checkpoint", runs=[])
    last = net[1]
    assert isinstance(last, BasicBlock)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]

    if fails:
        last.add_module("conv2", nn.Flatten())
        with pytest.raises(ValueError, match="expected 4D input"):
            net(images())
    else:
        square(net(images())).backward()

    assert not [norm for norm in norms if "forward" in vars(norm)]


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 5, 3, 3), (2, 8, 3)])
def test_the_errors_are_pytorchs(shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm2d(8)
    with pytest.raises((ValueError, RuntimeError)) as plain:
        copy.deepcopy(norm)(torch.randn(shape))

    with pytest.raises(plain.type) as ours:
        Replay(norm).first(torch.randn(shape))

    assert str(ours.value) == str(plain.value)


class PartlyCompiled(nn.Module):
    """A residual block of which a part is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    @torch.compile(backend="eager")
    def residual(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("strategy", ["checkpoint", "momentum"])
def test_exact_where_a_part_of_a_block_is_compiled(strategy: Strategy) -> None:
    torch.manual_seed(0)
    net = MomentumSequential(*(PartlyCompiled() for _ in range(3)))

    ours = aftermath(net, images(), strategy)

    assert not differences(ours, aftermath(net, images(), "store"))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_exact_where_nothing_but_a_norm_is_trained(trained: str) -> None:
    gradients = []
    for strategy in ("checkpoint", "store"):
        torch.manual_seed(0)
        net = MomentumSequential(Unusual(nn.BatchNorm2d(8)), runs=[], strategy=strategy)
        for name, parameter in net.named_parameters():
            parameter.requires_grad = name == f"0.norm.{trained}"
        square(net(images())).backward()
        gradients.append(gradient_of(net.get_parameter(f"0.norm.{trained}")))

    assert torch.equal(*gradients)
