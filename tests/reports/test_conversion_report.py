import io
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from momconv.reports.conversion import Calibration, Conversion, show_conversion
from momconv.surgery.conversion import Stage

DONE = Conversion(
    architecture="resnet34",
    source="ResNet34_Weights.IMAGENET1K_V1",
    gamma=0.9,
    velocity="zero",
    gain=True,
    stages=(Stage("layer1", 3, (0, 1, 2), 1000, 0.9), Stage("layer4", 3, (), 20, 0.0)),
    parameters=1234,
    calibration=Calibration(images=2000, layers=36, unreadable=("a.png: empty file",)),
    path=Path("my networks/x.safetensors"),
    bytes=2**21,
)
PLAIN = replace(DONE, gamma=0, calibration=None)


def shown(conversion: Conversion) -> str:
    buffer = io.StringIO()
    console = Console(file=buffer, width=80)
    for part in show_conversion(conversion):
        console.print(part, soft_wrap=True)
    return buffer.getvalue()


def test_the_stages_add_up() -> None:
    rows = {line[:10].strip(): line[10:].split() for line in shown(DONE).splitlines()[:5]}
    assert rows["layer1"] == ["3", "0-2", "1,000", "0.9"]
    assert rows["layer4"] == ["3", "none", "20", "0"]
    assert rows["the rest"] == ["214"]
    assert rows["all"] == ["1,234"]


def test_it_says_what_was_done() -> None:
    text = shown(DONE)
    assert "γ 0.9, v[0] = 0, with a gain for each block" in text
    assert "36 layers re-estimated on 2000 images" in text
    assert "bit for bit those of ordinary backpropagation" in text
    assert "my networks/x.safetensors (2.0 MiB)" in text
    assert "f(x[0]), without gains" in shown(replace(DONE, velocity="residual", gain=False))


def test_a_plain_network_is_not_said_to_be_more() -> None:
    text = shown(PLAIN)
    assert "the plain network" in text
    assert "bit for bit" not in text
    assert "re-estimated" not in text


def test_the_next_commands_can_be_pasted() -> None:
    lines = shown(DONE).splitlines()
    assert "momconv eval 'my networks/x.safetensors' --data FOLDER" in lines[-2]
    assert "momconv finetune --from 'my networks/x.safetensors' --data FOLDER" in lines[-1]


def test_the_document_holds_the_same() -> None:
    document = json.loads(json.dumps(DONE.to_json()))
    assert document["stages"][0] == {
        "name": "layer1",
        "blocks": 3,
        "momentum": [0, 1, 2],
        "parameters": 1000,
        "gamma": 0.9,
    }
    assert document["calibration"]["unreadable"] == ["a.png: empty file"]
    assert document["gradients_exact"] is True
    assert PLAIN.to_json()["gradients_exact"] is None
