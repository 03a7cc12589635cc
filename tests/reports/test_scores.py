import io
import itertools

from rich.console import Console

from momconv.evaluation import ClassScore, Scores
from momconv.reports.scores import show_scores


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
        classes=tuple(scores),
        confusion=tuple(map(tuple, confusion)),
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
        "macro F1 0.900 · loss 0.2500",
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
    ]


def test_a_thousand_classes_stay_readable() -> None:
    text = render(make_scores(1000))
    assert "the 10 worst of 1000 classes" in text
    assert "the most frequent confusions" in text
    lines = text.splitlines()
    assert len(lines) < 30
    assert "class 0" in lines[5]
    assert lines[-1].split() == ["class", "0", "class", "1", "1"]


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


def test_every_number_of_classes_renders() -> None:
    for classes in itertools.chain(range(2, 12), (30, 31)):
        assert "macro F1" in render(make_scores(classes))
