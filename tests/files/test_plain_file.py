from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from momconv.errors import UsageError
from momconv.files.plain_file import load_command, save_plain
from momconv.surgery.conversion import convert, revert
from momconv.zoo.description import describe
from momconv.zoo.networks import build


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_torchvision_reads_the_file(tmp_path: Path, name: str) -> None:
    network = convert(build("resnet18", 7), stages="all")
    plain = revert(network)
    assert type(plain) is torchvision.models.ResNet
    save_plain(revert(network).to(memory_format=torch.channels_last), tmp_path / name)
    if name.endswith(".pth"):
        state = torch.load(tmp_path / name, weights_only=True)
    else:
        state = safetensors.torch.load_file(tmp_path / name)
    theirs = torchvision.models.resnet18(num_classes=7)
    theirs.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(theirs.eval()(images), plain.eval()(images))
    assert not torch.equal(network.eval()(images), plain(images))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot tell the format of .*net.onnx"):
        save_plain(build("cifar_resnet20"), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "path", "python"),
    [
        (
            "resnet34",
            "a.pth",
            "torchvision.models.resnet34(num_classes=7).load_state_dict(torch.load('a.pth'))",
        ),
        (
            "resnet34",
            "a.safetensors",
            "torchvision.models.resnet34(num_classes=7)"
            ".load_state_dict(safetensors.torch.load_file('a.safetensors'))",
        ),
        ("cifar_resnet20", "a.pth", "momconv.load_network('cifar_resnet20', 'a.pth')"),
    ],
)
def test_it_says_how_to_read_the_file(architecture: str, path: str, python: str) -> None:
    described = describe(build(architecture, num_classes=7))
    assert load_command(described, Path(path)) == python
