import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from momconv import demo
from momconv.cli import app
from momconv.demo import Demo, demonstrate
from momconv.errors import ResourceError, UsageError
from momconv.files.model_file import load
from momconv.momentum.sequential import momentum_stages
from momconv.training.progress import Listener

pytest.importorskip("sklearn")

FILES = ("original", "converted", "finetuned")


def type_demo(folder: Path) -> Result:
    return CliRunner().invoke(app, ["demo", "-o", str(folder)])


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Result]:
    """A demo in a folder where one was before, with a tenth of the images, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / demo._MARKER).touch()
    (folder / "digits" / "train" / "old").mkdir(parents=True)
    (folder / "converted.safetensors").write_text("old")
    (folder / "mine.txt").write_text("mine")
    came: list[Demo] = []

    def briefly(folder: Path, listener: Listener) -> Demo:
        came.append(demonstrate(folder, images=180, epochs=(1, 1), listener=listener))
        return came[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demonstrate", briefly)
        patch.chdir(folder.parent)
        ran = type_demo(Path(folder.name))
        assert ran.exit_code == 0, ran.output
        (done,) = came
        absolute = {name: folder.parent / getattr(done, name) for name in FILES}
        scores = {folder.parent / path: scores for path, scores in done.scores.items()}
        return replace(done, **absolute, scores=scores), ran


@pytest.fixture(scope="module")
def done(typed: tuple[Demo, Result]) -> Demo:
    return typed[0]


def test_the_command_ends_with_a_table_and_a_command(typed: tuple[Demo, Result]) -> None:
    done, ran = typed
    folder = done.converted.parent
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["network", "top-1", "MiB", "an", "image", "file"]
    for line in lines[1:4]:
        name, top1, need, path = line.split()
        assert name in ("original", "converted", "fine-tuned")
        assert top1.endswith("%")
        assert 0.1 < float(need) < 3
        assert (folder.parent / path).is_file()
    best, val = f"{folder.name}/finetuning/best.safetensors", f"{folder.name}/digits/val"
    assert f"momconv eval {best} --data {val}" in lines[-1]
    assert "note: fine-tuning it with momentum" in ran.stderr


def test_the_command_does_not_touch_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    ran = type_demo(tmp_path)
    assert ran.exit_code == 2
    assert f"error: folder is not empty, and no demo made it: {tmp_path}" in ran.stderr
    assert "fix: -o FOLDER" in ran.stderr


def test_the_networks_are_what_they_are_said_to_be(done: Demo) -> None:
    gammas = [
        {stage.gamma for stage in momentum_stages(load(path)).values()}
        for path in (done.original, done.converted, done.finetuned)
    ]
    assert gammas == [{0}, {0.9}, {0.9}]


def test_all_are_scored_on_the_same_images_that_none_was_trained_on(done: Demo) -> None:
    digits = done.converted.parent / "digits"
    names = {
        split: {path.name for path in (digits / split).glob("*/*.png")}
        for split in ("pretrain", "train", "val")
    }
    counts = {split: len(files) for split, files in names.items()}
    assert counts["pretrain"] == pytest.approx(90, abs=5)
    assert counts["train"] == pytest.approx(45, abs=5)
    assert len(set.union(*names.values())) == sum(counts.values()) == 180
    assert [scores.n for scores in done.scores.values()] == 3 * [counts["val"]]


def test_the_images_are_digits_of_the_size_of_the_network(done: Demo) -> None:
    folders = list((done.converted.parent / "digits").glob("*/*"))
    assert {folder.name for folder in folders} == set("0123456789")
    with Image.open(next(folders[0].iterdir())) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")
        grey = set(picture.convert("L").tobytes())
    assert min(grey) == 0
    assert max(grey) > 200


def test_an_earlier_demo_is_replaced_and_nothing_else(done: Demo) -> None:
    folder = done.converted.parent
    assert not (folder / "digits" / "train" / "old").exists()
    assert (folder / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["full", "file"])
def test_what_no_demo_made_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "digits").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((UsageError, ResourceError), match=str(tmp_path / name)):
        demonstrate(tmp_path / name)
    assert (tmp_path / "full" / "digits").read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == 3


def test_without_scikit_learn_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ResourceError) as error:
        demonstrate(tmp_path / "new")
    assert error.value.fix == "pip install 'momconv[demo]'"
    assert not (tmp_path / "new").exists()
