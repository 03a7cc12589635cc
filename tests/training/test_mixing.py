from pathlib import Path

import pytest
import torch
from runs import Signals, read_tensors, small
from torchvision.transforms import v2

from momconv.recipe import TrainRecipe
from momconv.training.finetuning import finetune
from momconv.training.interruption import Interrupted
from momconv.training.mixing import Mixer, Part

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
    ours, theirs = read_tensors(tmp_path / "run"), read_tensors(tmp_path / "straight")
    assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
