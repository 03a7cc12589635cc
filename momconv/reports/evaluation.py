"""What an evaluation leaves for people: a page, and a table of what is said of each image."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from momconv.data.folder import name_images
from momconv.data.source import ImageSet
from momconv.errors import ResourceError, UsageError
from momconv.evaluation import Scores
from momconv.files.atomic import require_writable, write_atomically, write_text
from momconv.names import encode_name
from momconv.reports.page import render
from momconv.reports.run_page import compose_evaluation_page, quote_path
from momconv.reports.run_plots import draw_confusion
from momconv.reports.scores import confusion_to_csv
from momconv.words import plural
from momconv.zoo.description import Description
from momconv.zoo.own import is_own, restate
from momconv.zoo.preparation import Preparation


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """The files of an evaluation of the images in ``data``, each written whole or not at all.

    The images were prepared as the model says, but for what was ``said``.
    """

    path: Path
    data: Path
    said: Preparation = field(default_factory=Preparation)
    batches: list[Tensor] = field(default_factory=list)  # of probabilities, in the images' order

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def predictions(self) -> Path:
        """A line for each image: path, label, prediction and probabilities."""
        return self.path / "predictions.csv"

    @property
    def confusion(self) -> Path:
        """What images of each class are taken for."""
        return self.path / "confusion.csv"

    @property
    def picture(self) -> Path:
        """The same, drawn."""
        return self.path / "confusion.png"

    def require_free(self, *, overwrite: bool) -> None:
        """Do nothing if an evaluation can be written here.

        Raises:
            UsageError: Something else is there, or the folder is among the images.
            ResourceError: It cannot be written.
        """
        elsewhere = "-o FOLDER"
        if self.path.resolve().is_relative_to(self.data.resolve()):
            raise UsageError(
                f"output folder {self.path} is inside the folder of images {self.data}",
                kind="usage.output_in_data",
                fix=elsewhere,
            )
        own = {self.report, self.predictions, self.confusion, self.picture}
        found = set(self.path.iterdir()) if self.path.is_dir() else {self.path}
        if self.path.exists() and found and not (overwrite and found <= own):
            hint = f"{elsewhere}\n--overwrite" if found <= own else elsewhere
            raise UsageError(
                f"output folder already exists and is not empty: {self.path}",
                kind="usage.output_exists",
                fix=hint,
            )
        above = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        require_writable(above / self.report.name, "-o")

    def hear(self, probabilities: Tensor) -> None:
        """Remember what was computed for the next images."""
        self.batches.append(probabilities)

    def write(
        self, file: Path, images: ImageSet, description: Description, scores: Scores, remark: str
    ) -> None:
        """Write how good the model in ``file`` is on ``images``, all of which were heard of.

        Raises:
            ResourceError: That cannot be written.
        """
        self._make()
        write_atomically(self.predictions, lambda path: self._tabulate(path, images))
        draw_confusion(scores, self.picture)
        write_text(self.confusion, confusion_to_csv(scores))
        page = compose_evaluation_page(
            f"{file.name} on {name_images(self.data)}",
            description,
            scores,
            (f"{plural(scores.n, 'image')} in {self.data}. {remark}",),
            self.picture,
            self._restate(file, description),
        )
        write_text(self.report, render(page))

    def _restate(self, file: Path, description: Description) -> str:
        """Return the command that evaluates again."""
        own = [restate(description)] if is_own(description.architecture) else []
        words = (
            quote_path(file),
            "--data",
            quote_path(self.data),
            *own,
            *self.said.write_options(),
        )
        return " ".join(("momconv eval", *words))

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"cannot make output folder {self.path}: {error.strerror}",
                kind="output.unwritable",
                fix="-o FOLDER",
            ) from error

    def _tabulate(self, path: Path, images: ImageSet) -> None:
        names = images.classes  # which can be written, as what the model's file has of them
        rows = (row for batch in self.batches for row in batch)
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["path", "label", "prediction", "probability", *names])
            for row, sample in zip(rows, images.samples, strict=True):
                said, figures = ["", ""], [""] * len(names)  # without an answer
                if row.isfinite().all():
                    figures = [f"{value:.6g}" for value in row.tolist()]
                    said = [names[int(row.argmax())], f"{row.max().item():.6g}"]
                known = [encode_name(sample.path), names[sample.label]]
                table.writerow([*known, *said, *figures])
