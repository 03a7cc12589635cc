"""What a run finds out before its first step: what is black and white in its images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import Log, resume, small

from momconv import evaluate, predict
from momconv.data.folder import read_classes_folder
from momconv.files import model_file
from momconv.files.export import to_config
from momconv.training import starting
from momconv.training.finetuning import Result, finetune
from momconv.zoo.description import ValueRanges, describe

ELEVATION = {"valley": 400, "peak": 2500}
ELEVATION_RANGES = ValueRanges(floats=(0, 2600))


def save(path: Path, mean: float, *pixels: float, kind: str = "float32") -> Path:
    """Noise around a mean, the first values of which are ``pixels``."""
    values = np.random.default_rng(int(mean)).normal(mean, mean / 100, (32, 32)).astype(kind)
    values[0, : len(pixels)] = pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(scope="module")
def elevation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "elevation"
    for name, mean in ELEVATION.items():
        for number in range(5):
            save(root / name / f"{number}.tif", mean + number, -9999)
    return root


@pytest.fixture(scope="module")
def trained(elevation: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[str]]:
    log = Log()
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finetune(small(elevation, "train.epochs=1"), folder, listener=log), log.told


def test_one_range_for_all_images_is_told_and_kept_in_the_model(
    trained: tuple[Result, list[str]],
) -> None:
    result, told = trained
    for path in (result.best, result.last):
        assert describe(model_file.load(path)).preprocessing.ranges == ELEVATION_RANGES
    (note,) = (line for line in told if "not 8-bit" in line)
    assert note.endswith("floating-point values from 0 (black) to 2600 (white)")
    config = to_config(describe(model_file.load(result.best)))
    assert json.loads(json.dumps(config))["value_ranges"] == {"integers": None, "floats": [0, 2600]}


def test_a_pixel_without_data_changes_no_prediction(
    trained: tuple[Result, list[str]], tmp_path: Path
) -> None:
    model = model_file.load(trained[0].best)
    pixels: dict[str, list[float]] = {
        "plain": [],
        "none": [-9999],
        "largest": [3.4e38],
        "nan": [float("nan")],
    }
    paths = [save(tmp_path / f"{name}.tif", 2500, *odd) for name, odd in pixels.items()]
    valley = save(tmp_path / "valley.tif", 400)

    done = predict(model, [*paths, valley])

    peaks = [image.guesses[0].probability for image in done.images[:-1]]
    names = [image.guesses[0].name for image in done.images[:-1]]
    assert len({*names}) == 1
    assert peaks == pytest.approx([peaks[0]] * 4, abs=0.02)
    other = {guess.name: guess.probability for guess in done.images[-1].guesses}
    assert abs(other[names[0]] - peaks[0]) > 0.05
    assert done.outside == {paths[1]: 1, paths[2]: 1}
    assert not done.guessed


def test_evaluation_sees_what_validation_saw(
    trained: tuple[Result, list[str]], elevation: Path
) -> None:
    result, _ = trained
    scores = evaluate(model_file.load(result.best), result.splits.val)
    assert scores.loss == pytest.approx(result.best_epoch.val_loss, rel=1e-4)
    assert read_classes_folder(elevation).classes == result.splits.val.classes


def test_a_run_that_goes_on_keeps_its_range(
    trained: tuple[Result, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(trained[0].folder, tmp_path / "run"))
    monkeypatch.setattr(starting, "find_ranges", lambda _: pytest.fail("found anew"))
    done = resume(folder, "train.epochs=2")
    assert describe(model_file.load(done.last)).preprocessing.ranges == ELEVATION_RANGES


def test_a_network_that_is_trained_further_keeps_the_range_that_it_knows(
    trained: tuple[Result, list[str]], tmp_path: Path
) -> None:
    hills, mountains = tmp_path / "hills", tmp_path / "mountains"
    for number in range(5):
        for name, factor in (("a", 0.2), ("b", 0.8)):
            save(hills / name / f"{number}.tif", 1500 * factor + number)
            save(mountains / name / f"{number}.tif", 8000 * factor + number)
    for data, expected in ((hills, 2600.0), (mountains, 6700.0)):
        recipe = small(data, "train.epochs=1", f'model.from_file="{trained[0].best}"')
        done = finetune(recipe, data.with_suffix(".run"))
        ranges = describe(model_file.load(done.best)).preprocessing.ranges
        assert ranges.floats == pytest.approx((0, expected), rel=0.02)
