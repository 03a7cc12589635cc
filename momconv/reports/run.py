"""What a finished run leaves for people: pictures, a model card, and a config for other tools."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from momconv.data.dataset import count_workers
from momconv.evaluation import Scores, evaluate
from momconv.files.atomic import write_text
from momconv.files.export import to_config
from momconv.files.model_file import load
from momconv.planner.devices import find_device
from momconv.planner.prediction import PeakMemory
from momconv.planner.profile import compare_peaks
from momconv.reports.model_card import compose_card
from momconv.reports.page import render
from momconv.reports.run_page import compose_run_page
from momconv.reports.run_plots import (
    draw_confusion,
    draw_curves,
    draw_memory,
    draw_mistakes,
    draw_rates,
    draw_training_images,
)
from momconv.reports.scores import confusion_to_csv
from momconv.training.finetuning import Result
from momconv.training.network import make_own, place, start_training
from momconv.training.run_folder import RunFolder
from momconv.zoo.description import Description, describe

_BATCH = 32  # images to evaluate at once


def report_run(result: Result, progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``README.md``, ``report.html``, ``config.json`` and pictures to the folder of a run.

    The network of the best epoch is evaluated once more, for the confusion and the mistakes, which
    a run does not keep. ``progress`` is called with the number of images done and of all.

    Raises:
        DataError: An image cannot be decoded any more.
        ModelFileError: The best model is gone.
        ResourceError: The folder cannot be written, or another run has it by now.
    """
    with RunFolder(result.folder).claimed():
        _report(result, progress)


def _report(result: Result, progress: Callable[[int, int], None] | None) -> None:
    recipe = result.recipe
    model = load(result.best, make_own(recipe.model))
    description = describe(model)
    images = result.splits.val
    scores = None
    if images.samples:
        device = find_device(recipe.train.device)
        scores = evaluate(
            model,
            images,
            batch_size=min(_BATCH, result.plan.micro_batch),
            device=device,
            workers=count_workers(len(images.samples), device),
            progress=progress,
        )
    run = RunFolder(result.folder)
    peaks = _compare_peaks(model, result) if recipe.log.plots else {}
    plots = _draw(result, description, scores, peaks) if recipe.log.plots else []
    config = json.dumps(to_config(description), indent=2, ensure_ascii=False)
    write_text(run.model_config, f"{config}\n")
    write_text(run.card, compose_card(result, description, scores, plots))
    if scores:
        write_text(run.confusion, confusion_to_csv(scores))
    page = compose_run_page(result, description, scores, plots, peaks)
    write_text(run.report, render(page))


def _compare_peaks(model: nn.Module, result: Result) -> dict[str, PeakMemory]:
    """Return what a step of the run takes in each way that people compare, predicted."""
    plan, train = result.plan, result.recipe.train
    place(model, torch.device("meta"), train)
    start_training(model, train)
    images = plan.request.largest_part(plan.micro_batch)
    return compare_peaks(model, plan.request, images, plan.strategy)


def _draw(
    result: Result,
    description: Description,
    scores: Scores | None,
    peaks: Mapping[str, PeakMemory],
) -> list[Path]:
    """Return the pictures that were drawn, and remove earlier ones that are not drawn now."""
    run = RunFolder(result.folder)
    run.plots.mkdir(exist_ok=True)
    names = ("curves", "confusion", "worst-errors", "memory", "training-images", "rates")
    paths = [run.plots / f"{name}.png" for name in names]
    curves, confusion, mistakes, memory, images, rates = paths
    for path in paths:
        path.unlink(missing_ok=True)
    draw_curves(result.history, curves, result.probe)
    if scores:
        draw_confusion(scores, confusion)
    if scores and scores.mistakes:
        read = result.splits.val.source.read
        draw_mistakes(scores.mistakes, description.preprocessing, mistakes, read)
    draw_memory(result.plan, peaks, memory)
    draw_training_images(result.splits.train, description.preprocessing, result.recipe, images)
    with suppress(OSError, ValueError, LookupError):  # there is no such table, or a damaged one
        draw_rates(run.rates, result.recipe.train.resolved_lr, rates)
    return [path for path in paths if path.is_file()]
