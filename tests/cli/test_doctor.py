import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from momconv import diagnosis
from momconv.cli import app
from momconv.diagnosis import HealthCheck
from momconv.momentum import seam


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of published weights, with one file that is what its name says."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = f"resnet18-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    (folder / name).write_bytes(b"weights")
    (folder / "of-my-own.pth").touch()
    return folder


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *args])


def find(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [finding for finding in document["findings"] if finding["name"] == name]


def test_everything_is_looked_at_and_a_network_is_tried(weights: Path) -> None:
    ran = run("--json")
    document = json.loads(ran.stdout)

    assert (ran.exit_code, document["ok"]) == (0, True), document
    names = {finding["name"] for finding in document["findings"]}
    assert names >= {"momconv", "libraries", "processor", "memory", "disk", "writing", "weights"}
    assert "gradients exact, saved and loaded the same" in find(document, "test on cpu")[0]["found"]
    folder, file = find(document, "weights")
    assert folder["found"].startswith(f"1 published weights in {weights}")
    assert file["found"].endswith("as published")
    assert sorted(path.name for path in weights.parents[1].iterdir()) == ["hub"]


def test_damaged_weights_are_an_exit_code_and_a_command(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_PARTS", (diagnosis._look_at_weights,))
    damaged = weights / "resnet50-0123abcd.pth"
    damaged.touch()

    text, document = run(), json.loads(run("--json").stdout)

    assert text.exit_code == document["error"]["code"] == 5
    assert f"✗ weights        {damaged.name} is damaged" in text.stdout
    assert f"fix: rm {damaged}" in text.stdout
    assert f"fix: rm {damaged}" in text.stderr
    assert (document["ok"], document["error"]["kind"]) == (False, "doctor.broken")


def test_what_only_some_need_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = HealthCheck("extra plot", ok=False, found="none", fix="pip install it", needed=False)
    monkeypatch.setattr(diagnosis, "_PARTS", (lambda: iter([lacking]),))
    ran = run()
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == "! extra plot     none"
    assert "fix: pip install it" in ran.stdout


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "momconv.diagnosis", None)
    ran = run("--json")
    error = json.loads(ran.stdout)["error"]
    assert (ran.exit_code, error["kind"]) == (5, "doctor.import")
    assert error["message"].startswith("a library that momconv needs cannot be loaded: ")


def test_a_network_that_is_inverted_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "compare_gradients", lambda *_: {"layer1": False})
    (finding, *_) = diagnosis._try_network()
    assert finding.is_broken
    assert "gradients are not those of ordinary backpropagation" in finding.found


class BadCompiler(Exception):
    """Of no kind that Python knows."""


@pytest.mark.parametrize("error", [BadCompiler("gcc: no Python.h\nmore"), ImportError("no _C")])
def test_whatever_stops_the_network_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(diagnosis, "compare_gradients", fail)
    (finding,) = diagnosis._try_network()
    assert (finding.is_broken, finding.found) == (True, str(error).partition("\n")[0])


def test_gradients_that_cannot_be_compared_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "compare_gradients", lambda *_: {"layer1": None, "": True})
    (finding,) = diagnosis._try_network()
    assert finding.ok
    assert finding.found.startswith("gradients differ each time, so are not compared, saved")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**36, 2**37))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works all the same."""
    monkeypatch.setattr(seam, "find_obstacle", lambda _: "RuntimeError: no C compiler")
    card, fp32, triton = diagnosis._look_at_gpu(torch.device("cuda", 1))
    assert card == HealthCheck(
        "cuda:1",
        ok=True,
        found="NVIDIA H200, compute 9.0, 64.0 GiB of 128.0 GiB free",
        fix=card.fix,
        needed=False,
    )
    assert (fp32.name, fp32.found) == ("fp32 on cuda:1", "TF32 in convolutions")
    assert (triton.name, triton.ok, triton.needed) == ("Triton on cuda:1", False, False)
    assert triton.found == "RuntimeError: no C compiler"
    assert "gcc" in str(triton.fix)
    monkeypatch.setattr(seam, "find_obstacle", lambda _: None)
    assert [f.ok for f in diagnosis._look_at_gpu(torch.device("cuda", 1))] == [True, True, True]


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_another_holds_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    (finding,) = diagnosis._look_at_gpu(torch.device("cuda", 0))
    assert (finding.ok, finding.needed, finding.found) == (
        *(False, False),
        "CUDA error: out of memory",
    )
