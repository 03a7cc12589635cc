"""How a run looks on a terminal."""

from contextlib import ExitStack

from rich.text import Text

from momconv.cli._console import Report, progress, show, tell
from momconv.training.progress import EpochRow, Listener
from momconv.units import format_duration


class Display(Listener):
    """Shows a run on stderr: one bar at a time, and a line for each message and each epoch."""

    def __init__(self, bars: ExitStack) -> None:
        self._bars = bars
        self._title = ""
        self._report: Report | None = None

    def tell(self, text: str) -> None:
        """Print a message with its label."""
        tell(text)

    def advance(self, title: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of ``title``; the one of other work goes away."""
        if self._report is None or title != self._title:
            self._bars.close()
            self._title, self._report = title, self._bars.enter_context(progress(title, total))
        self._report(done, text)

    def finish_epoch(self, row: EpochRow, epochs: int) -> None:
        """Print the numbers of an epoch."""
        parts = [f"epoch {row.epoch}/{epochs}", f"loss {row.train_loss:.3f}"]
        if row.val_top1 is not None:
            parts += [f"val loss {row.val_loss:.3f}", f"val top-1 {row.val_top1:.1%}"]
            parts += [f"macro F1 {row.val_macro_f1:.1%}"] if row.val_macro_f1 is not None else []
        parts += [f"{row.images_per_second:.1f} images/s", format_duration(row.seconds)]
        show(Text(" · ".join(parts)))
