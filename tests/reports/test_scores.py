import io
import itertools
from pathlib import Path

from rich.console import Console

from momconv.evaluation import ClassScore, Mistake, Scores
from momconv.reports.scores import compare_scores, show_scores


def make_scores(classes: int, *, wrong: int = 1) -> Scores:
    """Ten images a class, of which class 0 loses ``wrong`` to class 1."""
    confusion = [[10 * (i == j) for j in range(classes)] for i in range(classes)]
    confusion[0][0] -= wrong
    confusion[0][1] += wrong
    scores = [ClassScore(f"class {i}", 1.0, 1.0, 1.0, 10) for i in range(classes)]
    scores[0] = ClassScore("class 0", 1.0, 0.9, 0.947, 10)
    return Scores(
        n=10 * classes,
        top1=1 - wrong / (10 * classes),
        interval=(0.5, 0.75),
        loss=0.25,
        macro_f1=0.9,
        calibration_error=0.0625,
        classes=tuple(scores),
        confusion=tuple(map(tuple, confusion)),
        mistakes=(Mistake(Path("0.png"), "class 1", "class 0", 0.75),) if wrong else (),
        said=tuple([1] * wrong + [0] * (10 - wrong) + [1] * 10 * (classes - 1)),
    )


def render(scores: Scores, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for part in show_scores(scores):
        console.print(part)
    return console.export_text()


def test_few_classes_get_a_row_each_and_a_matrix() -> None:
    lines = [" ".join(line.split()) for line in render(make_scores(2)).splitlines()]
    assert lines == [
        "top-1 95.00% (95 % interval 50.0% to 75.0%) on 20 images",
        "macro F1 0.900 · calibration error 0.062 · loss 0.2500",
        "",
        "each class",
        "class images precision recall F1",
        "class 0 10 1.000 0.900 0.947",
        "class 1 10 1.000 1.000 1.000",
        "",
        "confusion",
        "true \\ predicted class 0 class 1",
        "class 0 9 1",
        "class 1 0 10",
        "",
        "the most confident mistakes",
        "0.png: said class 1, is class 0 (75.0%)",
    ]


def test_a_thousand_classes_stay_readable() -> None:
    text = render(make_scores(1000))
    assert "the 10 worst of 1000 classes" in text
    assert "the most frequent confusions" in text
    lines = text.splitlines()
    assert len(lines) < 30
    assert "class 0" in lines[5]
    assert ["class", "0", "class", "1", "1"] in [line.split() for line in lines]


def test_without_a_mistake_there_are_no_confusions_to_list() -> None:
    assert "confusions" not in render(make_scores(20, wrong=0))


def test_names_of_classes_are_not_markup_and_not_obeyed() -> None:
    scores = make_scores(2)
    odd = tuple(ClassScore(name, 1, 1, 1, 10) for name in ("[red]x[/red]", "a\x1b[31m"))
    text = render(
        Scores(**({name: getattr(scores, name) for name in scores.__slots__} | {"classes": odd}))
    )
    assert text.count("[red]x[/red]") == 3
    assert "\x1b" not in text


def test_networks_stand_side_by_side_with_what_they_agree_on() -> None:
    console = Console(width=99, record=True, file=io.StringIO())
    networks = {Path("a"): make_scores(2), Path("b"): make_scores(2, wrong=3)}
    for part in compare_scores(networks):
        console.print(part)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines[:5] == [
        "top-1 95 % interval macro F1 calibration error loss same as 1",
        "1 95.00% 50.0% to 75.0% 0.900 0.062 0.250",
        "2 85.00% 50.0% to 75.0% 0.900 0.062 0.250 90.0%",
        "1 a",
        "2 b",
    ]


def test_every_number_of_classes_renders() -> None:
    for classes in itertools.chain(range(2, 12), (30, 31)):
        assert "macro F1" in render(make_scores(classes))
