import pytest
import torch

from momconv.errors import UsageError
from momconv.zoo.description import Description, Preprocessing, describe
from momconv.zoo.networks import build, head_name, names, replace_head

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_all_families_are_listed_by_depth() -> None:
    expected = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert [name for name in names() if name.startswith("resnet")] == expected
    assert {"cifar_resnet1202", "resnext50_32x4d", "wide_resnet101_2"} < set(names())
    assert not {"vgg16", "fcn_resnet50", "r3d_18"} & set(names())


@pytest.mark.parametrize("name", names())
def test_every_name_is_built_with_its_description_and_head(name: str) -> None:
    with torch.device("meta"):
        network = build(name, num_classes=7)
    assert describe(network).architecture == name
    assert describe(network).num_classes == 7
    head = network.get_submodule(head_name(name))
    assert isinstance(head, torch.nn.Linear)
    assert head.out_features == 7


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


def test_a_network_without_residual_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="vgg16 is not a residual network") as caught:
        build("vgg16")
    assert caught.value.kind == "usage.unsupported_model"


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20"])
def test_a_new_head_has_the_classes_in_the_description(name: str) -> None:
    network = build(name)
    keys = list(network.state_dict())
    replace_head(network, ["ants", "bees"])
    assert list(network.state_dict()) == keys
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 2)
    assert describe(network).classes == ("ants", "bees")
    assert describe(network).num_classes == 2
