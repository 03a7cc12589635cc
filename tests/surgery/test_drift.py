import math

import pytest
import torch
from torch import nn

from momconv.errors import DataError, ModelFileError
from momconv.surgery.drift import Drift, Reference, measure_drift

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])


def test_a_network_does_not_drift_from_itself() -> None:
    assert measure_drift(LOGITS, LOGITS) == Drift(3, 0, 0.0, 0.0)
    assert measure_drift(LOGITS, LOGITS).agreement == 1


def test_the_figures_are_those_of_their_definitions() -> None:
    other = LOGITS.clone()
    other[0] = torch.tensor([0.0, 2.0])
    drift = measure_drift(other, LOGITS)
    assert (drift.images, drift.disagreements) == (3, 1)
    assert drift.agreement == pytest.approx(2 / 3)
    p = math.e**2 / (1 + math.e**2)
    assert drift.divergence == pytest.approx(2 * (2 * p - 1) / 3)  # Σ p log(p/q), log p/q = ±2
    assert drift.distance == pytest.approx(math.sqrt(8 / 6))


def test_logits_shifted_by_a_constant_are_the_same_prediction_but_have_moved() -> None:
    drift = measure_drift(LOGITS + 1, LOGITS)
    assert drift.divergence == pytest.approx(0)
    assert drift.distance == pytest.approx(1)


def test_what_is_not_a_number_agrees_with_nothing() -> None:
    spoilt = LOGITS.clone()
    spoilt[0, 1] = torch.nan
    assert measure_drift(spoilt, spoilt).disagreements == 1
    assert measure_drift(LOGITS, spoilt).disagreements == 1
    assert measure_drift(spoilt, LOGITS).disagreements == 1
    assert math.isnan(measure_drift(spoilt, spoilt).divergence)


def test_a_reference_that_says_nothing_is_none() -> None:
    network = nn.Linear(2, 2)
    images = torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])
    Reference(network, [images[:1]]).require_answers()
    with pytest.raises(ModelFileError, match="not finite for 1 of 2 images"):
        Reference(network, [images]).require_answers()


@pytest.mark.parametrize(
    ("disagreements", "images", "share", "within"),
    [(1, 100, 0.01, True), (2, 100, 0.01, False), (29, 100, 0.29, True), (0, 5, 0, True)],
)
def test_a_limit_counts_whole_images(
    disagreements: int, images: int, share: float, within: bool
) -> None:
    assert Drift(images, disagreements, 0, 0).is_within(share) is within


def test_a_reference_reads_its_batches_for_every_comparison() -> None:
    network, other = nn.Linear(2, 2), nn.Linear(2, 2)
    images = torch.randn(4, 2)
    reference = Reference(network, [images, (images, torch.zeros(4))])
    drifts = [reference.compare(network), reference.compare(other)]
    assert [drift.images for drift in drifts] == [8, 8]
    assert drifts[0].distance == 0 < drifts[1].distance


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        Reference(nn.Linear(2, 2), [])


def test_networks_are_compared_as_they_are_used() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2)).train()
    assert Reference(network, [torch.randn(50, 2)]).compare(network).distance == 0
    assert all(module.training for module in network.modules())
