"""Second derivatives, and what transforms and traces a network: right, or refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import Scaled, images, square, stack
from torch import Tensor, func, nn
from torch.autograd import forward_ad, functional
from torchvision.models.feature_extraction import create_feature_extractor

from momconv import MomentumSequential, convert, set_strategy
from momconv.errors import UsageError
from momconv.zoo.networks import build

# PyTorch's own, of torch.jit.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)

RECOMPUTING = ["checkpoint", "segment", "momentum"]


def network(strategy: Any = "store") -> MomentumSequential:
    torch.manual_seed(0)
    net = MomentumSequential(*(Scaled() for _ in range(4)), gamma=0.8)
    net(images())
    set_strategy(net, strategy)
    return net


def textbook() -> Callable[[Tensor], Tensor]:
    """Equation (2) in double precision."""
    blocks = [*network().double()]

    def loop(x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for block in blocks:
            v = 0.8 * v + 0.2 * (block(x) - x)
            x = x + v
        return x

    return loop


def loss(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return net(x).pow(3).mean()


def direction() -> Tensor:
    return images(seed=5)


def penalty(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a gradient's norm."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(net, x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def forward_mode(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction().to(x.dtype))
        tangent: Tensor = forward_ad.unpack_dual(net(dual)).tangent
        return tangent


Derivative = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
SECOND: dict[str, Derivative] = {
    "jvp": lambda net, x: functional.jvp(net, x, direction().to(x.dtype))[1],
    "hvp": lambda net, x: functional.hvp(partial(loss, net), x, direction().to(x.dtype))[1],
    "vhp": lambda net, x: functional.vhp(partial(loss, net), x, direction().to(x.dtype))[1],
    "penalty": penalty,
}
TRANSFORMED: dict[str, Derivative] = {
    "grad": lambda net, x: func.grad(partial(loss, net))(x),
    "vmap of grad": lambda net, x: func.vmap(func.grad(partial(loss, net)))(x[:, None]),
    "jacrev": lambda net, x: func.jacrev(lambda z: net(z).sum((0, 2, 3)))(x),
    "jacfwd": lambda net, x: func.jacfwd(lambda z: net(x + z[:, None, None]))(x.new_zeros(8)),
    "func.jvp": lambda net, x: func.jvp(net, (x,), (direction().to(x.dtype),))[1],
    "forward mode": forward_mode,
    "hessian": lambda net, x: func.hessian(lambda z: loss(net, x * z))(x.new_ones(())),
}


@pytest.mark.parametrize("derivative", (SECOND | TRANSFORMED).values(), ids=SECOND | TRANSFORMED)
def test_derivatives_are_right_where_all_is_stored(derivative: Derivative) -> None:
    expected = derivative(textbook(), images().double()).float()

    found = derivative(network(), images())

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", RECOMPUTING)
@pytest.mark.parametrize("derivative", SECOND.values(), ids=SECOND)
def test_second_derivatives_of_what_is_recomputed_are_refused(
    derivative: Derivative, strategy: str
) -> None:
    with pytest.raises(UsageError, match="no second derivatives") as caught:
        derivative(network(strategy), images())
    assert caught.value.fix == 'momconv.set_strategy(model, "store")'


@pytest.mark.parametrize("strategy", RECOMPUTING)
@pytest.mark.parametrize("derivative", TRANSFORMED.values(), ids=TRANSFORMED)
def test_a_transform_gets_its_derivatives_from_operations(
    derivative: Derivative, strategy: str
) -> None:
    torch.testing.assert_close(
        derivative(network(strategy), images()), derivative(network(), images()), rtol=0, atol=0
    )


def test_a_transform_computes_the_values_of_a_pass() -> None:
    net = network()
    assert torch.equal(func.vmap(net)(images()[:, None])[:, 0], net(images()))


@pytest.mark.parametrize("strategy", ["store", "checkpoint", "segment"])
def test_gradients_pass_the_check_of_pytorch_itself(strategy: Any) -> None:
    x = images()[:1, :, :1, :1].double().requires_grad_()
    assert torch.autograd.gradcheck(network(strategy).double(), x)


def test_second_derivatives_through_a_stem_are_refused() -> None:
    model = convert(build("cifar_resnet20"), stages="all").eval()
    x = torch.randn(2, 3, 16, 16, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(square(model(x)), x, create_graph=True)[0]

    with pytest.raises(UsageError, match="no second derivatives"):
        gradient()
    set_strategy(model, "store")
    assert torch.autograd.grad(gradient().sum(), x)[0].any()


def traced(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return torch.jit.trace(model, x, check_trace=False)


TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.fx": lambda model, _: torch.fx.symbolic_trace(model),
    "torch.jit": traced,
    "torch.jit with gradients": partial(torch.jit.trace, check_trace=False),
    "torchvision": lambda model, _: create_feature_extractor(model, {"linear": "y"}),
}


@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_a_graph_computes_the_same_for_other_batches(
    trace: Callable[[nn.Module, Tensor], Any],
) -> None:
    model = convert(build("cifar_resnet20"), stages="all").eval()
    x, more = torch.randn(2, 3, 16, 16), torch.randn(5, 3, 16, 16)
    expected = model(more)

    found = trace(model, x)(more)

    assert torch.equal(found["y"] if isinstance(found, dict) else found, expected)


def test_a_stage_is_a_leaf_of_a_graph() -> None:
    model = convert(build("cifar_resnet20"), stages="all").eval()
    graph = torch.fx.symbolic_trace(model).graph
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    assert [t for t in targets if str(t).startswith("layer")] == ["layer1", "layer2", "layer3"]
    with pytest.raises(UsageError, match="a momentum stage as a whole"):
        torch.fx.symbolic_trace(stack(3))


def test_a_stage_cannot_be_scripted() -> None:
    for model in (stack(3), nn.Sequential(nn.Conv2d(8, 8, 1), stack(3))):
        with pytest.raises(UsageError, match="cannot be scripted") as caught:
            torch.jit.script(model)
        assert caught.value.fix == "torch.jit.trace(model.eval(), images)"
