from pathlib import Path

import pytest
import torch
from runs import Log, Signals, assert_same, read_tensors, small
from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model

from momconv.errors import UsageError
from momconv.planner.measurement import measure_step
from momconv.planner.prediction import peak_memory
from momconv.recipe import TrainRecipe
from momconv.surgery.conversion import convert
from momconv.training.finetuning import finetune
from momconv.training.interruption import Interrupted
from momconv.training.network import start_training
from momconv.training.optimisation import make_optimizer, set_rate
from momconv.zoo.networks import build
from momconv.zoo.stages import find_stages


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet50", ["stem", "layer1", "layer2", "layer3", "layer4", "head"]),
        ("regnet_y_400mf", ["stem", *(f"trunk_output.block{n}" for n in range(1, 5)), "head"]),
        ("convnext_tiny", [*(f"features.{n}" for n in range(8)), "head"]),
        ("mobilenet_v2", [*(f"features.{n}" for n in range(19)), "head"]),
        ("vit_b_32", ["stem", *(f"encoder.layers.encoder_layer_{n}" for n in range(12)), "head"]),
    ],
)
def test_stages_are_found_in_every_family(name: str, stages: list[str]) -> None:
    with torch.device("meta" if name.startswith("vit") else "cpu"):
        model = get_model(name)
    assert list(find_stages(model)) == stages
    start_training(model, TrainRecipe(freeze=stages[:-1]))
    head = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert 2 <= len(head) <= 4
    assert model.get_parameter(list(model.state_dict())[-1]) in head


def rates(model: nn.Module, recipe: TrainRecipe, lr: float) -> dict[str, float]:
    optimizer = make_optimizer(model, recipe)
    set_rate(optimizer, lr)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(("name", "head"), [("cifar_resnet20", "linear"), ("resnet18", "fc")])
def test_the_rate_falls_with_the_distance_from_the_head(name: str, head: str) -> None:
    recipe = TrainRecipe(lr=0.1, head_lr=0.3, layer_decay=0.5)
    found = rates(build(name), recipe, lr=0.01)
    deepest = 3 if name == "cifar_resnet20" else 4
    assert found[f"{head}.weight"] == found[f"{head}.bias"] == pytest.approx(0.03)
    for number in range(1, deepest + 1):
        expected = 0.01 * 0.5 ** (deepest + 1 - number)
        assert found[f"layer{number}.0.conv1.weight"] == pytest.approx(expected)
        assert found[f"layer{number}.0.bn2.bias"] == pytest.approx(expected)
    assert found["conv1.weight"] == pytest.approx(0.01 * 0.5 ** (deepest + 1))
    assert len(found) == len(list(build(name).parameters()))


def test_frozen_stages_have_neither_gradients_nor_new_statistics() -> None:
    model, recipe = convert(build("cifar_resnet20"), 0.9), TrainRecipe(freeze=["stem", "layer2"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_training(model, recipe)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    make_optimizer(model, recipe).step()
    for key, value in model.state_dict().items():
        is_frozen = key.startswith(("conv1", "bn1", "layer2"))
        assert torch.equal(value, before[key]) is is_frozen, key


def test_the_prediction_knows_what_is_frozen() -> None:
    recipe = TrainRecipe(freeze=["stem", "layer1", "layer2"])
    peaks = {}
    for strategy in ("store", "momentum"):
        model = convert(build("cifar_resnet20"), 0.9)
        start_training(model, TrainRecipe())
        everything = peak_memory(model, 4, 32, strategy=strategy)
        start_training(model, recipe)
        peak = peak_memory(model, 4, 32, strategy=strategy)
        assert peak.gradients < everything.gradients
        usage = measure_step(model, 4, 32, precision="fp32", device=torch.device("cpu"))
        assert peak.step == pytest.approx(usage, rel=0.01)
        peaks[strategy] = everything.step, peak.step
    assert peaks["store"][1] < 0.5 * peaks["store"][0]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["layer1", "layer9"],
            "no stage 'layer9'\nits stages: stem, layer1, layer2, layer3, head\nfix: --freeze stem",
        ),
        (["stem", "layer1", "layer2", "layer3", "head"], "leaves nothing to train"),
    ],
)
def test_stages_that_cannot_be_frozen_are_named(
    colours: Path, tmp_path: Path, wanted: list[str], message: str
) -> None:
    log = Log()
    with pytest.raises(UsageError) as refused:
        finetune(small(colours, f"train.freeze={wanted}"), tmp_path / "run", listener=log)
    assert message in str(refused.value)
    assert not log.shown  # before the images are opened


def test_a_run_with_groups_and_frozen_stages_goes_on_exactly(colours: Path, tmp_path: Path) -> None:
    recipe = small(
        colours, "train.freeze=[stem, layer1]", "train.layer_decay=0.5", "train.head_lr=0.1"
    )
    finetune(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(9))
    finetune(recipe, tmp_path / "run", resume=True)
    ours, theirs = read_tensors(tmp_path / "run"), read_tensors(tmp_path / "straight")
    assert ours.keys() == theirs.keys()
    assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    last = load_file(tmp_path / "run" / "last.safetensors")
    assert int(last["layer1.0.bn1.num_batches_tracked"]) == 0
    assert int(last["layer2.0.bn1.num_batches_tracked"]) > 0


def test_at_first_the_head_alone_may_learn_and_then_the_rest_that_is_not_frozen(
    colours: Path, tmp_path: Path
) -> None:
    changes = ["train.freeze_epochs=1", "train.freeze=[layer1]", "train.warmup_epochs=0"]
    recipe, log = small(colours, *changes, "train.epochs=3"), Log()
    finetune(recipe, tmp_path / "straight", listener=log)
    frozen = 6 * (9 * 16 * 16 + 2 * 16)  # 6 convolutions of layer1, with their norms
    total = sum(p.numel() for p in build("cifar_resnet20", 3).parameters())
    (told,) = [text for text in log.told if text.endswith("%)") and "learn" in text]
    assert told.startswith(f"note: {total - frozen:,} of {total:,} parameters learn (")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(9))
    begun = load_file(tmp_path / "run" / "last.safetensors")
    assert int(begun["layer2.0.bn1.num_batches_tracked"]) < 4  # of 8 micro-batches
    finetune(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "straight", tmp_path / "run")


def test_in_epochs_of_the_head_alone_nothing_else_changes(colours: Path, tmp_path: Path) -> None:
    changes = ["train.epochs=1", "train.lr=0.1"]
    finetune(small(colours, *changes, "train.freeze_epochs=1"), tmp_path / "first")
    finetune(small(colours, *changes, "train.freeze=[all-but-head]"), tmp_path / "only")
    first, only = (load_file(tmp_path / run / "last.safetensors") for run in ("first", "only"))
    assert all(torch.equal(value, only[key]) for key, value in first.items())
    start = convert(build("cifar_resnet20"), 0.9)
    assert int(first["bn1.num_batches_tracked"]) == 0
    assert first.keys() >= start.state_dict().keys()


def test_the_head_cannot_be_frozen_and_learn_alone(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only the head learns in them"):
        finetune(small(colours, "train.freeze=[head]", "train.freeze_epochs=1"), tmp_path / "run")
