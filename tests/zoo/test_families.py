"""Every family of networks that momconv converts, by its smallest member on small images."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    retinanet_resnet50_fpn,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.maxvit import MaxVit
from torchvision.models.segmentation import (
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet50,
    fcn_resnet50,
    lraspp_mobilenet_v3_large,
)

import momconv
from momconv.errors import UsageError
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, list[str], nn.Module]:
    """Its name, the keys of the plain network, and the converted one, which must stay as it is."""
    plain = make(request.param)
    return request.param, list(plain.state_dict()), momconv.convert(plain, stages="all")


def test_a_family_is_converted_trained_exactly_saved_and_turned_back(
    family: tuple[str, list[str], nn.Module], tmp_path: Path
) -> None:
    name, keys, converted = family
    model = copy.deepcopy(converted)
    assert {stage: runs for stage, runs in spans(model).items() if runs} == FAMILIES[name]
    assert list(model.state_dict()) == keys

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


def test_the_peak_is_predicted(family: tuple[str, list[str], nn.Module]) -> None:
    model = copy.deepcopy(family[-1]).train()
    predicted = momconv.peak_memory(model, 2, SIDE)
    measured = measure_step(model, 2, SIDE, precision="fp32", device=torch.device("cpu"))
    assert predicted.step == pytest.approx(measured, rel=0.03)


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
    stored = step(model, "store")
    for strategy in ("momentum", "auto"):  # which computes blocks of the first stage in parts
        reconstructed = step(model, strategy)
        assert all(torch.equal(value, reconstructed[key]) for key, value in stored.items())
    assert not torch.equal(model.eval()(images), plain.eval()(images))
    assert [type(module) for module in revert(model).modules()] == [
        type(module) for module in plain.modules()
    ]


LAYERS = {"backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4"}
SEGMENTATION = {
    fcn_resnet50: LAYERS,
    deeplabv3_resnet50: LAYERS,
    deeplabv3_mobilenet_v3_large: {"backbone"},
    lraspp_mobilenet_v3_large: {"backbone"},
}
BOXES = {"boxes": torch.tensor([[2.0, 2.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
SMALL = {"min_size": 64, "max_size": 64}
DETECTION: dict[Any, tuple[dict[str, int], set[str]]] = {
    retinanet_resnet50_fpn: (SMALL, {f"backbone.body.layer{n}" for n in (1, 2, 3, 4)}),
    fasterrcnn_mobilenet_v3_large_320_fpn: (SMALL, {"backbone.body"}),
    ssdlite320_mobilenet_v3_large: ({}, {"backbone.features.0", "backbone.features.1"}),
}


@pytest.mark.parametrize("make", SEGMENTATION, ids=lambda make: str(make.__name__))
def test_a_backbone_of_segmentation_is_converted_where_it_is_with_exact_gradients(
    make: Callable[..., nn.Module],
) -> None:
    plain = make(weights=None, weights_backbone=None)
    check_backbone(plain, SEGMENTATION[make], torch.randn(2, 3, SIDE, SIDE))


@pytest.mark.parametrize("make", DETECTION, ids=lambda make: str(make.__name__))
def test_a_backbone_of_detection_is_converted_where_it_is_with_exact_gradients(
    make: Callable[..., nn.Module],
) -> None:
    options, found = DETECTION[make]
    plain = make(weights=None, weights_backbone=None, **options)
    check_backbone(plain, found, [torch.rand(3, 64, 64)] * 2, [BOXES] * 2)


def check_backbone(plain: nn.Module, found: set[str], *inputs: Any) -> None:
    """Convert it all, compare what is left of a step with some loss, and turn it back."""
    model = momconv.convert(plain, stages="all").train()
    assert {name for name, runs in spans(model).items() if runs} == found
    assert list(model.state_dict()) == list(plain.state_dict())
    stored, *others = (left_of(model, strategy, *inputs) for strategy in ("store", "auto"))
    assert all(all(map(torch.equal, stored, other)) for other in others)
    turned_back = momconv.revert(model)
    assert [*map(type, turned_back.modules())] == [*map(type, plain.modules())]


def left_of(model: nn.Module, strategy: Any, *inputs: Any) -> list[Tensor]:
    """Gradients and buffers."""
    model = copy.deepcopy(model)
    set_strategy(model, strategy)
    torch.manual_seed(0)
    sum(output.square().mean() for output in model(*copy.deepcopy(inputs)).values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    return [*gradients, *model.buffers()]


def test_what_is_handed_out_from_inside_a_run_keeps_it_from_being_converted() -> None:
    blocks = make("mobilenet_v3_small").get_submodule("features")
    for taken, works in {"4": True, "5": False}.items():  # blocks 5 and 6 are a run
        plain = IntermediateLayerGetter(blocks, {taken: "low", "6": "high"})
        if works:
            assert spans(momconv.convert(plain, stages="all")) == {"": [(5, 7)]}
        else:
            with pytest.raises(UsageError, match="it: the loop over it does more"):
                momconv.convert(plain)
