from pathlib import Path

import pytest
import torch
from runs import Signals, read_metrics, read_tensors, small
from safetensors.torch import load_file
from torch import nn

from momconv.evaluation import evaluate
from momconv.files import model_file
from momconv.momentum.sequential import momentum_stages
from momconv.planner.prediction import peak_memory
from momconv.training.averaging import Average
from momconv.training.finetuning import finetune
from momconv.training.images import recall_images
from momconv.training.interruption import Interrupted
from momconv.training.network import place
from momconv.training.planning import BatchPlan
from momconv.training.run_folder import RunFolder

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


def test_a_run_s_results_are_the_average_which_resuming_keeps_exactly(
    colours: Path, tmp_path: Path
) -> None:
    recipe = small(colours, *CHANGES)
    result = finetune(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(10))
    finetune(recipe, tmp_path / "run", resume=True)
    ours, theirs = read_tensors(tmp_path / "run"), read_tensors(tmp_path / "straight")
    assert ours.keys() == theirs.keys()
    assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")

    state, last = load_file(tmp_path / "run" / "state.safetensors"), load_file(result.last)
    weight = "layer1.0.conv1.weight"
    assert torch.equal(last[weight], state[f"extra/ema/module.{weight}"])
    assert not torch.equal(last[weight], state[f"model/{weight}"])
    best = model_file.load(result.best)
    assert momentum_stages(best)["layer1"].gamma == 0.9
    val = recall_images(RunFolder(result.folder).split).val
    assert evaluate(best, val).top1 == result.best_epoch.val_top1


def test_the_plan_counts_the_average(colours: Path, tmp_path: Path) -> None:
    finetune(small(colours, "train.ema=0.9", "train.epochs=1"), tmp_path)
    plan = BatchPlan.from_json((tmp_path / "plan.json").read_text())
    model = model_file.load(tmp_path / "last.safetensors").train()
    place(model, torch.device("cpu"))
    peak = peak_memory(model, 3, 32, strategy=plan.strategy, ema=True)
    assert plan.predicted_bytes == peak.total == pytest.approx(plan.measured_bytes, rel=0.02)
    assert peak.ema == peak.weights
