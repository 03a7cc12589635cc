"""Which network a run trains, and what is told of that and of its time beforehand."""

import json
from dataclasses import replace
from pathlib import Path

import deep
import pytest
from runs import Log, resume, small

from momconv import convert
from momconv.errors import UsageError
from momconv.files import model_file
from momconv.planner.plan import Plan, Request
from momconv.planner.prediction import peak_memory
from momconv.recipe import MomentumRecipe, load_recipe, recall_recipe
from momconv.training.finetuning import Result, finetune, rehearse
from momconv.training.network import read_gamma
from momconv.training.planning import suggest_smaller
from momconv.zoo.networks import outline

BATCH = 5
NAME = f'model.name="{deep.__file__}:make"'
AUTO = ["momentum.use=auto", "train.micro_batch=auto", "data.resolution=32", NAME]


def run(images: Path, folder: Path, *changes: str) -> tuple[Result, list[str]]:
    log = Log()
    return finetune(small(images, *AUTO, *changes), folder, listener=log), log.told


@pytest.fixture(scope="module")
def needy(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[str]]:
    """A run in memory for which the plain network would take two micro-batches."""
    converted = convert(deep.make(), 0.9).train()
    limit = int(peak_memory(converted, BATCH, 32, strategy="auto").total * 1.015)
    folder = tmp_path_factory.mktemp("runs") / "needy"
    return run(colours, folder, f'train.memory="{limit}"', "train.epochs=1")


def test_with_memory_enough_the_network_stays_plain(colours: Path, tmp_path: Path) -> None:
    result, told = run(colours, tmp_path / "run", "train.epochs=1")
    assert read_gamma(model_file.load(result.best, deep.make())) == 0
    assert result.best_epoch.gamma == 0
    assert recall_recipe(tmp_path / "run" / "config.yaml").momentum.use == "never"
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [row["network"] for row in plan["alternatives"]] == ["plain", "plain", "momentum"]
    assert plan["seconds"] == plan["seconds_per_epoch"] > 0
    (table,) = (line for line in told if line.startswith(f"note: {plan['reason']}\n"))
    assert [line[:17].rstrip() for line in table.splitlines()[2:]] == [
        "plain, stored",
        "plain, recomputed",
        "momentum",
    ]
    assert any(line.startswith("note: about ") and line.endswith("an epoch") for line in told)


def test_with_little_it_is_converted(needy: tuple[Result, list[str]]) -> None:
    result, told = needy
    assert result.plan.micro_batch == BATCH
    assert read_gamma(model_file.load(result.best, deep.make())) == 0.9
    assert recall_recipe(result.folder / "config.yaml").momentum.use == "always"
    assert any(line.startswith("note: momentum, 5 images at once, where") for line in told)


def test_what_was_decided_holds_when_the_run_goes_on(needy: tuple[Result, list[str]]) -> None:
    result, _ = needy
    done = resume(result.folder, "train.epochs=2", NAME, 'train.memory="2GiB"')
    assert [row.gamma for row in done.history] == [0.9, 0.9]
    assert done.plan.micro_batch == BATCH


def test_who_sets_how_blocks_change_wants_them_to() -> None:
    wanted = [
        ["momentum.gamma=0.9"],
        ["momentum.stages=all"],
        ["momentum.velocity=residual"],
        ["momentum.anneal=1"],
        ["momentum.strategy=momentum"],
    ]
    assert [load_recipe(None, keys).momentum.use for keys in wanted] == ["always"] * 5
    assert MomentumRecipe(gamma=0.5).use == "always"
    left = [[], ["momentum.strategy=store"], ["momentum.calibrate=false"]]
    assert [load_recipe(None, keys).momentum.use for keys in left] == ["auto"] * 3
    assert load_recipe(None, ["momentum.use=auto", "momentum.gamma=0.5"]).momentum.use == "auto"


@pytest.mark.parametrize("use", ["always", "never"])
def test_there_need_be_no_choice(use: str, colours: Path, tmp_path: Path) -> None:
    recipe = small(colours, *AUTO, f"momentum.use={use}")
    log = Log()
    plan = rehearse(recipe, tmp_path / "run", listener=log).plan
    assert plan.alternatives == ()
    assert plan.reason.startswith("momentum, as it is asked for, in ") == (use == "always")
    assert ("; the plain network (--momentum auto) would take " in plan.reason) == (use == "always")
    assert (f"note: {plan.reason}" in log.told) == (use == "always")
    assert not (tmp_path / "run").exists()


def test_a_network_that_would_not_take_hours_is_named() -> None:
    request = Request(64, batch_size=32, images=2000, held_out=200, epochs=10)
    plan = Plan(request=request, strategy="store", micro_batch=32, predicted_bytes=1, limit_bytes=2)
    model = outline("resnet50").train()
    assert suggest_smaller(replace(plan, seconds_per_image=0.3), model) is None  # 100 minutes
    told = suggest_smaller(replace(plan, seconds_per_image=0.4), model)
    assert told
    assert told.startswith("with --model resnet18 it would be about ")
    small = outline("mobilenet_v3_small").train()
    assert suggest_smaller(replace(plan, seconds_per_image=0.4), small) is None


def test_a_file_is_taken_as_it_is(
    needy: tuple[Result, list[str]], colours: Path, tmp_path: Path
) -> None:
    start = ["train.epochs=1", f'model.from_file="{needy[0].best}"']
    with pytest.raises(UsageError, match="is a momentum network"):
        run(colours, tmp_path / "run", *start, "momentum.use=never")
    plan = rehearse(small(colours, *AUTO, *start), tmp_path / "run").plan
    assert plan.alternatives == ()


def test_what_was_decided_is_what_the_run_is_about(needy: tuple[Result, list[str]]) -> None:
    with pytest.raises(UsageError, match=r"momentum\.use"):
        resume(needy[0].folder, NAME, "momentum.use=never")
