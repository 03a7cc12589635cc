import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Log, Signals, read_metrics, read_tensors, small
from torch.nn import functional

from momconv.data.folder import ImageSet, Sample
from momconv.recipe import DataRecipe
from momconv.training.balancing import (
    describe_imbalance,
    draw,
    repeat,
    weigh_classes,
    weigh_images,
)
from momconv.training.finetuning import finetune
from momconv.training.gradients import weigh_labels
from momconv.training.interruption import Interrupted


def images(*counts: int) -> ImageSet:
    samples = [Sample(Path(f"{n}/{i}"), n) for n, count in enumerate(counts) for i in range(count)]
    return ImageSet(Path(), tuple("abcdef"[: len(counts)]), tuple(samples))


@given(st.lists(st.integers(0, 3000), min_size=2, max_size=6).filter(any))
def test_the_weights_of_all_images_have_the_mean_one(counts: list[int]) -> None:
    weights = weigh_classes(counts)
    total = sum(w * n for w, n in zip(weights, counts, strict=True))
    assert total == pytest.approx(sum(counts))
    present = sorted((n, w) for n, w in zip(counts, weights, strict=True) if n)
    assert [w for _, w in present] == sorted((w for _, w in present), reverse=True)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(0, 9))
def test_each_image_is_drawn_as_often_as_its_weight_says(counts: list[int], epoch: int) -> None:
    own = images(*counts)
    weights, count = weigh_images(own), sum(counts)
    drawn = draw(weights, seed=0, epoch=epoch)
    assert len(drawn) == len(set(drawn)) == count
    assert max(drawn) < len(repeat(own).samples)
    times = Counter(index % count for index in drawn)
    assert all(abs(times[index] - weight) < 1 + 1e-6 for index, weight in enumerate(weights))
    assert {repeat(own).samples[index].label for index in drawn} <= set(range(len(counts)))
    assert drawn == draw(weights, seed=0, epoch=epoch)


def test_epochs_draw_and_order_anew() -> None:
    weights = weigh_images(images(30, 3))
    first, second = (draw(weights, seed=0, epoch=epoch) for epoch in (0, 1))
    assert {n % 33 for n in first} != {n % 33 for n in second}
    rare = sum(n % 33 >= 30 for n in first)
    assert rare == pytest.approx(33 / 2, abs=1)
    assert first != sorted(first)


def test_the_imbalance_is_told_where_there_is_one_or_something_is_done() -> None:
    assert describe_imbalance(images(5, 4), DataRecipe()) is None
    told = describe_imbalance(images(30, 4, 0), DataRecipe())
    assert told == (
        "note: a has 30 images and b 4 (7.5:1); --balance loss or --balance sampler makes up for"
        " that"
    )
    assert describe_imbalance(images(5, 5), DataRecipe(balance="loss")) == (
        "note: all classes have 5 images, so --balance loss changes nothing"
    )
    assert "come up more often" in (
        describe_imbalance(images(5, 4), DataRecipe(balance="sampler")) or ""
    )


@pytest.fixture(scope="module")
def unequal(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blue images, eight green ones and three red ones."""
    folder = Path(shutil.copytree(colours, tmp_path_factory.mktemp("data") / "unequal"))
    for number in range(3, 8):
        (folder / "red" / f"{number}.png").unlink()
    return folder


@pytest.mark.parametrize("balance", ["loss", "sampler"])
def test_a_balanced_run_goes_on_exactly(unequal: Path, tmp_path: Path, balance: str) -> None:
    recipe = small(unequal, f"data.balance={balance}", "train.epochs=1")
    log = Log()
    finetune(recipe, tmp_path / "straight", listener=log)
    assert any("and red 2 (3.0:1)" in text for text in log.told)
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(3))
    finetune(recipe, tmp_path / "run", resume=True)
    ours, theirs = read_tensors(tmp_path / "run"), read_tensors(tmp_path / "straight")
    assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    (row,) = read_metrics(tmp_path / "run")
    assert 0 <= float(row["val_macro_f1"]) <= 1
    assert 0 <= float(row["val_macro_recall"]) <= 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_weight_of_an_image_does_not_change_its_best_answer(
    smoothing: float, *, mixed: bool
) -> None:
    """However rare another class is, which smoothing gives its share too."""
    weights = torch.tensor([0.5, 1.0, 40.0])
    labels = torch.tensor([0, 2])
    plain = functional.one_hot(labels, 3).float()
    if mixed:
        labels = plain = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    weighed = weigh_labels(labels, weights, smoothing)
    per_image = (plain * weights).sum(1, keepdim=True)
    torch.testing.assert_close(weighed.sum(1, keepdim=True), per_image)
    if not mixed:
        expected = (1 - smoothing) * plain + smoothing / 3
        torch.testing.assert_close(weighed / per_image, expected)
