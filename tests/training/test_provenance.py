import json
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import Log, Signals, small

from momconv.errors import ModelFileError
from momconv.training import resuming
from momconv.training.finetuning import finetune, rehearse
from momconv.training.interruption import Interrupted
from momconv.training.provenance import describe_machine, read_provenance
from momconv.zoo.checkpoints import sha256
from momconv.zoo.networks import build


def differences(log: Log) -> list[str]:
    return [text for text in log.told if text.startswith("warning: not as in the run of ")]


def change(file: Path, **machine: str) -> None:
    document = json.loads(file.read_text())
    document["machine"] |= machine
    file.write_text(json.dumps(document))


def test_a_run_says_what_it_began_with_and_another_what_is_different(
    colours: Path, tmp_path: Path
) -> None:
    data, weights = shutil.copytree(colours, tmp_path / "data"), tmp_path / "w.pth"
    torch.save(build("cifar_resnet20").state_dict(), weights)
    recipe = small(data, "train.epochs=1", f"model.weights={weights}", "momentum.calibrate=false")
    finetune(recipe, tmp_path / "run")
    like = tmp_path / "run" / "run.json"
    began = read_provenance(like)
    assert began.command == tuple(sys.argv)
    assert began.machine["torch"] == torch.__version__.partition("+")[0]
    assert (began.weights, began.weights_sha256) == ("w.pth", sha256(weights))
    report = json.loads((tmp_path / "run" / "data-report.json").read_text())
    assert began.images == report["fingerprint"]

    same = Log()
    rehearse(recipe, tmp_path / "again", like=like, listener=same)
    assert differences(same) == []
    torch.save(build("cifar_resnet20").state_dict(), weights)
    Image.new("RGB", (34, 36)).save(data / "red" / "0.png")
    change(like, torch="1")
    other = Log()
    rehearse(recipe, tmp_path / "again", like=like, listener=other)
    found = [text.split(": ")[2].split(" is ")[0] for text in differences(other)]
    assert found == ["torch", "sha256 of the weights", "fingerprint of the images"]


def test_a_run_that_goes_on_elsewhere_says_so(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        finetune(small(colours, "train.epochs=1"), tmp_path / "run", listener=Signals(3))
    log, here = Log(), describe_machine(torch.device("cpu"))
    monkeypatch.setattr(resuming, "describe_machine", lambda _: here | {"Python": "5.0"})
    finetune(small(colours, "train.epochs=1"), tmp_path / "run", resume=True, listener=log)
    (told,) = differences(log)
    assert told.split(": ")[2] == f"Python is 5.0, and was {platform.python_version()}"


@pytest.mark.parametrize(("text", "kind"), [(None, "no"), ("{}", "bad"), ("{", "bad")])
def test_a_file_that_says_nothing_is_an_error(tmp_path: Path, text: str | None, kind: str) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ModelFileError) as refused:
        read_provenance(tmp_path / "run.json")
    assert refused.value.kind == f"run.{kind}_provenance"
