"""How far a network is from another, in a table and in words."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from momconv.surgery.adaptation import Step
from momconv.surgery.drift import Drift
from momconv.words import plural

_TOLD = {
    "swapped": "rule swapped",
    "statistics": "statistics chosen",
    "refined": "gains and norms refined",
    "distilled": "distilled",
}


def show_steps(steps: Sequence[Step]) -> Iterator[RenderableType]:
    """A table of what every step did, if there are several."""
    if len(steps) < 2:
        return
    table = Table("step", box=None, pad_edge=False)
    for title in ("agreement", "KL in nats", "logits moved by"):
        table.add_column(title, justify="right")
    for step in steps:
        drift = step.drift
        figures = (f"{drift.agreement:.1%}", f"{drift.divergence:.4f}", f"{drift.distance:.1%}")
        table.add_row(_TOLD[step.name], *figures)
    yield table
    yield Text()


def describe_drift(drift: Drift, origin: str) -> str:
    """One line."""
    return (
        f"same top-1 as the original on {drift.agreement:.1%} of {plural(drift.images, 'image')} "
        f"{origin}; KL {drift.divergence:.4f} nats, logits moved by {drift.distance:.1%}"
    )


def show_facts(facts: Iterable[tuple[str, str]]) -> Iterator[RenderableType]:
    """Lines with labels."""
    return (Text(f"{label:<11}{text}") for label, text in facts)
