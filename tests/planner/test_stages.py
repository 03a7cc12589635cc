import pytest
import torch
import torchvision
from torch import Tensor, nn

from momconv.planner.prediction import peak_memory
from momconv.planner.stages import assign_modules


def test_the_stages_of_a_residual_network_are_its_layers_stem_and_head() -> None:
    stages = assign_modules(torchvision.models.resnet18())
    layers = [f"layer{n}" for n in range(1, 5)]
    assert list(dict.fromkeys(stages.values())) == ["stem", *layers, "head"]


def test_a_network_without_children_is_one_stage() -> None:
    linear = nn.Linear(2, 2)
    assert assign_modules(linear) == {linear: "model"}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vit_b_32", ["stem", "encoder.layers", "encoder.ln", "heads"]),
        ("regnet_y_400mf", ["stem", *(f"trunk_output.block{n}" for n in range(1, 5)), "head"]),
        ("convnext_tiny", [*(f"features.{n}" for n in range(8)), "avgpool", "classifier"]),
        ("efficientnet_b0", [*(f"features.{n}" for n in range(9)), "avgpool", "classifier"]),
        ("wide_resnet50_2", ["stem", *(f"layer{n}" for n in range(1, 5)), "head"]),
    ],
)
def test_the_stages_of_other_families_are_inside_their_trunk(name: str, stages: list[str]) -> None:
    model = torchvision.models.get_model(name)
    assert list(dict.fromkeys(assign_modules(model).values())) == stages


class Staged(nn.Module):
    """A network whose stage ``wide`` is a thousand times wider than the rest."""

    def __init__(self, wide: str) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        widths = {name: 4000 if name == wide else 4 for name in ("layer1", "layer2", "layer3")}
        for name, width in widths.items():
            fan_in = 3 if name == "layer1" else 4
            layers = (nn.Linear(fan_in, width), nn.Sigmoid(), nn.Linear(width, 4))
            self.add_module(name, nn.Sequential(*layers))
        self.fc = nn.Linear(4, 4000 if wide == "head" else 4)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("wide", ["layer1", "layer2", "layer3", "head"])
def test_the_stage_at_the_peak_is_named(wide: str) -> None:
    assert peak_memory(Staged(wide), 16, 1).stage == wide


def test_a_stage_is_charged_in_the_backward_pass_too() -> None:
    model = Staged("none")
    model.layer2 = nn.Sequential(Inflating())
    assert peak_memory(model, 16, 1).stage == "layer2"


class Inflating(nn.Module):
    """Nothing in the forward pass, much in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.register_hook(self.inflate)
        return y.clone()

    @staticmethod
    def inflate(gradient: Tensor) -> Tensor:
        return gradient + torch.zeros(1_000_000).sum()
