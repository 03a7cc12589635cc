import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pages import PageReader
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.data.folder import find_evaluation_set
from momconv.evaluation import evaluate
from momconv.files import model_file
from momconv.surgery.conversion import convert
from momconv.zoo.description import attach, describe
from momconv.zoo.networks import build, replace_head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights for the classes of the fixture ``colours``."""
    torch.manual_seed(0)
    network, path = build("cifar_resnet20"), tmp_path_factory.mktemp("model") / "m.safetensors"
    replace_head(network, ("blue", "green", "red"))
    model_file.save(network, path)
    return path


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def test_the_real_program_prints_one_document(model: Path, colours: Path) -> None:
    command: list[str | Path]
    command = [sys.executable, "-m", "momconv", "eval", model, "--data", colours, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert (ran.returncode, ran.stderr) == (0, "")
    document = json.loads(ran.stdout)
    assert document["ok"] is True
    assert document["n"] == 24
    assert 0 <= document["top1"] <= 1
    assert document["top1"] * 24 == pytest.approx(
        sum(document["confusion"][i][i] for i in range(3))
    )
    assert [score["name"] for score in document["classes"]] == ["blue", "green", "red"]


def test_without_json_there_are_tables(model: Path, colours: Path) -> None:
    ran = run(model, "--data", colours, "--batch-size", "7")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout.startswith("top-1 ")
    assert "on 24 images" in ran.stdout
    assert "true \\ predicted" in ran.stdout


def test_the_folder_of_a_run_is_its_best_model(run_folder: Path, colours: Path) -> None:
    named, best = (
        json.loads(run(file, "--data", colours, "--json").stdout)
        for file in (run_folder, run_folder / "best.safetensors")
    )
    assert named == best
    assert named["file"] == str(run_folder / "best.safetensors")


def test_a_folder_gets_a_report_and_what_is_said_of_each_image(
    model: Path, colours: Path, tmp_path: Path
) -> None:
    words: list[str | Path] = [model, "--data", colours, "-o", tmp_path / "out", "--json"]
    document = json.loads(run(*words).stdout)
    names = ["confusion.csv", "confusion.png", "predictions.csv", "report.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names

    page = PageReader((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert f"{document['top1']:.1%} top-1 on 24 images" in page.text
    assert page.pictures == 1 + len(document["mistakes"])
    with (tmp_path / "out" / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == 24
    hits = sum(row["label"] == row["prediction"] for row in rows)
    assert hits == round(24 * document["top1"])
    for row in rows:
        assert Path(row["path"]).parent.name == row["label"]
        shares = {name: float(row[name]) for name in ("blue", "green", "red")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert shares[row["prediction"]] == max(shares.values()) == float(row["probability"])

    again = json.loads(run(*words).stdout)["error"]
    assert (again["code"], again["kind"]) == (2, "usage.output_exists")
    assert run(*words, "--overwrite").exit_code == 0
    inside = json.loads(run(*words[:-2], colours / "out", "--json").stdout)["error"]
    assert inside["kind"] == "usage.output_in_data"
    assert not (colours / "out").exists()


def test_a_class_that_is_no_text_is_called_alike_in_all_files(
    colours: Path, tmp_path: Path
) -> None:
    name = "r\\xe4d"
    network, file, folder = build("cifar_resnet20"), tmp_path / "m.safetensors", tmp_path / "data"
    replace_head(network, ("blue", name))
    model_file.save(network, file)
    for ours, theirs in (("blue", "blue"), ("r\udce4d", "red")):
        (folder / ours).mkdir(parents=True)
        shutil.copy(colours / theirs / "0.png", folder / ours)

    ran = run(file, "--data", folder, "-o", tmp_path / "out", "--json")
    assert [score["name"] for score in json.loads(ran.stdout)["classes"]] == ["blue", name]
    with (tmp_path / "out" / "predictions.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [row["label"] for row in rows] == ["blue", name]
    for row in rows:
        assert float(row[row["prediction"]]) == float(row["probability"])


def test_the_validation_split_is_taken_where_there_is_one(
    model: Path, colours: Path, tmp_path: Path
) -> None:
    shutil.copytree(colours, tmp_path / "data" / "train")
    shutil.copytree(colours / "red", tmp_path / "data" / "val" / "red")
    ran = run(model, "--data", tmp_path / "data", "--json")
    assert json.loads(ran.stdout)["n"] == 8
    assert "warning: " in ran.stderr
    assert "has no images of 2 classes: blue, green" in ran.stderr


@pytest.fixture(scope="module")
def run_folder(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that held 6 of 24 images out."""
    folder = tmp_path_factory.mktemp("run")
    args = ["--model", "cifar_resnet20", "--weights", "none", "--epochs", "1", "--device", "cpu"]
    args += ["--micro-batch", "8", "--set", "data.workers=0", "--no-plots", "-o", str(folder)]
    assert CliRunner().invoke(app, ["finetune", "--data", str(colours), *args]).exit_code == 0
    return folder


def test_images_that_were_trained_on_do_not_count_wherever_they_and_the_model_are(
    run_folder: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(colours, tmp_path / "moved" / "photos"))
    (tmp_path / "link").symlink_to(colours)
    copy = shutil.copy(run_folder / "best.safetensors", tmp_path / "copy.safetensors")
    monkeypatch.chdir(moved / "red")
    for data in (colours, tmp_path / "moved" / ".." / "link", Path("..")):
        document = json.loads(run(copy, "--data", data, "--json").stdout)
        assert document["n"] == 6
        assert document["training_images"] == {
            "left_out": 18,
            "counted": 0,
            "recorded": True,
            "complete": True,
        }
    shown = run(copy, "--data", moved).stdout
    assert "on 6 images" in shown
    assert "none of them was trained on; 18 images left out, which were" in shown


def test_training_images_count_where_nothing_else_is_there_or_wanted(
    run_folder: Path, colours: Path, tmp_path: Path
) -> None:
    split = json.loads((run_folder / "split.json").read_text())
    trained = [path for path, _, _ in split["train"]["files"]]
    for path in trained:
        for part in ("only", "data/train"):
            (tmp_path / part / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(colours / path, tmp_path / part / path)
    shutil.copytree(colours, tmp_path / "data" / "val")
    model = run_folder / "best.safetensors"
    asked = run(model, "--data", tmp_path / "data", "--split", "train", "--json")
    for ran in (asked, run(model, "--data", tmp_path / "only", "--json")):
        assert json.loads(ran.stdout)["training_images"]["counted"] == 18
        assert "warning: 18 of 18 images were trained on" in ran.stderr
    assert json.loads(run(model, "--data", tmp_path / "data", "--json").stdout)["n"] == 6


def test_where_it_is_not_known_what_was_trained_on_the_score_says_so(
    model: Path, run_folder: Path, colours: Path
) -> None:
    assert "which images it was trained on is not recorded" in run(model, "--data", colours).stdout
    document = json.loads(run(model, "--data", colours, "--json").stdout)
    assert document["training_images"]["recorded"] is False
    both: list[str | Path]
    both = [run_folder / "best.safetensors", "--compare", model, "--data", colours]
    document = json.loads(run(*both, "--json").stdout)
    assert (document["n"], document["compared"][0]["n"]) == (6, 6)
    assert document["training_images"]["recorded"] is False


def test_a_file_without_class_names_takes_the_folder_s(colours: Path, tmp_path: Path) -> None:
    model_file.save(build("cifar_resnet20", 3), tmp_path / "m.safetensors")
    ran = run(tmp_path / "m.safetensors", "--data", colours, "--json")
    assert ran.exit_code == 0
    assert "names no classes" in ran.stderr
    names = [score["name"] for score in json.loads(ran.stdout)["classes"]]
    assert names == ["blue", "green", "red"]


def test_images_are_prepared_as_is_said(model: Path, colours: Path, tmp_path: Path) -> None:
    said = ["--crop", "0.8", "--mean", "0.1,0.2,0.3", "--std", "0.5,0.5,0.5"]
    words: list[str | Path] = [model, "--data", colours, *said]
    document = json.loads(run(*words, "-o", tmp_path / "out", "--json").stdout)

    assert document["loss"] != json.loads(run(*words[:3], "--json").stdout)["loss"]
    page = PageReader((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "shorter side to 40" in page.text
    assert f"momconv eval {model} --data {colours} {' '.join(said)}" in page.text
    bad = json.loads(run(*words[:3], "--std", "0", "--json").stdout)["error"]
    assert bad["kind"] == "usage.bad_value"


def test_an_unreadable_image_is_left_out_with_a_warning(
    model: Path, colours: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    (data / "red" / "bad.png").touch()
    ran = run(model, "--data", data, "--json")
    assert json.loads(ran.stdout)["n"] == 24
    assert "warning: 1 of 25 images unreadable (4.0%)" in ran.stderr


def test_models_are_compared_on_the_same_images(model: Path, colours: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network, other = build("cifar_resnet20"), tmp_path / "other.safetensors"
    replace_head(network, ("blue", "green", "red"))
    model_file.save(network, other)

    document = json.loads(run(model, "--compare", other, "--data", colours, "--json").stdout)
    alone = json.loads(run(other, "--data", colours, "--json").stdout)
    table = run(model, "--compare", other, "--data", colours).stdout

    (compared,) = document["compared"]
    assert compared["top1"] == alone["top1"]
    assert compared["confusion"] == alone["confusion"]
    assert 0 <= compared["agreement"] <= 1
    assert "same as 1" in table
    assert f"2  {other}" in table


def test_a_model_of_other_classes_is_not_compared(
    model: Path, colours: Path, tmp_path: Path
) -> None:
    network, other = build("cifar_resnet20"), tmp_path / "other.safetensors"
    replace_head(network, ("red", "green", "blue"))
    model_file.save(network, other)
    ran = run(model, "--compare", other, "--data", colours)
    assert (ran.exit_code, "the same classes apart" in ran.stderr) == (4, True)
    assert f"fix: momconv inspect {model}" in ran.stderr


def test_a_top1_below_the_least_is_an_exit_code_with_the_scores(model: Path, colours: Path) -> None:
    ran = run(model, "--data", colours, "--min-top1", "100%")
    assert ran.exit_code == 6
    assert ran.stdout.startswith("top-1 ")
    assert ran.stderr.endswith("below 100.00%\n")
    ran = run(model, "--data", colours, "--min-top1", "1", "--json")
    document = json.loads(ran.stdout)
    assert (ran.exit_code, document["ok"], document["n"]) == (6, False, 24)
    assert document["error"]["kind"] == "threshold.top1"
    assert run(model, "--data", colours, "--min-top1", "0").exit_code == 0


def test_mistakes_are_explained(model: Path, colours: Path, tmp_path: Path) -> None:
    ten, wolves = tmp_path / "ten.safetensors", Path(shutil.copytree(colours, tmp_path / "wolves"))
    model_file.save(build("cifar_resnet20"), ten)
    (wolves / "red").rename(wolves / "wolf")
    mistakes: list[tuple[list[str | Path], int, str]] = [
        ([model, "--data", wolves], 3, "1 class that the model does not have: wolf (8 images)"),
        ([ten, "--data", colours], 3, "has 3 classes, the model tells 10 apart"),
        ([model, "--data", tmp_path / "nope"], 3, "data folder does not exist"),
        ([tmp_path / "m.safetensors", "--data", colours], 4, "file does not exist"),
        ([model, "--data", colours, "--device", "cuda:99"], 5, "--device cuda:99"),
        ([model, "--data", colours, "--batch-size", "0"], 2, "--batch-size"),
        ([model, "--data", colours, "--min-top1", "90"], 2, "'90' is not a share"),
        ([model], 2, "--data"),
    ]
    for args, code, message in mistakes:
        ran = run(*args)
        assert (ran.exit_code, message in ran.stderr) == (code, True), ran.stderr
        assert ran.stdout == ""


def test_with_json_a_mistake_is_a_document_too(model: Path) -> None:
    ran = run(model, "--data", "/nope", "--json")
    assert ran.exit_code == 3
    assert json.loads(ran.stdout)["error"]["kind"] == "data.missing_folder"


def test_the_original_is_compared_with_what_became_of_it(
    model: Path, colours: Path, tmp_path: Path
) -> None:
    """An unconverted checkpoint, what it was converted to, and what comes of that."""
    original = build("cifar_resnet20", 3)
    torch.save(original.state_dict(), tmp_path / "original.pth")
    attach(original, replace(describe(original), classes=("blue", "green", "red")))
    model_file.save(convert(original, 0.9), tmp_path / "converted.safetensors")
    files = [tmp_path / "converted.safetensors", tmp_path / "original.pth"]
    ran = run(model, "--data", colours, "--compare", files[0], "--compare", files[1], "--json")
    assert ran.exit_code == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert [row["file"] for row in document["compared"]] == list(map(str, files))
    plain = evaluate(original, find_evaluation_set(colours))
    assert document["compared"][1]["loss"] == plain.loss
    torch.save(build("cifar_resnet20").state_dict(), tmp_path / "ten.pth")
    torch.save(build("cifar_resnet32", 3).state_dict(), tmp_path / "deeper.pth")
    for name, said in (
        ("ten", "does not tell the same classes"),
        ("deeper", "like cifar_resnet32"),
    ):
        ran = run(model, "--data", colours, "--compare", tmp_path / f"{name}.pth")
        assert (ran.exit_code, ran.stdout) == (4, "")
        assert said in ran.stderr
