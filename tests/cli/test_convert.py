import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.files.model_file import load, read_metadata
from momconv.surgery.conversion import summarise
from momconv.zoo.networks import build

SMALL = ["cifar_resnet20", "--weights", "none"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, args)])


def converted(*args: str | Path) -> dict[str, Any]:
    """The document of a conversion that works."""
    ran = run(*args, "--json")
    assert ran.exit_code == 0, ran.output
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def test_the_real_program_writes_a_file_that_rebuilds_the_network(
    here: Path, colours: Path
) -> None:
    command = [sys.executable, "-m", "momconv", "convert", *SMALL, "--calibrate", str(colours)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "warning: only 24 images to calibrate on; 100 or more are better\n"
    assert "layer1         3            0-2      14,016  0.9" in ran.stdout
    assert "19 layers re-estimated on 24 images" in ran.stdout
    assert "written    cifar_resnet20-g0.9.safetensors (1.0 MiB)" in ran.stdout
    network = load(here / "cifar_resnet20-g0.9.safetensors")
    assert [stage.gamma for stage in summarise(network)] == [0.9, 0, 0]
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_json_is_one_document(here: Path) -> None:
    ran = run(*SMALL, "--gamma", "0.5", "-o", "net.safetensors", "--json")
    document = json.loads(ran.stdout)
    assert (ran.exit_code, ran.stderr, document["ok"]) == (0, "", True)
    assert (document["gamma"], document["path"]) == (0.5, "net.safetensors")
    assert document["bytes"] == (here / "net.safetensors").stat().st_size
    assert document["gradients_exact"] is True
    assert document["calibration"] is None


def test_gamma_0_keeps_the_network(here: Path) -> None:
    plain = build("cifar_resnet20").eval()
    torch.save(plain.state_dict(), "plain.pth")
    document = converted("cifar_resnet20", "--weights", "plain.pth", "--gamma", "0")
    assert document["gradients_exact"] is None
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load("cifar_resnet20-g0.safetensors")(images), plain(images))


def test_the_options_arrive() -> None:
    options = ["--stages", "layer2,layer3", "--velocity", "residual", "--no-gain"]
    document = converted(*SMALL, *options)
    assert [stage["momentum"] for stage in document["stages"]] == [[], [1, 2], [1, 2]]
    (layer3,) = read_metadata(document["path"])["stages"]["layer3"]["runs"]
    assert layer3["gains"] == [1, 1]
    assert read_metadata(document["path"])["stages"]["layer3"]["velocity"] == "residual"


def test_all_stages_can_be_asked_for() -> None:
    document = converted(*SMALL, "--stages", "all")
    assert [stage["momentum"] for stage in document["stages"]] == [[0, 1, 2], [1, 2], [1, 2]]


def test_weights_that_are_not_calibrated_are_warned_of(here: Path) -> None:
    torch.save(build("cifar_resnet20").state_dict(), "plain.pth")
    ran = run("cifar_resnet20", "--weights", "plain.pth")
    assert ran.exit_code == 0
    assert "warning: BatchNorm's statistics are still those of the plain network" in ran.stderr


def test_a_network_in_which_momentum_saves_nothing_is_warned_of() -> None:
    ran = run("resnet18", "--weights", "none")
    assert ran.exit_code == 0
    assert "warning: no run of blocks is long enough" in ran.stderr


def test_calibration_uses_at_most_so_many_images_and_leaves_out_broken_ones(
    here: Path, colours: Path
) -> None:
    shutil.copytree(colours, here / "images")
    (here / "images" / "red" / "broken.jpg").write_bytes(b"x")
    ran = run(*SMALL, "--calibrate", "images", "--json")
    assert "1 images left out because they are unreadable\n  images/red/broken.jpg" in ran.stderr
    assert json.loads(ran.stdout)["calibration"]["images"] == 24
    document = converted(*SMALL, "--calibrate", colours, "--max-images", "7", "--overwrite")
    assert document["calibration"]["images"] == 7


def test_the_same_seed_gives_the_same_network(colours: Path) -> None:
    torch.save(build("cifar_resnet20").state_dict(), "plain.pth")
    args = ["cifar_resnet20", "--weights", "plain.pth", "--max-images", "9"]
    args += ["--calibrate", str(colours)]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        converted(*args, "--seed", seed, "-o", f"{name}.safetensors")
    a, b, c = (load(f"{name}.safetensors").state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_an_existing_file_is_kept_unless_told_otherwise(here: Path) -> None:
    path = here / "net.safetensors"
    path.write_text("mine")
    ran = run(*SMALL, "-o", path)
    assert ran.exit_code == 2
    assert f"error: output file already exists: {path}\nfix: --overwrite" in ran.stderr
    assert path.read_text() == "mine"
    assert run(*SMALL, "-o", path, "--overwrite").exit_code == 0
    assert load(path)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["renset18"], 2, "unknown model 'renset18' — did you mean resnet18?"),
        (["vgg16"], 2, "vgg16 is not a residual network that momconv converts"),
        (["../resnet18"], 2, "unknown model '../resnet18'"),
        ([*SMALL, "--gamma", "1.5"], 2, "gamma is 1.5"),
        ([*SMALL, "--gamma", "-1"], 2, "gamma is -1"),
        (
            [*SMALL, "--stages", "layer9"],
            2,
            "this CifarResNet has no two consecutive residual blocks",
        ),
        (["cifar_resnet20"], 2, "there are no published weights 'DEFAULT' for cifar_resnet20"),
        (["resnet18", "--weights", "V9"], 2, "unknown weights 'V9' for resnet18"),
        (["resnet18", "--weights", "no.pth"], 4, "file does not exist: no.pth"),
        ([*SMALL, "--calibrate", "nowhere"], 3, "data folder does not exist: nowhere"),
        ([*SMALL, "--calibrate", "."], 3, "no images in ./"),
        ([*SMALL, "-o", "no/where.safetensors"], 5, "folder does not exist: no"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing_behind(
    here: Path, args: list[str], code: int, message: str
) -> None:
    ran = run(*args)
    assert ran.exit_code == code
    assert f"error: {message}" in ran.stderr
    assert ran.stdout == ""
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("args", [["--velocity", "fast"], ["--max-images", "0"]])
def test_a_value_that_an_option_does_not_take_is_a_usage_error(args: list[str]) -> None:
    assert run(*SMALL, *args).exit_code == 2
