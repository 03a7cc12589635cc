import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.cli._display import Display
from momconv.files.model_file import load, read_metadata
from momconv.surgery.conversion import summarise
from momconv.zoo.networks import build

SMALL: list[str | Path] = ["cifar_resnet20", "--weights", "none"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # of networks with random weights
    return tmp_path


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 2)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, args)])


def converted(*args: str | Path) -> dict[str, Any]:
    """The document of a conversion that works."""
    ran = run(*args, "--json")
    assert ran.exit_code == 0, ran.output
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def real_program(*args: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "momconv", "convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_the_real_program_writes_a_file_that_rebuilds_the_network(
    here: Path, colours: Path
) -> None:
    ran = real_program(*SMALL, "--verify", colours)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == (
        f"note: the classes in {colours} are not the 10 of the network, so the networks are only"
        " compared with each other\n"
    )
    assert "layer1         3            0-2      14,016  0.9" in ran.stdout
    assert f"of 24 images from {colours}" in ran.stdout
    assert "written    cifar_resnet20-g0.9.safetensors (1.0 MiB)" in ran.stdout
    network = load(here / "cifar_resnet20-g0.9.safetensors")
    assert [stage.gamma for stage in summarise(network)] == [0.9, 0, 0]
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_calibration_holds_out_images_to_measure_its_steps_on(colours: Path) -> None:
    ran = run(*SMALL, "--calibrate", colours)
    assert ran.exit_code == 0
    assert ran.stderr == "warning: only 20 images to calibrate on; 100 or more are better\n"
    assert "BatchNorm  " in ran.stdout
    assert "gains and norms refined" in ran.stdout
    assert f"of 4 images held out of {colours}" in ran.stdout


def test_json_is_one_document(here: Path) -> None:
    ran = run(*SMALL, "--gamma", "0.5", "-o", "net.safetensors", "--json")
    document = json.loads(ran.stdout)
    assert (ran.exit_code, ran.stderr, document["ok"]) == (0, "", True)
    assert (document["gamma"], document["path"]) == (0.5, "net.safetensors")
    assert document["bytes"] == (here / "net.safetensors").stat().st_size
    assert document["gradients_exact"] is True
    assert document["calibration"] is None
    assert document["measured_on"] == "of noise"
    assert [step["name"] for step in document["steps"]] == ["swapped"]


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
    assert "1 image left out for being unreadable\n  images/red/broken.jpg" in ran.stderr
    assert json.loads(ran.stdout)["calibration"]["images"] == 19
    document = converted(*SMALL, "--calibrate", colours, "--max-images", "7", "--overwrite")
    assert document["calibration"]["images"] == 6


def test_the_same_seed_gives_the_same_network(colours: Path) -> None:
    torch.save(build("cifar_resnet20").state_dict(), "plain.pth")
    args = ["cifar_resnet20", "--weights", "plain.pth", "--max-images", "9"]
    args += ["--calibrate", str(colours), "--gamma", "0"]  # by which statistics always change
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
        (["vgg16"], 2, "vgg16 is not a residual network: "),
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
        ([*SMALL, "--gamma", "much"], 2, "--gamma much: 'much' is not a number"),
        ([*SMALL, "--gamma", "auto"], 2, "--gamma auto needs images"),
        ([*SMALL, "--max-drift", "1%"], 2, "--max-drift is a limit for the choice of γ"),
        (
            [*SMALL, "--gamma", "auto", "--max-drift", "200%", "--calibrate", "."],
            2,
            "'200%' is not a share between 0% and 100%",
        ),
        ([*SMALL, "--distill", "6"], 2, "--distill needs images"),
        (
            [*SMALL, "--distill", "soon", "--calibrate", "."],
            2,
            "--distill soon: 'soon' is neither a number of epochs nor a duration",
        ),
        ([*SMALL, "--verify", "."], 3, "no images in ./"),
        ([*SMALL, "--verify", "nowhere"], 3, "data folder does not exist: nowhere"),
        ([], 2, "no network to convert"),
        (["resnet18", "--back", "x.safetensors"], 2, "--back takes the network as it is"),
        (["--back", "x.safetensors", "--gamma", "0.5"], 2, "--back takes the network as it is"),
        (["--back", "no.safetensors"], 4, "file does not exist: no.safetensors"),
        (["--back", "no.safetensors", "-o", "x.onnx"], 2, "cannot tell the format of x.onnx"),
        ([*SMALL, "--device", "tpu"], 2, "unknown device 'tpu'"),
        ([*SMALL, "--calibrate", "nowhere"], 3, "data folder does not exist: nowhere"),
        ([*SMALL, "--calibrate", "."], 3, "no images in ./"),
        ([*SMALL, "-o", "no/where.safetensors"], 5, "folder does not exist: no"),
        ([*SMALL, "-o", "x.pth"], 2, "x.pth: a converted network is in a .safetensors file"),
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


def test_a_file_in_place_of_a_name_is_said_to_be_one() -> None:
    assert run(*SMALL, "-o", "own.safetensors").exit_code == 0
    assert run("--back", "own.safetensors", "-o", "plain.pth").exit_code == 0
    fixes = {
        "own.safetensors": "--back own.safetensors",
        "plain.pth": "resnet50 --weights plain.pth",
    }
    for file, fix in fixes.items():
        ran = run(file)
        assert (ran.exit_code, f"error: {file} is a file" in ran.stderr) == (2, True)
        assert f"fix: momconv convert {fix}" in ran.stderr


@pytest.mark.parametrize("args", [["--velocity", "fast"], ["--max-images", "0"]])
def test_a_value_that_an_option_does_not_take_is_a_usage_error(args: list[str]) -> None:
    assert run(*SMALL, *args).exit_code == 2


# Adaptation and certificate


def test_every_step_is_measured_and_kept_in_the_file(colours: Path) -> None:
    args = [*SMALL, "--calibrate", colours, "--verify", colours, "--distill", "1"]
    document = converted(*args)
    steps = document["steps"]
    assert [step["name"] for step in steps] == ["swapped", "statistics", "refined", "distilled"]
    certificate = document["certificate"]
    assert certificate["drift"] == steps[-1]["drift"]
    assert certificate["drift"]["images"] == document["calibration"]["images"] == 24
    (stage,) = certificate["stages"]
    assert (stage["name"], stage["gradients_exact"]) == ("layer1", True)
    metadata = read_metadata(document["path"])
    assert metadata["certificate"] == certificate
    assert metadata["steps"] == steps


def test_folders_of_other_classes_give_no_accuracy(colours: Path) -> None:
    ran = run(*SMALL, "--verify", colours, "--json")
    assert "note: the classes in" in ran.stderr
    assert "are not the 10 of the network" in ran.stderr
    assert json.loads(ran.stdout)["certificate"]["accuracy"] is None


def test_a_network_far_from_its_original_is_warned_of(here: Path, colours: Path) -> None:
    torch.save(far_from_linear().state_dict(), "plain.pth")
    args = ["cifar_resnet20", "--weights", "plain.pth", "--stages", "all", "--no-gain"]
    ran = run(*args, "--verify", colours)
    assert ran.exit_code == 0
    assert "of the images keep their top-1" in ran.stderr
    command = "momconv convert cifar_resnet20 --weights plain.pth --stages all --no-gain --verify"
    assert f"  {command} {colours} -o cifar_resnet20-g0.9.safetensors --overwrite" in ran.stderr


def far_from_linear() -> torch.nn.Module:
    """A network whose blocks matter, so that another rule gives other classes."""
    torch.manual_seed(0)
    network = build("cifar_resnet20")
    for _ in range(20):
        network(torch.randn(50, 3, 32, 32))
    return network.eval()


def test_a_limit_on_the_drift_chooses_gamma(colours: Path) -> None:
    args = [*SMALL, "--calibrate", colours, "--gamma", "auto"]
    document = converted(*args, "--max-drift", "100%")
    assert [attempt["gamma"] for attempt in document["tried"]] == [0.7, 0.9, 0.95]
    assert (document["gamma"], document["path"]) == (0.95, "cifar_resnet20-gauto.safetensors")
    assert load(document["path"]).get_submodule("layer1").gamma == 0.95


def test_a_limit_that_none_keeps_is_an_error(
    here: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("momconv.surgery.drift.Drift.is_within", lambda *_: False)
    ran = run(*SMALL, "--calibrate", colours, "--gamma", "auto", "--max-drift", "3%")
    assert ran.exit_code == 6
    assert "no γ keeps the top-1 disagreement with the original at 3.00% or less" in ran.stderr
    assert list(here.iterdir()) == []


# Back


def test_a_converted_network_comes_back_as_a_plain_file(here: Path, colours: Path) -> None:
    converted("resnet18", "--weights", "none", "--stages", "all", "-o", "net.safetensors")
    before = load("net.safetensors").state_dict()
    document = converted("--back", "net.safetensors", "-o", "plain.pth")
    assert document["drift"]["images"] == 8
    assert document["python"].startswith("torchvision.models.resnet18(num_classes=1000)")
    state = torch.load("plain.pth", weights_only=True)
    torchvision.models.resnet18().load_state_dict(state, strict=True)
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_it_can_be_adapted_on_the_way_back(colours: Path) -> None:
    converted(*SMALL, "-o", "net.safetensors")
    back: list[str | Path] = ["--back", "net.safetensors", "--calibrate", colours, "--distill", "1"]
    document = converted(*back)
    assert document["path"] == "net-plain.safetensors"
    assert [step["name"] for step in document["steps"]][-2:] == ["refined", "distilled"]
    again = converted("cifar_resnet20", "--weights", "net-plain.safetensors", "--overwrite")
    assert again["source"] == "net-plain.safetensors"


def test_only_converted_files_come_back(here: Path) -> None:
    torch.save(build("cifar_resnet20").state_dict(), "plain.pth")
    ran = run("--back", "plain.pth")
    assert ran.exit_code == 4
    assert "plain.pth is an unconverted cifar_resnet20" in ran.stderr
    assert [path.name for path in here.iterdir()] == ["plain.pth"]


# Interruptions


@pytest.mark.parametrize("title", ["refining", "distilling"])
def test_ctrl_c_in_a_training_keeps_the_best_so_far(
    here: Path, colours: Path, monkeypatch: pytest.MonkeyPatch, title: str
) -> None:
    interrupt_at(title, monkeypatch)
    ran = run(*SMALL, "--calibrate", colours, "--distill", "2", "--json")
    assert ran.exit_code == 130
    document = json.loads(ran.stdout)
    assert (document["ok"], document["interrupted"]) == (True, True)
    name = {"refining": "refined", "distilling": "distilled"}[title]
    assert f"interrupted before it was fully {name}; the best so far was written" in ran.stderr
    assert document["steps"][-1]["name"] == name
    assert load(document["path"])


def test_ctrl_c_before_leaves_nothing_behind(
    here: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at("statistics", monkeypatch)
    ran = run(*SMALL, "--calibrate", colours)
    assert ran.exit_code == 130
    assert "error: interrupted" in ran.stderr
    assert list(here.iterdir()) == []


def interrupt_at(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance(_self: Display, what: str, done: int, _total: int, _text: str = "") -> None:
        if what == title and done:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "advance", advance)


# With published weights and real images


def test_a_published_network_keeps_its_classes(
    shared: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 25)
    with zipfile.ZipFile(shared / "data" / "cifar10-images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        archive.extractall(here, names[::300])
    weights = shared / "weights" / "resnet20-12fca82f.th"
    args: list[str | Path] = [
        "cifar_resnet20",
        "--weights",
        weights,
        "--stages",
        "all",
        "--gamma",
        "0.5",
    ]
    document = converted(*args, "--calibrate", "cifar10/train", "--verify", "cifar10/val")
    certificate = document["certificate"]
    assert certificate["drift"]["images"] == len(names[::300]) - document["calibration"]["images"]
    assert certificate["drift"]["agreement"] > 0.8
    assert certificate["accuracy"]["converted"] > certificate["accuracy"]["original"] - 0.1 > 0.6
    kl = [step["drift"]["divergence"] for step in document["steps"]]
    assert kl[2] < kl[1]
