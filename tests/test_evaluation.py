"""The scores are compared with figures counted by hand, on a network that is told what to say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from momconv.data.folder import Folder, read_classes_folder
from momconv.data.source import ImageSet
from momconv.errors import DataError, UsageError
from momconv.evaluation import Scores, evaluate, wilson_interval
from momconv.zoo.description import Description, Preprocessing, attach
from momconv.zoo.networks import build

PREPROCESSING = Preprocessing(32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Brightest(nn.Module):
    """Says the class of the brightest channel, but "green" for "blue" in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0
        self.seen: list[int] = []
        attach(self, Description("cifar_resnet20", 3, PREPROCESSING))

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches += 1
        self.seen.append(len(images))
        red, green, blue = (images[:, channel].mean((1, 2)) for channel in range(3))
        if self.batches % 2:
            green = green + 9 * (blue > torch.maximum(red, green))
        return torch.stack([blue, green, red], 1) * 10


@pytest.fixture
def images(colours: Path) -> ImageSet:
    return read_classes_folder(colours)


@pytest.fixture
def scores(images: ImageSet) -> Scores:
    return evaluate(Brightest(), images, batch_size=4)


def test_the_confusion_counts_every_image_by_true_class(scores: Scores) -> None:
    """Of the eight blue images, the first four are taken for green."""
    assert scores.confusion == ((4, 4, 0), (0, 8, 0), (0, 0, 8))
    assert (scores.n, scores.top1) == (24, 20 / 24)


def test_the_classes_have_the_figures_of_the_confusion(scores: Scores) -> None:
    blue, green, red = scores.classes
    assert [score.name for score in scores.classes] == ["blue", "green", "red"]
    assert (blue.precision, blue.recall, blue.support) == (1, 0.5, 8)
    assert (green.precision, green.recall) == pytest.approx((8 / 12, 1))
    assert (red.precision, red.recall, red.f1) == (1, 1, 1)
    assert [blue.f1, green.f1] == pytest.approx([2 / 3, 4 / 5])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 4 / 5 + 1) / 3)


def test_the_loss_is_the_mean_over_images_whatever_the_batches(images: ImageSet) -> None:
    model = build("cifar_resnet20", 3)
    whole, parts = (evaluate(model, images, batch_size=size).loss for size in (24, 7))
    assert whole == pytest.approx(parts, rel=1e-5)


def test_scores_are_plain_json(scores: Scores) -> None:
    document = json.loads(json.dumps(scores.to_json()))
    assert document["top1"] == 20 / 24
    assert document["mistakes"][0]["truth"] == "blue"
    assert document["classes"][1]["name"] == "green"
    assert document["confusion"] == [[4, 4, 0], [0, 8, 0], [0, 0, 8]]
    assert list(document["interval"]) == list(scores.interval)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_the_interval_is_wilson_s(hits: int, n: int, low: float, high: float) -> None:
    """Values of R's binom::binom.confint(method = "wilson")."""
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_the_worst_mistakes_are_those_it_is_surest_of(scores: Scores, images: ImageSet) -> None:
    """The first four blue images are called green; the rest is right."""
    blue = {sample.path for sample in images.samples[:4]}
    assert {mistake.path for mistake in scores.mistakes} == blue
    assert {(mistake.said, mistake.truth) for mistake in scores.mistakes} == {("green", "blue")}
    probabilities = [mistake.probability for mistake in scores.mistakes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities[-1] > 0.99


class Ranking(nn.Module):
    """Puts the class "a" before "b" and so on, whatever the image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = -torch.arange(classes).float()
        attach(self, Description("cifar_resnet20", classes, PREPROCESSING))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def test_the_right_class_may_be_among_the_five_first(images: ImageSet) -> None:
    """Of the classes "a" to "f" the last one is the sixth; the others have four images each."""
    samples = [replace(s, label=n // 4) for n, s in enumerate(images.samples)]
    six = ImageSet(images.source, tuple("abcdef"), tuple(samples))
    heard = list[Tensor]()
    scores = evaluate(Ranking(6), six, batch_size=7, hear=heard.append)
    assert (scores.top1, scores.top5) == (4 / 24, 20 / 24)
    assert torch.equal(torch.cat(heard), Ranking(6).logits.softmax(0).expand(24, -1))
    assert evaluate(Ranking(3), images).top5 is None  # of three it always is


class Sure(nn.Module):
    """Says "blue" with the same confidence for every image."""

    def __init__(self, confidence: float) -> None:
        super().__init__()
        self.logits = torch.tensor([confidence, (1 - confidence) / 2, (1 - confidence) / 2]).log()
        attach(self, Description("cifar_resnet20", 3, PREPROCESSING))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), 3)


@pytest.mark.parametrize("confidence", [0.4, 0.9])
def test_the_calibration_error_is_how_much_too_sure_it_is(
    images: ImageSet, confidence: float
) -> None:
    """A third of the images is blue."""
    scores = evaluate(Sure(confidence), images)
    assert scores.calibration_error == pytest.approx(confidence - 1 / 3, abs=1e-6)


def test_agreement_counts_the_images_not_the_hits(images: ImageSet) -> None:
    brightest, blue = evaluate(Brightest(), images), evaluate(Sure(0.5), images)
    assert brightest.agreement(brightest) == 1
    assert brightest.agreement(blue) == blue.agreement(brightest) == 0  # one batch: blue is green


def test_a_class_without_images_does_not_count_for_the_mean(images: ImageSet) -> None:
    some = images.select(i for i, label in enumerate(images.labels) if label)
    scores = evaluate(Brightest(), some, batch_size=50)
    assert [score.support for score in scores.classes] == [0, 8, 8]
    assert scores.macro_f1 == pytest.approx(
        sum(score.f1 for score in scores.classes if score.support) / 2
    )


def test_the_model_s_flags_and_the_random_state_stay(images: ImageSet) -> None:
    model = build("cifar_resnet20", 3).train()
    model.layer1.eval()  # type: ignore[union-attr]
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    evaluate(model, images)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_is_told_in_images(images: ImageSet) -> None:
    told: list[tuple[int, int]] = []
    evaluate(Brightest(), images, batch_size=10, progress=lambda *done: told.append(done))
    assert told == [(10, 24), (20, 24), (24, 24)]


def test_more_classes_than_the_model_has_are_named(images: ImageSet) -> None:
    with pytest.raises(DataError, match="3 classes, the model tells 10 apart"):
        evaluate(build("cifar_resnet20"), images)


@pytest.mark.parametrize("name", ["photos/val", "photos/Test", "photos"])
def test_images_for_validation_are_not_offered_for_training(images: ImageSet, name: str) -> None:
    with pytest.raises(DataError) as refused:
        evaluate(build("cifar_resnet20"), replace(images, source=Folder(Path(name))))
    assert refused.value.fix == "momconv finetune --from FILE --data photos"


def test_nothing_to_evaluate_is_an_error(images: ImageSet) -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(Brightest(), images.select([]))


def test_a_model_without_description_is_refused(images: ImageSet) -> None:
    with pytest.raises(UsageError):
        evaluate(nn.Identity(), images)


def test_a_network_that_has_diverged_still_gets_its_scores(images: ImageSet) -> None:
    model = build("cifar_resnet20", 3)
    nn.init.constant_(model.linear.weight, math.nan)  # type: ignore[union-attr, arg-type]
    scores = evaluate(model, images)
    assert math.isnan(scores.loss)
    assert (scores.top1, scores.macro_f1, scores.unanswered) == (0, 0, 24)
    assert scores.agreement(scores) == 0
    assert scores.mistakes == ()


class _SilentOnRed(Brightest):
    def forward(self, images: Tensor) -> Tensor:
        outputs = super().forward(images)
        return outputs / (outputs.argmax(1, keepdim=True) != 2)


def test_no_answer_is_a_mistake_of_the_image_s_class_alone(images: ImageSet) -> None:
    scores = evaluate(_SilentOnRed(), images, batch_size=4)
    assert scores.confusion == ((4, 4, 0), (0, 8, 0), (0, 0, 0))
    assert (scores.top1, scores.unanswered) == (12 / 24, 8)
    red = scores.classes[2]
    assert (red.precision, red.recall, red.f1, red.support) == (0, 0, 0, 8)
    assert scores.agreement(evaluate(Brightest(), images, batch_size=4)) == 16 / 24


def test_where_memory_runs_out_fewer_images_at_once_get_the_same_scores(images: ImageSet) -> None:
    model = build("cifar_resnet20", 3)
    few = evaluate(model, images, batch_size=6)

    def exhaust(_module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > 6:
            raise RuntimeError("could not create a primitive")

    model.register_forward_pre_hook(exhaust)
    crowded = evaluate(model, images)
    assert (crowded.said, crowded.confusion) == (few.said, few.confusion)
    assert crowded.loss == pytest.approx(few.loss, rel=1e-6)


def test_under_autocast_the_network_computes_in_that_precision(images: ImageSet) -> None:
    seen = []
    model = build("cifar_resnet20", 3)
    model.get_submodule("linear").register_forward_hook(lambda _m, _a, y: seen.append(y.dtype))
    evaluate(model, images, precision="bf16")
    evaluate(model, images)
    assert seen == [torch.bfloat16, torch.float32]
