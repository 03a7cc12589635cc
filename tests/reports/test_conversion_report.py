import io
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from momconv.catalogue import Saving
from momconv.reports.conversion import CalibrationReport, Conversion, Reversion
from momconv.surgery.adaptation import AdaptationStep, Attempt
from momconv.surgery.certificate import Accuracy, Certificate, StageCertificate
from momconv.surgery.conversion import Stage
from momconv.surgery.drift import Drift

CERTIFICATE = Certificate(
    drift=Drift(images=200, disagreements=3, divergence=0.0123, distance=0.2),
    accuracy=Accuracy(original=0.7, converted=0.69),
    gradients_exact=True,
    stages=(StageCertificate("layer1", True, 16.0, 256.0, 4.0, 8 / 3),),
    rounding=3.2e-7,
)
FAR = replace(CERTIFICATE, drift=replace(CERTIFICATE.drift, disagreements=20))
DONE = Conversion(
    architecture="resnet34",
    source="ResNet34_Weights.IMAGENET1K_V1",
    gamma=0.9,
    velocity="zero",
    gain=True,
    stages=(Stage("layer1", 3, (0, 1, 2), 1000, 0.9), Stage("layer4", 3, (), 20, 0.0)),
    parameters=1234,
    calibration=CalibrationReport(2000, layers=36, more=True, unreadable=("a.png: empty file",)),
    steps=(AdaptationStep("swapped", FAR.drift), AdaptationStep("statistics", CERTIFICATE.drift)),
    tried=(),
    interrupted=False,
    certificate=CERTIFICATE,
    saving=Saving(
        resolution=224, store_bytes=40 * 2**20, auto_bytes=10 * 2**20, relative_seconds=1.4
    ),
    measured_on="held out of photos",
    is_noise=False,
    command="momconv convert resnet34 -o x",
    path=Path("my networks/x.safetensors"),
    bytes=2**21,
)
PLAIN = replace(
    DONE,
    gamma=0,
    calibration=None,
    steps=(),
    certificate=replace(CERTIFICATE, gradients_exact=None, stages=()),
)


def shown(conversion: Conversion) -> str:
    buffer = io.StringIO()
    console = Console(file=buffer, width=80)
    for part in conversion.show():
        console.print(part, soft_wrap=True)
    return buffer.getvalue()


def test_the_stages_add_up() -> None:
    rows = {line[:10].strip(): line[10:].split() for line in shown(DONE).splitlines()[:5]}
    assert rows["layer1"] == ["3", "0-2", "1,000", "0.9", "4.0", "bits", "2.7"]
    assert rows["layer4"] == ["3", "none", "20", "0"]
    assert rows["the rest"] == ["214"]
    assert rows["all"] == ["1,234"]


def test_it_says_what_was_done() -> None:
    text = shown(DONE)
    assert "γ 0.9, v[0] = 0, with a gain for each block" in text
    assert "36 layers re-estimated on 2000 images" in text
    assert "bit for bit those of ordinary backpropagation, in 1 stage and outside" in text
    assert "same top-1 as the original on 98.5% of 200 images held out of photos" in text
    assert "KL 0.0123 nats, logits moved by 20.0%" in text
    assert "top-1      original 70.0%, converted 69.0%" in text
    assert "my networks/x.safetensors (2.0 MiB)" in text
    assert "f(x[0]), without gains" in shown(replace(DONE, velocity="residual", gain=False))


def test_a_plain_network_is_not_said_to_be_more() -> None:
    text = shown(PLAIN)
    assert "the plain network" in text
    assert "bit for bit" not in text
    assert "re-estimated" not in text


def test_the_next_commands_can_be_pasted() -> None:
    lines = shown(DONE).splitlines()
    assert "momconv eval 'my networks/x.safetensors' --data FOLDER" in lines[-3]
    assert "momconv finetune --from 'my networks/x.safetensors' --data FOLDER" in lines[-2]
    assert "momconv profile-memory 'my networks/x.safetensors'" in lines[-1]


def test_the_effect_of_each_step_is_shown() -> None:
    lines = shown(DONE).splitlines()
    (start,) = (n for n, line in enumerate(lines) if line.startswith("step"))
    assert lines[start + 1].split() == ["rule", "swapped", "90.0%", "0.0123", "20.0%"]
    assert lines[start + 2].split() == ["statistics", "chosen", "98.5%", "0.0123", "20.0%"]
    assert "step" not in shown(replace(DONE, steps=DONE.steps[:1]))


def test_the_memory_that_is_saved_is_said() -> None:
    assert "10.0 MiB for an image of 224 × 224 in training, 40.0 MiB in the plain" in shown(DONE)
    assert "75% saved, for about 1.4 times the time" in shown(DONE)
    assert "in training" not in shown(PLAIN)


def test_the_gammas_that_were_tried_are_shown() -> None:
    tried = (Attempt(0.7, CERTIFICATE.drift), Attempt(0.9, FAR.drift))
    assert "tried      γ 0.7 98.5%, γ 0.9 90.0%" in shown(replace(DONE, tried=tried))


def test_a_network_that_has_drifted_far_comes_with_commands_that_help() -> None:
    far = replace(DONE, certificate=FAR)
    base = "momconv convert resnet34 -o x"
    assert far.remedies == (
        f"{base} --gamma 0.9 --distill 6",
        f"{base} --gamma 0.9 --max-images 5000",
        f"{base} --gamma 0.8",
    )
    assert replace(far, calibration=None).remedies == (f"{base} --gamma 0.9 --calibrate FOLDER",)
    distilled = replace(far, gamma=0.1, steps=(AdaptationStep("distilled", FAR.drift),))
    assert distilled.remedies == (f"{base} --gamma 0.1 --max-images 5000",)
    assert DONE.remedies == replace(far, is_noise=True).remedies == ()
    assert replace(far, source="none").remedies == replace(far, gamma=0).remedies == ()


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
    assert document["certificate"]["drift"]["agreement"] == 0.985
    assert document["certificate"]["stages"][0]["headroom_bits"] == 4
    assert [step["name"] for step in document["steps"]] == ["swapped", "statistics"]
    assert PLAIN.to_json()["gradients_exact"] is None


DRIFT = Drift(images=200, disagreements=3, divergence=0.0123, distance=0.2)
REVERTED = Reversion(
    architecture="resnet34",
    num_classes=7,
    source=Path("tuned.safetensors"),
    steps=(AdaptationStep("swapped", DRIFT),),
    drift=DRIFT,
    accuracy=Accuracy(original=0.7, converted=0.69),
    measured_on="held out of photos",
    interrupted=False,
    path=Path("plain.pth"),
    bytes=2**21,
    python="torch.load('plain.pth')",
)


def test_it_says_what_the_file_is_and_how_far_from_the_momentum_network() -> None:
    buffer = io.StringIO()
    for part in REVERTED.show():
        Console(file=buffer, width=80).print(part, soft_wrap=True)
    text = buffer.getvalue()
    assert "network    resnet34, 7 classes, from tuned.safetensors" in text
    assert "98.5% of 200 images held out of photos" in text
    assert "with momentum 70.0%, plain 69.0%" in text
    assert "plain.pth (2.0 MiB)" in text


def test_the_document_of_a_reversion_holds_the_same() -> None:
    document = json.loads(json.dumps(REVERTED.to_json()))
    assert (document["path"], document["source"]) == ("plain.pth", "tuned.safetensors")
    assert document["drift"]["agreement"] == 0.985
    assert document["accuracy"] == {"original": 0.7, "converted": 0.69}
