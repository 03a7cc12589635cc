"""The folder of a run: what is in it, and what may be done with it."""

import itertools
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from momconv.data.folder import name_images
from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.files import claim
from momconv.files.atomic import find_aside, is_temporary, remove, require_writable, sweep
from momconv.opening import BEST, LAST, PROBE, name_after
from momconv.recipe import Recipe, recall_recipe
from momconv.units import format_bytes
from momconv.zoo import own

_RUNS = Path("runs")  # below the working directory


def _ignore(_: str) -> None:
    """Hear a message and do nothing."""


def name_folder(recipe: Recipe) -> Path:
    """Return the default folder of a run, below the working directory."""
    file = recipe.model.from_file
    model = name_after(file) if file else own.file_stem(recipe.model.name)
    data = name_images(recipe.data.path) if recipe.data.path else "images"
    return _RUNS / f"{model}-{data}"


def find_last_run() -> Path:
    """Return the folder below ``runs`` whose state was saved last.

    Raises:
        ModelFileError: There is none.
    """
    states = _find_states(_RUNS)
    if not states:
        raise ModelFileError(
            f"no run to resume in {_RUNS.absolute()}",
            kind="run.no_state",
            fix="momconv finetune --resume FOLDER",
        )
    return max(states, key=lambda state: state.stat().st_mtime_ns).parent


def _find_states(folder: Path) -> list[Path]:
    """Return what runs below ``folder`` can be resumed from.

    A process that is killed while it saves may leave nothing but the state before.
    """
    runs = map(RunFolder, folder.glob("*/"))
    return [state for run in runs for state in (run.state, run.previous) if state.is_file()]


class _Child:
    """A file of the run folder, as an attribute of that."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunFolder", _: type) -> Path:
        return run.path / self._name


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a run. All are written whole or not at all."""

    path: Path

    config = _Child("config.yaml")  # the recipe with all its defaults; ``--recipe`` replays it
    provenance = _Child("run.json")  # versions, weights, images and command that it began with
    plan = _Child("plan.json")  # how the micro-batch was chosen
    split = _Child("split.json")  # which images are trained on and which are held out
    data_report = _Child("data-report.json")  # what was found in the images
    state = _Child("state.safetensors")  # of one moment, all that resuming needs
    previous = _Child("state.previous.safetensors")  # the one before, should that be damaged
    parts = _Child("state.parts")  # the tensors of states of which each process wrote some
    damaged = _Child("state.damaged.safetensors")  # a state that could not be read
    best = _Child(BEST)  # the model of the best epoch
    last = _Child(LAST)  # the model as it was last saved
    probe = _Child(PROBE)  # the network as it came, with a linear head on its features
    rates = _Child("lr_finder.csv")  # the loss at the learning rates that were tried
    metrics = _Child("metrics.csv")  # a line of numbers for each epoch
    events = _Child("events.jsonl")  # the same and what went wrong, an object for each line
    board = _Child("tensorboard")  # the same for TensorBoard, if that is asked for
    card = _Child("README.md")  # what the network is, for people
    model_config = _Child("config.json")  # the same for other tools
    report = _Child("report.html")  # all of this to look at
    confusion = _Child("confusion.csv")  # what held-out images of each class are taken for
    plots = _Child("plots")  # the run in pictures

    @property
    def resume_command(self) -> str:
        """What goes on with the run."""
        return f"momconv finetune --resume {shlex.quote(str(self.path))}"

    @property
    def is_unused(self) -> bool:
        """Whether the folder is missing or empty.

        What a run left that was killed before its first state counts as nothing.
        """
        left = {self.probe, self.rates, self.config, self.provenance, self.plan, self.split}
        left.add(self.data_report)
        return not self.path.exists() or (self.path.is_dir() and not self._others(left))

    @property
    def has_state(self) -> bool:
        """Whether there is something to resume."""
        return self.state.exists() or self.previous.exists()

    @property
    def has_run(self) -> bool:
        """Whether there is a run that can be resumed, or that is done and was to keep no state."""
        if self.has_state:
            return True
        whole = self.last.is_file() and self.config.is_file()
        return whole and not recall_recipe(self.config).train.keep

    def require_unused(self, *, overwrite: bool = False) -> None:
        """Do nothing if the folder can be that of a new run.

        Raises:
            UsageError: It holds something; with ``overwrite``, something that no run wrote.
        """
        if claim.is_claimed(self.path):
            with self.claimed(fix=self._offer()):  # which says by whom
                pass
        if self.is_unused:
            return
        offers = [self._offer()]
        others = self._others(self._files) if self.path.is_dir() else [self.path]
        if others and overwrite:
            raise UsageError(
                f"--overwrite: no run of momconv wrote {others[0]}",
                kind="usage.output_exists",
                fix=offers[0],
            )
        if overwrite:
            return
        if self.has_state:
            offers.insert(0, self.resume_command)
        if not others:
            offers.append("--overwrite")
        kind = "not empty" if self.path.is_dir() else "a file"
        raise UsageError(
            f"output folder already exists and is {kind}: {self.path}",
            kind="usage.output_exists",
            fix="\n".join(offers),
        )

    @contextmanager
    def claimed(
        self, tell: Callable[[str], None] = _ignore, *, fix: str | None = None
    ) -> Iterator[None]:
        """Keep other runs out of the folder inside. It is made, and gone again if nothing is in it.

        Raises:
            ResourceError: Another run has it, which has this ``fix``, or it cannot be made or
                written to.
        """
        with ExitStack() as held:
            try:
                held.enter_context(claim.claim(self.path, tell, fix=fix))
            except OSError as error:
                raise self._unwritable(error.strerror) from error
            yield

    def require_outside(self, images: Path) -> None:
        """Do nothing unless the folder would be among the images, where its plots were a class.

        Raises:
            UsageError: It would.
        """
        if not self.path.resolve().is_relative_to(images.resolve()):
            return
        elsewhere = RunFolder(images.absolute().parent / "runs" / self.path.name).find_unused()
        raise UsageError(
            f"output folder {self.path} is inside the folder of images {images}",
            kind="usage.output_in_data",
            fix=f"-o {shlex.quote(str(elsewhere))}",
        )

    def find_unused(self) -> Path:
        """Return this folder, or the first with a number behind its name, that is unused.

        What another run has claimed is not.
        """
        named = self.path if self.path.name else self.path.absolute()
        numbered = (named.with_name(f"{named.name}-{n}") for n in range(2, 10**6))
        paths = itertools.chain([self.path], numbered)
        return next(p for p in paths if RunFolder(p).is_unused and not claim.is_claimed(p))

    def clear(self) -> None:
        """Remove what runs write.

        Raises:
            ResourceError: That is not allowed.
        """
        try:
            for path in self._files:
                remove(path)
        except OSError as error:
            raise ResourceError(
                f"cannot remove {error.filename}: {error.strerror}",
                kind="output.unwritable",
                fix=f"-o {shlex.quote(str(self.find_unused()))}",
            ) from error

    def keep_states(self, count: int) -> None:
        """Keep the newest ``count`` of the two states of a run that is done."""
        for path in (self.state, self.previous)[count:]:
            path.unlink(missing_ok=True)

    def require_state(self) -> None:
        """Do nothing if there is a run to resume.

        Raises:
            ModelFileError: There is none; the message names others that there are.
        """
        if self.has_state:
            return
        others = sorted({state.parent for state in _find_states(self.path.parent)})
        listed = ", ".join(map(str, others))
        problem = "no run to resume in" if self.path.is_dir() else "run folder does not exist:"
        raise ModelFileError(
            f"{problem} {self.path} (looked for {self.state.name})"
            + (f"\nruns that can be resumed: {listed}" if listed else ""),
            kind="run.no_state",
            fix=RunFolder(others[-1]).resume_command if others else None,
        )

    def make(self) -> None:
        """Make the folder and those above it; temporary files of a killed process are removed.

        For use by a process that has claimed it.

        Raises:
            ResourceError: That is not allowed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        for folder in (self.path, self.plots):
            if folder.is_dir():
                sweep(folder)

    def put_folders_aside(self, tell: Callable[[str], None]) -> None:
        """Give folders that are in place of the run's files other names, and ``tell`` of each.

        Raises:
            ResourceError: That is not allowed.
        """
        for path in sorted(filter(self._is_strange, self._files)):
            aside = find_aside(path)
            try:
                path.rename(aside)
            except OSError as error:
                raise self._unwritable(error.strerror) from error
            tell(f"warning: {path} is a folder, which is {aside} now")

    def require_room(self, needed_bytes: int) -> None:
        """Do nothing if the folder can be made, or written to, and has room for so much.

        For use before the work that leads to it: nothing is made.

        Raises:
            ResourceError: It cannot, or has not.
        """
        above = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not above.is_dir():
            raise self._unwritable(f"{above} is a file")
        try:
            require_writable(above / self.path.name)
        except ResourceError as error:
            raise self._unwritable(f"{above} cannot be written to") from error
        free = shutil.disk_usage(above).free
        if free < needed_bytes:
            raise ResourceError(
                f"{self.path} needs about {format_bytes(needed_bytes)}, {format_bytes(free)} free",
                kind="output.no_space",
                fix="-o FOLDER",
            )

    def _offer(self) -> str:
        return f"-o {shlex.quote(str(self.find_unused()))}"

    def _unwritable(self, reason: str | None) -> ResourceError:
        problem, fix = "make output folder", "-o FOLDER"
        if self.has_state:
            problem = "write to run folder"
            fix += f"\ncp -r {shlex.quote(str(self.path))} FOLDER; momconv finetune --resume FOLDER"
        return ResourceError(
            f"cannot {problem} {self.path}: {reason}", kind="output.unwritable", fix=fix
        )

    @property
    def _files(self) -> set[Path]:
        """All that a run writes."""
        return {
            *(self.config, self.provenance, self.plan, self.split, self.data_report, self.rates),
            *(self.state, self.previous, self.parts, self.damaged, self.best, self.last),
            self.probe,
            *(self.metrics, self.events, self.board),
            *(self.card, self.model_config, self.report, self.confusion, self.plots),
        }

    def _others(self, known: Collection[Path]) -> list[Path]:
        """Return what the folder holds besides."""
        known = {*known, self.path / claim.NAME}
        return [
            path
            for path in sorted(self.path.iterdir())
            if not (path in known or is_temporary(path)) or self._is_strange(path)
        ]

    def _is_strange(self, path: Path) -> bool:
        """Return whether ``path`` is a folder, as no run makes any of this name."""
        own = (self.board, self.plots, self.parts)
        return path.is_dir() and path not in own and not is_temporary(path)
