"""What a finished run leaves for people: pictures, a model card, and a config for other tools."""

import json
from collections.abc import Callable
from pathlib import Path

from momconv.data.dataset import count_workers
from momconv.evaluation import Scores, evaluate
from momconv.files.atomic import write_text
from momconv.files.export import to_config
from momconv.files.model_file import load
from momconv.planner.devices import find_device
from momconv.recipe import Recipe
from momconv.reports.model_card import compose_card
from momconv.reports.run_plots import (
    can_draw,
    draw_confusion,
    draw_curves,
    draw_memory,
    draw_mistakes,
)
from momconv.training.finetuning import Result
from momconv.training.network import make_own
from momconv.zoo.description import describe

_BATCH = 32  # images to evaluate at once

NO_PLOTS = "note: no plots, because matplotlib is not installed: pip install 'momconv[plot]'"


def report_run(
    result: Result, recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> tuple[str, ...]:
    """Write ``README.md``, ``config.json`` and ``plots`` to the folder of a run; notes on them.

    The network of the best epoch is evaluated once more, for the confusion and the mistakes, which
    a run does not keep. ``progress`` is called with the number of images done and of all.

    Raises:
        DataError: An image cannot be decoded any more.
        ModelFileError: The best model is gone.
        ResourceError: The folder cannot be written.
    """
    model = load(result.best, make_own(recipe.model))
    description = describe(model)
    images = result.splits.val
    scores = None
    if images.samples:
        scores = evaluate(
            model,
            images,
            batch_size=min(_BATCH, result.plan.micro_batch),
            device=find_device(recipe.train.device),
            workers=count_workers(len(images.samples)),
            progress=progress,
        )
    plots = _draw(result, scores) if can_draw() else []
    config = json.dumps(to_config(description), indent=2, ensure_ascii=False)
    write_text(result.folder / "config.json", f"{config}\n")
    card = compose_card(result, recipe, description, scores, plots)
    write_text(result.folder / "README.md", card)
    return () if can_draw() else (NO_PLOTS,)


def _draw(result: Result, scores: Scores | None) -> list[Path]:
    """The pictures that were drawn; one of an earlier end of the run that has none now is gone."""
    folder = result.folder / "plots"
    folder.mkdir(exist_ok=True)
    names = ("curves", "confusion", "worst-errors", "memory")
    curves, confusion, mistakes, memory = (folder / f"{name}.png" for name in names)
    for path in (confusion, mistakes):
        path.unlink(missing_ok=True)
    draw_curves(result.history, curves)
    if scores:
        draw_confusion(scores, confusion)
    if scores and scores.mistakes:
        draw_mistakes(scores.mistakes, mistakes)
    draw_memory(result.plan, memory)
    return [path for path in (curves, confusion, mistakes, memory) if path.is_file()]
