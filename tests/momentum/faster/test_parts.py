"""Blocks that are computed again in two parts: less is alive at once, and nothing changes."""

from typing import Literal

import pytest
import torch
from networks import aftermath, differences, gradient_of, square, under_bf16_autocast
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from momconv import MomentumSequential, set_strategy
from momconv.errors import InversionError
from momconv.planner.measurement import measure


def transformer(dropout: float = 0.0) -> MomentumSequential:
    torch.manual_seed(0)
    blocks = (EncoderBlock(2, 16, 64, dropout, attention_dropout=dropout) for _ in range(4))
    return MomentumSequential(*blocks)


def tokens(count: int = 2) -> Tensor:
    return torch.randn(count, 9, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("step", [lambda net, x: square(net(x)), under_bf16_autocast])
def test_gradients_are_those_of_storing_everything(dropout: float, step: object) -> None:
    net = transformer(dropout)

    stored, ours = (aftermath(net, tokens(), how, step) for how in ("store", "auto"))  # type: ignore[arg-type]

    assert differences(ours, stored) == []


def test_exact_where_the_largest_tensor_is_a_weight() -> None:
    net, x = transformer(), tokens(count=1)  # in half precision, of so few tokens

    stored, ours = (aftermath(net, x, how, under_bf16_autocast) for how in ("store", "auto"))

    assert differences(ours, stored) == []


def test_exact_where_the_first_part_needs_no_gradient() -> None:
    net = transformer()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("mlp" in name)

    def step(net: nn.Module, x: Tensor) -> Tensor:
        return square(net(x.detach()))

    stored, ours = (aftermath(net, tokens(), how, step) for how in ("store", "auto"))

    assert differences(ours, stored) == []


def test_blocks_with_an_input_kept_may_be_computed_in_parts_too() -> None:
    net = transformer()
    stored = aftermath(net, tokens(), "store")
    set_strategy(net, "checkpoint")
    net.in_parts = True

    square(net(tokens())).backward()

    gradients = {f"grad {name}": parameter.grad for name, parameter in net.named_parameters()}
    assert all(torch.equal(stored[name], gradients[name]) for name in gradients)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("part", ["", "mlp", "self_attention"])
def test_exact_where_a_block_or_a_part_of_it_is_compiled(part: str) -> None:
    gradients = []
    for strategy in ("store", "auto"):
        net = transformer()
        net.find_runs(tokens())
        for block in net:
            block.get_submodule(part).compile(backend="aot_eager")
        set_strategy(net, strategy)
        square(net(tokens())).backward()
        gradients.append([gradient_of(parameter) for parameter in net.parameters()])

    assert all(map(torch.equal, *gradients))


def calls_of(module: nn.Module, net: nn.Module) -> int:
    calls: list[object] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    square(net(tokens())).backward()
    return len(calls)


def test_the_second_repetition_goes_no_further_than_the_middle() -> None:
    net = transformer()
    net.find_runs(tokens())
    set_strategy(net, "auto")

    block = net[2]
    assert calls_of(block.ln_1, net) == 3
    assert calls_of(block.mlp[0], net) == 2  # which makes the hidden layer
    assert calls_of(block.mlp[3], net) == 2


def test_one_repetition_has_all_that_an_operation_saved() -> None:
    """Its other part is not alive while the operation's gradients are computed."""
    net, x = transformer(), tokens(count=1)
    net.find_runs(x)
    set_strategy(net, "auto")
    events: list[str] = []
    net[2].ln_1.register_forward_hook(lambda *_: events.append("run"))
    net[2].mlp[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))

    under_bf16_autocast(net, x).backward()  # where the largest tensor is this weight

    assert events == ["run", "run", "gradient", "run"]


def peak(strategy: Literal["momentum", "auto"]) -> float:
    net, x = transformer(), tokens(count=64)
    net.find_runs(x)
    set_strategy(net, strategy)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return measure(lambda: square(net(x)).backward(), torch.device("cpu")) / x.nbytes


def test_what_attention_saved_is_not_alive_at_the_peak() -> None:
    # q, k, v and what attention made of them: four tensors of x's size
    assert peak("auto") <= peak("momentum") - 4


def test_a_second_backward_explains_itself() -> None:
    net = transformer()
    set_strategy(net, "auto")
    loss = square(net(tokens()))
    loss.backward(retain_graph=True)

    with pytest.raises(InversionError, match="second time"):
        loss.backward()
