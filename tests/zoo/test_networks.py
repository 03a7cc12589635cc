from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.models import list_models

from momconv.errors import UsageError
from momconv.zoo.description import Description, Preprocessing, describe
from momconv.zoo.networks import (
    NOT_RESIDUAL,
    build,
    build_described,
    check_resolution,
    head_name,
    names,
    outline,
    replace_head,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_all_families_are_listed_by_depth() -> None:
    expected = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert [name for name in names() if name.startswith("resnet")] == expected
    assert {"cifar_resnet1202", "resnext50_32x4d", "wide_resnet101_2", "swin_t"} < set(names())
    assert not {"vgg16", "fcn_resnet50", "r3d_18"} & set(names())


@pytest.mark.parametrize("name", [name for name in names() if name != "cifar_resnet1202"])
def test_every_name_is_built_with_its_description_and_head(name: str) -> None:
    network = outline(name, num_classes=7)
    assert describe(network).architecture == name
    assert describe(network).num_classes == 7
    head = network.get_submodule(head_name(name))
    assert isinstance(head, torch.nn.Linear)
    assert head.out_features == 7
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "num_classes", "resolution", "resize"),
    [("resnet18", 1000, 224, 256), ("resnet50", 1000, 224, 232), ("cifar_resnet20", 10, 32, 32)],
)
def test_the_description_has_the_default_weights_preprocessing(
    name: str, num_classes: int, resolution: int, resize: int
) -> None:
    preprocessing = Preprocessing(resolution=resolution, resize=resize, mean=MEAN, std=STD)
    assert describe(build(name)) == Description(name, num_classes, preprocessing)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("resnet5O", "resnet50"), ("RESNET18", "resnet18"), ("cifar20", "cifar_resnet20")],
)
def test_a_typo_is_answered_with_what_was_meant(typo: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"'{typo}' — did you mean {meant}?") as caught:
        build(typo)
    assert caught.value.kind == "usage.unknown_model"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vgg16", "only the one before"),
        ("densenet121", "concatenate"),
        ("googlenet", "concatenate"),
    ],
)
def test_a_network_without_residual_blocks_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not a residual network: .*{reason}") as caught:
        build(name)
    assert caught.value.kind == "usage.unsupported_model"


def test_every_network_of_torchvision_is_residual_or_in_a_family_that_is_not() -> None:
    others = set(list_models(module=torchvision.models)) - set(names())
    assert {next(f for f in NOT_RESIDUAL if name.startswith(f)) for name in others} == set(
        NOT_RESIDUAL
    )


def test_a_vision_transformer_is_built_for_its_resolution() -> None:
    assert outline("vit_b_16").get_parameter("encoder.pos_embedding").shape[1] == 14**2 + 1
    large = build_described(
        replace(
            describe(outline("vit_b_32")),
            preprocessing=describe(outline("vit_b_32")).preprocessing.at(64),
        )
    )
    assert large.get_parameter("encoder.pos_embedding").shape[1] == 2**2 + 1


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "mobilenet_v3_small", "maxvit_t"])
def test_a_new_head_has_the_classes_in_the_description(name: str) -> None:
    network = outline(name)
    keys = list(network.state_dict())
    replace_head(network, ["ants", "bees"])
    assert list(network.state_dict()) == keys
    assert network.get_submodule(head_name(name)).get_parameter("weight").shape[0] == 2
    assert describe(network).classes == ("ants", "bees")
    assert describe(network).num_classes == 2


def test_a_network_with_positions_takes_images_of_one_size() -> None:
    for name, resolution in {"vit_b_32": 224, "maxvit_t": 224, "resnet18": 96}.items():
        check_resolution(outline(name), resolution)
    with pytest.raises(UsageError, match="vit_b_32 is made for images of 224 pixels") as caught:
        check_resolution(outline("vit_b_32"), 96)
    assert caught.value.fix == "--resolution 224"
