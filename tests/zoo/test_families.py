"""Every family of networks that momconv converts, by its smallest member on small images."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.maxvit import MaxVit
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

import momconv
from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.planner.measurement import measure_step
from momconv.surgery.conversion import revert
from momconv.zoo.networks import build

Spans = dict[str, list[tuple[int, int]]]
FAMILIES: dict[str, Spans] = {
    "resnet18": {"layer1": [(0, 2)]},
    "resnext50_32x4d": {"layer1": [(1, 3)], "layer2": [(1, 4)], "layer3": [(1, 6)]}
    | {"layer4": [(1, 3)]},
    "wide_resnet50_2": {"layer1": [(1, 3)], "layer2": [(1, 4)], "layer3": [(1, 6)]}
    | {"layer4": [(1, 3)]},
    "regnet_x_400mf": {"trunk_output.block3": [(1, 7)], "trunk_output.block4": [(1, 12)]},
    "regnet_y_400mf": {"trunk_output.block2": [(1, 3)]}
    | {f"trunk_output.block{n}": [(1, 6)] for n in (3, 4)},
    "convnext_tiny": {f"features.{n}": [(0, 9 if n == 5 else 3)] for n in (1, 3, 5, 7)},
    "vit_b_32": {"encoder.layers": [(0, 12)]},
    "swin_t": {f"features.{n}": [(0, 6 if n == 5 else 2)] for n in (1, 3, 5, 7)},
    "swin_v2_t": {f"features.{n}": [(0, 6 if n == 5 else 2)] for n in (1, 3, 5, 7)},
    "efficientnet_b0": {"features.4": [(1, 3)], "features.5": [(1, 3)], "features.6": [(1, 4)]},
    "efficientnet_v2_s": {"features.1": [(0, 2)], "features.2": [(1, 4)], "features.3": [(1, 4)]}
    | {"features.4": [(1, 6)], "features.5": [(1, 9)], "features.6": [(1, 15)]},
    "mobilenet_v2": {"features": [(5, 7), (8, 11), (12, 14), (15, 17)]},
    "mobilenet_v3_small": {"features": [(5, 7), (10, 12)]},
    "mnasnet0_5": {f"layers.{n}": [(1, 3)] for n in (8, 9, 10)} | {"layers.12": [(1, 4)]},
}
SIDE = 32


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name, num_classes=3, resolution=SIDE)


def spans(model: nn.Module) -> Spans:
    stages = momentum_stages(model).items()
    return {name: [(r.start, r.stop) for r in stage.runs or ()] for name, stage in stages}


def step(model: nn.Module, strategy: str) -> dict[str, Tensor]:
    """What a training step leaves behind, stochastic depth and dropout included."""
    model = copy.deepcopy(model).train()
    set_strategy(model, strategy)  # type: ignore[arg-type]
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return left | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_converted_trained_exactly_saved_and_turned_back(
    name: str, tmp_path: Path
) -> None:
    plain = make(name)
    model = momconv.convert(plain, stages="all")
    assert {stage: runs for stage, runs in spans(model).items() if runs} == FAMILIES[name]
    assert list(model.state_dict()) == list(plain.state_dict())

    images = torch.randn(2, 3, SIDE, SIDE)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert momconv.calibrate(model, [images]).layers == norms

    stored, reconstructed = step(model, "store"), step(model, "momentum")
    assert stored.keys() == reconstructed.keys()
    assert all(torch.equal(value, reconstructed[key]) for key, value in stored.items())
    for key, parameter in model.named_parameters():
        parameter.grad = reconstructed[key]
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.optim.SGD(model.parameters(), 0.1).step()

    momconv.save(model, tmp_path / "model.safetensors")
    loaded = momconv.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), model.eval()(images))
    again, size = revert(loaded), {"image_size": SIDE} if name.startswith("vit") else {}
    theirs = get_model(name, num_classes=3, **size).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images), theirs(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_peak_is_predicted(name: str) -> None:
    model = momconv.convert(make(name), stages="all").train()
    predicted = momconv.peak_memory(model, 2, SIDE)
    measured = measure_step(model, 2, SIDE, precision="fp32", device=torch.device("cpu"))
    assert predicted.step == pytest.approx(measured.peak_bytes, rel=0.03)


def test_a_list_of_blocks_is_converted_and_the_longer_of_nested_runs_counts() -> None:
    torch.manual_seed(0)
    plain = MaxVit((SIDE, SIDE), 8, 2, [8, 16], [1, 4], 4, 0.2, num_classes=3)
    images = torch.ones(2, 3, SIDE, SIDE)
    model = momconv.convert(plain, stages="all", inputs=[images])
    assert spans(model) == {
        "blocks.0.layers.0.layers": [(1, 3)],
        "blocks.1.layers": [(1, 4)],
        "blocks.1.layers.0.layers": [(1, 3)],
    }
    stored, reconstructed = step(model, "store"), step(model, "momentum")
    assert all(torch.equal(value, reconstructed[key]) for key, value in stored.items())
    assert not torch.equal(model.eval()(images), plain.eval()(images))
    assert [type(module) for module in revert(model).modules()] == [
        type(module) for module in plain.modules()
    ]


def test_backbones_of_segmentation_are_converted_where_they_are_with_exact_gradients() -> None:
    images = torch.randn(2, 3, SIDE, SIDE)
    for make in (fcn_resnet50, deeplabv3_resnet50):
        check_backbone(make(weights=None, weights_backbone=None), "backbone", images)


def test_a_backbone_of_detection_is_converted_where_it_is_with_exact_gradients() -> None:
    plain = retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=64)
    boxes, labels = torch.tensor([[2.0, 2.0, 30.0, 30.0]]), torch.tensor([1])
    check_backbone(
        plain, "backbone.body", [torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": labels}]
    )


def check_backbone(plain: nn.Module, backbone: str, *inputs: Any) -> None:
    """Convert it all, and compare the gradients of some loss."""
    model = momconv.convert(plain, stages="all").train()
    found = {name for name, runs in spans(model).items() if runs}
    assert {f"{backbone}.layer2", f"{backbone}.layer3"} <= found
    gradients = []
    for strategy in ("store", "momentum"):
        momconv.set_strategy(model, strategy)
        model.zero_grad()
        torch.manual_seed(0)
        total = sum(output.square().mean() for output in model(*inputs).values())
        total.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
