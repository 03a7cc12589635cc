import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from runs import Log, Signals, assert_same, copy_photos, resume, save_weights, small
from torch import nn
from torch.nn import functional as F

from momconv.data.folder import find_splits
from momconv.data.splits import shuffle
from momconv.errors import UsageError
from momconv.evaluation import evaluate
from momconv.files.model_file import load, read_metadata
from momconv.momentum.sequential import momentum_stages
from momconv.recipe import Recipe
from momconv.training.finetuning import Result, finetune, rehearse
from momconv.training.interruption import Interrupted
from momconv.training.probing import _Features, compare, fit
from momconv.training.progress import ProbeScore
from momconv.training.state import SavedState, load_state
from momconv.zoo.description import describe


def draw_features(count: int, distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes whose centres are that far from each other, far from the origin."""
    labels = torch.arange(count) % 3
    return torch.randn(count, 8).double() + 5 + distance * F.one_hot(labels, 8), labels


@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_is_the_minimum_of_the_convex_problem(bias: bool) -> None:
    torch.manual_seed(0)
    features, labels = draw_features(150, 2.0)
    head = nn.Linear(8, 3, bias=bias).double()

    penalty = fit(head, features.clone(), labels)

    scale = (features - bias * features.mean(0)).square().sum(1).mean()
    loss = F.cross_entropy(head(features), labels)
    (loss + penalty * scale / 2 * head.weight.square().sum()).backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-4
    assert loss < 0.9  # of log 3 without features


def test_the_more_the_features_say_the_weaker_is_the_penalty() -> None:
    torch.manual_seed(0)
    penalties = [fit(nn.Linear(8, 3).double(), *draw_features(150, d)) for d in (0.0, 1.5, 8.0)]
    assert penalties == sorted(penalties, reverse=True)
    assert len(set(penalties)) == 3


def test_a_single_image_of_each_class_is_enough() -> None:
    head = nn.Linear(4, 3)
    fit(head, torch.eye(4)[:3], torch.arange(3))
    assert head(torch.eye(4)[:3]).argmax(1).tolist() == [0, 1, 2]
    fit(head, torch.zeros(3, 4), torch.arange(3))  # which say nothing
    assert head.weight.isfinite().all()


def test_features_are_vectors() -> None:
    with pytest.raises(UsageError, match="does not take one vector"):
        _Features(nn.Sequential(nn.Linear(4, 3), nn.Flatten()))(torch.zeros(2, 5, 4))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights"))


def converted(data: Path, trained: Path, *changes: str) -> Recipe:
    """A momentum network, of one epoch."""
    own = (f"model.weights={trained}", "momentum.calibrate=false", "train.epochs=1")
    return small(data, *own, *changes)


def begin(recipe: Recipe, folder: Path, listener: Log) -> SavedState:
    """Return the state of a run that ends in its first step."""
    with pytest.raises(Interrupted):
        finetune(recipe, folder, listener=listener)
    return load_state(folder / "state.safetensors")


@pytest.fixture(scope="module")
def result(colours: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with a probe, interrupted and resumed."""
    folder, begun, resumed = tmp_path_factory.mktemp("runs") / "probed", Signals(1), Log()
    begin(converted(colours, trained, "train.probe=true"), folder, begun)
    result = resume(folder, listener=resumed)
    assert sum("linear probe" in told for told in begun.told) == 1
    assert not any("linear probe" in told for told in resumed.told)
    return result


@pytest.fixture(scope="module")
def score(result: Result) -> ProbeScore:
    assert result.probe
    return result.probe


def test_a_probe_changes_nothing_else(
    result: Result, colours: Path, trained: Path, tmp_path: Path
) -> None:
    finetune(converted(colours, trained), tmp_path / "run")
    assert_same(tmp_path / "run", result.folder)


def test_the_probe_is_a_model_of_the_plain_network(
    result: Result, score: ProbeScore, trained: Path
) -> None:
    path = result.folder / "probe.safetensors"
    model, original = load(path), torch.load(trained)

    assert evaluate(model, result.splits.val).top1 == score.top1
    assert not momentum_stages(model)
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("linear")}
    assert all(torch.equal(v, original[k]) for k, v in body.items())
    assert describe(model).classes == ("blue", "green", "red")
    assert read_metadata(path)["probe"]["top1"] == score.top1


def test_the_score_is_the_first_event(result: Result, score: ProbeScore) -> None:
    first, *_ = (result.folder / "events.jsonl").read_text().splitlines()
    event = json.loads(first)
    assert (event["event"], event["epoch"], event["top1"]) == ("probe", 0, score.top1)
    assert (score.n, score.images) == (6, 18)
    assert score.top1 == 1  # the colours of these squares are easy


def test_images_that_are_lost_meanwhile_are_left_out(colours: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    splits = find_splits(data)
    last = shuffle(range(18), seed=0)[-1]
    lost = [splits.train.samples[last].path, splits.val.samples[3].path]
    changes = ("momentum.use=never", "data.max_bad_fraction=0.5", "train.probe=true")

    progress = begin(small(data, *changes), tmp_path / "run", Loses(lost)).progress

    assert progress.probe
    assert (progress.probe.images, progress.probe.n) == (17, 5)
    assert (progress.left_out("train"), progress.left_out("val")) == ({last}, {3})


class Loses(Signals):
    """Breaks files when it hears of features for the first time; then ends the first step."""

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__(1)
        self.files = files

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        super().advance(title, done, total, text)
        if title == "computing features":
            for file in self.files:
                file.write_bytes(b"")
            self.files = ()


def test_features_of_real_photographs_go_far(shared: Path, tmp_path: Path) -> None:
    """The network names 91.7 % of CIFAR-10's test images; here, 10 of each class have labels."""
    data = copy_photos(shared, tmp_path / "photos")
    weights = f"model.weights={shared / 'weights' / 'resnet20-12fca82f.th'}"
    changes = (weights, "momentum.use=never", "train.probe=true", "data.max_images=100")
    whole = ("train.batch_size=32", "train.micro_batch=32")

    probe = begin(small(data, *changes, *whole), tmp_path / "run", Signals(1)).progress.probe

    assert probe
    assert (probe.images, probe.n) == (100, 100)
    assert probe.top1 > 0.7


def test_without_held_out_images_there_is_no_probe(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--probe: without held-out images"):
        rehearse(small(colours, "data.val_frac=0", "train.probe=true"), tmp_path / "run")


@pytest.mark.parametrize(
    ("top1", "words"),
    [
        (0.954, "91.2%, fine-tuned 95.4%: fine-tuning bought nothing that 153 images can show"),
        (0.993, "91.2%, fine-tuned 99.3%: fine-tuning gained 8.1 points"),
        (0.601, "91.2%, fine-tuned 60.1%: fine-tuning lost 31.1 points"),
    ],
)
def test_what_fine_tuning_bought_is_told(top1: float, words: str) -> None:
    probe = ProbeScore(0.912, (0.856, 0.947), n=153, images=244, penalty=1e-3, seconds=1.0)
    assert compare(probe, top1, 153) == words
