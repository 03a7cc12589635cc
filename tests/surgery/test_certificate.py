import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from momconv.errors import DataError, InversionError, UsageError
from momconv.momentum.autograd import Strategy
from momconv.momentum.equations import HEADROOM
from momconv.momentum.sequential import MomentumSequential
from momconv.surgery import certificate
from momconv.surgery.calibration import calibrate
from momconv.surgery.certificate import REST, certify, compare_gradients
from momconv.surgery.conversion import convert
from momconv.zoo.networks import build

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STAGES = ("layer1", "layer2", "layer3")


def network() -> nn.Module:
    torch.manual_seed(0)
    return convert(build("cifar_resnet20"), 0.9, stages="all")


def test_a_converted_network_passes_and_stays_as_it_is() -> None:
    net = network().eval()
    before = copy.deepcopy(net.state_dict())
    random_state = torch.get_rng_state()
    assert compare_gradients(net, IMAGES) == dict.fromkeys((REST, *STAGES), True)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module.training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_frozen_parameters_are_no_obstacle() -> None:
    net = network()
    net.get_submodule("layer1").requires_grad_(False)
    assert all(compare_gradients(net, IMAGES).values())


def test_the_smallest_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_strategy(model: nn.Module, strategy: Strategy) -> None:
        if strategy == "momentum":
            bias = model.get_parameter("linear.bias")
            bias.data[0] = torch.nextafter(bias[0], torch.tensor(9.0))

    monkeypatch.setattr(certificate, "set_strategy", set_strategy)
    assert not compare_gradients(network(), IMAGES)[REST]


def test_a_wrong_gradient_is_found_in_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_strategy(model: nn.Module, strategy: Strategy) -> None:
        if strategy == "momentum":
            weight = model.get_parameter("layer2.1.conv1.weight")
            weight.register_hook(lambda gradient: gradient * (1 + 1e-6))

    monkeypatch.setattr(certificate, "set_strategy", set_strategy)
    found = compare_gradients(network(), IMAGES)
    assert found == {REST: True, "layer1": True, "layer2": False, "layer3": True}


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
        compare_gradients(net, IMAGES)


def test_nothing_is_said_where_storing_does_not_repeat_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a GPU's algorithms may not; other stages are judged all the same."""
    count = iter(range(3))

    def set_strategy(model: nn.Module, _: Strategy) -> None:
        turn = next(count)
        bias = model.get_parameter("layer3.1.bn1.bias")
        bias.register_hook(lambda gradient: gradient + turn)

    monkeypatch.setattr(certificate, "set_strategy", set_strategy)
    found = compare_gradients(network(), IMAGES)
    assert found == {REST: True, "layer1": True, "layer2": True, "layer3": None}
    assert certificate._conclude(found) is None
    assert certificate._conclude({**found, "layer1": False}) is False


def test_a_gpu_is_asked_for_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def deterministic(**asked: bool) -> nullcontext[None]:
        wanted.append(asked)
        return nullcontext()

    class OnAGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(certificate, "deterministic", deterministic)
    monkeypatch.setattr(certificate, "_record", lambda *_: {REST: [IMAGES]})
    assert compare_gradients(nn.Identity(), IMAGES.as_subclass(OnAGpu)) == {REST: True}
    assert compare_gradients(nn.Identity(), IMAGES) == {REST: True}
    assert wanted == [{"wanted": True}, {"wanted": False}]


def test_a_plain_network_has_no_gradients_to_compare() -> None:
    with pytest.raises(UsageError):
        compare_gradients(build("cifar_resnet20"), IMAGES)
    with pytest.raises(UsageError):
        compare_gradients(convert(build("cifar_resnet20"), 0), IMAGES)


# Certificates


def test_a_certificate_says_what_a_conversion_changed() -> None:
    original = build("cifar_resnet20")
    calibrate(original, [torch.randn(50, 3, 16, 16)])
    model = convert(original, 0.9, stages="all")
    before = [[*module._forward_hooks] for module in model.modules()]
    found = certify(model, original, [IMAGES, IMAGES[:1]])
    assert found.drift.images == 3
    assert found.drift.distance > 0.001
    assert found.accuracy is None
    assert found.gradients_exact is True
    assert tuple(stage.name for stage in found.stages) == STAGES
    assert all(stage.gradients_exact for stage in found.stages)
    assert [stage.remainder_bits for stage in found.stages] == [8 / 3, 8 / 2, 8 / 2]
    assert [[*module._forward_hooks] for module in model.modules()] == before
    assert model.training


def test_the_largest_activation_is_that_of_the_run_from_its_input_to_its_output() -> None:
    model, original = network(), build("cifar_resnet20")
    model.eval()
    layer1 = model.get_submodule("layer1")
    assert isinstance(layer1, MomentumSequential)
    seen = list[torch.Tensor]()
    for block in layer1:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    layer1.register_forward_hook(lambda _, __, output: seen.append(output.abs().max()))
    (first, *_) = certify(model, original, [IMAGES]).stages
    with torch.no_grad():
        seen.clear()
        model(IMAGES)
    assert len(seen) == 4
    assert first.largest == float(max(seen))
    (run,) = layer1.runs or ()
    assert first.limit == 2.0 ** (run.exponent or 0)
    assert HEADROOM <= first.headroom_bits < HEADROOM + 1
    assert 2**first.headroom_bits == pytest.approx(first.limit / first.largest)


def test_labels_give_the_accuracy_of_both() -> None:
    original = build("cifar_resnet20").eval()
    labels = original(IMAGES).argmax(1)
    labels[1] = (labels[1] + 1) % 10
    accuracy = certify(convert(original, 0), original, [(IMAGES, labels)]).accuracy
    assert accuracy is not None
    assert (accuracy.original, accuracy.converted) == (0.5, 0.5)


def test_a_plain_network_is_only_compared() -> None:
    original = build("cifar_resnet20")
    for model in (original, convert(original, 0)):
        found = certify(model, original, [IMAGES])
        assert (found.gradients_exact, found.stages) == (None, ())
        assert found.drift.distance == 0


def test_a_certificate_of_no_images_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        certify(network(), build("cifar_resnet20"), [])
