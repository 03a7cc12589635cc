from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    PLAN,
    REQUEST,
    Log,
    Signals,
    assert_same,
    assert_same_tensors,
    make_run,
    read_metrics,
    small,
)
from safetensors.torch import load_file
from test_loop import gradients
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.models import get_model

from momconv.errors import MomconvError, UsageError
from momconv.evaluation import evaluate
from momconv.files import model_file
from momconv.momentum.equations import LOWEST
from momconv.momentum.sequential import momentum_stages, read_ranges, set_strategy
from momconv.planner.measurement import measure_step
from momconv.planner.plan import Plan
from momconv.planner.prediction import Predictor, Training, peak_memory
from momconv.recipe import TrainRecipe
from momconv.surgery.conversion import convert
from momconv.training import loop
from momconv.training.finetuning import finetune
from momconv.training.images import recall_images
from momconv.training.interruption import Interrupted
from momconv.training.loop import _add_up, _Report, _step
from momconv.training.network import place, start_training
from momconv.training.optimisation import (
    Average,
    choose_precision,
    make_optimizer,
    make_scaler,
    rate_at,
    read_scaler,
    restore_scaler,
    set_rate,
    share_of_rate,
)
from momconv.training.progress import Progress
from momconv.training.run import TrainingRun
from momconv.training.run_folder import RunFolder
from momconv.training.saving import save
from momconv.training.steps import Step, take_step
from momconv.zoo.networks import build
from momconv.zoo.stages import find_stages


@given(st.integers(0, 50), st.integers(1, 200))
def test_the_rate_rises_to_its_top_and_then_falls_without_reaching_zero(
    warmup: int, total: int
) -> None:
    shares = [share_of_rate(step, warmup=warmup, total=total + warmup) for step in range(total)]
    assert shares[: warmup + 1] == sorted(shares[: warmup + 1])
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert all(0 < share <= 1 for share in shares)


def test_the_warm_up_takes_at_most_half_of_a_short_run() -> None:
    recipe = TrainRecipe(epochs=1, lr=1, warmup_epochs=5)
    assert [rate_at(recipe, step, 4) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])


def test_more_epochs_stretch_the_schedule() -> None:
    short, long = (TrainRecipe(epochs=epochs, lr=1, warmup_epochs=0) for epochs in (2, 4))
    assert rate_at(short, 10, 5) == 0
    assert rate_at(long, 10, 5) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "kind"), [("sgd", SGD), ("adamw", AdamW)])
def test_norms_and_biases_do_not_decay(name: str, kind: type) -> None:
    model = build("cifar_resnet20")
    recipe = TrainRecipe.model_validate({"optimizer": name, "weight_decay": 0.1, "lr": 0.5})
    optimizer = make_optimizer(model, recipe)
    assert type(optimizer) is kind
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        is_weight = "bn" not in parameter_name and not parameter_name.endswith("bias")
        assert (decay[parameter] == 0.1) is (is_weight and parameter.dim() > 1), parameter_name
    assert len(decay) == len(list(model.parameters()))
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_sgd_has_momentum_as_nesterov() -> None:
    model = build("cifar_resnet20")
    group = make_optimizer(model, TrainRecipe(momentum=0.8)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.8, True)
    assert not make_optimizer(model, TrainRecipe(momentum=0)).param_groups[0]["nesterov"]


def test_the_cpu_computes_in_fp32_unless_told_otherwise() -> None:
    cpu = torch.device("cpu")
    assert choose_precision(TrainRecipe(), cpu) == "fp32"
    assert choose_precision(TrainRecipe(precision="bf16"), cpu) == "bf16"


def test_a_constant_rate_stays_at_its_top_after_the_warm_up() -> None:
    recipe = TrainRecipe(epochs=4, lr=1, warmup_epochs=1, schedule="constant")
    assert [rate_at(recipe, step, 2) for step in range(8)] == [0.5, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
@pytest.mark.parametrize("total", [1, 2, 3, 4, 40])
def test_one_cycle_is_pytorch_s(total: int) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = OneCycleLR(optimizer, 0.5, total_steps=total, cycle_momentum=False)
    recipe = TrainRecipe(epochs=total, lr=0.5, schedule="onecycle")
    for step in range(total):
        assert rate_at(recipe, step, 1) == pytest.approx(theirs.get_last_lr()[0])
        if step < total - 1:
            theirs.step()


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
        set_strategy(model, strategy)
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
    assert_same_tensors(tmp_path / "run", tmp_path / "straight")
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


CPU = torch.device("cpu")  # scaling gradients works there too, though nobody wants it
IMAGES, LABELS = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])


def make_fp16_run(colours: Path, strategy: str, folder: Path = Path()) -> TrainingRun:
    torch.manual_seed(0)
    model = convert(build("cifar_resnet20", 3), 0.9).train()
    set_strategy(model, strategy)  # type: ignore[arg-type]  # it is one
    plan = replace(PLAN, request=replace(REQUEST, precision="fp16"), measured_bytes=1)
    return make_run(colours, model, "train.label_smoothing=0", plan=plan, folder=folder)


def add_up(run: TrainingRun) -> None:
    run.progress = Progress(lr_factor=0.5)  # as after the only return to an earlier state
    step = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)]))
    assert _add_up(run, step, _Report(run), lambda: None) is not None


def test_under_fp16_gradients_have_their_own_size_and_momentum_stays_exact(colours: Path) -> None:
    found = []
    for strategy in ("store", "momentum"):
        run = make_fp16_run(colours, strategy)
        run.scaler = GradScaler("cpu", init_scale=2.0**10)
        add_up(run)
        found.append(gradients(run.model))
    assert all(map(torch.equal, *found))
    run.model.zero_grad()
    F.cross_entropy(run.model(IMAGES), LABELS).backward()  # in fp32
    for ours, theirs in zip(found[0], gradients(run.model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05)


def test_a_step_that_overflows_is_left_out_until_the_scale_is_exhausted(colours: Path) -> None:
    run = make_fp16_run(colours, "store")
    before = [parameter.clone() for parameter in run.model.parameters()]
    run.scaler = GradScaler("cpu", init_scale=2.0**126)
    add_up(run)
    take_step(run, 0.1)
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.scaler.get_scale() == 2.0**125
    run.scaler = GradScaler("cpu", init_scale=1.0)
    run.model.get_parameter("linear.weight").register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(MomconvError, match="a gradient is not finite"):
        add_up(run)


def test_after_a_return_to_an_earlier_state_gradients_are_scaled_again(
    colours: Path, tmp_path: Path
) -> None:
    run = make_fp16_run(colours, "store", tmp_path)
    run.scaler = GradScaler("cpu", init_scale=1.0)
    save(run)
    hook = run.model.get_parameter("linear.weight").register_hook(lambda grad: grad * torch.inf)
    step = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)]))
    assert _add_up(run, step, _Report(run), lambda: None) is None
    hook.remove()
    add_up(run)
    take_step(run, 0.1)
    assert run.scaler.get_scale() == 1.0


def test_the_scale_is_part_of_the_state() -> None:
    scaler = make_scaler("fp16", CPU)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 4096.0, "_growth_tracker": 7})
    again = make_scaler("fp16", CPU)
    restore_scaler(again, read_scaler(scaler))
    assert again.state_dict() == scaler.state_dict()
    assert read_scaler(make_scaler("bf16", CPU)) == {}


def test_a_cpu_refuses_fp16_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 is for GPUs, and the device is cpu"):
        finetune(small(tmp_path / "nowhere", "train.precision=fp16"), tmp_path / "run")


def test_memory_that_runs_out_between_unscaling_and_the_step_leaves_a_scaler_that_works(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_fp16_run(colours, "store", tmp_path)
    run.scaler = GradScaler("cpu", init_scale=1024.0)

    def exhaust(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_require_finite", exhaust)
        step = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)]))
        assert _add_up(run, step, _Report(run), lambda: None) is None
    assert run.scaler.get_scale() == 1024.0
    add_up(run)
    take_step(run, 0.1)


def test_memory_that_runs_out_in_the_average_is_no_end_under_fp16(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_fp16_run(colours, "store").model
    plan = replace(PLAN, request=replace(REQUEST, precision="fp16"), measured_bytes=1)
    run = make_run(colours, model, "train.ema=0.9", plan=plan, folder=tmp_path)
    run.scaler = GradScaler("cpu", init_scale=1024.0)
    save(run)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def exhaust(*_: object) -> None:
        raise MemoryError

    step, loss = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)])), torch.zeros(())
    add_up(run)
    with monkeypatch.context() as patch:
        patch.setattr(Average, "update", exhaust)
        assert not _step(run, step, loss, 0.0)
    assert all(map(torch.equal, before, model.parameters()))
    assert run.scaler.get_scale() == 1024.0
    add_up(run)
    assert _step(run, step, loss, 0.0)


CHANGES = ["train.ema=0.5", "momentum.anneal=1.5"]


def test_it_averages_weights_and_statistics_and_forgets_faster_at_first() -> None:
    model = nn.BatchNorm1d(1)
    average, expected = Average(model, 0.3), 0.0
    for n, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0]):
        nn.init.constant_(model.weight, value)
        nn.init.constant_(model.running_mean, -value)  # type: ignore[arg-type]  # a buffer
        average.update(model)
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        expected = decay * expected + (1 - decay) * value
    assert float(average.model.get_parameter("weight").detach()) == pytest.approx(expected)
    assert float(average.model.get_buffer("running_mean")) == pytest.approx(-expected)


def test_an_average_has_the_ranges_of_its_network() -> None:
    model = convert(build("cifar_resnet20"), stages="all")
    average = Average(model, 0.3)
    model(torch.randn(2, 3, 16, 16))
    average.update(model)
    assert min(read_ranges(model)) > LOWEST
    assert read_ranges(average.model) == read_ranges(model)


def test_a_run_s_results_are_the_average_which_resuming_keeps_exactly(
    colours: Path, tmp_path: Path
) -> None:
    recipe = small(colours, *CHANGES)
    result = finetune(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(10))
    finetune(recipe, tmp_path / "run", resume=True)
    assert_same_tensors(tmp_path / "run", tmp_path / "straight")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")

    state, last = load_file(tmp_path / "run" / "state.safetensors"), load_file(result.last)
    weight = "layer1.0.conv1.weight"
    assert torch.equal(last[weight], state[f"extra/ema/module.{weight}"])
    assert not torch.equal(last[weight], state[f"model/{weight}"])
    best = model_file.load(result.best)
    assert momentum_stages(best)["layer1"].gamma == 0.9
    val = recall_images(RunFolder(result.folder).split).val
    assert evaluate(best, val).top1 == result.best_epoch.val_top1


@pytest.mark.parametrize("last", ["true", "false"])
def test_the_plan_counts_the_average(colours: Path, tmp_path: Path, last: str) -> None:
    changes = ("train.ema=0.9", "train.epochs=1", f"train.channels_last={last}")
    finetune(small(colours, *changes), tmp_path)
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    model = model_file.load(tmp_path / "last.safetensors").train()
    place(model, torch.device("cpu"), TrainRecipe(channels_last=last == "true"))
    training = Training(32, ema=True, as_bytes=True)
    peak = Predictor(model, training).predict(3, plan.strategy).peak
    assert plan.predicted_bytes == peak.total == pytest.approx(plan.measured_bytes, rel=0.02)
    assert peak.ema == peak.weights
