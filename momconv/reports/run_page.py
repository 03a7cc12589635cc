"""What report.html says of a run, and of an evaluation."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from momconv._version import __version__
from momconv.data.decoding import UnreadableImage, decode, read_bytes
from momconv.data.folder import name_images
from momconv.evaluation import ClassScore, Scores
from momconv.names import encode_name
from momconv.planner.plan import Plan
from momconv.planner.prediction import PeakMemory
from momconv.reports.inspection import describe_input
from momconv.reports.page import Figure, Illustration, Page, Section, Table, embed, shrink
from momconv.reports.run_plots import split_measured, split_peak
from momconv.training.finetuning import Result
from momconv.training.run_folder import RunFolder
from momconv.units import format_bytes, format_duration
from momconv.words import list_some, plural
from momconv.zoo import own
from momconv.zoo.description import Description, Preprocessing

_MOST_CLASSES = 200  # rows of the table; above, those with the lowest F1
_MOST_NOTES = 20
_TITLES = {
    "curves": "Loss, scores and learning rate over the epochs",
    "rates": "Loss at the learning rates that were tried",
    "confusion": "What is taken for what",
    "memory": "Memory at the peak of a training step, by part",
    "training-images": "Training images as in the first epoch",
}


def compose_run_page(
    result: Result,
    description: Description,
    scores: Scores | None,
    plots: Sequence[Path],
    peaks: Mapping[str, PeakMemory],
) -> Page:
    """Return the page of a run.

    Args:
        result: What the run came to.
        description: What the network of its best epoch is.
        scores: Of that network on the held-out images; None where there are none.
        plots: Pictures in the run's folder.
        peaks: What a step takes in each way that was compared, predicted.
    """
    pictures = {path.stem: path for path in plots}
    folder = RunFolder(result.folder)

    def show(title: str, *names: str, **content: Any) -> Section:
        found = [embed(pictures[name], _TITLES[name]) for name in names if name in pictures]
        return Section(title=title, pictures=tuple(found), **content)

    bought = result.compare_to_probe()
    lines = (f"Linear probe {bought}.",) if bought else ()
    sections = [show("Curves", "curves", "rates", lines=lines)]
    if scores:
        sections += [
            show("Confusion", "confusion"),
            _show_mistakes(scores, description.preprocessing, result.splits.val.source.read),
            _show_classes(scores),
        ]
    sections += [
        show("Training images", "training-images", lines=(_describe_images(result),)),
        show(
            "Memory and the plan",
            "memory",
            lines=(*_explain(result.plan), str(result.plan), *_compare(result.plan)),
            tables=(
                *_tabulate_measured(result.plan, peaks.get("chosen", result.plan.peak)),
                *_tabulate_peaks(peaks),
            ),
            summary="The whole plan (plan.json)",
            details=tuple(_tabulate_plan(folder)),
        ),
        _show_data(folder),
        _show_commands(result, description),
    ]
    return Page(
        title=f"{description.architecture} on {name_images(result.root)}",
        subtitle=f"{plural(description.num_classes, 'class')}, fine-tuned for "
        f"{plural(result.epochs, 'epoch')}, momconv {__version__}",
        figures=tuple(_list_run_figures(result, scores)),
        sections=tuple(section for section in sections if _has_content(section)),
    )


def compose_evaluation_page(
    title: str,
    description: Description,
    scores: Scores,
    lines: Sequence[str],
    picture: Path,
    command: str,
) -> Page:
    """Return the page of an evaluation: ``lines`` are of the images, ``command`` does it again."""
    prepared = f"Each was prepared so: {describe_input(description.preprocessing)}."
    sections = (
        Section(title="Confusion", pictures=(embed(picture, _TITLES[picture.stem]),)),
        _show_mistakes(scores, description.preprocessing),
        _show_classes(scores),
        Section(title="Images", lines=(*lines, prepared)),
        Section(title="Repeat", commands=(command,)),
    )
    return Page(
        title=title,
        subtitle=f"{description.architecture}, {plural(description.num_classes, 'class')}, "
        f"momconv {__version__}",
        figures=tuple(_list_figures(scores)),
        sections=tuple(section for section in sections if _has_content(section)),
    )


def _has_content(section: Section) -> bool:
    parts = (section.lines, section.pictures, section.thumbnails, section.tables)
    return any(parts) or bool(section.commands)


def _list_run_figures(result: Result, scores: Scores | None) -> Iterator[Figure]:
    if scores:
        yield from _list_figures(scores)
    if result.probe:
        remark = f"on frozen features; {_show_interval(result.probe.interval)}"
        yield Figure("linear probe", f"{result.probe.top1:.1%}", remark)
    plan, history = result.plan, result.history
    if plan.measured_bytes is not None:
        peak, predicted = map(format_bytes, (plan.measured_bytes, plan.predicted_bytes))
        yield Figure("memory at the peak", peak, f"{predicted} predicted")
    else:
        yield Figure("memory at the peak", format_bytes(plan.predicted_bytes), "predicted")
    seconds = format_duration(sum(row.seconds for row in history))
    yield Figure("training", seconds, f"epoch {result.best_epoch.epoch} is the best")


def _list_figures(scores: Scores) -> Iterator[Figure]:
    remark = _show_interval(scores.interval)
    yield Figure(f"top-1 on {plural(scores.n, 'image')}", f"{scores.top1:.1%}", remark)
    if scores.top5 is not None:
        yield Figure("top-5", f"{scores.top5:.1%}")
    yield Figure("macro F1", f"{scores.macro_f1:.1%}", "the mean over the classes")
    error = f"{scores.calibration_error:.3f}"
    yield Figure("calibration error", error, "how far confidence is from accuracy")


def _show_interval(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"95 % interval {low:.1%} to {high:.1%}"


def _show_mistakes(
    scores: Scores, p: Preprocessing, read: Callable[[Path], bytes] = read_bytes
) -> Section:
    thumbnails = list[Illustration]()
    for mistake in scores.mistakes:
        try:
            image = decode(mistake.path, p.ranges, read)
        except UnreadableImage:  # since it was evaluated
            continue
        lines = (f"is {mistake.truth}", f"said {mistake.said} ({mistake.probability:.0%})")
        thumbnails.append(shrink(image, mistake.path.name, lines))
    wrong = scores.n - round(scores.top1 * scores.n)
    line = f"The surest of {wrong} mistakes." if wrong > 1 else "The only one."
    line = line if thumbnails else "There are none."
    return Section(title="Worst errors", lines=(line,), thumbnails=tuple(thumbnails))


def _show_classes(scores: Scores) -> Section:
    shown, lines = scores.classes, tuple[str, ...]()
    if len(shown) > _MOST_CLASSES:
        shown = tuple(sorted(shown, key=lambda score: score.f1)[:_MOST_CLASSES])
        lines = (f"The {_MOST_CLASSES} with the lowest F1 of {len(scores.classes)}.",)
    titles = ("class", "images", "precision", "recall", "F1")
    table = Table(titles, tuple(map(_to_row, shown)))
    return Section(title="Each class", lines=lines, tables=(table,))


def _to_row(score: ClassScore) -> tuple[str, ...]:
    figures = (score.precision, score.recall, score.f1)
    return (score.name, str(score.support), *(f"{figure:.1%}" for figure in figures))


def _describe_images(result: Result) -> str:
    recipe, flipped = result.recipe.data, "mirrored half of the time"
    if recipe.augment == "none":
        return "They are not changed at random (data.augment is none)."
    return (
        f"Changed at random in each epoch: data.augment is {recipe.augment}, "
        f"{flipped if recipe.flip else 'never mirrored'}."
    )


def _explain(plan: Plan) -> Iterator[str]:
    """Yield why this network is trained in this way, if there was a choice."""
    if plan.reason:
        yield f"Chosen: {plan.reason}."


def _compare(plan: Plan) -> Iterator[str]:
    """Yield how good the prediction was."""
    if plan.measured_bytes:
        off = abs(plan.predicted_bytes / plan.measured_bytes - 1)
        yield (
            f"Measured at the peak of the first step: {format_bytes(plan.measured_bytes)}; the "
            f"prediction is {off:.1%} off."
        )


def _tabulate_measured(plan: Plan, peak: PeakMemory | None) -> Iterator[Table]:
    """Yield what was measured beside what was predicted, by part as far as both are known.

    A GPU's allocator does not see its context.
    """
    measured = split_measured(plan)
    if not measured or peak is None:
        return
    predicted = split_peak(peak)
    *_, rest = measured
    predicted[rest] = peak.batch + peak.step
    rows = [(part, *map(format_bytes, (predicted[part], measured[part]))) for part in measured]
    if peak.allowance:
        rows.append(("context and fragmentation", format_bytes(peak.allowance), "not measured"))
    rows.append(("together", format_bytes(peak.total), format_bytes(sum(measured.values()))))
    yield Table(("at the peak", "predicted", "measured"), tuple(rows))


def _tabulate_peaks(peaks: Mapping[str, PeakMemory]) -> Iterator[Table]:
    """Yield the parts of each peak, a column each."""
    if not peaks:
        return
    parts = {name: split_peak(peak) for name, peak in peaks.items()}
    rows = [
        (part, *(format_bytes(amounts[part]) for amounts in parts.values()))
        for part in next(iter(parts.values()))
        if any(amounts[part] for amounts in parts.values())
    ]
    rows.append(("together", *(format_bytes(peak.total) for peak in peaks.values())))
    yield Table(("predicted", *peaks), tuple(rows))


def _tabulate_plan(folder: RunFolder) -> Iterator[Table]:
    """Yield what plan.json says, whatever that is."""
    try:
        plan = json.loads(folder.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    facts = dict[str, str]()
    for name, value in plan.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            titles = tuple(dict.fromkeys(key for row in value for key in row))
            rows = tuple(tuple(_say(key, row.get(key)) for key in titles) for row in value)
            yield Table(tuple(map(_name, titles)), rows)
        elif isinstance(value, dict):
            unit = name if name.endswith("bytes") else ""  # of all in it
            facts |= {
                f"{_name(name)}, {_name(key)}": _say(unit or key, v) for key, v in value.items()
            }
        else:
            facts[_name(name)] = _say(name, value)
    yield Table((), tuple(facts.items()))


def _name(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _say(key: str, value: object) -> str:
    """Return a value of a plan, with the unit that its key implies."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float) and key.endswith("bytes"):
        return format_bytes(value)
    if isinstance(value, list):
        return ", ".join(_say(key, part) for part in value) or "–"
    if isinstance(value, float):
        unit = " s" if "seconds" in key else ""
        return f"{value:.4g}{unit}"
    return str(value)


def _show_data(folder: RunFolder) -> Section:
    """Return what was found in the images."""
    try:
        found = json.loads(folder.data_report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Section(title="Data")
    rows = []
    for part, name in (("train", "to train on"), ("val", "held out")):
        about = found.get(part) or {}
        if images := about.get("images"):
            rows.append((name, f"{plural(images, 'image')} in {about.get('folder')}"))
            if bad := about.get("unreadable"):
                rows.append((f"{name}, unreadable", ", ".join(list_some(list(bad), 5))))
    rows.append(("fingerprint", str(found.get("fingerprint"))))
    notes = list_some([str(note) for note in found.get("notes", [])], _MOST_NOTES)
    return Section(title="Data", lines=tuple(notes), tables=(Table((), tuple(rows)),))


def _show_commands(result: Result, description: Description) -> Section:
    options = f" {own.restate(description)}" if own.is_own(description.architecture) else ""
    config = quote_path(RunFolder(result.folder).config)
    best = quote_path(result.best)
    commands = (
        f"momconv finetune --recipe {config}{options} --auto-name",
        f"momconv predict {best} PHOTO.jpg{options}",
        f"momconv eval {best} --data {quote_path(result.root)}{options}",
    )
    lines = (
        "The first command repeats the run, the others use its best model.",
        f"It prepares images so: {describe_input(description.preprocessing)}.",
    )
    return Section(title="Repeat and use", lines=lines, commands=commands)


def quote_path(path: Path) -> str:
    """Return ``path`` as a command line has it."""
    return shlex.quote(encode_name(path))
