"""Runs whose weights are divided between two processes that talk over gloo, against one process."""

import shutil
from functools import partial
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest
import torch
from runs import Damage, flip_a_bit, make_run, read_metrics, small
from safetensors.torch import load_file
from teams import Team, find_team
from torch import Tensor, nn

from momconv import convert, peak_memory, set_strategy
from momconv.errors import ModelFileError, OutOfMemory, ResourceError, UsageError
from momconv.exhaustion import EXHAUSTED
from momconv.planner.gathering import find_units
from momconv.planner.measurement import measure, run_step
from momconv.planner.plan import Plan
from momconv.planner.prediction import Training
from momconv.recipe import Recipe, load_recipe
from momconv.training.batches import split_epoch
from momconv.training.finetuning import finetune
from momconv.training.images import find_images
from momconv.training.lockstep import finish_passes
from momconv.training.processes import joined
from momconv.training.progress import SILENT
from momconv.training.run_folder import RunFolder
from momconv.training.sharding import shard
from momconv.training.state import load_state
from momconv.vocabulary import Strategy
from momconv.zoo.networks import build, outline

FROZEN = ["train.freeze_bn=true", "train.epochs=1", "train.warmup_epochs=0"]
SHARDED = "train.shard=true"


@pytest.fixture(scope="module")
def team() -> Team:
    return find_team()


def run(recipe: Recipe, folder: Path, broken: tuple[Path, ...] = ()) -> str:
    """Begin or resume a run; its plan."""
    resume = (folder / "state.safetensors").exists()
    result = finetune(recipe, folder, resume=resume, listener=Damage(broken))
    return str(result.plan)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a state, also where each process has written some, or of a model."""
    return load_state(path).tensors if path.stem == "state" else load_file(path)


def assert_close(one: Path, other: Path) -> None:
    """Two runs came to the same, but for the order in which numbers were added."""
    for name in ("state", "best", "last"):
        ours, theirs = (read(folder / f"{name}.safetensors") for folder in (one, other))
        kept = {key for key in theirs if not key.startswith(("document/", "random/"))}
        assert kept <= ours.keys()
        for key in kept:
            scale = float(theirs[key].abs().max())
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2**-14 * scale)


def test_two_processes_take_the_step_of_one_on_the_joint_batch(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    """With shares of 11 and 10 images in six and five micro-batches; see test_processes.py.

    There are also the norm of all gradients, and the average of the weights.
    """
    changes = [*FROZEN, "train.batch_size=21", "data.val_frac=0.13"]
    changes += ["train.clip=0.5", "train.ema=0.5"]
    first, second = team.do(run, small(colours, *changes, SHARDED), tmp_path / "two")
    assert first == second
    finetune(small(colours, *changes), tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")
    (ours_row,), (row,) = (read_metrics(tmp_path / name) for name in ("two", "one"))
    assert float(ours_row["train_loss"]) == pytest.approx(float(row["train_loss"]), rel=1e-6)
    assert ours_row["val_top1"] == row["val_top1"]


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    """With BatchNorm; and one process can go on."""
    recipe = small(colours, "train.schedule=constant", "train.warmup_epochs=0", SHARDED)
    team.do(run, recipe, tmp_path / "whole")
    team.do(run, recipe.change(train={"epochs": 1}), tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    team.do(
        run, load_recipe(tmp_path / "parts" / "config.yaml", ["train.epochs=2"]), tmp_path / "parts"
    )
    for name in ("state", "best", "last"):
        ours, theirs = (read(tmp_path / n / f"{name}.safetensors") for n in ("parts", "whole"))
        assert ours.keys() == theirs.keys()
        changing = {key for key in ours if key.startswith("document/")}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - changing)
    metrics = [read_metrics(tmp_path / name) for name in ("whole", "parts")]
    for row in chain(*metrics):
        del row["peak_bytes"]  # a thread of gloo may let go of a piece a moment later
    assert metrics[0] == metrics[1]
    folder = RunFolder(tmp_path / "whole")
    assert [len([*path.iterdir()]) for path in sorted(folder.parts.iterdir())] == [2, 2]
    alone = load_recipe(tmp_path / "one" / "config.yaml", ["train.epochs=2"])
    assert finetune(alone, tmp_path / "one", resume=True).epochs == 2
    last = max(folder.parts.glob("*/*"))
    flip_a_bit(last)
    with pytest.raises(ModelFileError, match=rf"{last} is missing, damaged or another one"):
        load_state(folder.state)
    assert load_state(folder.previous).progress.epoch == 1


def test_a_run_of_four_processes_goes_on_with_two(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    """An epoch of each is one step."""
    recipe = small(colours, *FROZEN, "train.batch_size=21", "data.val_frac=0.13", SHARDED)
    folders = tmp_path / "four", tmp_path / "two"
    team.do(run, recipe, folders[0], count=4)
    shutil.copytree(*folders)
    longer = load_recipe(folders[0] / "config.yaml", ["train.epochs=2"])
    for folder, count in zip(folders, (4, 2), strict=True):
        team.do(run, longer, folder, count=count)
        assert load_state(RunFolder(folder).state).progress.epoch == 2
    assert_close(*folders)


def test_an_image_that_breaks_in_one_process_is_left_out_by_both(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(colours, tmp_path / "data"))
    recipe = small(data, *FROZEN, SHARDED, "data.max_bad_fraction=0.2", "train.epochs=2")
    images = find_images(data, recipe.data, SILENT)
    late = split_epoch(18, 5, seed=0, epoch=0)[-1][-1]
    broken = (images.train.samples[late].path, images.val.samples[1].path)
    team.do(run, recipe, tmp_path / "run", broken)
    progress = load_state(RunFolder(tmp_path / "run").state).progress
    assert [omission.path for omission in progress.omissions] == list(map(str, broken))
    assert progress.epoch == 2


def test_after_a_pass_that_ran_out_of_memory_the_plan_has_smaller_micro_batches(
    colours: Path, tmp_path: Path
) -> None:
    run = make_run(colours, build("cifar_resnet20"), folder=tmp_path)
    run.is_whole = False
    with pytest.raises(ResourceError, match="is kept, and goes on with micro-batches of 2"):
        finish_passes(run, 0, OutOfMemory("memory ran out", kind=EXHAUSTED))
    assert Plan.from_json(run.folder.plan.read_bytes()).micro_batch == 2


def test_what_is_not_divided_is_refused(colours: Path) -> None:
    for change, fix in {
        "train.optimizer=adamw-8bit": "--optimizer adamw\n",
        "train.release_gradients=true": "--set train.release_gradients=auto\n",
        "train.compile=true": "--set train.compile=false\n",
    }.items():
        with pytest.raises(UsageError, match="--shard true does not go with") as caught:
            small(colours, SHARDED, "train.micro_batch=auto", change)
        assert caught.value.fix == f"{fix}--shard false"


def make_network() -> nn.Module:
    torch.manual_seed(0)
    model = convert(build("cifar_resnet20"), 0.9).train()
    model(torch.randn(2, 3, 16, 16))  # which finds the ranges
    return model


def measure_peaks(strategies: tuple[Strategy, ...]) -> list[int]:
    """The peak of a step of two images under each strategy, as often as it was seen."""
    peaks = []
    with joined() as processes:
        for strategy in strategies:
            model = make_network()
            set_strategy(model, strategy)
            shard(model, torch.device("cpu"), processes.count)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            images, labels = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
            step = partial(run_step, model, images, labels, "fp32")
            # At times a thread of gloo lets go of what it had a moment too late.
            least = min(measure(step, images.device) for _ in range(6))
            static = Training(16, shards=processes.count).static_bytes(model).total
            peaks.append(static + images.nbytes + labels.nbytes + least)
    return peaks


@pytest.mark.parametrize(("count", "strategies"), [(2, get_args(Strategy)), (4, ("momentum",))])
def test_the_peak_of_a_process_is_predicted(
    team: Team, count: int, strategies: tuple[Strategy, ...]
) -> None:
    every = team.do(measure_peaks, strategies, count=count)
    model = make_network()
    for strategy, measured in zip(strategies, map(min, *every), strict=True):
        peak = peak_memory(model, 2, 16, strategy=strategy, processes=count)
        assert peak.total == pytest.approx(measured, rel=0.02)
        assert peak.gathered > 0


@pytest.mark.parametrize(
    ("name", "count"), [("cifar_resnet20", 9), ("vit_b_16", 12), ("mobilenet_v2", 19)]
)
def test_blocks_are_divided_one_by_one(name: str, count: int) -> None:
    model = outline(name)
    units = find_units(model)
    assert len(units) == count
    assert len({type(unit) for unit in units}) <= 2
    inside = [p for unit in units for p in unit.parameters()]
    assert len({*inside}) == len(inside)
    rest = sum(p.numel() for p in {*model.parameters()} - {*inside})
    assert rest < 0.5 * sum(p.numel() for p in model.parameters())
