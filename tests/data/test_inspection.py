from pathlib import Path

import numpy as np
import pytest
from pictures import save_classes, save_picture
from PIL import Image

from momconv.data.folder import read_classes_folder
from momconv.data.inspection import check_images, find_duplicates, warn_of_duplicates
from momconv.data.source import ImageSet
from momconv.errors import DataError


def damaged(root: Path, ants: int, bees: int, bad: int) -> ImageSet:
    """Images of which the first ``bad`` ants are cut off."""
    save_classes(root, ants=ants, bees=bees)
    for number in range(bad):
        path = root / "ants" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60])
    return read_classes_folder(root)


def test_a_sound_set_comes_back_as_it_is(tmp_path: Path) -> None:
    images = damaged(tmp_path, 3, 3, bad=0)
    assert check_images(images).images == images
    assert check_images(images).notes == ()


def test_unreadable_images_are_left_out_and_told(tmp_path: Path) -> None:
    images = damaged(tmp_path, 14, 10, bad=3)
    found = check_images(images, max_bad_fraction=0.2)
    assert found.images.counts() == {"ants": 11, "bees": 10}
    assert set(found.unreadable().values()) == {"truncated image"}
    notes = found.notes
    lines = notes[0].splitlines()
    assert lines[0] == "warning: 3 of 24 images unreadable (12.5%)"
    assert lines[1] == f"  {tmp_path}/ants/0.png: truncated image"
    assert len(lines) == 4


def test_no_more_than_five_are_named(tmp_path: Path) -> None:
    notes = check_images(damaged(tmp_path, 9, 3, bad=7), max_bad_fraction=0.6).notes
    lines = notes[0].splitlines()
    assert len(lines) == 7
    assert lines[-1] == "  and 2 more"


def test_too_many_unreadable_images_are_an_error(tmp_path: Path) -> None:
    images = damaged(tmp_path, 14, 10, bad=3)
    with pytest.raises(DataError) as caught:
        check_images(images)
    error = caught.value
    assert error.kind == "data.too_many_unreadable"
    assert "3 of 24 images unreadable (12.5%)" in error.message.splitlines()[0]
    assert "ants/0.png: truncated image" in error.message
    assert error.fix == "--max-bad-fraction 0.15"
    check_images(images, max_bad_fraction=0.15)  # the fix works


def test_the_limit_itself_is_accepted(tmp_path: Path) -> None:
    check_images(damaged(tmp_path, 10, 10, bad=1), max_bad_fraction=0.05)


def test_a_class_must_not_vanish(tmp_path: Path) -> None:
    images = damaged(tmp_path, 2, 98, bad=2)
    expected = "warning: no image can be read of 1 class: ants"
    assert check_images(images, max_bad_fraction=0.5).notes[1] == expected
    with pytest.raises(DataError) as caught:
        check_images(images, max_bad_fraction=0.5, every_class=True)
    assert caught.value.kind == "data.class_unreadable"
    assert "no image can be read of 1 class: ants" in caught.value.message


def test_a_class_that_was_absent_before_is_no_loss(tmp_path: Path) -> None:
    images = read_classes_folder(save_classes(tmp_path, ants=2), ("ants", "bees"))
    assert check_images(images).images == images
    assert check_images(images).notes == ()


def test_what_was_converted_is_counted(tmp_path: Path) -> None:
    save_classes(tmp_path, ants=2, bees=2)
    for number in range(2):
        deep = Image.fromarray(np.full((4, 4), 9999, dtype=np.uint16))
        deep.save(tmp_path / "ants" / f"deep{number}.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "bees" / "print.jpg")
    assert check_images(read_classes_folder(tmp_path)).notes == (
        "note: images converted to 8-bit RGB: 2 16-bit grey, rescaled to 0-255; 1 CMYK",
    )


def test_an_image_may_have_any_name(tmp_path: Path) -> None:
    save_classes(tmp_path, ants=2, bees=2)
    save_picture(tmp_path / "ants" / "caf\udce9.png")
    checked = check_images(read_classes_folder(tmp_path))
    assert checked.notes == ()
    assert checked.images.counts() == {"ants": 3, "bees": 2}


def test_images_in_both_splits_are_found_by_their_content(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", ants=3)
    save_picture(tmp_path / "val" / "ants" / "other name.png", 2)
    save_picture(tmp_path / "val" / "ants" / "new.png", 9)
    train, val = (check_images(read_classes_folder(tmp_path / name)) for name in ("train", "val"))
    same = tmp_path / "train/ants/2.png", tmp_path / "val/ants/other name.png"
    assert find_duplicates(train, val) == [same]
    assert warn_of_duplicates([same], 2) == (
        "warning: 1 of 2 validation images are training images too, byte for byte, such as "
        f"{same[1]} = {same[0]}",
    )
    assert warn_of_duplicates([], 2) == ()


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    images = damaged(tmp_path, 2, 2, bad=0)
    check_images(images, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
