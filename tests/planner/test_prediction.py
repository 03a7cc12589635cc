"""Predicted peaks are compared with measured ones."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

import momconv
from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.planner import prediction
from momconv.planner.measurement import measure, measure_step
from momconv.planner.prediction import PeakMemory, peak_memory
from momconv.vocabulary import STRATEGIES, OptimizerName, Precision
from momconv.zoo.networks import build

CPU = torch.device("cpu")
VARIANTS = ("plain", *STRATEGIES)


def converted(network: nn.Module, strategy: str) -> nn.Module:
    if strategy == "plain":
        return network
    network = momconv.convert(network, stages="all")
    momconv.set_strategy(network, strategy)  # type: ignore[arg-type]
    return network


def vision_transformer() -> Any:
    return VisionTransformer(224, 32, 4, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=10)


def conv_next() -> Any:
    return ConvNeXt([CNBlockConfig(32, 64, 3), CNBlockConfig(64, None, 3)], num_classes=10)


def freeze(model: nn.Module, *, head: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(head))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def errors(
    model: nn.Module, batch: int, resolution: int, precision: Precision = "fp32"
) -> tuple[float, float]:
    """The relative error of what a step allocates, and of the whole peak."""
    predicted = peak_memory(model, batch, resolution, precision)
    measured = measure_step(model, batch, resolution, precision=precision, device=CPU)
    rest = predicted.static + predicted.batch
    return predicted.step / measured - 1, predicted.total / (measured + rest) - 1


def assert_agreement(*args: Any) -> None:
    of_step, of_whole = errors(*args)
    assert abs(of_whole) < 0.03
    assert abs(of_step) < 0.03


# Agreement with measured steps


@pytest.mark.parametrize("strategy", VARIANTS)
def test_the_peak_of_a_residual_network_is_predicted(strategy: str) -> None:
    assert_agreement(converted(build("cifar_resnet20"), strategy), 4, 32)


@pytest.mark.parametrize("strategy", VARIANTS)
def test_the_peak_under_autocast_is_predicted(strategy: str) -> None:
    assert_agreement(converted(build("cifar_resnet20"), strategy), 2, 32, "bf16")


@pytest.mark.parametrize("strategy", ["plain", "momentum"])
def test_the_peak_of_another_family_under_autocast_is_predicted(strategy: str) -> None:
    assert_agreement(converted(conv_next().train(), strategy), 2, 64, "bf16")


def test_the_layout_of_a_single_image_is_predicted() -> None:
    assert_agreement(converted(conv_next().train(), "segment"), 1, 64)


@pytest.mark.parametrize("strategy", ["plain", "checkpoint", "momentum"])
@pytest.mark.parametrize("network", [vision_transformer, conv_next])
def test_the_peak_of_other_families_is_predicted(network: Any, strategy: str) -> None:
    assert_agreement(converted(network().train(), strategy), 4, 224)


@pytest.mark.parametrize(
    ("name", "batch", "resolution"),
    [("resnet18", 1, 64), ("resnet18", 5, 48), ("resnet50", 2, 64), ("resnext50_32x4d", 2, 64)],
)
def test_the_peak_of_an_imagenet_network_is_predicted(
    name: str, batch: int, resolution: int
) -> None:
    assert_agreement(build(name, num_classes=10), batch, resolution)


@pytest.mark.parametrize("strategy", ["plain", "momentum"])
def test_the_peak_with_a_frozen_backbone_is_predicted(strategy: str) -> None:
    model = converted(build("cifar_resnet20"), strategy)
    freeze(model, head="linear")
    assert_agreement(model, 4, 32)
    freeze(model, head="l")  # the stages and the head
    assert_agreement(model, 4, 32)


def test_without_the_memory_of_kernels_a_prediction_would_be_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prediction, "peak_within", lambda *_: 0)
    assert errors(build("resnet18", num_classes=10), 2, 48)[0] < -0.03


# What a prediction costs


def test_a_large_prediction_allocates_next_to_nothing() -> None:
    with torch.device("meta"):
        model = momconv.convert(build("cifar_resnet20"))
    peak_memory(model, 64, 32, strategy="momentum")  # measures each convolution on a few images
    found: list[PeakMemory] = []
    usage = measure(lambda: found.append(peak_memory(model, 2**16, 32, strategy="momentum")), CPU)
    assert 0 < usage < 2**20
    assert found[0].total > 2**34


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = converted(build("cifar_resnet20"), "momentum")
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    peak_memory(model, 2, 32, strategy="checkpoint")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert {stage.strategy for stage in momentum_stages(model).values()} == {"momentum"}


def test_a_model_without_memory_gets_the_same_prediction() -> None:
    with torch.device("meta"):
        nowhere = torchvision.models.resnet18()
    assert peak_memory(nowhere, 3, 64) == peak_memory(torchvision.models.resnet18(), 3, 64)


# What it says


def test_the_parts_add_up_to_the_peak() -> None:
    model = build("cifar_resnet20")
    peak = peak_memory(model, 4, 32, optimizer="adamw", ema=True)
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert peak.gradients == parameters
    assert peak.optimizer == 2 * parameters
    assert peak.ema == peak.weights > parameters
    assert peak.batch == 4 * (3 * 32 * 32 * 4 + 8)
    assert peak.static == peak.weights + peak.gradients + peak.optimizer + peak.ema
    assert peak.total == peak.static + peak.batch + peak.step
    assert sum(kind.bytes for kind in peak.alive) <= peak.step
    assert set(peak.activations) <= {"stem", "layer1", "layer2", "layer3", "head"}
    assert peak.stage in {"stem", "layer1", "layer2", "layer3", "head"}


class Spared(nn.Module):
    """A network with a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = build("cifar_resnet20"), nn.Linear(100, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sgd-8bit", "adamw-8bit"])
def test_what_no_loss_depends_on_has_neither_gradient_nor_state(optimizer: OptimizerName) -> None:
    model = Spared()
    whole, used = (peak_memory(m, 2, 32, optimizer=optimizer) for m in (model, model.used))
    assert whole.weights == used.weights + 4 * (100 * 100 + 100)
    assert (whole.gradients, whole.optimizer, whole.step) == (
        *(used.gradients, used.optimizer, used.step),
    )


class Residual(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Run(nn.Module):
    """A run whose tensors are small next to the logits, so that the peak falls into the loss."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        block = [Residual() for _ in range(blocks)]
        self.blocks = momconv.MomentumSequential(*block, gamma=0.5)
        self.head = nn.Linear(3, 64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x.flatten(1)))
        return logits


def test_the_remainders_of_the_momentum_rule_are_told_apart() -> None:
    peak = peak_memory(Run(6), 10_000, 1)
    assert peak.stage == "head"
    assert peak.side_information == 10_000 * 3 * 2  # log2(1/γ) bits a block: int16 for 6 blocks
    assert peak_memory(Run(6), 10_000, 1, strategy="store").side_information == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_convolution_over_channels_is_no_convolution_of_images(precision: Precision) -> None:
    class ChannelAttention(nn.Module):
        """Of ECA-Net (Wang et al. 2020)."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            means = x.mean((2, 3))[:, None]
            gates: Tensor = self.conv(means).sigmoid().transpose(1, 2)[..., None]
            return x * gates

    conv, pool = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(conv, ChannelAttention(), pool, nn.Flatten(), nn.Linear(8, 10))
    assert_agreement(model, 4, 32, precision)


def test_strategies_need_less_than_storing() -> None:
    model = momconv.convert(build("cifar_resnet44"), stages="all")
    store, checkpoint, momentum = (
        peak_memory(model, 4, 32, strategy=strategy).step
        for strategy in ("store", "checkpoint", "momentum")
    )
    assert momentum < checkpoint < store


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    model = build("cifar_resnet20")
    freeze(model, head="linear")
    peak = peak_memory(model, 4, 32, optimizer="adamw")
    assert peak.gradients == 4 * (64 * 10 + 10)
    assert peak.optimizer == 2 * peak.gradients


def test_a_gpu_needs_an_allowance_and_rounds_up() -> None:
    cpu, gpu = (
        peak_memory(build("cifar_resnet20"), 4, 32, device=name) for name in ("cpu", "cuda")
    )
    assert cpu.allowance == 0
    assert gpu.allowance > 2**28
    assert all(kind.bytes % 512 == 0 for kind in gpu.alive)


# What it refuses


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(UsageError, match="unknown device"):
        peak_memory(build("cifar_resnet20"), 2, 32, device="tpu")


def test_an_unknown_strategy_is_an_error() -> None:
    model = momconv.convert(build("cifar_resnet20"))
    with pytest.raises(UsageError, match="unknown strategy"):
        peak_memory(model, 2, 32, strategy="none")  # type: ignore[arg-type]


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.flatten(1))
        return y if y.sum() > 0 else -y


def test_a_model_that_looks_at_values_is_an_error() -> None:
    with pytest.raises(UsageError, match="depends on values"):
        peak_memory(Choosing(), 2, 1)
