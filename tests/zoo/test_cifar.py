import io
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from momconv.zoo.cifar import DEPTHS, CifarBlock, cifar_resnet
from momconv.zoo.description import describe
from momconv.zoo.weights import load_network

# Table 6 of the paper gives these, in millions.
PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}


@pytest.mark.parametrize("depth", DEPTHS.values())
def test_the_number_of_parameters_is_the_papers(depth: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in cifar_resnet(depth).parameters())
    assert count / 1e6 == pytest.approx(PARAMETERS[depth], rel=0.02)


def test_each_stage_halves_the_image_and_doubles_the_channels() -> None:
    network = cifar_resnet(20)
    x = network.layer1(torch.rand(1, 16, 32, 32))
    assert x.shape == (1, 16, 32, 32)
    x = network.layer2(x)
    assert x.shape == (1, 32, 16, 16)
    assert network.layer3(x).shape == (1, 64, 8, 8)


def test_the_shortcut_pads_with_zero_channels_on_both_sides() -> None:
    x = torch.rand(1, 16, 4, 4)
    shortcut = CifarBlock(16, 32, 2).shortcut(x)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


def test_a_block_leaves_its_input_alone() -> None:
    x = torch.randn(2, 16, 4, 4)
    before = x.clone()
    CifarBlock(16, 16, 1)(x)
    assert torch.equal(x, before)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    block = CifarBlock(2, 4, 2).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)


@pytest.mark.parametrize(
    ("depth", "file"), [(20, "resnet20-12fca82f.th"), (32, "resnet32-d509ac18.th")]
)
def test_published_weights_recognise_real_images(shared: Path, depth: int, file: str) -> None:
    network = load_network(f"cifar_resnet{depth}", shared / "weights" / file).eval()
    images, labels = _test_images(shared / "data" / "cifar10-images.zip", per_class=20)
    preprocessing = describe(network).preprocessing
    batch = transforms.normalize(images, mean=list(preprocessing.mean), std=list(preprocessing.std))
    with torch.inference_mode():
        accuracy = (network(batch).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.7


def _test_images(path: Path, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.namelist() if "/val/" in m and m.endswith(".jpg")]
        classes = sorted({Path(m).parent.name for m in members})
        chosen = [
            (label, member)
            for label, name in enumerate(classes)
            for member in [m for m in members if Path(m).parent.name == name][:per_class]
        ]
        images = [Image.open(io.BytesIO(archive.read(member))) for _, member in chosen]
    assert len(images) == 10 * per_class
    pixels = torch.stack([transforms.to_image(image) for image in images])
    return transforms.to_dtype(pixels, torch.float32, scale=True), torch.tensor(
        [label for label, _ in chosen]
    )
