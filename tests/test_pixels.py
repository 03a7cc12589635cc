"""Images as bytes: the values that a network makes of them, and what they are for memory."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

import momconv
from momconv.pixels import normalise, taking_bytes
from momconv.planner.measurement import measure
from momconv.planner.prediction import Predictor, Training
from momconv.vocabulary import Strategies
from momconv.zoo.networks import build

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
LABELS = torch.tensor([0, 1, 2, 3])


def run(model: nn.Module, images: Tensor) -> None:
    is_bytes = images.dtype == torch.uint8
    with taking_bytes(model, MEAN, STD, CPU) if is_bytes else nullcontext():
        F.cross_entropy(model(images), LABELS).backward()


def values(pixels: Tensor) -> Tensor:
    return normalise(pixels, torch.tensor(MEAN), torch.tensor(STD))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_are_torchvisions_in_any_layout(layout: torch.memory_format) -> None:
    pixels = PIXELS.contiguous(memory_format=layout)
    theirs = v2.functional.normalize(PIXELS.float() / 255, [*MEAN], [*STD])
    assert torch.equal(values(pixels), theirs)
    assert values(pixels).stride() == pixels.stride()


@pytest.mark.parametrize("strategy", ["store", "momentum"])
def test_bytes_give_the_gradients_of_values_and_what_they_take_is_predicted(
    strategy: Strategies,
) -> None:
    torch.manual_seed(0)
    model = momconv.convert(build("cifar_resnet20").train())
    momconv.set_strategy(model, strategy)
    other = copy.deepcopy(model)
    run(other, values(PIXELS))
    run(model, PIXELS)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert "forward" not in vars(model)
    peak = Predictor(model, Training(32, as_bytes=True)).predict(4).peak
    assert peak.batch == PIXELS.nbytes + LABELS.nbytes
    assert peak.step == pytest.approx(measure(lambda: run(model, PIXELS), CPU), rel=0.01)


def test_where_the_stem_is_recomputed_values_are_not_there_at_the_peak() -> None:
    model = momconv.convert(build("cifar_resnet20").train())
    momconv.set_strategy(model, "momentum")
    peaks = [
        Predictor(model, Training(32, as_bytes=as_bytes)).predict(4).peak
        for as_bytes in (False, True)
    ]
    saved = peaks[0].total - peaks[1].total
    assert saved == pytest.approx(3 * PIXELS.nbytes, rel=0.01)
