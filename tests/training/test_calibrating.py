import gc
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    REQUEST,
    Log,
    Signals,
    assert_same_tensors,
    copy_photos,
    read_metrics,
    save_weights,
    small,
)
from torch import nn

from momconv.data.folder import read_classes_folder
from momconv.evaluation import Scores, evaluate
from momconv.momentum.sequential import momentum_stages
from momconv.planner.measurement import measure, static_bytes
from momconv.recipe import TrainRecipe, load_recipe
from momconv.surgery.conversion import convert
from momconv.training import network
from momconv.training.calibrating import calibrate_on, needs_calibration
from momconv.training.finetuning import finetune
from momconv.training.interruption import Interrupted
from momconv.training.planning import plan_batches
from momconv.training.progress import SILENT
from momconv.training.state import load_state
from momconv.zoo.networks import build
from momconv.zoo.weights import load_network

WHOLE = "train.micro_batch=5"  # large enough to hold an image out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 6)


def before_the_first_step(data: Path, folder: Path, *changes: str) -> nn.Module:
    """The network with which a run begins."""
    with pytest.raises(Interrupted):
        finetune(small(data, *changes), folder, listener=Signals(1))
    return load_state(folder / "state.safetensors").model


def gains(model: nn.Module) -> list[tuple[float, ...]]:
    return [run.gains for s in momentum_stages(model).values() for run in s.runs or ()]


@pytest.fixture(scope="module")
def photos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 images of each class of CIFAR-10 to train on, and 20 others."""
    return copy_photos(shared, tmp_path_factory.mktemp("photos"))


def test_a_run_with_real_weights_begins_close_to_the_original(
    shared: Path, photos: Path, tmp_path: Path
) -> None:
    weights = shared / "weights" / "resnet20-12fca82f.th"
    plain = load_network("cifar_resnet20", weights)
    val = read_classes_folder(photos / "val")
    changes = [f"model.weights={weights}", "train.batch_size=25", "train.micro_batch=25"]
    changes.append("momentum.stages=all")

    def score(model: nn.Module) -> Scores:
        """With the original's head, as that of the run is untrained."""
        model.linear = plain.linear
        return evaluate(model.eval(), val)

    scores = {
        value: score(
            before_the_first_step(photos, tmp_path / value, *changes, f"momentum.calibrate={value}")
        )
        for value in ("false", "true")
    }
    original = evaluate(plain.eval(), val)
    assert scores["true"].agreement(original) > 0.87
    assert scores["true"].agreement(original) > scores["false"].agreement(original) + 0.03
    assert scores["true"].loss < scores["false"].loss


def test_without_calibration_nothing_is_touched(
    colours: Path, trained: Path, tmp_path: Path
) -> None:
    changes = (f"model.weights={trained}", "momentum.calibrate=false", WHOLE)
    model = before_the_first_step(colours, tmp_path / "run", *changes)
    plain = load_network("cifar_resnet20", trained)
    state, expected = model.state_dict(), plain.state_dict()
    assert [k for k, v in expected.items() if not torch.equal(v, state[k])] == [
        "linear.weight",
        "linear.bias",
    ]
    assert gains(model) == gains(convert(plain))


@pytest.mark.usefixtures("few_steps")
def test_calibration_leaves_what_is_in_no_block_and_the_new_head_alone(
    colours: Path, trained: Path, tmp_path: Path
) -> None:
    changes = (f"model.weights={trained}", WHOLE)
    models = [
        before_the_first_step(colours, tmp_path / value, *changes, f"momentum.calibrate={value}")
        for value in ("true", "false")
    ]
    ours, theirs = (model.state_dict() for model in models)
    changed = {key for key, value in ours.items() if not torch.equal(value, theirs[key])}
    assert changed
    assert all("bn" in key or key.startswith("layer") for key in changed)


@pytest.mark.usefixtures("few_steps")
def test_the_listener_hears_of_the_calibration_and_what_it_came_to(
    colours: Path, trained: Path, tmp_path: Path
) -> None:
    log = Log()
    changes = (f"model.weights={trained}", WHOLE, "train.epochs=1")
    finetune(small(colours, *changes), tmp_path / "run", listener=log)
    titles = list(dict.fromkeys(title for title, *_ in log.shown))
    assert titles[-4:] == [
        "adapting BatchNorm to momentum",
        "holding out images",
        "calibrating",
        "training",
    ]
    assert [done for title, done, *_ in log.shown if title == "calibrating"] == [0, 1, 1, 2, 3]
    (note,) = (text for text in log.told if "calibrated" in text)
    assert note.startswith("note: calibrated on 15 training images; the mean divergence from the")


def test_where_no_image_can_be_held_out_it_says_so(
    colours: Path, trained: Path, tmp_path: Path
) -> None:
    log = Log()
    finetune(
        small(colours, f"model.weights={trained}", "train.epochs=1"), tmp_path / "run", listener=log
    )
    assert any("on 18 training images; refining gains and norms too" in text for text in log.told)


@pytest.mark.usefixtures("few_steps")
def test_the_original_is_gone_when_training_begins(
    colours: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals: list[weakref.ref[nn.Module]] = []

    def load(*args: Any, **settings: Any) -> nn.Module:
        model = load_network(*args, **settings)
        originals.append(weakref.ref(model))
        return model

    class Watch(Log):
        alive: int | None = None

        def advance(self, title: str, done: int, total: int, text: str = "") -> None:
            if title == "training" and self.alive is None:
                gc.collect()
                self.alive = sum(original() is not None for original in originals)

    monkeypatch.setattr(network, "load_network", load)
    watch = Watch()
    changes = (f"model.weights={trained}", WHOLE, "train.epochs=1")
    finetune(small(colours, *changes), tmp_path / "run", listener=watch)
    assert (len(originals), watch.alive) == (2, 0)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("anneal", ["0", "1.5"])
def test_a_calibrated_run_goes_on_exactly_and_is_not_calibrated_again(
    colours: Path, trained: Path, tmp_path: Path, anneal: str
) -> None:
    changes = (f"model.weights={trained}", WHOLE, f"momentum.anneal={anneal}")
    straight, run, log = tmp_path / "straight", tmp_path / "run", Log()
    finetune(small(colours, *changes, "data.workers=1"), straight)
    with pytest.raises(Interrupted):
        finetune(small(colours, *changes), run, listener=Signals(3))
    finetune(load_recipe(run / "config.yaml"), run, resume=True, listener=log)
    assert read_metrics(run) == read_metrics(straight)
    assert_same_tensors(run, straight)
    assert {title for title, *_ in log.shown} == {"training"}


@pytest.mark.usefixtures("few_steps")
def test_calibrating_takes_no_more_memory_than_the_planned_step(
    colours: Path, trained: Path
) -> None:
    """With the original beside it, but without gradients of the weights and optimiser state."""
    model, cpu = convert(load_network("cifar_resnet20", trained)), torch.device("cpu")
    request = replace(REQUEST, images=24, batch_size=8, micro_batch="auto", strategy="auto")
    plan = plan_batches(model.train(), request)

    def work() -> None:
        original = load_network("cifar_resnet20", trained)
        images = read_classes_folder(colours)
        calibrate_on(
            *(images, model, original, TrainRecipe(epochs=1)),
            batch_size=8,
            workers=0,
            listener=SILENT,
            leave_out=lambda error: pytest.fail(str(error)),
        )

    peak = static_bytes(model, "sgd").weights + measure(work, cpu)
    assert peak <= plan.predicted_bytes


def test_ctrl_c_while_calibrating_leaves_no_folder(
    colours: Path, trained: Path, tmp_path: Path
) -> None:
    class Impatient(Log):
        def advance(self, title: str, done: int, total: int, text: str = "") -> None:
            if title == "calibrating":
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(
            small(colours, f"model.weights={trained}", WHOLE),
            tmp_path / "run",
            listener=Impatient(),
        )
    assert not (tmp_path / "run").exists()


def test_only_trained_weights_that_were_just_converted_are_calibrated(tmp_path: Path) -> None:
    plain = build("cifar_resnet20")
    converted = convert(plain)
    recipe = load_recipe(None)
    assert needs_calibration(converted, recipe)
    assert not needs_calibration(plain, recipe)
    for change in ("model.weights=none", "model.from_file=a", "momentum.calibrate=false"):
        assert not needs_calibration(converted, load_recipe(None, [change]))


@pytest.mark.usefixtures("few_steps")
def test_the_original_keeps_its_statistics(colours: Path, trained: Path) -> None:
    """On images of a few classes, those of all others would be lost."""
    original = load_network("cifar_resnet20", trained)
    before = {key: value.clone() for key, value in original.named_buffers()}
    calibrate_on(
        *(read_classes_folder(colours), convert(original), original),
        TrainRecipe(epochs=1),
        batch_size=8,
        workers=0,
        listener=SILENT,
        leave_out=lambda error: pytest.fail(str(error)),
    )
    assert all(torch.equal(value, before[key]) for key, value in original.named_buffers())
