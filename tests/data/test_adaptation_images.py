from pathlib import Path

import pytest
import torch
from pictures import save_classes

from momconv.data.adaptation_images import AdaptationImages, gather_images
from momconv.errors import DataError
from momconv.zoo.description import Description, Preprocessing

HALVES = (0.5, 0.5, 0.5)
NETWORK = Description("cifar_resnet20", 2, Preprocessing(8, 8, HALVES, HALVES))


def gather(adapting: Path | None, measuring: Path | None, count: int = 99) -> AdaptationImages:
    return gather_images(adapting, measuring, NETWORK, count, seed=0)


def sizes(images: AdaptationImages) -> tuple[int, int]:
    """How many images there are to adapt and to measure on."""
    measured = (
        batch if isinstance(batch, torch.Tensor) else batch[0] for batch in images.measuring
    )
    return sum(map(len, images.adapting or ())), sum(map(len, measured))


def test_a_fifth_is_held_out_and_used_for_nothing_else(tmp_path: Path) -> None:
    images = gather(save_classes(tmp_path, a=11), None)
    assert sizes(images) == (9, 2)
    assert images.adapting is not None
    (adapting,), (measured,) = list(images.adapting), list(images.measuring)
    assert isinstance(measured, torch.Tensor)
    assert not any(torch.equal(one, other) for one in adapting for other in measured)
    assert images.origin == f"held out of {tmp_path}"


def test_a_folder_of_its_own_leaves_all_images_to_adapt_on(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", a=3, b=3)
    save_classes(tmp_path / "val", a=2, b=2)
    assert sizes(gather(tmp_path / "train", tmp_path / "val")) == (6, 4)
    assert sizes(gather(None, tmp_path / "val", count=3)) == (0, 3)


def test_too_few_to_hold_one_out_serve_both(tmp_path: Path) -> None:
    images = gather(save_classes(tmp_path, a=4), None)
    assert sizes(images) == (4, 4)
    assert images.origin == "that it was calibrated on"


def test_without_images_there_is_noise_which_is_the_same_each_time() -> None:
    images = gather(None, None)
    assert (sizes(images), images.is_noise) == ((0, 8), True)
    (one,), (other,) = images.measuring, gather(None, None).measuring
    assert isinstance(one, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    assert torch.equal(one, other)


@pytest.mark.parametrize(("count", "more"), [(5, True), (6, True), (7, False)])
def test_it_is_known_whether_the_folder_may_hold_more(
    tmp_path: Path, count: int, more: bool
) -> None:
    assert gather(save_classes(tmp_path, a=6), None, count).more is more


def test_missing_folders_are_errors(tmp_path: Path) -> None:
    for folders in ((tmp_path / "no", None), (None, tmp_path / "no")):
        with pytest.raises(DataError, match="does not exist"):
            gather(*folders)
