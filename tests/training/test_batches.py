import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Log, Signals, assert_same_tensors, read_metrics, small
from torch.nn import functional
from torchvision.transforms import v2

from momconv.data.folder import Folder
from momconv.data.source import ImageSet, Sample
from momconv.planner.micro_batch import count_steps
from momconv.recipe import DataRecipe, TrainRecipe
from momconv.training.batches import (
    MicroBatches,
    Mixer,
    Part,
    describe_imbalance,
    draw,
    repeat,
    split_batch,
    split_epoch,
    weigh_classes,
    weigh_images,
)
from momconv.training.finetuning import finetune
from momconv.training.interruption import Interrupted
from momconv.training.steps import weigh_labels

counts = st.integers(2, 300)
sizes = st.integers(1, 70)


@given(counts, sizes, st.integers(0, 99), st.integers(0, 9))
def test_an_epoch_has_every_image_once(count: int, size: int, seed: int, epoch: int) -> None:
    batches = split_epoch(count, size, seed=seed, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert len(batches) == count_steps(count, size)


@given(counts, st.integers(2, 70))
def test_no_image_is_left_alone_and_only_the_last_batch_is_of_another_size(
    count: int, size: int
) -> None:
    *full, last = split_epoch(count, size, seed=0, epoch=0)
    assert {len(batch) for batch in full} <= {size}
    assert 2 <= len(last) <= size + 1


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    first = split_epoch(50, 8, seed=1, epoch=2)
    assert split_epoch(50, 8, seed=1, epoch=2) == first
    assert split_epoch(50, 8, seed=2, epoch=1) != first
    assert split_epoch(50, 8, seed=1, epoch=3) != first


def test_the_order_is_the_same_on_every_machine() -> None:
    assert split_epoch(7, 3, seed=0, epoch=0) == [[3, 6, 5], [0, 4, 1, 2]]


@given(st.integers(1, 100), sizes)
def test_a_batch_keeps_its_images_and_their_order(count: int, micro_batch: int) -> None:
    parts = split_batch(range(count), micro_batch)
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(2, 100), st.integers(2, 70))
def test_a_micro_batch_is_never_one_image_where_two_are_possible(
    count: int, micro_batch: int
) -> None:
    parts = split_batch(range(count), micro_batch)
    assert min(map(len, parts)) >= 2
    assert max(map(len, parts)) <= max(3, micro_batch)


def test_the_sampler_gives_the_micro_batches_of_whatever_steps_it_has() -> None:
    sampler = MicroBatches()
    assert (len(sampler), list(sampler)) == (0, [])
    sampler.steps = [[[1, 2], [3]], [[4]]]
    assert (len(sampler), list(sampler)) == (3, [[1, 2], [3], [4]])


IMAGES, LABELS = torch.rand(7, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1, 2])


def mixed(recipe: TrainRecipe, sizes: list[int], step: int = 0) -> Part:
    """The seven images in micro-batches of these sizes, mixed."""
    mixer = Mixer(recipe, 4)
    batch = iter(range(7))
    parts = mixer.extend([[next(batch) for _ in range(size)] for size in sizes], before=6)
    read = ((IMAGES[part], LABELS[part]) for part in parts)
    images, labels = zip(*mixer.mix(read, epoch=1, step=step), strict=True)
    assert [len(part) for part in images] == sizes
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(("name", "kind"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_the_parts_together_are_torchvision_s_mixed_batch(
    name: str, kind: type[v2.MixUp], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TrainRecipe.model_validate({name: 1.0})
    ours = mixed(recipe, [7])
    for sizes in ([4, 3], [3, 2, 2], [1] * 7):
        assert all(map(torch.equal, ours, mixed(recipe, sizes)))
    drawn = Mixer(recipe, 4)._draw(IMAGES, epoch=1, step=0)[1]
    monkeypatch.setattr(kind, "make_params", lambda *_: drawn)
    theirs = kind(alpha=1.0, num_classes=4)(IMAGES, LABELS)
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], IMAGES)


def test_the_numbers_depend_on_seed_epoch_and_step_alone() -> None:
    recipe = TrainRecipe(mixup=0.2, cutmix=1.0)
    before = torch.get_rng_state()
    first = mixed(recipe, [4, 3])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert all(map(torch.equal, first, mixed(recipe, [4, 3])))
    assert not torch.equal(first[1], mixed(recipe, [4, 3], step=1)[1])
    other = recipe.model_copy(update={"seed": 1})
    assert not torch.equal(first[1], mixed(other, [4, 3])[1])


def test_a_run_that_mixes_goes_on_exactly(colours: Path, tmp_path: Path) -> None:
    changes = ["train.mixup=0.2", "train.cutmix=1", "data.augment=trivial", "train.epochs=1"]
    recipe = small(colours, *changes)
    finetune(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(4))
    finetune(recipe, tmp_path / "run", resume=True)
    assert_same_tensors(tmp_path / "run", tmp_path / "straight")


def images(*counts: int) -> ImageSet:
    samples = [Sample(Path(f"{n}/{i}"), n) for n, count in enumerate(counts) for i in range(count)]
    return ImageSet(Folder(Path()), tuple("abcdef"[: len(counts)]), tuple(samples))


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
    assert_same_tensors(tmp_path / "run", tmp_path / "straight")
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
