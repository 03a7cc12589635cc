from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import finetuning
from benchmarks.tables import Row
from momconv.recipe import load_recipe
from momconv.zoo.description import Preprocessing

PLAIN = Preprocessing(resolution=32, resize=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_the_table_has_the_last_and_the_best_epoch_over_the_seeds() -> None:
    scores = {"0": (50, 80, 70), "1": (60, 82, 74)}
    rows: list[Row] = [
        {
            "task": "t",
            "method": "m",
            "epoch": str(n),
            "seed": seed,
            finetuning.VALUE: str(score),
        }
        for seed, own in scores.items()
        for n, score in enumerate(own, start=1)
    ]
    assert finetuning.present(rows) == [
        {
            "task": "t",
            "method": "m",
            "seeds": "2",
            "last epoch": "72.0 ± 2.8",
            "best epoch": "81.0 ± 1.4",
        }
    ]


def test_every_task_and_method_has_a_recipe() -> None:
    for task, changes in finetuning.TASKS.items():
        for method in finetuning.select(task):
            load_recipe(None, [*changes, *finetuning.METHODS[method]])


@pytest.mark.parametrize("method", [finetuning.REFERENCE, "momconv, plain"])
def test_every_epoch_of_a_run_is_scored(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(colours)
    small = ["model.name=cifar_resnet20", "model.weights=none"]
    monkeypatch.setitem(finetuning.TASKS, "small", small)
    monkeypatch.setattr(finetuning, "EPOCHS", 2)
    with torch.random.fork_rng(devices=[]):
        rows = list(finetuning.run("small", method, 0, tmp_path))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {row["method"] for row in rows} == {method}
    assert float(rows[-1][finetuning.VALUE]) > 40


@pytest.mark.parametrize("p", [PLAIN, PLAIN.at(96)])
def test_the_reference_sees_squares_of_the_resolution(p: Preprocessing) -> None:
    image = finetuning.transform_like_reference(p)(Image.new("RGB", (32, 32), "white"))
    assert image.shape == (3, p.resolution, p.resolution)
