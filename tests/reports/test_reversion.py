import io
import json
from pathlib import Path

from rich.console import Console

from momconv.reports.reversion import Reversion
from momconv.surgery.adaptation import Step
from momconv.surgery.certificate import Accuracy
from momconv.surgery.drift import Drift

DRIFT = Drift(images=200, disagreements=3, divergence=0.0123, distance=0.2)
DONE = Reversion(
    architecture="resnet34",
    num_classes=7,
    source=Path("tuned.safetensors"),
    steps=(Step("swapped", DRIFT),),
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
    for part in DONE.show():
        Console(file=buffer, width=80).print(part, soft_wrap=True)
    text = buffer.getvalue()
    assert "network    resnet34, 7 classes, from tuned.safetensors" in text
    assert "98.5% of 200 images held out of photos" in text
    assert "with momentum 70.0%, plain 69.0%" in text
    assert "plain.pth (2.0 MiB)" in text


def test_the_document_holds_the_same() -> None:
    document = json.loads(json.dumps(DONE.to_json()))
    assert (document["path"], document["source"]) == ("plain.pth", "tuned.safetensors")
    assert document["drift"]["agreement"] == 0.985
    assert document["accuracy"] == {"original": 0.7, "converted": 0.69}
