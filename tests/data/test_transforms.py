from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import save_picture
from PIL import Image
from torchvision.models import ResNet50_Weights
from torchvision.transforms import ToTensor, v2

from momconv.data.decoding import decode
from momconv.data.transforms import Augmentation, evaluation_transform, training_transform
from momconv.zoo.description import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Preprocessing(resolution=224, resize=256, mean=MEAN, std=STD)
CIFAR = Preprocessing(resolution=32, resize=32, mean=MEAN, std=STD)
PLAIN = Preprocessing(resolution=32, resize=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[Image.Image]:
    paths = sorted((shared / "data/hymenoptera/val/bees").iterdir())[:4]
    return [decode(path) for path in paths]


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_evaluation_equals_torchvisions_preset_bit_for_bit(
    photographs: list[Image.Image], name: str
) -> None:
    theirs = ResNet50_Weights[name].transforms()
    ours = evaluation_transform(
        Preprocessing(
            resolution=theirs.crop_size[0],
            resize=theirs.resize_size[0],
            mean=tuple(theirs.mean),
            std=tuple(theirs.std),
            interpolation=theirs.interpolation.value,
        )
    )
    assert all(torch.equal(ours(image), theirs(image)) for image in photographs)


def test_evaluation_of_a_small_image_only_normalises_it(tmp_path: Path) -> None:
    image = decode(save_picture(tmp_path / "small.png", size=(32, 32)))
    tensor = evaluation_transform(PLAIN)(image)
    assert type(tensor) is torch.Tensor
    assert tensor.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes() == (
        image.tobytes()
    )


@pytest.mark.parametrize("p", [IMAGENET, CIFAR, IMAGENET.at(96)])
@pytest.mark.parametrize("size", [(32, 32), (300, 200), (7, 90)])
def test_both_give_squares_of_the_resolution(p: Preprocessing, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "white")
    for transform in (evaluation_transform(p), training_transform(p)):
        tensor = transform(image)
        assert tensor.shape == (3, p.resolution, p.resolution)
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("p", [PLAIN, PLAIN.at(128)])
def test_mirroring_can_be_switched_off(p: Preprocessing) -> None:
    image = Image.linear_gradient("L").rotate(90).convert("RGB")  # bright on the left

    def mirrored(*, flip: bool) -> set[bool]:
        transform = training_transform(p, flip=flip)
        tensors = [transform(image)[:, 8:-8, 6:-6] for _ in range(40)]
        return {bool(t[0, 0, 0] < t[0, 0, -1]) for t in tensors}

    torch.manual_seed(0)
    assert len(mirrored(flip=True)) == 2
    assert len(mirrored(flip=False)) == 1


def test_tiny_images_are_shifted_by_at_most_four_pixels(tmp_path: Path) -> None:
    image = decode(save_picture(tmp_path / "small.png", size=(32, 32)))
    padded = torch.nn.functional.pad(evaluation_transform(PLAIN)(image), (4, 4, 4, 4))
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    torch.manual_seed(0)
    transform = training_transform(PLAIN, flip=False)
    shifts = set()
    for _ in range(20):
        tensor = transform(image)
        shifts.add(next(i for i, window in enumerate(windows) if torch.equal(window, tensor)))
    assert len(shifts) > 5


def test_large_images_are_cropped_to_a_third_at_least() -> None:
    # The value of a pixel tells its column, so the range in a crop tells the width of the crop.
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    torch.manual_seed(0)
    transform = training_transform(PLAIN.at(128), flip=False)
    spans = [float(t.amax() - t.amin()) for t in (transform(ramp) for _ in range(60))]
    assert min(spans) > (0.35 * 3 / 4) ** 0.5 - 0.02
    assert max(spans) > 0.9
    assert min(spans) < 0.7


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    image = Image.linear_gradient("L").rotate(90).convert("RGB")
    ours = training_transform(PLAIN.at(128), level="none", flip=True)(image)
    assert torch.equal(ours, evaluation_transform(PLAIN.at(128))(image))


@pytest.mark.parametrize("level", ["trivial", "randaug"])
@pytest.mark.parametrize("p", [PLAIN, PLAIN.at(128)])
def test_stronger_levels_change_colours_and_erase(p: Preprocessing, level: Augmentation) -> None:
    image = Image.new("RGB", (200, 160), (90, 120, 200))
    torch.manual_seed(0)
    transform = training_transform(p, level=level)
    tensors = [transform(image) for _ in range(60)]
    assert all(tensor.shape == (3, p.resolution, p.resolution) for tensor in tensors)
    centres = {
        tuple(tensor[:, p.resolution // 2, p.resolution // 2].tolist()) for tensor in tensors
    }
    assert len(centres) > 5
    assert isinstance(transform.transforms[-1], v2.RandomErasing)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (40, 50), (20, 32)])
def test_leaving_out_what_changes_nothing_changes_nothing(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
    image = v2.functional.to_pil_image(pixels)
    crop, flip = v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()
    normal = [ToTensor(), v2.Normalize(CIFAR.mean, CIFAR.std)]
    whole = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32), *normal])
    moved = v2.Compose([v2.Resize(32, antialias=True), crop, flip, *normal])
    for ours, theirs in ((evaluation_transform, whole), (training_transform, moved)):
        torch.manual_seed(1)
        expected = theirs(image)
        torch.manual_seed(1)
        assert torch.equal(ours(CIFAR)(image), expected)


@pytest.mark.parametrize(("level", "share"), [("trivial", 0.1), ("randaug", 0.25)])
def test_so_many_images_lose_a_rectangle(level: Augmentation, share: float) -> None:
    *_, erasing = training_transform(PLAIN, level=level).transforms
    assert erasing.p == share


@pytest.mark.parametrize("p", [IMAGENET, CIFAR, PLAIN.at(128)])
@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (3, 9_000)])
@pytest.mark.parametrize("level", [None, "none", "light", "trivial", "randaug"])
def test_of_a_strip_only_what_the_network_sees_is_computed(
    p: Preprocessing,
    size: tuple[int, int],
    level: Augmentation | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = [0]
    resize = Image.Image.resize

    def watch(image: Image.Image, size: tuple[int, int], *rest: Any, **named: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(image, size, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", watch)
    transform = training_transform(p, level=level) if level else evaluation_transform(p)
    assert transform(Image.new("RGB", size, "white")).shape == (3, p.resolution, p.resolution)
    assert max(made) <= p.resize**2


@pytest.mark.parametrize("p", [IMAGENET, PLAIN, PLAIN.at(128)])
@pytest.mark.parametrize("size", [(20, 321), (3, 100), (2111, 31), (100, 6)])
def test_the_middle_of_a_strip_is_what_a_crop_of_all_of_it_shows(
    p: Preprocessing, size: tuple[int, int]
) -> None:
    image = Image.radial_gradient("L").convert("RGB").resize(size)
    whole = v2.Compose([v2.Resize(p.resize, antialias=True), v2.CenterCrop(p.resolution)])
    expected = (ToTensor()(whole(image)) - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(
        p.std
    ).view(3, 1, 1)
    # Other coordinates may round to the next of 255 grey levels.
    level = 1.01 / 255 / min(p.std)
    assert torch.allclose(evaluation_transform(p)(image), expected, rtol=0, atol=level)
