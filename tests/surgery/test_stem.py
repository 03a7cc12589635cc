import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import momconv
from momconv.errors import InversionError, NotReproducible, UsageError
from momconv.planner.prediction import peak_memory
from momconv.surgery.stem import restore_stem
from momconv.zoo.networks import build


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Network(nn.Module):
    """Its stem has functions, statistics and random numbers, and goes past the stages too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = beginning = F.dropout(F.relu(self.norm(self.conv(images))), 0.2, self.training)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head((x + beginning.square()).mean((2, 3)))
        return logits


def make(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return momconv.convert(Network(), inputs=[IMAGES], **options).train()  # type: ignore[arg-type]


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, strategy: str) -> dict[str, Tensor]:
    momconv.set_strategy(model, strategy)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model(IMAGES).square().sum().backward()
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return left | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("strategy", ["momentum", "checkpoint", "segment", "auto"])
def test_a_stem_is_recomputed_exactly_whatever_it_does(strategy: str) -> None:
    model = make()
    stored, recomputed = step(copy.deepcopy(model), "store"), step(copy.deepcopy(model), strategy)
    assert stored.keys() == recomputed.keys()
    assert all(torch.equal(value, recomputed[key]) for key, value in stored.items())


@pytest.mark.parametrize(("name", "side"), [("resnet18", 224), ("cifar_resnet20", 32)])
def test_recomputing_a_stem_takes_less_memory(name: str, side: int) -> None:
    model = momconv.convert(build(name)).train()
    recomputed = peak_memory(model, 8, side).step
    restore_stem(model)
    assert recomputed < peak_memory(model, 8, side).step


def test_a_stem_that_fails_leaves_the_next_pass_alone() -> None:
    model = make()
    with pytest.raises(RuntimeError):
        model(IMAGES[:, :2])
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()  # keeps what it saves
    assert all(torch.equal(*pair) for pair in zip(*map(gradients, (model, make())), strict=True))


def gradients(model: nn.Module) -> list[Tensor]:
    left = step(model, "momentum")
    return [value for key, value in left.items() if not key.startswith("buffer")]


def test_a_second_backward_pass_through_a_stem_is_refused() -> None:
    model, seen = make(), list[Tensor]()
    model.get_submodule("blocks").register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(IMAGES)
    seen[0].sum().backward(retain_graph=True)
    with pytest.raises(InversionError, match="asked again"):
        seen[0].sum().backward()


def test_a_stem_that_writes_into_the_images_is_refused() -> None:
    model = make()
    model.register_forward_pre_hook(lambda _, args: (args[0].clone(),), prepend=True)
    model.get_submodule("conv").register_forward_pre_hook(lambda _, args: (args[0].add_(1),))
    with pytest.raises(UsageError, match="modifies its input in place"):
        model(IMAGES)


@pytest.mark.parametrize("strategy", ["momentum", "checkpoint", "segment", "auto"])
@pytest.mark.parametrize("name", ["images", "conv.weight", "norm.weight", "blocks.1.layer.weight"])
def test_what_a_pass_computed_with_may_not_change_before_backward(name: str, strategy: str) -> None:
    model, images = make(), IMAGES.clone()
    momconv.set_strategy(model, strategy)  # type: ignore[arg-type]
    loss = model(images).square().sum()
    with torch.no_grad():
        (images if name == "images" else model.get_parameter(name)).mul_(1.5)

    with pytest.raises(InversionError, match="was modified in place before backward"):
        loss.backward()


@pytest.mark.parametrize("strategy", ["momentum", "checkpoint", "segment", "auto"])
def test_an_optimiser_may_step_while_backward_is_under_way(strategy: str) -> None:
    def train(strategy: str) -> list[Tensor]:
        model = make()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_descend)
        step(model, strategy)
        return [*model.parameters()]

    assert all(map(torch.equal, train(strategy), train("store")))


class Interrupting(nn.Identity):
    """As Ctrl-C in the third of the passes that are trained."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += torch.is_grad_enabled()
        if self.passes == 3:
            raise KeyboardInterrupt
        return x


def test_an_interruption_in_the_stem_leaves_nothing_behind() -> None:
    original = Network().eval()
    model = momconv.convert(original, inputs=[IMAGES])
    model.norm = nn.Sequential(model.norm, Interrupting())  # type: ignore[arg-type]

    done = momconv.distill(model, original, [torch.randn(20, 3, 6, 6)])

    assert done.interrupted
    copy.deepcopy(model)
    weight = torch.ones(3, requires_grad=True)
    weight.square().sum().backward()  # has nothing to do with it
    assert torch.equal(weight.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["store", "momentum", "checkpoint", "segment", "auto"])
def test_a_pass_may_come_to_no_stage(strategy: str) -> None:
    class Leaving(Network):
        leaves = False

        def forward(self, images: Tensor) -> Tensor:
            if not self.leaves:
                return super().forward(images)
            logits: Tensor = self.head(F.relu(self.conv(images)).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    plain = Leaving()
    model = momconv.convert(plain, inputs=[IMAGES])
    plain.leaves = model.leaves = True  # type: ignore[assignment]

    ours, theirs = step(model, strategy), {}
    plain(IMAGES).square().sum().backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

    assert theirs
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


def test_threads_may_share_a_network() -> None:
    original = Network().eval()
    model = momconv.convert(original, inputs=[IMAGES])
    momconv.set_strategy(model, "store")
    batches = [torch.randn(2, 3, 6, 6) for _ in range(40)]
    expected = [model(images) for images in batches]
    momconv.set_strategy(model, "auto")

    with ThreadPoolExecutor(8) as pool:  # each with gradients on, as a thread begins
        found = [*pool.map(model, batches)]

    assert all(map(torch.equal, found, expected))


class Foreign(nn.Module):
    """A layer that computes something else each time, which PyTorch does not know."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.calls = layer, how, 0
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.how == "writes past PyTorch":
            x.data.mul_(1.5)
        factors = {
            "numpy": 0.5 + np.random.rand(),
            "generator": torch.rand((), generator=self.generator),
            "counter": float(self.calls),
        }
        y = self.layer(x)
        if self.how == "order":
            return torch.tanh(y)[torch.arange(len(y)).roll(self.calls)]
        if self.how == "branch":  # what is saved last is the same
            return torch.tanh(y * factors["counter"]) + torch.tanh(y)
        return torch.tanh(y * factors.get(self.how, 1.0))


@pytest.mark.parametrize(
    "how", ["numpy", "generator", "counter", "order", "branch", "writes past PyTorch"]
)
@pytest.mark.parametrize("strategy", ["auto", "segment"])
@pytest.mark.parametrize("place", ["conv1", "layer2.0.conv1", "layer2.1.conv1"])
def test_what_is_not_the_same_the_second_time_is_seen_before_any_weight_changes(
    place: str, strategy: str, how: str
) -> None:
    torch.manual_seed(0)
    model = build("cifar_resnet20")
    parent, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Foreign(model.get_submodule(place), how))
    model = momconv.convert(model, stages="all", inputs=[IMAGES])
    momconv.set_strategy(model, strategy)  # type: ignore[arg-type]
    layers = [module for module in model.modules() if isinstance(module, Foreign)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_descend)

    with pytest.raises((NotReproducible, InversionError)):
        model(IMAGES.clone()).square().sum().backward()

    assert all(map(torch.equal, parameters, before))


def _descend(parameter: Tensor) -> None:
    assert parameter.grad is not None
    with torch.no_grad():
        parameter.sub_(0.1 * parameter.grad)
    parameter.grad = None


class Noisy(nn.Module):
    """A stem whose buffer is something else each time, which is seen in its gradients alone."""

    noise: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.how, self.generator = how, torch.Generator().manual_seed(0)
        self.register_buffer("noise", torch.ones(8, 1, 1))
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.rand(8, 1, 1, generator=self.generator)
        if self.how == "written":
            self.noise.copy_(noise)
        elif self.how == "written past PyTorch":
            self.noise.data.add_(noise)
        elif self.how == "new":
            self.noise = noise
        y: Tensor = self.blocks(torch.tanh(self.norm(self.conv(images))) * self.noise)
        return y


@pytest.mark.parametrize("how", ["written", "written past PyTorch", "new", "the same"])
@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum", "auto"])
def test_of_buffers_in_a_stem_only_statistics_may_be_others(how: str, strategy: str) -> None:
    torch.manual_seed(0)
    model = momconv.convert(Noisy("the same"), inputs=[IMAGES]).train()
    model.how = how  # type: ignore[assignment]

    if how == "the same":
        expected, found = step(copy.deepcopy(model), "store"), step(model, strategy)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        return
    with pytest.raises(NotReproducible, match="something else"):
        step(model, strategy)
    assert model.conv.weight.grad is None  # type: ignore[union-attr]


class Spectral(Network):
    """Its stem saves tensors whose signs PyTorch has still to change, and which are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(images).conj()
        images = torch.fft.irfft(spectrum * self.filter, 6) + torch.fft.fft(images).conj().imag
        return super().forward(images * self.filter.conj().imag.sum())


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum", "auto"])
def test_a_stem_may_have_signs_that_are_still_to_be_changed(strategy: str) -> None:
    torch.manual_seed(0)
    model = momconv.convert(Spectral(), inputs=[IMAGES]).train()
    expected, found = step(copy.deepcopy(model), "store"), step(model, strategy)
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_going_back_leaves_nothing_of_it() -> None:
    plain = momconv.revert(make())
    hooks = [h for m in plain.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    assert not any(hooks)


@pytest.mark.parametrize("strategy", ["store", "auto"])
def test_a_network_is_freed_as_soon_as_nobody_holds_it(strategy: str) -> None:
    model = make()
    step(model, strategy)
    freed = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_backward_does_not_need_the_caller_to_hold_the_network() -> None:
    model, images = make(), IMAGES.clone().requires_grad_()
    outputs = model(images)
    del model
    outputs.sum().backward()
    assert images.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_a_network_that_is_compiled_as_a_whole_computes_the_same() -> None:
    expected, model = step(make(), "store"), make()
    model.compile(backend="aot_eager")
    found = step(model, "momentum")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("strategy", ["checkpoint", "momentum", "auto"])
def test_a_hook_that_changes_the_images_may_be_added_later(strategy: str) -> None:
    models = make(), make()
    for model in models:
        model.register_forward_pre_hook(lambda _, args: (3 * args[0] - 1,))
    ours, stored = step(models[0], strategy), step(models[1], "store")
    assert [name for name, value in stored.items() if not torch.equal(value, ours[name])] == []
