import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import save_classes, save_picture

from momconv.data.folder import find_evaluation_set, find_splits, list_images, read_classes_folder
from momconv.errors import DataError, UsageError
from momconv.words import printable


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "Val"])
def test_split_folders_are_found_by_their_usual_names(tmp_path: Path, val: str) -> None:
    save_classes(tmp_path / "train", ant=5, bee=6)
    save_classes(tmp_path / val, ant=1, bee=2)
    save_classes(tmp_path / "test", ant=9, bee=9)
    splits = find_splits(tmp_path)
    assert splits.train.counts() == {"ant": 5, "bee": 6}
    assert splits.val.counts() == {"ant": 1, "bee": 2}
    assert splits.val.root == tmp_path / val
    assert splits.notes == (
        f"note: training on {tmp_path}/train (11 images), "
        f"validating on {tmp_path / val} (3 images)",
    )


def test_real_splits_are_found(shared: Path) -> None:
    splits = find_splits(shared / "data/hymenoptera")
    # One of the 124 ants is a GIF, which torchvision's ImageFolder passes over.
    assert splits.train.counts() == {"ants": 124, "bees": 121}
    assert splits.val.counts() == {"ants": 70, "bees": 83}


def test_one_folder_of_classes_is_divided(tmp_path: Path) -> None:
    save_classes(tmp_path, cat=10, dog=9, fox=5)
    splits = find_splits(tmp_path, val_frac=0.2, seed=0)
    assert splits.train.counts() == {"cat": 8, "dog": 7, "fox": 4}
    assert splits.val.counts() == {"cat": 2, "dog": 2, "fox": 1}
    assert not {s.path for s in splits.train.samples} & {s.path for s in splits.val.samples}
    assert (
        "no val/ folder; holding out 20% per class (seed 0): 19 train / 5 val." in splits.notes[0]
    )
    assert "Change it with --val-frac or --val-dir." in splits.notes[0]


def test_a_test_folder_is_never_validated_on(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", ant=5, bee=5)
    save_classes(tmp_path / "test", ant=5, bee=5)
    splits = find_splits(tmp_path)
    assert splits.val.counts() == {"ant": 1, "bee": 1}
    assert all("train" in s.path.parts for s in splits.val.samples)


def test_no_validation_must_be_asked_for(tmp_path: Path) -> None:
    splits = find_splits(save_classes(tmp_path, ant=5, bee=5), val_frac=0)
    assert len(splits.train.samples) == 10
    assert splits.val.samples == ()
    assert "none held out" in splits.notes[0]


def test_a_wrong_fraction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="20"):
        find_splits(save_classes(tmp_path, ant=5, bee=5), val_frac=20)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    save_classes(tmp_path, bus=5, car=5, train=5)
    assert find_splits(tmp_path).train.classes == ("bus", "car", "train")


def test_a_folder_beside_the_splits_does_not_hide_them(tmp_path: Path) -> None:
    for folder in ("train", "val", "extra"):
        save_classes(tmp_path / folder, ant=5, bee=5)
    assert find_splits(tmp_path).train.root == tmp_path / "train"


def test_classes_of_validation_are_matched_by_name(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", cat=5, dog=5, fox=5)
    save_classes(tmp_path / "val", cat=1, fox=2)
    splits = find_splits(tmp_path)
    assert splits.val.classes == ("cat", "dog", "fox")
    assert splits.val.labels == [0, 2, 2]
    assert splits.notes[1:] == (f"warning: {tmp_path}/val has no images of 1 class: dog",)


def test_unknown_classes_can_be_skipped_but_not_all(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", cat=5, dog=5)
    save_classes(tmp_path / "val", cat=1, wolf=2)
    splits = find_splits(tmp_path, unknown="skip")
    assert splits.val.labels == [0]
    warning = "warning: ignoring 1 class that train does not have: wolf (2 images)"
    assert warning in splits.notes
    with pytest.raises(DataError, match="2 classes that the model does not have: cat") as caught:
        find_evaluation_set(tmp_path / "val", ("dog",), unknown="skip")
    assert caught.value.fix is None


def test_the_folders_of_the_splits_can_be_named(tmp_path: Path) -> None:
    save_classes(tmp_path / "a", ant=5, bee=5)
    save_classes(tmp_path / "b", ant=1, bee=1)
    save_classes(tmp_path / "data" / "train", ant=6, bee=6)
    save_classes(tmp_path / "data" / "val", ant=2, bee=2)
    named = find_splits(tmp_path / "a", train=tmp_path / "a", val=tmp_path / "b")
    assert (named.train.root, named.val.root) == (tmp_path / "a", tmp_path / "b")
    mixed = find_splits(tmp_path / "data", train=tmp_path / "a")
    assert (mixed.train.root, mixed.val.root) == (tmp_path / "a", tmp_path / "data" / "val")
    only_val = find_splits(tmp_path / "data", val=tmp_path / "b")
    assert only_val.train.counts() == {"ant": 6, "bee": 6}


def test_a_test_folder_is_evaluated_on_only_when_asked_for(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        save_classes(tmp_path / name, ant=1, bee=1)
    assert find_evaluation_set(tmp_path).root == tmp_path / "val"
    assert find_evaluation_set(tmp_path, split="test").root == tmp_path / "test"
    with pytest.raises(DataError, match="no folder of test images") as caught:
        find_evaluation_set(tmp_path / "train", split="test")
    assert caught.value.kind == "data.no_test_split"


def test_deeper_folders_belong_to_their_class(tmp_path: Path) -> None:
    save_picture(tmp_path / "a" / "x" / "deep" / "1.png")
    save_picture(tmp_path / "b" / "x" / "1.JPG")
    save_picture(tmp_path / "b" / "2.png")
    found = read_classes_folder(tmp_path)
    assert found.counts() == {"a": 1, "b": 2}
    (note,) = found.notes
    assert note.startswith(
        f"note: 2 images in {tmp_path} lie deeper than the folder of their class"
    )


@pytest.mark.parametrize("junk", [".hidden", "__MACOSX", "__pycache__", ".ipynb_checkpoints"])
def test_what_other_programs_leave_is_ignored(tmp_path: Path, junk: str) -> None:
    save_classes(tmp_path, ant=1, bee=1)
    save_picture(tmp_path / junk / "1.png")
    save_picture(tmp_path / "ant" / junk / "1.png")
    save_picture(tmp_path / "ant" / "._1.png")
    images = read_classes_folder(tmp_path)
    assert images.counts() == {"ant": 1, "bee": 1}
    assert images.notes == ()
    assert len(list_images(tmp_path)) == 2


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    save_classes(tmp_path, ant=1, bee=1)
    (tmp_path / "zebra").mkdir()
    (tmp_path / "ant" / "notes.txt").touch()
    (tmp_path / "ant" / "scan.PDF").touch()
    save_picture(tmp_path / "loose.png")
    images = read_classes_folder(tmp_path)
    assert images.classes == ("ant", "bee")
    assert images.notes == (
        "warning: ignoring 1 folder with no images: zebra",
        f"note: ignoring 2 files in {tmp_path} that are not images: .txt (1), .pdf (1)",
        f"warning: ignoring 1 image directly in {tmp_path}, in no class folder",
    )


def test_small_classes_are_warned_of(tmp_path: Path) -> None:
    notes = find_splits(save_classes(tmp_path, ant=9, bee=3)).notes
    assert notes[1:] == ("warning: 1 class with fewer than 5 training images: bee (2)",)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "data", ant=1, bee=1)
    elsewhere = save_classes(tmp_path / "elsewhere", cow=2)
    (root / "cow").symlink_to(elsewhere / "cow")
    (root / "ant" / "up").symlink_to(root)
    (root / "ant" / "self").symlink_to(root / "ant")
    (root / "ant" / "knot").symlink_to("knot")
    assert read_classes_folder(root).counts() == {"ant": 1, "bee": 1, "cow": 2}
    assert len(list_images(root)) == 4


def test_dead_links_and_pipes_are_listed_for_their_reader_to_name(tmp_path: Path) -> None:
    save_classes(tmp_path, ant=1)
    (tmp_path / "ant" / "dead.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    assert [path.name for path in list_images(tmp_path)] == ["0.png", "dead.png", "pipe.png"]


def test_what_is_no_regular_file_is_passed_over_and_named(tmp_path: Path) -> None:
    save_classes(tmp_path, ant=2, bee=2)
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    (tmp_path / "bee" / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "bee" / "dead.png").symlink_to("nowhere.png")
    found = read_classes_folder(tmp_path)
    assert found.counts() == {"ant": 2, "bee": 3}
    assert found.notes == (
        "warning: ignoring 2 paths that are not regular files: "
        f"{tmp_path}/ant/pipe.png, {tmp_path}/bee/endless.png",
    )


def test_images_of_any_structure_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/2.png", "a/deep/1.tiff", "c/1.webp"):
        save_picture(tmp_path / name)
    (tmp_path / "readme.txt").touch()
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert found == ["a/2.png", "a/deep/1.tiff", "b.png", "c/1.webp"]


def test_evaluation_takes_the_validation_split_or_the_folder_itself(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", ant=5, bee=5)
    save_classes(tmp_path / "val", bee=2)
    assert find_evaluation_set(tmp_path).classes == ("bee",)
    known = find_evaluation_set(tmp_path, ("ant", "bee"))
    assert known.counts() == {"ant": 0, "bee": 2}
    assert find_evaluation_set(tmp_path / "train").counts() == {"ant": 5, "bee": 5}


def test_labels_follow_the_given_order_of_classes(tmp_path: Path) -> None:
    images = read_classes_folder(save_classes(tmp_path, ant=1, bee=2), ("bee", "cow", "ant"))
    assert images.labels == [2, 0, 0]
    assert images.counts() == {"bee": 2, "cow": 0, "ant": 1}


def test_a_selection_keeps_the_classes(tmp_path: Path) -> None:
    images = read_classes_folder(save_classes(tmp_path, ant=2, bee=2))
    assert images.select([3, 0]).labels == [1, 0]
    assert images.select([3]).counts() == {"ant": 0, "bee": 1}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain é 蜂", "plain é 蜂"),
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\udcff", r"\xff"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
    ],
)
def test_names_are_made_printable(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_odd_names_cannot_break_a_message(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", ant=5, bee=5)
    save_picture(tmp_path / "val" / "wo\nlf\x1b[0m" / "1.png")
    with pytest.raises(DataError) as caught:
        find_splits(tmp_path)
    assert r"wo\nlf\x1b[0m (1 image)" in caught.value.message.splitlines()[0]


def _missing(root: Path) -> Path:
    save_classes(root / "nopes", ant=1)
    return root / "nope"


def _missing_without_a_neighbour(root: Path) -> Path:
    return root / "zzz" / "yyy"


def _a_file(root: Path) -> Path:
    return save_picture(root / "photo.png")


def _only_images(root: Path) -> Path:
    for number in range(5):
        save_picture(root / f"{number}.png")
    return root


def _empty(root: Path) -> Path:
    return root


def _unknown_class(root: Path) -> Path:
    save_classes(root / "train", cat=5, dog=5)
    save_classes(root / "val", cat=1, wolf=1)
    return root


def _one_class(root: Path) -> Path:
    return save_classes(root, ant=3)


def _one_level_too_high(root: Path) -> Path:
    save_classes(root / "photos", ant=3, bee=3)
    return root


def _no_train(root: Path) -> Path:
    save_classes(root / "val", ant=3, bee=3)
    save_classes(root / "test", ant=3, bee=3)
    return root


def _nested_splits(root: Path) -> Path:
    save_classes(root / "train" / "train", ant=3, bee=3)
    save_classes(root / "train" / "val", ant=3, bee=3)
    return root


def _no_images(root: Path) -> Path:
    (root / "ant").mkdir()
    for name in ("1.heic", "2.heic", "3.HEIC", "README"):
        (root / "ant" / name).write_bytes(b"?")
    return root


@pytest.mark.parametrize(
    ("make", "kind", "first_line", "fix"),
    [
        (_missing, "missing_folder", "does not exist: {root}/nope", "{root}/nopes"),
        (_missing_without_a_neighbour, "missing_folder", "{root}/zzz/yyy", "folder is {root}"),
        (_a_file, "not_a_folder", "is a file: {root}/photo.png", "folder of class folders"),
        (_only_images, "no_class_folders", "5 images directly in {root}/ but no", "<class>/"),
        (_empty, "no_images", "no images in {root}", "<class>/"),
        (_no_images, "no_images", "only files of other kinds: .heic (3), no suffix (1)", ".jpg"),
        (
            _unknown_class,
            "unknown_class",
            "val has 1 class that train does not have: wolf (1 image)",
            "--unknown-classes skip",
        ),
        (_one_class, "too_few_classes", "found 1 class in {root}: ant (3 images)", "other class"),
        (_one_level_too_high, "too_few_classes", "photos (6 images)", "{root}/photos"),
        (_no_train, "no_train_split", "training images in {root}", "{root}/train/<class>/"),
        (_nested_splits, "wrong_level", "{root}/train holds splits", "{root}/train/train"),
    ],
)
def test_a_folder_that_cannot_be_used_is_explained(
    tmp_path: Path, make: Callable[[Path], Path], kind: str, first_line: str, fix: str
) -> None:
    with pytest.raises(DataError) as caught:
        find_splits(make(tmp_path))
    error = caught.value
    assert error.kind == f"data.{kind}"
    assert first_line.format(root=tmp_path) in error.message.splitlines()[0]
    assert error.fix is not None
    assert fix.format(root=tmp_path) in error.fix


def test_a_class_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    save_classes(tmp_path / "new", ant=1, wolf=2)
    with pytest.raises(
        DataError, match=r"^new has 1 class that the model does not have: wolf \(2 ima"
    ):
        find_evaluation_set(tmp_path / "new", ("ant", "bee"))


def test_splits_without_validation_are_not_evaluated_on(tmp_path: Path) -> None:
    save_classes(tmp_path / "test", ant=1)
    save_classes(tmp_path / "train", ant=1)
    with pytest.raises(DataError, match="no folder of validation images") as caught:
        find_evaluation_set(tmp_path, ("ant",))
    assert str(tmp_path / "test") in str(caught.value)


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", ant=1)
    save_classes(tmp_path / "test", ant=1)
    for classes in (None, ("ant",)):
        with pytest.raises(DataError, match="holds splits, not classes"):
            read_classes_folder(tmp_path, classes)


def test_a_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_classes(tmp_path, ant=1, bee=1)
    scandir: Callable[[str], object] = os.scandir

    def deny(path: str) -> object:
        if Path(path).name == "ant":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=r"cannot read folder .*ant: Permission denied"):
        read_classes_folder(tmp_path)


def test_listing_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no images in {tmp_path}"):
        list_images(tmp_path)
