import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from pages import PageReader
from PIL import Image

from momconv.evaluation import ClassScore, Mistake, Scores
from momconv.recipe import load_recipe
from momconv.reports import run_plots
from momconv.reports.run import report_run
from momconv.reports.run_plots import draw_confusion, draw_mistakes
from momconv.training.finetuning import Result, finetune
from momconv.training.probing import compare
from momconv.training.progress import ProbeScore
from momconv.units import format_bytes
from momconv.zoo.description import Preprocessing

PLAIN = Preprocessing(32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A network that has hardly learned anything, so that it makes mistakes."""
    recipe = load_recipe(
        None,
        [
            *("model.name=cifar_resnet20", "model.weights=none", "train.epochs=2", "train.lr=1e-6"),
            "momentum.use=always",
            *("train.batch_size=17", "train.device=cpu", "data.workers=0"),
            *("train.freeze=[stem]", "train.ema=0.9"),
            f'data.path="{colours}"',
        ],
    )
    return finetune(recipe, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def folder(run: Result) -> Path:
    report_run(run)
    return run.folder


def read_front_matter(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    document: dict[str, Any] = yaml.safe_load(front)
    return document


def colourful(path: Path) -> float:
    """The share of the picture's pixels that are clearly not grey."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return float((np.ptp(pixels, axis=2) > 60).mean())


def test_a_run_leaves_pictures(folder: Path) -> None:
    names = {path.stem for path in (folder / "plots").iterdir()}
    assert names == {"curves", "confusion", "worst-errors", "memory", "training-images"}
    for path in (folder / "plots").iterdir():
        with Image.open(path) as picture:
            assert picture.width > 300


@pytest.mark.parametrize("name", ["worst-errors", "training-images"])
def test_images_are_shown(folder: Path, name: str) -> None:
    """Noisy red, green and blue squares on white."""
    assert colourful(folder / "plots" / f"{name}.png") > 0.05


def test_the_confusion_is_a_table_too(folder: Path) -> None:
    names, *rows = csv.reader((folder / "confusion.csv").read_text().splitlines())
    assert names == ["class", "blue", "green", "red"]
    assert [row[0] for row in rows] == names[1:]
    assert [sum(map(int, row[1:])) for row in rows] == [2, 2, 2]


def test_the_front_matter_is_what_a_hub_reads(folder: Path) -> None:
    front = read_front_matter(folder)
    assert front["pipeline_tag"] == "image-classification"
    assert front["library_name"] == "momconv"
    assert "base_model" not in front  # random weights
    (index,) = front["model-index"]
    kinds = [metric["type"] for metric in index["results"][0]["metrics"]]
    assert kinds == front["metrics"] == ["accuracy", "f1"]


def test_the_library_of_the_hub_reads_the_card(folder: Path, run: Result) -> None:
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.datasets, data.library_name) == ("other", ["colours"], "momconv")
    assert data.eval_results is not None
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    assert figures["accuracy"] == pytest.approx(run.best_epoch.val_top1, abs=1e-4)
    assert {result.dataset_name for result in data.eval_results} == {"colours"}
    assert {result.dataset_type for result in data.eval_results} == {"imagefolder"}


def test_the_card_has_the_figures_of_the_run(folder: Path, run: Result) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "colours: 18 images to train on, 6 held out." in card
    assert "| red | 6 | 2 |" in card
    assert "momconv predict best.safetensors PHOTO.jpg" in card
    assert f"Fingerprint of the files: `{run.splits.fingerprint}`" in card
    top1 = run.best_epoch.val_top1
    assert f"| top-1 | {top1:.2%} " in card
    assert "![confusion](plots/confusion.png)" in card


def test_the_card_has_what_was_asked_for_and_no_path(folder: Path, run: Result) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| `model.name` | cifar\\_resnet20 |" in card
    assert "`train.momentum`" not in card  # a default
    assert str(run.recipe.data.path) not in card


def test_the_card_of_a_network_from_a_file_says_so(run: Result, tmp_path: Path) -> None:
    file = Path("elsewhere/mine.safetensors")
    recipe = run.recipe.change(model={"from_file": file}, log={"plots": False})

    report_run(replace(run, folder=tmp_path, recipe=recipe))

    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "trained from mine.safetensors with" in card
    assert "`model.name`" not in card  # which had no effect


def test_the_config_has_timm_s_keys(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "cifar_resnet20"
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_without_plots_everything_else_is_written(run: Result, tmp_path: Path) -> None:
    recipe = run.recipe.change(log={"plots": False})

    report_run(replace(run, folder=tmp_path, recipe=recipe))

    written = ["README.md", "config.json", "confusion.csv", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert "plots/" not in (tmp_path / "README.md").read_text()


def test_the_page_shows_the_run(folder: Path, run: Result) -> None:
    page = PageReader((folder / "report.html").read_text(encoding="utf-8"))
    # Curves, confusion, memory and training images, and the worst errors one by one.
    wrong = round(6 * (1 - (run.best_epoch.val_top1 or 0)))
    assert page.pictures == 4 + wrong
    for word in (
        "cifar_resnet20 on colours",
        f"{run.best_epoch.val_top1:.1%} top-1 on 6 images 95 % interval",
        f"The surest of {wrong} mistakes.",
        "class images precision recall F1 blue 2",
        "predicted plain checkpointed momentum chosen weights 2.1 MiB",
        "18 images in",
        str(run.splits.fingerprint),
        "momconv predict",
        "strategy",
    ):
        assert word in page.text


def test_the_page_has_the_peak_by_part_as_predicted_and_as_measured(
    folder: Path, run: Result
) -> None:
    page = PageReader((folder / "report.html").read_text(encoding="utf-8"))
    plan, peak = run.plan, run.plan.peak
    held, measured = plan.measured_static_bytes, plan.measured_bytes
    assert peak
    assert held
    assert measured
    assert (held.weights, held.gradients, held.optimizer) == (
        *(peak.weights, peak.gradients, peak.optimizer),
    )
    parts = {
        "weights": (peak.weights + peak.ema, held.weights + held.ema),
        "gradients": (peak.gradients, held.gradients),
        "optimiser state": (peak.optimizer, held.optimizer),
        "activations and the rest": (peak.batch + peak.step, measured - held.total),
        "together": (plan.predicted_bytes, measured),
    }
    rows = [f"{name} {format_bytes(a)} {format_bytes(b)}" for name, (a, b) in parts.items()]
    assert f"at the peak predicted measured {' '.join(rows)}" in page.text
    assert held.gradients < held.weights - 4 * 16 * 3 * 9  # the stem's have none


def test_a_probe_stands_beside_the_score(run: Result, tmp_path: Path) -> None:
    probe = ProbeScore(1.0, (0.61, 1.0), n=6, images=18, penalty=1e-3, seconds=1.0)
    recipe = run.recipe.change(log={"plots": False})

    report_run(replace(run, folder=tmp_path, recipe=recipe, probe=probe))

    bought = compare(probe, run.best_epoch.val_top1 or 0, 6)
    page = PageReader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "100.0% linear probe on frozen features; 95 % interval 61.0% to 100.0%" in page.text
    assert f"Linear probe {bought}." in page.text
    card = (tmp_path / "README.md").read_text()
    assert "| top-1 of a linear probe | 100.00% (95 % interval 61.0% to 100.0%) |" in card
    assert bought in card


def test_what_was_chosen_adds_up_to_what_was_planned(folder: Path, run: Result) -> None:
    """The last batch of an epoch has an image more than others, and the stem is frozen."""
    page = PageReader((folder / "report.html").read_text(encoding="utf-8"))
    assert f"{format_bytes(run.plan.predicted_bytes)} The whole plan" in page.text


def test_the_page_needs_no_pictures_and_no_scores(run: Result, tmp_path: Path) -> None:
    splits = replace(run.splits, val=run.splits.val.select([]))
    epoch = replace(run.best_epoch, val_loss=None, val_top1=None)
    recipe = run.recipe.change(log={"plots": False})

    report_run(
        replace(
            run, folder=tmp_path, recipe=recipe, splits=splits, best_epoch=epoch, history=(epoch,)
        )
    )

    page = PageReader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.pictures == 0
    assert "top-1" not in page.text


def test_without_held_out_images_there_are_no_scores(run: Result, tmp_path: Path) -> None:
    splits = replace(run.splits, val=run.splits.val.select([]))
    epoch = replace(run.best_epoch, val_loss=None, val_top1=None)
    result = replace(run, folder=tmp_path, splits=splits, best_epoch=epoch, history=(epoch,))

    report_run(result)

    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert drawn == {"curves", "memory", "training-images"}
    assert "None: no image was held out." in (tmp_path / "README.md").read_text()
    assert "metrics" not in read_front_matter(tmp_path)


def make_scores(*names: str) -> Scores:
    """Each class is taken for the next one; the last ones always."""
    n = len(names)
    confusion = [[0] * n for _ in names]
    for number in range(n):
        wrong = number * 9 // n
        confusion[number][number] = 9 - wrong
        confusion[number][(number + 1) % n] = wrong
    classes = tuple(ClassScore(name, 0.5, 0.5, 0.5, 9) for name in names)
    return Scores(
        9 * n, 0.5, (0.4, 0.6), 1.0, 0.5, 0.1, classes, tuple(map(tuple, confusion)), (), ()
    )


def test_names_are_not_obeyed_and_may_be_of_any_script(colours: Path, tmp_path: Path) -> None:
    names = ("$x$ \\frac{", "六", "a\x1b[31m", "x" * 99)
    draw_confusion(make_scores(*names), tmp_path / "confusion.png")
    mistakes = [Mistake(colours / "red" / "0.png", name, "$", 0.5) for name in names]
    strip = tmp_path / "strip.png"
    Image.new("RGB", (1, 40_000)).save(strip)
    mistakes.append(Mistake(strip, "a", "b", 0.5))
    draw_mistakes(mistakes, PLAIN, tmp_path / "mistakes.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_of_many_classes_the_most_confused_are_shown() -> None:
    shown = run_plots._choose_classes(make_scores(*map(str, range(90))))
    assert len(shown) == 30
    assert min(shown) > 50
