import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from momconv import diagnosis
from momconv.cli import app
from momconv.diagnosis import Finding


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
    lacking = Finding("extra plot", ok=False, found="none", fix="pip install it", needed=False)
    monkeypatch.setattr(diagnosis, "_PARTS", (lambda: iter([lacking]),))
    ran = run()
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == "! extra plot     none"
    assert "fix: pip install it" in ran.stdout


def test_a_network_that_is_inverted_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "compare_gradients", lambda *_: {"layer1": False})
    (finding, *_) = diagnosis._try_network()
    assert finding.is_broken
    assert "gradients are not those of ordinary backpropagation" in finding.found
