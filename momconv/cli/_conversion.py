"""The work of ``momconv convert``, in both directions."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from momconv.cli._console import err, note, warn
from momconv.cli._display import Display
from momconv.errors import InversionError, UsageError
from momconv.units import parse_duration

if TYPE_CHECKING:
    from torch import nn

    from momconv.data.adaptation_images import AdaptationImages
    from momconv.reports.conversion import Calibration, Conversion
    from momconv.reports.reversion import Reversion
    from momconv.surgery.adaptation import Adaptation, Progress
    from momconv.surgery.certificate import Certificate
    from momconv.surgery.drift import Reference
    from momconv.surgery.ladder import Choice

_FEW = 100  # images, below which BatchNorm's statistics are poor
_SHOWN = 3  # unreadable files that a warning names


@dataclass(frozen=True, slots=True)
class Scheme:
    """How to convert; ``gamma`` is None where the largest that drifts little is to be found."""

    model: str
    arguments: tuple[str, ...]  # of the function that makes a network of the user's own
    resolution: int  # of its images
    weights: str
    gamma: float | None
    max_drift: float
    stages: str
    velocity: Literal["zero", "residual"]
    gain: bool

    @property
    def file_name(self) -> str:
        """The name of the output, where none is given."""
        gamma = "auto" if self.gamma is None else f"{self.gamma:g}"
        from momconv.zoo.own import file_stem

        return f"{file_stem(self.model)}-g{gamma}.safetensors"

    def apply(self, original: "nn.Module", gamma: float) -> "nn.Module":
        """The converted network."""
        from momconv.surgery.conversion import convert

        stages: Literal["auto", "all"] | list[str] = self.stages.split(",")
        if self.stages in ("auto", "all"):
            stages = "all" if self.stages == "all" else "auto"
        return convert(original, gamma, stages, self.velocity, gain=self.gain)


@dataclass(frozen=True, slots=True)
class Means:
    """What there is to adapt with.

    Attributes:
        calibrate: The folder of images to adapt on.
        verify: The folder of images to measure on.
        count: How many images of either.
        seed: Of their choice.
        distill: For how many epochs (int) or minutes (float) to distil.
        device: Where; what comes of it is certified on the CPU.
    """

    calibrate: Path | None
    verify: Path | None
    count: int
    seed: int
    distill: int | float | None
    device: str

    def check(self) -> None:
        """Do nothing if there are such images and devices; for use before the work with them."""
        from momconv.data.folder import list_images
        from momconv.planner.devices import find_device

        find_device(self.device)
        for folder in (self.calibrate, self.verify):
            if folder:
                list_images(folder)


def parse_distillation(text: str) -> int | float:
    """Epochs, an int, or minutes, a float.

    >>> parse_distillation("6"), parse_distillation("90s")
    (6, 1.5)

    Raises:
        UsageError: ``text`` is neither.
    """
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return parse_duration(text) / 60
    except UsageError as error:
        raise UsageError(
            f"--distill {text}: {text!r} is neither a number of epochs nor a duration",
            kind=error.kind,
            fix="--distill 6\n--distill 5min",
        ) from error


@dataclass(frozen=True, slots=True)
class _Workshop:
    """Where networks are brought close to their original again."""

    original: "nn.Module"
    images: "AdaptationImages"
    means: Means
    reference: "Reference"
    tell: "Progress"

    def calibrate(self, network: "nn.Module", *, refine: bool = True) -> "Adaptation":
        """Begin with ``network``, and calibrate it if there are images for that."""
        from momconv.surgery.adaptation import Adaptation

        device = next(self.original.parameters()).device
        adaptation = Adaptation(network.to(device), self.reference, self.tell)
        if batches := self.images.adapting:
            adaptation.calibrate(batches, len(batches.paths), refine=refine)
        return adaptation

    def distill(self, adaptation: "Adaptation") -> None:
        """Distil if that is wanted."""
        from momconv.surgery.adaptation import Distillation

        length = self.means.distill
        if self.images.adapting and length:
            epochs = Distillation(length) if isinstance(length, int) else None
            adaptation.distill(self.images.adapting, epochs or Distillation(minutes=length))

    def certify(self, network: "nn.Module") -> "Certificate":
        """What ``network`` is worth, which moves to the CPU, as the original does.

        Raises:
            InversionError: Its gradients are not exact.
        """
        from momconv.surgery.certificate import certify

        # A GPU's kernels may add in another order each time.
        certificate = certify(network.cpu(), self.original.cpu(), self.images.measuring)
        if certificate.gradients_exact is False:
            raise InversionError(
                "this network's gradients are not those of ordinary backpropagation, bit for bit",
                kind="inversion.not_exact",
            )
        return certificate


@contextmanager
def _workshop(original: "nn.Module", means: Means) -> Iterator[_Workshop]:
    from momconv.data.adaptation_images import gather_images
    from momconv.planner.devices import find_device
    from momconv.surgery.drift import Reference
    from momconv.zoo.description import describe

    description = describe(original)
    images = gather_images(means.calibrate, means.verify, description, means.count, means.seed)
    if images.note:
        note(images.note)
    with err.status("running the original"):
        reference = Reference(original.to(find_device(means.device)), images.measuring)
    with ExitStack() as bars:
        yield _Workshop(original, images, means, reference, Display(bars).advance)


def convert_network(scheme: Scheme, means: Means, path: Path) -> "Conversion":
    """Convert as ``scheme`` says, adapt with ``means``, certify, and write the file."""
    from momconv.files.model_file import save
    from momconv.surgery.ladder import LADDER, Choice, find_gamma
    from momconv.zoo.own import parse_arguments
    from momconv.zoo.weights import load_network

    _check_names(scheme.model, path)
    means.check()
    arguments = parse_arguments(scheme.arguments)
    original = load_network(scheme.model, scheme.weights, arguments, resolution=scheme.resolution)
    convert = cache(partial(scheme.apply, original))
    with err.status(f"converting {scheme.model}"):
        convert(LADDER[0] if scheme.gamma is None else scheme.gamma)  # refuse now what is wrong
    with _workshop(original, means) as workshop:
        if scheme.gamma is None:
            choice = find_gamma(lambda g: workshop.calibrate(convert(g)), scheme.max_drift)
        else:
            adaptation = workshop.calibrate(convert(scheme.gamma), refine=scheme.gamma > 0)
            choice = Choice(scheme.gamma, adaptation)
        workshop.distill(choice.adaptation)
        certificate = workshop.certify(choice.adaptation.model)
    calibration = _describe_calibration(choice.adaptation, workshop)
    steps = choice.adaptation.steps
    record = {
        "calibration": calibration and asdict(calibration),
        "steps": [step.to_json() for step in steps],
        "certificate": certificate.to_json(),
        "measured_on": workshop.images.origin,
    }
    save(choice.adaptation.model, path, extra=record)
    done = _report(scheme, workshop, choice, certificate, calibration, path)
    _warn_of_cuts(choice.adaptation)
    _warn_of_images(workshop)
    _warn_of_result(done)
    return done


def _check_names(model: str, path: Path) -> None:
    """Refuse what is no network, or a file that would not be taken for a converted one."""
    from momconv.files.model_file import check_suffix
    from momconv.zoo.checkpoints import is_converted
    from momconv.zoo.networks import check_name, is_known
    from momconv.zoo.own import is_own

    if not is_known(model) and Path(model).is_file():
        options = "--back" if is_converted(Path(model)) else "resnet50 --weights"
        raise UsageError(
            f"{model} is a file; a network is converted by its name, with weights from a file",
            kind="usage.unknown_model",
            fix=f"momconv convert {options} {shlex.quote(model)}",
        )
    if not is_own(model):
        check_name(model)
    check_suffix(path)


def _report(
    scheme: Scheme,
    workshop: _Workshop,
    choice: "Choice",
    certificate: "Certificate",
    calibration: "Calibration | None",
    path: Path,
) -> "Conversion":
    from momconv.planner.saving import predict_saving
    from momconv.reports.conversion import Conversion
    from momconv.surgery.conversion import summarise
    from momconv.zoo.description import describe
    from momconv.zoo.own import is_own, restate

    network = choice.adaptation.model
    return Conversion(
        architecture=scheme.model,
        source=describe(network).source,
        gamma=choice.gamma,
        velocity=scheme.velocity,
        gain=scheme.gain,
        stages=tuple(summarise(network)),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        calibration=calibration,
        steps=tuple(choice.adaptation.steps),
        tried=choice.tried,
        interrupted=choice.adaptation.interrupted,
        certificate=certificate,
        saving=predict_saving(workshop.original, network),
        measured_on=workshop.images.origin,
        is_noise=workshop.images.is_noise,
        command=_command(scheme, workshop.means, path),
        path=path,
        bytes=path.stat().st_size,
        options=f" {restate(describe(network))}" if is_own(scheme.model) else "",
    )


def _describe_calibration(adaptation: "Adaptation", workshop: _Workshop) -> "Calibration | None":
    from momconv.reports.conversion import Calibration

    images = workshop.images.adapting
    if images is None:
        return None
    unreadable = tuple(error.message for error in images.unreadable)
    readable = len(images.paths) - len(unreadable)
    return Calibration(readable, adaptation.layers, workshop.images.more, unreadable)


def _command(scheme: Scheme, means: Means, path: Path) -> str:
    """What converts the network like this, but for γ and the length of the work."""
    from momconv.zoo.own import write_options

    words = ["momconv", "convert", scheme.model, "--weights", scheme.weights]
    words += write_options(scheme.arguments)
    words += ["--resolution", str(scheme.resolution)] if scheme.resolution != 224 else []
    words += ["--stages", scheme.stages] if scheme.stages != "auto" else []
    words += ["--velocity", scheme.velocity] if scheme.velocity != "zero" else []
    words += [] if scheme.gain else ["--no-gain"]
    words += ["--calibrate", str(means.calibrate)] if means.calibrate else []
    words += ["--verify", str(means.verify)] if means.verify else []
    return shlex.join([*words, "-o", str(path), "--overwrite"])


def revert_network(
    file: Path, load: Callable[[Path], "nn.Module"], means: Means, path: Path
) -> "Reversion":
    """Write the network in ``file`` as a plain one, adapted with ``means``."""
    from momconv.files.plain_file import check_suffix, load_command, save_plain
    from momconv.reports.reversion import Reversion
    from momconv.surgery.conversion import revert
    from momconv.zoo.description import describe

    check_suffix(path)
    means.check()
    network = load(file)
    description = describe(network)
    with _workshop(network, means) as workshop:
        adaptation = workshop.calibrate(revert(network))
        workshop.distill(adaptation)
        certificate = workshop.certify(adaptation.model)
    save_plain(adaptation.model, path)
    _warn_of_cuts(adaptation)
    _warn_of_images(workshop)
    return Reversion(
        architecture=description.architecture,
        num_classes=description.num_classes,
        source=file,
        steps=tuple(adaptation.steps),
        drift=certificate.drift,
        accuracy=certificate.accuracy,
        measured_on=workshop.images.origin,
        interrupted=adaptation.interrupted,
        path=path,
        bytes=path.stat().st_size,
        python=load_command(description, path),
    )


def _warn_of_cuts(adaptation: "Adaptation") -> None:
    if adaptation.interrupted:
        name = adaptation.steps[-1].name
        warn(f"interrupted before it was fully {name}; the best so far was written")


def _warn_of_images(workshop: _Workshop) -> None:
    images = workshop.images.adapting
    if images is None:
        return
    if bad := images.unreadable:
        listed = "\n".join(f"  {error.message}" for error in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        warn(f"{len(bad)} images left out because they are unreadable\n{listed}{more}")
    readable = len(images.paths) - len(bad)
    if readable < _FEW:
        warn(f"only {readable} images to calibrate on; {_FEW} or more are better")


def _warn_of_result(done: "Conversion") -> None:
    if done.gamma and not any(stage.momentum for stage in done.stages):
        warn("no run of blocks is long enough for momentum to save memory; --stages all takes any")
    if done.calibration is None and done.gamma and done.source != "none":
        warn(
            "BatchNorm's statistics are still those of the plain network, which costs accuracy;"
            " --calibrate FOLDER re-estimates them on your images"
        )
    if done.remedies:
        drift = done.certificate.drift
        commands = "\n".join(f"  {command}" for command in done.remedies)
        warn(
            f"only {drift.agreement:.1%} of the images keep their top-1; what brings the network "
            f"closer to its original\n{commands}"
        )
