"""What is expected of combinations is checked against predictions of them."""

import pytest
import torch
from torch import nn

import momconv
from momconv.momentum.sequential import momentum_stages
from momconv.momentum.ways import Way
from momconv.planner.combination import Combinations
from momconv.planner.cost import Speed, estimate_speed
from momconv.planner.prediction import Predictor, StepPrediction, Training
from momconv.zoo.networks import build

IMAGES = 8
CPU = estimate_speed("cpu", "fp32")


class Nested(nn.Module):
    """A stem, layers around two stages, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        stages = [nn.Sequential(*(Block(8 * n) for _ in range(6))) for n in (1, 2)]
        wide = nn.Sequential(nn.Conv2d(8, 16, 2, stride=2), nn.ReLU())
        self.features = nn.Sequential(stages[0], wide, stages[1])
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(self.stem(x)).mean((2, 3)))
        return logits


class Block(nn.Module):
    """A residual block that keeps its shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.layers(x)
        return y


@pytest.fixture(scope="module", params=["resnet", "plain", "transformer", "nested"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    with torch.device("meta"):
        network = {
            "resnet": lambda: momconv.convert(build("cifar_resnet32"), stages="all"),
            "plain": lambda: momconv.convert(build("cifar_resnet32"), 0),
            "transformer": lambda: momconv.convert(build("vit_b_32")),
            "nested": lambda: momconv.convert(Nested(), inputs=[torch.zeros(2, 3, 32, 32)]),
        }[request.param]()
    side = 224 if request.param == "transformer" else 32
    return Predictor(network.train(), Training(side))


def predict(predictor: Predictor, ways: dict[str, Way]) -> StepPrediction:
    return predictor.predict(IMAGES, {stage: str(way) for stage, way in ways.items()})


def test_memory_and_time_are_those_that_are_predicted(predictor: Predictor) -> None:
    stored = predictor.predict(IMAGES, "store")
    combinations = Combinations(predictor, IMAGES, stored)
    least = predictor.predict(IMAGES, "auto").peak.step
    found = []
    for share in (0.1, 0.3, 0.6):
        limit = least + share * (stored.peak.step - least)
        best = combinations.find(limit, CPU)
        assert best is not None
        step = predict(predictor, dict(best.ways))
        expected = max(part.peak for part in best.parts)  # the largest alone is a lower bound
        assert expected <= step.peak.step * 1.005
        assert step.peak.step <= limit + 0.005 * step.peak.total
        assert CPU.seconds(best.work) == pytest.approx(CPU.seconds(step.work), rel=0.01)
        found.append(CPU.seconds(step.work))
    assert found == sorted(found, reverse=True)
    assert found[-1] < CPU.seconds(predictor.predict(IMAGES, "checkpoint").work)


def test_every_stage_has_a_way_of_which_it_is_capable(predictor: Predictor) -> None:
    stored = predictor.predict(IMAGES, "store")
    found = Combinations(predictor, IMAGES, stored).find(stored.peak.step / 2, Speed(0, 1, 0))
    assert found is not None
    stages = momentum_stages(predictor.model)
    assert set(found.ways) == set(stages)
    for name, way in found.ways.items():
        assert way.strategy != "momentum" or stages[name].followed


def test_where_nothing_fits_nothing_is_found(predictor: Predictor) -> None:
    stored = predictor.predict(IMAGES, "store")
    combinations = Combinations(predictor, IMAGES, stored)
    assert combinations.find(stored.peak.step / 50, CPU) is None
