import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.files import model_file
from momconv.files.tensor_file import write_tensors
from momconv.surgery.certificate import certify
from momconv.surgery.conversion import convert
from momconv.zoo import checkpoints
from momconv.zoo.networks import build, replace_head

TRAINING = {"epochs": 2, "metrics": {"epoch": 2, "val_top1": 0.875}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    plain, path = build("cifar_resnet20"), tmp_path_factory.mktemp("model") / "m.safetensors"
    replace_head(plain, ("ants", "bees"))
    network = convert(plain, 0.5, ["layer1"])
    certificate = certify(network, plain, [torch.randn(2, 3, 32, 32)])
    extra = {"certificate": certificate.to_json(), "measured_on": "of noise", "training": TRAINING}
    model_file.save(network, path, extra)
    return path


@pytest.fixture
def edited(model: Path, tmp_path: Path) -> Any:
    """Makes a copy of the file with other metadata."""

    def edit(**changes: object) -> Path:
        metadata = checkpoints.read_metadata(model)
        metadata |= {f"momconv.{key}": json.dumps(value) for key, value in changes.items()}
        write_tensors(tmp_path / "edited.safetensors", load_file(model), metadata)
        return tmp_path / "edited.safetensors"

    return edit


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def test_the_document_says_what_is_in_the_file(model: Path) -> None:
    ran = run(model, "--json")
    found = json.loads(ran.stdout)
    network = model_file.load(model)

    assert (ran.exit_code, ran.stderr, found["ok"]) == (0, "", True)
    assert found["description"]["architecture"] == "cifar_resnet20"
    assert found["description"]["classes"] == ["ants", "bees"]
    assert found["parameters"] == sum(p.numel() for p in network.parameters())
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["layer1", "layer2", "layer3"]
    assert (stages["layer1"]["gamma"], stages["layer1"]["momentum"]) == (0.5, [0, 1, 2])
    assert (stages["layer2"]["gamma"], stages["layer2"]["momentum"]) == (0, [])
    assert found["certificate"]["drift"]["images"] == 2
    assert found["certificate"]["gradients_exact"] is True
    assert found["certificate"]["stages"][0]["headroom_bits"] > 0
    assert found["training"] == TRAINING


def test_without_json_there_is_a_table_and_facts(model: Path) -> None:
    ran = run(model)
    lines = [" ".join(line.split()) for line in ran.stdout.splitlines()]

    assert (ran.exit_code, ran.stderr) == (0, "")
    assert lines[1].startswith("layer1 3 0-2 14,016 0.5 ")
    assert "network cifar_resnet20, 2 classes" in lines
    assert "classes ants, bees" in lines
    assert "training epochs 2, epoch 2, val_top1 0.875" in lines
    assert any(line.startswith("rounding outputs within ") for line in lines)
    assert any(line.startswith("agreement same top-1 as the original on") for line in lines)


def test_a_file_without_certificate_or_training_has_neither(tmp_path: Path) -> None:
    model_file.save(build("cifar_resnet20", 3), tmp_path / "plain.safetensors")
    found = json.loads(run(tmp_path / "plain.safetensors", "--json").stdout)
    assert (found["certificate"], found["training"]) == (None, None)


def test_without_a_certificate_the_grid_says_how_exact_a_network_is(tmp_path: Path) -> None:
    path = tmp_path / "converted.safetensors"
    model_file.save(convert(build("cifar_resnet20", 3)), path)
    lines = [" ".join(line.split()) for line in run(path).stdout.splitlines()]
    assert "gradients not compared" in lines
    assert "rounding not measured; x is kept to 2^-24 of the largest activation, or finer" in lines


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    network = build("cifar_resnet20", 3)
    network.get_buffer("bn1.running_var")[2] = torch.inf
    network.get_parameter("linear.weight").data[0, 0] = torch.nan
    model_file.save(network, tmp_path / "spoilt.safetensors")
    ran = run(tmp_path / "spoilt.safetensors")
    assert ran.exit_code == 0
    assert "not finite bn1.running_var, linear.weight: nothing can be" in ran.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"certificate": "of a stranger"}, "momconv.certificate: "),
        ({"certificate": {"drift": {"images": 0}}}, "momconv.certificate.drift.images"),
        ({"training": [1]}, "momconv.training: "),
        ({"stages": {"layer9": {}}}, "no stage 'layer9'"),
        ({"description": {"architecture": "resnet18"}}, "momconv.description"),
    ],
)
def test_what_a_stranger_wrote_is_checked(
    edited: Any, changes: dict[str, object], message: str
) -> None:
    ran = run(edited(**changes), "--json")
    error = json.loads(ran.stdout)["error"]
    assert (ran.exit_code, error["kind"]) == (4, "model_file.inconsistent")
    assert message in error["message"]


def test_no_network_is_too_large_to_be_refused(model: Path, edited: Any) -> None:
    description = json.loads(checkpoints.read_metadata(model)["momconv.description"])
    ran = run(edited(description={**description, "num_classes": 10**17, "classes": None}))
    assert (ran.exit_code, "more classes than bytes" in ran.stderr) == (4, True)


def test_what_a_stranger_wrote_is_not_obeyed(edited: Any) -> None:
    ran = run(edited(measured_on="[red]\x1b[31m", training={"a\x1b[31m": "[b]"}))
    assert ran.exit_code == 0
    assert "\x1b" not in ran.stdout
    assert "[red]" in ran.stdout


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    torch.save(build("cifar_resnet20").state_dict(), tmp_path / "plain.pth")
    (tmp_path / "text.safetensors").write_text("no model")
    for name, message in {
        "plain.pth": "is an unconverted cifar_resnet20; run momconv convert first",
        "text.safetensors": "is a text, which begins with 'no model'",
        "nope.safetensors": "file does not exist",
    }.items():
        ran = run(tmp_path / name)
        assert (ran.exit_code, message in ran.stderr) == (4, True), ran.stderr
