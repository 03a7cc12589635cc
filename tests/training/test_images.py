import shutil
from pathlib import Path

import pytest
from runs import Log

from momconv.data.folder import find_splits
from momconv.errors import DataError, ModelFileError, UsageError
from momconv.recipe import DataRecipe
from momconv.training.images import (
    find_held_out,
    find_images,
    keep_readable,
    recall_images,
    remember_images,
    require_folder,
)


def test_a_recipe_without_images_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no folder of images"):
        require_folder(DataRecipe())


def test_an_unreadable_image_is_left_out_and_told(colours: Path, tmp_path: Path) -> None:
    root, log = Path(shutil.copytree(colours, tmp_path / "data")), Log()
    (root / "blue" / "bad.png").write_bytes(b"nothing")
    recipe = DataRecipe(max_bad_fraction=0.5)
    splits = keep_readable(find_images(root, recipe, log), recipe, log)
    assert len(splits.train.samples) + len(splits.val.samples) == 24
    assert any("1 of 19 images unreadable" in text or "1 of 6" in text for text in log.told)
    assert log.told[0].startswith("note: no val/ folder")
    assert {title for title, *_ in log.shown} == {
        "checking the training images",
        "checking the held-out images",
    }


def test_the_split_is_recalled_in_its_order_whatever_was_added(
    colours: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(colours, tmp_path / "data"))
    splits = find_splits(root)
    remember_images(splits, root, tmp_path / "split.json")
    shutil.copy(root / "blue" / "0.png", root / "blue" / "new.png")
    again = recall_images(tmp_path / "split.json")
    assert again.train.samples == splits.train.samples
    assert again.val.samples == splits.val.samples
    assert again.train.classes == ("blue", "green", "red")


def test_the_images_may_have_moved_but_not_vanished(colours: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(colours, tmp_path / "data"))
    remember_images(find_splits(root), root, tmp_path / "split.json")
    moved = root.rename(tmp_path / "moved")
    assert recall_images(tmp_path / "split.json", moved).train.root == moved
    with pytest.raises(DataError, match="24 images of the run are not in"):
        recall_images(tmp_path / "split.json", root)


@pytest.mark.parametrize("text", ["", "{}", '{"classes": 3}'])
def test_a_damaged_split_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"split\.json is damaged"):
        recall_images(tmp_path / "split.json")
    with pytest.raises(ModelFileError, match="cannot read"):
        recall_images(tmp_path / "missing.json")


def test_a_class_that_the_split_does_not_list_is_damage(colours: Path, tmp_path: Path) -> None:
    remember_images(find_splits(colours), colours, tmp_path / "split.json")
    text = (tmp_path / "split.json").read_text()
    (tmp_path / "split.json").write_text(text.replace('"blue"', '"blau"', 1))
    with pytest.raises(ModelFileError, match="unknown class blue"):
        recall_images(tmp_path / "split.json")


def test_the_held_out_part_of_one_folder_is_found_again(colours: Path, tmp_path: Path) -> None:
    splits, path = find_splits(colours), tmp_path / "split.json"
    assert find_held_out(path, colours) is None
    remember_images(splits, colours, path)
    held_out = find_held_out(path, colours)
    assert held_out is not None
    assert held_out.samples == splits.val.samples
    assert find_held_out(path, tmp_path) is None


def test_a_validation_folder_needs_no_memory(colours: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        shutil.copytree(colours, tmp_path / "data" / name)
    splits = find_splits(tmp_path / "data")
    remember_images(splits, tmp_path / "data", tmp_path / "split.json")
    assert find_held_out(tmp_path / "split.json", tmp_path / "data") is None
    assert recall_images(tmp_path / "split.json").val.root == tmp_path / "data" / "val"
