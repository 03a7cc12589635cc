"""The scripts of the paper that train or plan for images, on a few images made here."""

import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from torch import Tensor, nn
from torchvision import datasets

from momconv import peak_memory
from momconv.recipe import Recipe
from momconv.surgery.calibration import Calibration
from momconv.surgery.imitation import Imitation
from momconv.training.progress import Listener
from recipes.paper import cifar, fig2, fig6, fig7, fig8, fig9, table2
from recipes.paper.cifar import Images, Schedule


def make_images(count: int) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10)


class Block(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(super().forward(x))


class Tiny(nn.Sequential):
    """Three residual blocks of four channels between a stem and a head."""

    def __init__(self, classes: int) -> None:
        stem = nn.Conv2d(3, 4, 3, stride=8)
        body = nn.Sequential(Block(), Block(), Block())
        super().__init__(stem, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> table2.Task:
    """A task of seconds, with checkpoints in a folder of its own."""
    monkeypatch.setattr(cifar, "RUNS", tmp_path)
    images = make_images(20)
    return table2.Task("tiny", images, images, Tiny, Schedule(2), seeds=1)


def test_images_are_read_class_by_class(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for part in ("train", "val"):
            for class_, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
                for number in range(3):
                    stream = BytesIO()
                    Image.new("RGB", (32, 32), colour).save(stream, "JPEG")
                    file.writestr(f"c/{part}/{class_}/{number}.jpg", stream.getvalue())
    images = cifar.read(archive, "train", per_class=2)
    assert images.y.tolist() == [0, 0, 1, 1]
    assert images.x.shape == (4, 3, 32, 32)
    assert (images.x[0, 0] > 200).all()
    assert (images.x[3, 0] < 50).all()
    with pytest.raises(typer.BadParameter, match="--data"):
        cifar.read(tmp_path / "absent.zip", "train", 1)


def test_data_that_cannot_be_downloaded_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "RUNS", tmp_path)
    monkeypatch.setattr(datasets.CIFAR100, "url", "file:///absent")
    with pytest.raises(typer.BadParameter, match="absent into"):
        cifar.download(100, "val")


@pytest.mark.parametrize("schedule", [Schedule(2), Schedule(2, drops=(1,))])
def test_training_goes_on_where_it_was_interrupted(
    task: table2.Task, tmp_path: Path, schedule: Schedule
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Tiny(10)

    whole, first, second = make(), make(), make()
    file = tmp_path / "checkpoint.pt"
    cifar.train(whole, task.train, schedule)

    def interrupt(text: str) -> None:
        if text.startswith("epoch 1/2, loss ") and text.endswith(" left"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cifar.train(first, task.train, schedule, file, interrupt)
    told: list[str] = []
    cifar.train(second, task.train, schedule, file, told.append)
    assert told[0] == "goes on after epoch 1/2"
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_rate_drops_to_a_tenth_after_some_epochs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.01)
    scheduler = Schedule(5, rate=0.01, drops=(2, 4)).decay(optimizer, steps=2)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-2] * 4 + [1e-3] * 4 + [1e-4] * 2)


def test_the_networks_of_table_2_begin_with_the_same_weights(task: table2.Task) -> None:
    plain, *momentum = (table2.make(task, kind, seed=0) for kind in table2.KINDS)
    for network in momentum:
        assert plain.state_dict().keys() == network.state_dict().keys()
        assert all(map(torch.equal, plain.parameters(), network.parameters()))
    images = torch.randn(2, 3, 32, 32)
    outputs = [network(images) for network in (plain, *momentum)]
    assert not any(torch.equal(outputs[i], outputs[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("kind", list(table2.KINDS))
def test_the_papers_network_may_have_larger_activations(
    task: table2.Task, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(cifar, "download", lambda *_: task.train)
    network = table2.make(replace(table2.large(10), make=Tiny), kind, seed=0)
    nn.init.constant_(network.get_parameter("0.weight"), 30.0)
    network(torch.ones(2, 3, 32, 32)).sum().backward()  # 810 in the first run


def test_table_2_trains_every_kind_and_is_judged_by_the_worst(task: table2.Task) -> None:
    results = {"tiny": {kind: table2.measure(task, kind) for kind in table2.KINDS}}
    assert all(0 <= values[0] <= 100 for values in results["tiny"].values())
    assert len(table2.draw(results).axes) == 1
    kinds = list(table2.KINDS)
    for accuracies, holds in [((90, 89, 89), True), ((90, 95, 80), False)]:
        judged = {"tiny": {k: [float(a)] for k, a in zip(kinds, accuracies, strict=True)}}
        assert table2.judge(judged, tolerance=4).holds is holds
    assert table2.spread([1.0, 2.0]) == "1.50 ± 0.71"


def test_a_network_is_tested_with_other_gammas_and_refitted(task: table2.Task) -> None:
    plain = fig6.trained(task, 0.9)
    before = [parameter.clone() for parameter in plain.parameters()]
    accuracies = fig6.retest(task, plain, (0.0, 0.9))
    assert list(accuracies) == [0.0, 0.9]
    assert all(map(torch.equal, before, plain.parameters()))
    assert len(fig6.draw([fig6.Retest("tiny", 0.9, accuracies)]).axes) == 1
    for after, holds in [(88.0, True), (60.0, False)]:
        pair = {0.0: (50.0, after), 0.9: (90.0, 90.0)}
        assert fig6.judge([fig6.Retest("tiny", 0.9, pair)]).holds is holds


def test_published_weights_are_found_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "resnet20-12fca82f.th"
    file.touch()
    assert cifar.find_published(tmp_path) == {"cifar_resnet20": file}


def test_memory_is_predicted_for_every_method_and_gamma() -> None:
    case = fig7.Case("cifar_resnet20", 32, (2,))
    curves = fig7.predict(case)
    assert list(curves) == list(fig7.COLOURS)
    gammas = fig7.predict_gammas(case, gammas=(0.1,))
    assert gammas[0.1].side_information > 0
    row = fig7.tabulate(case, "ResNet", 2, curves["ResNet"][2])
    assert row["of these remainders"] == "0.000"
    assert len(fig7.draw([case], [curves], gammas, {0.1: (0.8, 81.0)}).axes) == 3
    assert not fig7.judge([dict(zip(curves, reversed(curves.values()), strict=True))]).holds


def test_a_calibration_that_is_interrupted_has_no_accuracy(
    task: table2.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    imitation = Imitation(steps=1, before=1.0, after=0.9, interrupted=True)
    monkeypatch.setattr(fig7, "calibrate", lambda *_: Calibration(0, imitation))
    monkeypatch.setattr(cifar, "read", lambda *_: task.train)
    with pytest.raises(KeyboardInterrupt):
        fig7.measure_accuracies(fig7.make("cifar_resnet20", 0), Path(), gammas=(0.9,))


def test_the_largest_batch_fits_the_budget_and_one_more_does_not() -> None:
    model = fig7.make("cifar_resnet20", 0)
    budget = 40 * 2**20
    batch = fig8.largest_batch(model, resolution=32, budget=budget)
    peaks = [peak_memory(model, n, 32).total for n in (batch, batch + 1)]
    assert peaks[0] <= budget < peaks[1]


def test_fine_tuning_is_read_from_the_metrics_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,val_top1,images_per_second,seconds\n1,0.5,3,10\n2,0.9,4,10\n")
    speed, curve = fig8.read_metrics(path)
    assert (speed, curve) == (4.0, ((10.0, 50.0), (20.0, 90.0)))
    plain, momentum = fig8.Result(2, speed, curve), fig8.Result(20, speed, curve)
    results = {"ResNet": plain, "Momentum ResNet": momentum}
    assert fig8.judge(results).holds
    assert not fig8.judge(results | {"Momentum ResNet": replace(plain, batch=3)}).holds
    assert len(fig8.draw(results).axes[1].lines) == 2


def test_fine_tuning_goes_on_also_before_the_end_of_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "RUNS", tmp_path)
    folder = tmp_path / "hymenoptera, ResNet"
    folder.mkdir()
    (folder / "state.safetensors").touch()
    resumed = []

    def imitate(recipe: Recipe, path: Path, *, resume: bool, listener: Listener) -> None:
        resumed.append(resume)
        assert recipe.momentum.strategy == "store"
        (path / "metrics.csv").write_text("val_top1,images_per_second,seconds\n0.5,3,10\n")

    monkeypatch.setattr(fig8, "finetune", imitate)
    monkeypatch.setattr(fig8, "largest_batch", lambda model: 2)
    monkeypatch.setattr(fig8, "make", lambda kind: None)
    assert fig8.fine_tune("ResNet", tmp_path, "none") == fig8.Result(2, 3.0, ((10.0, 50.0),))
    assert resumed == [True]


def test_a_second_order_block_starts_at_rest_and_both_can_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchdiffeq")
    monkeypatch.setattr(cifar, "RUNS", tmp_path)
    images = make_images(10)
    task = fig9.Task(images, images, Schedule(1), shrink=4)
    accuracies = fig9.measure(task, channels=(2,), seeds=(0, 1))
    assert all(len(points) == 2 for (points,) in accuracies.values())
    assert len([*tmp_path.glob("*.pt")]) == 4  # checkpoints
    network = fig9.Network(2, "second order")
    with torch.no_grad():
        for parameter in network.field.parameters():
            parameter.zero_()
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(network.flow(x), x)
    assert fig9.judge({"first order": [[40.0, 41.0]], "second order": [[45.0, 44.0]]}).holds
    assert not fig9.judge({"first order": [[45.0]], "second order": [[40.0]]}).holds
    assert len(fig9.draw(accuracies, (2,)).axes[0].lines) == 4


def test_growth_over_the_depth_is_what_is_judged() -> None:
    plain = [(10.0, 20.0), (100.0, 200.0)]
    assert fig2.judge({"store all": plain, "momconv": [(10.0, 8.0), (100.0, 10.0)]}).holds
    assert not fig2.judge({"store all": plain, "momconv": [(10.0, 8.0), (100.0, 80.0)]}).holds
