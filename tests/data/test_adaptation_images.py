from pathlib import Path

import pytest
import torch
from pictures import save_classes, save_picture

from momconv.data.adaptation_images import (
    AdaptationImages,
    VerificationImages,
    find_verification_images,
    gather_images,
)
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


SMALL = Preprocessing(resolution=8, resize=8, mean=HALVES, std=HALVES)


def found(
    folder: Path, classes: int = 2, names: tuple[str, ...] | None = None, count: int = 99
) -> VerificationImages:
    description = Description("cifar_resnet20", classes, SMALL, names)
    return find_verification_images(folder, description, count, seed=0)


def labels_in(images: VerificationImages) -> list[int]:
    return [int(label) for batch in images if isinstance(batch, tuple) for label in batch[1]]


def test_labels_are_the_network_s_own_numbers(tmp_path: Path) -> None:
    images = found(save_classes(tmp_path, cat=2, dog=3), names=("dog", "cat"))
    assert sorted(labels_in(images)) == [0, 0, 0, 1, 1]
    assert images.note is None
    assert [len(pair) for pair in images] == [2]  # again


def test_a_network_without_names_gets_the_folder_s_and_says_so(tmp_path: Path) -> None:
    images = found(save_classes(tmp_path, cat=1, dog=2))
    assert sorted(labels_in(images)) == [0, 1, 1]
    assert images.note is not None
    assert "2 classes" in images.note


def test_labels_follow_the_files_that_can_be_read(tmp_path: Path) -> None:
    save_classes(tmp_path, cat=3, dog=3)
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    assert sorted(labels_in(found(tmp_path))) == [0, 0, 1, 1, 1]


def test_the_validation_split_is_preferred(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", cat=5, dog=5)
    save_classes(tmp_path / "val", cat=1, dog=1)
    assert len(found(tmp_path).images.paths) == 2
    assert len(found(tmp_path, classes=7).images.paths) == 2


@pytest.mark.parametrize(("classes", "names"), [(7, None), (2, ("cat", "cow"))])
def test_other_classes_leave_images_without_labels(
    tmp_path: Path, classes: int, names: tuple[str, ...] | None
) -> None:
    images = found(save_classes(tmp_path, cat=1, dog=2), classes, names)
    (batch,) = images
    assert isinstance(batch, torch.Tensor)
    assert len(batch) == 3
    assert images.note is not None
    assert f"not the {classes} of the network" in images.note


def test_loose_images_do_too_and_a_random_choice_is_taken(tmp_path: Path) -> None:
    for number in range(9):
        save_picture(tmp_path / f"{number}.png", number)
    assert len(found(tmp_path, count=4).images.paths) == 4


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_a_folder_without_images_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name):
        found(tmp_path / name)
