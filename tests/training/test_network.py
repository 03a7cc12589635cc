import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import Log, Signals, assert_same_tensors, read_metrics, small
from torch import nn

from momconv.files import model_file
from momconv.momentum.sequential import momentum_stages, set_strategy
from momconv.recipe import MomentumRecipe, load_recipe
from momconv.surgery.conversion import convert, read_schemes
from momconv.training import network
from momconv.training.finetuning import Result, finetune
from momconv.training.interruption import Interrupted
from momconv.training.network import anneal, compiling, gamma_at, uncompiled
from momconv.zoo.networks import build


def test_gamma_is_read_from_the_blocks_that_follow_the_rule() -> None:
    plain = build("cifar_resnet20")
    assert network.read_gamma(plain) == 0
    assert network.read_gamma(convert(plain, gamma=0)) == 0
    assert network.read_gamma(convert(plain, MomentumRecipe().gamma)) == 0.9


CHANGES = ("momentum.anneal=1.25", "momentum.stages=all")
MICRO_BATCHES = 7  # of an epoch


@pytest.fixture(scope="module")
def straight(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Two epochs of four steps, in the first five of which γ changes."""
    return finetune(small(colours, *CHANGES), tmp_path_factory.mktemp("annealed"))


def assert_same(one: Path, other: Path) -> None:
    assert read_metrics(one) == read_metrics(other)
    assert_same_tensors(one, other)
    for name in ("best", "last"):
        models = (model_file.load(folder / f"{name}.safetensors") for folder in (one, other))
        assert len({repr(read_schemes(model)) for model in models}) == 1


@pytest.mark.parametrize(
    ("gamma", "epochs", "expected"),
    [(0.9, 0, 0.1), (0.9, 1, 0.3), (0.9, 3.5, 0.8), (0.9, 4, 0.9), (0.9, 9, 0.9), (1, 2, 0.55)],
)
def test_gamma_rises_in_a_straight_line(gamma: float, epochs: float, expected: float) -> None:
    recipe = MomentumRecipe(gamma=gamma, anneal=4)
    assert gamma_at(recipe, epochs) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0, 0.37, 1])
def test_without_annealing_gamma_is_the_target_from_the_beginning(gamma: float) -> None:
    assert gamma_at(MomentumRecipe(gamma=gamma), 0) == gamma


def test_refined_gains_stay_a_factor_on_top_of_those_of_gamma() -> None:
    plain, recipe = build("cifar_resnet20"), MomentumRecipe(anneal=2)
    model, expected = (convert(plain, gamma, stages="all") for gamma in (0.1, 0.9))
    for stage in momentum_stages(model).values():
        stage.runs = tuple(
            replace(run, gains=(1.5 * run.gains[0], *run.gains[1:])) for run in stage.runs or ()
        )
    for epochs in (0.5, 1, 1.7, 2):
        anneal(model, recipe, epochs)
    for stage, other in zip(
        momentum_stages(model).values(), momentum_stages(expected).values(), strict=True
    ):
        assert stage.gamma == 0.9
        for run, theirs in zip(stage.runs or (), other.runs or (), strict=True):
            assert run.gains == pytest.approx((1.5 * theirs.gains[0], *theirs.gains[1:]))


def test_without_gains_there_are_none_on_the_way_either() -> None:
    model = convert(build("cifar_resnet20"), 0.1, stages="all", gain=False)
    anneal(model, MomentumRecipe(anneal=2, gain=False), 1)
    gains = [run.gains for stage in momentum_stages(model).values() for run in stage.runs or ()]
    assert {gain for own in gains for gain in own} == {1.0}
    assert {stage.gamma for stage in momentum_stages(model).values()} == {0.5}


def test_the_model_at_the_end_has_the_target_and_each_epoch_names_its_gamma(
    straight: Result,
) -> None:
    gammas = [float(row["gamma"]) for row in read_metrics(straight.folder)]
    assert gammas == pytest.approx([0.1 + 0.8 / 1.25, 0.9])
    for path in (straight.best, straight.last):
        stages = momentum_stages(model_file.load(path))
        assert {stage.gamma for stage in stages.values()} == {0.9}


def test_a_network_converted_without_annealing_has_the_same_gains(straight: Result) -> None:
    annealed = momentum_stages(model_file.load(straight.last))
    converted = momentum_stages(convert(build("cifar_resnet20"), 0.9, stages="all"))
    for stage, other in zip(annealed.values(), converted.values(), strict=True):
        for run, theirs in zip(stage.runs or (), other.runs or (), strict=True):
            assert run.gains == pytest.approx(theirs.gains)


def test_it_is_exact_on_the_way(straight: Result, colours: Path, tmp_path: Path) -> None:
    """Without invertibility the same bits come out."""
    finetune(small(colours, *CHANGES, "momentum.strategy=store"), tmp_path / "run")
    assert_same(straight.folder, tmp_path / "run")


@pytest.mark.parametrize(
    "n",
    [
        pytest.param(1, id="in the first step"),
        pytest.param(4, id="in a step of the first epoch"),
        pytest.param(MICRO_BATCHES + 2, id="while validating"),
        pytest.param(MICRO_BATCHES + 6, id="at the target"),
    ],
)
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(
    straight: Result, colours: Path, tmp_path: Path, n: int
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        finetune(small(colours, *CHANGES), folder, listener=Signals(n))
    finetune(load_recipe(folder / "config.yaml"), folder, resume=True, listener=Log())
    assert_same(straight.folder, folder)


WHOLE = ["train.batch_size=6", "train.micro_batch=6"]  # one shape
by_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler without its last and slowest part; tests/momentum has it whole."""
    monkeypatch.setattr(network, "_BACKEND", "aot_eager")


@by_dynamo
@pytest.mark.usefixtures("quick_compiler")
def test_all_blocks_are_compiled_and_momentum_stays_exact() -> None:
    torch.manual_seed(0)
    model, found = convert(build("cifar_resnet20"), 0.9, "all").train(), []
    images = torch.randn(3, 3, 32, 32)
    for strategy in ("store", "momentum"):
        own = copy.deepcopy(model)
        set_strategy(own, strategy)
        with compiling(own, wanted=True):
            own(images).square().sum().backward()
        blocks = [b for s in own.children() if isinstance(s, nn.Sequential) for b in s]
        assert len(blocks) == 9
        assert all(block._compiled_call_impl is not None for block in blocks)
        found.append([parameter.grad for parameter in own.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    with uncompiled(wanted=True), torch.no_grad():
        assert torch.equal(own.eval()(images), copy.deepcopy(own)(images))


@by_dynamo
@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_run_goes_on_exactly(colours: Path, tmp_path: Path) -> None:
    changes = ["train.compile=true", "train.deterministic=true", "train.clip=0.5"]
    recipe = small(colours, *changes, "train.epochs=1", *WHOLE)
    finetune(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(2))
    finetune(recipe, tmp_path / "run", resume=True)
    assert_same_tensors(tmp_path / "run", tmp_path / "straight")
