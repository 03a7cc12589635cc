"""A run's README.md: what the network is, how to use it, how it came about, how good it is."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from momconv._version import __version__
from momconv.data.folder import name_images
from momconv.evaluation import Scores
from momconv.recipe import Recipe
from momconv.reports.inspection import describe_input
from momconv.training.finetuning import Result
from momconv.units import format_bytes
from momconv.vocabulary import OPTIMIZERS
from momconv.words import describe_classes, plural, printable
from momconv.zoo import own
from momconv.zoo.description import Description

_MOST_ROWS = 50  # classes in a table


def compose_card(
    result: Result,
    description: Description,
    scores: Scores | None,
    plots: Sequence[Path],
) -> str:
    """Return the card as Markdown with front matter.

    Args:
        result: What the run came to.
        description: What the network of its best epoch is.
        scores: Of that network on the held-out images; None where there are none.
        plots: Pictures in the run's folder.
    """
    recipe = result.recipe
    name = f"{description.architecture} on {name_images(result.root)}"
    data = name_images(result.root)
    front = yaml.safe_dump(
        _compose_front_matter(name, data, description, scores), sort_keys=False, allow_unicode=True
    )
    parts = [
        f"---\n{front}---\n\n# {_escape(name)}\n",
        *_introduce(result, description),
        *_explain_use(result, description),
        *_describe_data(result, recipe),
        *_describe_training(result, recipe),
        *_list_scores(scores, result),
        *(f"![{path.stem}]({path.relative_to(result.folder).as_posix()})\n" for path in plots),
        *_list_limits(scores, result, description),
    ]
    return "\n".join(parts)


def _compose_front_matter(
    name: str, data: str, description: Description, scores: Scores | None
) -> dict[str, Any]:
    """Return what ``huggingface_hub.ModelCard`` reads."""
    front: dict[str, Any] = {
        "license": "other",
        "license_name": "of-the-original-weights-and-the-images",
        "datasets": [printable(data)],
        "tags": ["image-classification", "momconv", "momentum-residual-network"],
        "pipeline_tag": "image-classification",
        "library_name": "momconv",
    }
    if description.source != "none":
        front["base_model"] = printable(description.source)
    if scores is None:
        return front
    figures = {"accuracy": scores.top1, "f1": scores.macro_f1}
    metrics = [{"type": kind, "value": round(value, 4)} for kind, value in figures.items()]
    dataset = {"name": printable(data), "type": "imagefolder", "split": "validation"}
    task = {"type": "image-classification", "name": "Image classification"}
    results = [{"task": task, "dataset": dataset, "metrics": metrics}]
    index = [{"name": printable(name), "results": results}]
    return front | {"metrics": list(figures), "model-index": index}


def _introduce(result: Result, description: Description) -> Iterator[str]:
    stages = result.plan.stages
    source = {"none": "random weights"}.get(description.source, description.source)
    if (file := result.recipe.model.from_file) is not None:
        source = file.name
    yield (
        f"A {description.architecture} that tells {plural(description.num_classes, 'class')} apart,"
        f" trained from {_escape(source)} with momconv {__version__} (γ "
        f"{result.best_epoch.gamma:g}, backward pass: {stages}).\n"
    )


def _explain_use(result: Result, description: Description) -> Iterator[str]:
    file, is_own = result.best.name, own.is_own(description.architecture)
    options = f" {own.restate(description)}" if is_own else ""
    network = ", make()" if is_own else ""
    yield "## Use\n"
    yield (
        f"```sh\nmomconv predict {file} PHOTO.jpg{options}\n"
        f"momconv eval {file} --data FOLDER{options}\n```\n"
    )
    yield (
        "```python\nimport momconv\n\n"
        f'model = momconv.load("{file}"{network})\n'
        'print(momconv.predict(model, ["PHOTO.jpg"]).images)\n```\n'
    )
    yield f"Both prepare an image in the same way: {describe_input(description.preprocessing)}.\n"


def _describe_data(result: Result, recipe: Recipe) -> Iterator[str]:
    train, val = result.splits.train, result.splits.val
    yield "## Data\n"
    yield (
        f"{_escape(name_images(result.root))}: {plural(len(train.samples), 'image')} to train on, "
        f"{len(val.samples)} held out.\n"
    )
    trained, held_out = train.counts(), val.counts()
    if len(trained) <= _MOST_ROWS:
        rows = ((_escape(name), count, held_out[name]) for name, count in trained.items())
        yield _tabulate(("class", "training", "held out"), rows)
    if result.splits.fingerprint:
        yield f"Fingerprint of the files: `{result.splits.fingerprint}`.\n"


def _describe_training(result: Result, recipe: Recipe) -> Iterator[str]:
    train, plan = recipe.train, result.plan
    settings = {
        "epochs": f"{result.epochs}, of which number {result.best_epoch.epoch} is the best",
        "batch": f"{plan.request.batch} in micro-batches of {plan.micro_batch}",
        "optimiser": f"{OPTIMIZERS[train.optimizer].class_name}, "
        f"learning rate up to {train.resolved_lr:g}, "
        f"weight decay {train.weight_decay:g}",
        "label smoothing": f"{train.label_smoothing:g}",
        "precision": plan.precision,
        **_list_changes(recipe),
        "seed": train.seed,
        "device": plan.request.device,
        "memory at the peak": _describe_memory(result),
    }
    yield "## Training\n"
    yield _tabulate(("setting", "value"), settings.items())
    yield "`config.yaml` has all settings: `momconv finetune --recipe config.yaml` repeats it.\n"


def _list_changes(recipe: Recipe) -> dict[str, object]:
    """Return what else was asked for, by its key; paths of this machine are nobody's business."""
    told = {"train.epochs", "train.batch_size", "train.seed", "train.device", "train.memory"}
    if recipe.model.from_file is not None:  # which says what the network is
        told |= {"model.name", "model.weights", "model.arguments"}
    return {
        f"`{section}.{key}`": _escape(str(value))
        for section, own in recipe
        for key, value in own
        if value != getattr(getattr(Recipe(), section), key)
        if not isinstance(value, Path) and f"{section}.{key}" not in told
    }


def _describe_memory(result: Result) -> str:
    plan = result.plan
    measured = plan.measured_bytes
    told = f", {format_bytes(measured)} measured" if measured is not None else ""
    limit = format_bytes(plan.limit_bytes)
    return f"{format_bytes(plan.predicted_bytes)} predicted{told}; limit {limit}"


def _list_scores(scores: Scores | None, result: Result) -> Iterator[str]:
    yield "## Scores\n"
    if scores is None:
        yield "None: no image was held out.\n"
        return
    low, high = scores.interval
    figures = {
        "top-1": f"{scores.top1:.2%} (95 % interval {low:.1%} to {high:.1%})",
        "macro F1": f"{scores.macro_f1:.3f}",
        "expected calibration error": f"{scores.calibration_error:.3f}",
        "loss": f"{scores.loss:.4f}",
    }
    if result.probe:
        low, high = result.probe.interval
        told = f"{result.probe.top1:.2%} (95 % interval {low:.1%} to {high:.1%})"
        figures["top-1 of a linear probe"] = told
    yield f"Of epoch {result.best_epoch.epoch}, on {plural(scores.n, 'held-out image')}.\n"
    yield _tabulate(("score", "value"), figures.items())
    if bought := result.compare_to_probe():
        yield f"Linear probe, on the features as they were before training: {bought}.\n"
    if scores.uncovered:
        which = _escape(describe_classes(scores.uncovered))
        yield f"They do not cover {which}, of which no image was held out.\n"
    if len(scores.classes) <= _MOST_ROWS:
        rows = (
            (_escape(c.name), f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", c.support)
            for c in scores.classes
        )
        yield _tabulate(("class", "precision", "recall", "F1", "images"), rows)


def _list_limits(scores: Scores | None, result: Result, description: Description) -> Iterator[str]:
    classes = plural(description.num_classes, "class")
    limits = [f"It says one of its {classes} of any image, also where none of them is on it."]
    if scores:
        limits.append(
            "The images of the scores are of the same origin as those of the training; others may "
            "be harder."
        )
    if scores and result.epochs > 1:
        limits.append("The best epoch was chosen on these images, which flatters the scores.")
    limits.append("The licences of the original weights and of the images apply.")
    yield "## Limits\n"
    yield "".join(f"* {limit}\n" for limit in limits)


def _tabulate(titles: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _escape(text: str) -> str:
    """Return ``text`` on one line, with what Markdown or HTML would obey made visible."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#$&" else char for char in printable(text))
