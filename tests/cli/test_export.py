import json
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.files import export, model_file
from momconv.surgery.conversion import convert
from momconv.zoo import checkpoints
from momconv.zoo.networks import build, replace_head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    plain, path = build("cifar_resnet20"), tmp_path_factory.mktemp("model") / "m.safetensors"
    replace_head(plain, ("ants", "bees"))
    plain(torch.randn(8, 3, 32, 32))  # BatchNorm statistics that are not those of a new network
    converted = convert(plain, 0.9).eval()
    converted(torch.randn(2, 3, 32, 32))  # and ranges that are recorded
    model_file.save(converted, path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, args)])


@torch.no_grad()
def apply(model: Path, images: Tensor) -> Tensor:
    logits: Tensor = model_file.load(model)(images)
    return logits


def test_torch_export_computes_the_same(model: Path, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"

    ran = run(model, "--format", "torch-export", "-o", path, "--json")

    document = json.loads(ran.stdout)
    assert (ran.exit_code, ran.stderr, document["difference"]) == (0, "", 0)
    extra = {"momconv.config": ""}
    program = torch.export.load(path, extra_files=extra)
    assert torch.equal(program.module()(images), apply(model, images))
    config = json.loads((tmp_path / "m.pt2.json").read_text())
    assert json.loads(extra["momconv.config"]) | {"sha256": checkpoints.sha256(path)} == config
    assert config["label_names"] == ["ants", "bees"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_onnx_computes_the_same_in_another_library(
    model: Path, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"

    ran = run(model, "--format", "onnx", "-o", path)

    assert (ran.exit_code, ran.stderr) == (0, "")
    assert "difference at most " in ran.stdout
    session = InferenceSession(path)
    (logits,) = session.run(None, {"images": images.numpy()})
    # A value may round to the next point of the grid.
    torch.testing.assert_close(
        torch.from_numpy(logits), apply(model, images), rtol=0, atol=2.0**-12
    )
    (entry,) = onnx.load(path).metadata_props
    config = json.loads((tmp_path / "m.onnx.json").read_text())
    assert json.loads(entry.value) | {"sha256": checkpoints.sha256(path)} == config


def test_a_plain_state_dict_is_exported_with_what_is_lost(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"

    ran = run(model, "--format", "torchvision", "-o", path, "--json")

    document = json.loads(ran.stdout)
    assert ran.exit_code == 0
    assert document["difference"] > 0
    assert "neither momentum nor gains" in ran.stderr
    build("cifar_resnet20", 2).load_state_dict(torch.load(path))


def test_a_plain_network_loses_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_file.save(build("cifar_resnet20"), tmp_path / "m.safetensors")
    ran = run(tmp_path / "m.safetensors", "--format", "torchvision", "-o", tmp_path / "p.pth")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert "difference at most 0 " in ran.stdout
    state = checkpoints.read_state(tmp_path / "m.safetensors")
    for key, value in checkpoints.read_state(tmp_path / "p.pth").items():
        assert torch.equal(value, state[key])


def test_a_file_that_computes_something_else_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "BOUND", -1.0)
    ran = run(model, "--format", "torch-export", "-o", tmp_path / "m.pt2")
    assert (ran.exit_code, "would not compute what the network does" in ran.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_", ["torch-export", "onnx", "torchvision"])
def test_a_network_that_gives_no_answers_is_refused(tmp_path: Path, format_: str) -> None:
    network = build("cifar_resnet20")
    network.get_buffer("bn1.running_var").fill_(-1)  # of which there is no root
    model_file.save(network, tmp_path / "m.safetensors")
    ran = run(tmp_path / "m.safetensors", "--format", format_, "-o", tmp_path / "p.pth")
    assert (ran.exit_code, "its outputs are not finite" in ran.stderr) == (4, True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_mistakes_are_explained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.pt2").touch()
    (tmp_path / "beside.pt2.json").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    mistakes: list[tuple[list[str | Path], int, str]] = [
        ([model, "--format", "torch-export", "-o", tmp_path / "there.pt2"], 2, "already exists"),
        ([model, "--format", "torch-export", "-o", tmp_path / "beside.pt2"], 2, "beside.pt2.json"),
        ([model, "--format", "torchvision", "-o", tmp_path / "m.bin"], 2, "cannot tell the format"),
        ([model, "--format", "onnx", "-o", tmp_path / "m.onnx"], 2, "needs onnxruntime, which"),
        ([model, "--format", "tflite"], 2, "--format"),
        ([tmp_path / "nope", "--format", "onnx", "-o", tmp_path / "n/m.onnx"], 2, "momconv[onnx]"),
    ]
    for args, code, message in mistakes:
        ran = run(*args)
        assert (ran.exit_code, message in ran.output) == (code, True), ran.output
