"""From the name of a network to a file with its converted weights, and back to a plain one.

``momconv.convert`` swaps the rule in a network at hand. Here are the steps around it: the weights
are loaded, the network is brought close to its original again, certified, and written.
"""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from torch import nn

from momconv.data.adaptation_images import AdaptationImages, gather_images
from momconv.data.calibration_images import choose_images, find_ranges_of
from momconv.data.folder import list_images
from momconv.data.values import settle_ranges, warn_of_values
from momconv.errors import InversionError, UsageError
from momconv.files import model_file, plain_file
from momconv.momentum.equations import Velocity
from momconv.momentum.sequential import forget_ranges
from momconv.opening import find_model_file
from momconv.planner.devices import find_device
from momconv.planner.profile import predict_saving
from momconv.reports.conversion import CalibrationReport, Conversion, Reversion
from momconv.surgery.adaptation import LADDER, Adaptation, Choice, Distillation, find_gamma
from momconv.surgery.certificate import Certificate, certify
from momconv.surgery.conversion import convert, revert, summarise
from momconv.surgery.drift import Reference
from momconv.training.progress import SILENT, Listener
from momconv.words import itemise, plural
from momconv.zoo.checkpoints import is_converted
from momconv.zoo.description import describe, mark_as_seen
from momconv.zoo.networks import check_name, check_resolution, is_known
from momconv.zoo.own import file_stem, is_own, parse_arguments, restate, write_options
from momconv.zoo.preparation import Preparation, describe_assumption, prepare_as
from momconv.zoo.weights import load_network

_FEW = 100  # images, below which BatchNorm's statistics are poor
_SHOWN = 3  # unreadable files that a warning names


@dataclass(frozen=True, slots=True)
class Scheme:
    """What to convert, and how.

    Attributes:
        model: The network's name, or a function of the user's that makes it.
        arguments: Of that function, each as KEY=VALUE.
        resolution: Pixels of the sides of its images; None for its own.
        preparation: What else is said of how images become its input.
        weights: A name of torchvision's, a file, or "none".
        gamma: γ; None for the largest with which few images get another top-1.
        max_drift: How many these may be, a share.
        stages: "auto", "all", or names with commas between them.
        velocity: v[0] is 0 ("zero") or f(x[0]) ("residual").
        gain: Whether blocks get the gain that restores their weight in the sum.
    """

    model: str
    arguments: tuple[str, ...] = ()
    resolution: int | None = None
    preparation: Preparation = field(default_factory=Preparation)
    weights: str = "DEFAULT"
    gamma: float | None = 0.9
    max_drift: float = 0.01
    stages: str = "auto"
    velocity: Velocity = "zero"
    gain: bool = True

    @property
    def file_name(self) -> str:
        """The name of the output, where none is given."""
        gamma = "auto" if self.gamma is None else f"{self.gamma:g}"
        return f"{file_stem(self.model)}-g{gamma}.safetensors"

    def apply(self, original: nn.Module, gamma: float) -> nn.Module:
        """Return the converted network."""
        stages = self.stages if self.stages in ("auto", "all") else self.stages.split(",")
        return convert(original, gamma, stages, self.velocity, gain=self.gain)


@dataclass(frozen=True, slots=True)
class Means:
    """What there is to adapt with.

    Attributes:
        calibrate: The folder of images to adapt on.
        verify: The folder of images to measure on; without, a fifth of the others.
        count: How many images of either.
        seed: Of their choice.
        distill: For how many epochs (int) or minutes (float) to distil.
        device: Where; what comes of it is certified on the CPU.
    """

    calibrate: Path | None = None
    verify: Path | None = None
    count: int = 2000
    seed: int = 0
    distill: int | float | None = None
    device: str = "auto"

    def check(self) -> None:
        """Do nothing if there are such images and devices; for use before the work with them."""
        find_device(self.device)
        for folder in (self.calibrate, self.verify):
            if folder:
                list_images(folder)

    def settle_ranges(self, network: nn.Module, listener: Listener) -> None:
        """Let ``network`` know what is black and white in images to adapt on that are not 8-bit."""
        if self.calibrate:
            files = choose_images(self.calibrate, self.count, self.seed)
            for line in settle_ranges(network, find_ranges_of(files)):
                listener.tell(line)


def convert_network(
    scheme: Scheme, means: Means, path: Path, listener: Listener = SILENT
) -> Conversion:
    """Convert as ``scheme`` says, adapt with ``means``, certify, and write the file ``path``.

    A KeyboardInterrupt in a training ends that early; the best so far is written.

    Raises:
        UsageError: There is no such network or stage, or ``path`` is not for converted networks.
        ModelFileError: The weights are missing, damaged or another network's.
        DataError: The images cannot be used.
        ResourceError: Memory, disk, device or network is not there.
        InversionError: The network's gradients are not exact.
    """
    _check_names(scheme.model, path)
    means.check()
    original = _load(scheme, listener)
    apply = cache(partial(scheme.apply, original))
    means.settle_ranges(original, listener)
    listener.advance(f"converting {scheme.model}", 0, 1)
    apply(LADDER[0] if scheme.gamma is None else scheme.gamma)  # refuse now what is wrong
    workshop = _open_workshop(original, means, listener)
    if scheme.gamma is None:
        choice = find_gamma(lambda g: workshop.calibrate(apply(g)), scheme.max_drift)
    else:
        adaptation = workshop.calibrate(apply(scheme.gamma), refine=scheme.gamma > 0)
        choice = Choice(scheme.gamma, adaptation)
    workshop.distill(choice.adaptation)
    certificate = workshop.certify(choice.adaptation.model)
    if workshop.images.adapting:
        mark_as_seen(choice.adaptation.model, workshop.images.adapting.read_sha256s())
    calibration = _describe_calibration(choice.adaptation, workshop.images)
    record = {
        "calibration": calibration and asdict(calibration),
        "steps": [step.to_json() for step in choice.adaptation.steps],
        "certificate": certificate.to_json(),
        "measured_on": workshop.images.origin,
    }
    model_file.save(choice.adaptation.model, path, extra=record)
    done = _report(scheme, workshop, choice, certificate, calibration, path)
    _warn_of_cuts(choice.adaptation, listener)
    _warn_of_images(workshop.images, listener)
    _warn_of_result(done, listener)
    return done


def _load(scheme: Scheme, listener: Listener) -> nn.Module:
    said = replace(scheme.preparation, resolution=scheme.resolution)
    arguments = parse_arguments(scheme.arguments)
    original = load_network(
        scheme.model, scheme.weights, arguments, resolution=said.side, tell=listener.tell
    )
    if said.side is not None:
        check_resolution(original, said.side)
    prepare_as(original, said)
    if note := describe_assumption(original):
        listener.tell(note)
    return original


def revert_network(
    file: Path,
    means: Means,
    path: Path,
    listener: Listener = SILENT,
    load: Callable[[Path], nn.Module] = model_file.load,
) -> Reversion:
    """Write the network in ``file``, which is ``load``ed, as a plain one, adapted with ``means``.

    Raises:
        MomconvError: As :func:`convert_network`.
    """
    plain_file.check_suffix(path)
    means.check()
    network = load(file)
    means.settle_ranges(network, listener)
    description = describe(network)
    workshop = _open_workshop(network, means, listener)
    adaptation = workshop.calibrate(revert(network))
    workshop.distill(adaptation)
    certificate = workshop.certify(adaptation.model)
    plain_file.save_plain(adaptation.model, path)
    _warn_of_cuts(adaptation, listener)
    _warn_of_images(workshop.images, listener)
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
        python=plain_file.load_command(description, path),
    )


@dataclass(frozen=True, slots=True)
class _Workshop:
    """Where networks are brought close to their original again."""

    original: nn.Module
    images: AdaptationImages
    means: Means
    reference: Reference
    listener: Listener

    def calibrate(self, network: nn.Module, *, refine: bool = True) -> Adaptation:
        """Return an adaptation of ``network``, calibrated if there are images for that."""
        device = next(self.original.parameters()).device
        adaptation = Adaptation(network.to(device), self.reference, self.listener.advance)
        if batches := self.images.adapting:
            adaptation.calibrate(batches, len(batches.paths), refine=refine)
        return adaptation

    def distill(self, adaptation: Adaptation) -> None:
        """Distil if that is wanted."""
        length = self.means.distill
        if self.images.adapting and length:
            epochs = Distillation(length) if isinstance(length, int) else None
            adaptation.distill(self.images.adapting, epochs or Distillation(minutes=length))

    def certify(self, network: nn.Module) -> Certificate:
        """Return what ``network`` is worth, which moves to the CPU, as the original does.

        Raises:
            InversionError: Its gradients are not exact.
        """
        forget_ranges(network)  # those from before the calibration
        # A GPU's kernels may add in another order each time.
        certificate = certify(network.cpu(), self.original.cpu(), self.images.measuring)
        if certificate.gradients_exact is False:
            raise InversionError(
                "this network's gradients are not those of ordinary backpropagation, bit for bit",
                kind="inversion.not_exact",
            )
        if not (self.means.calibrate or self.means.verify):
            forget_ranges(network)  # those of noise
        return certificate


def _open_workshop(original: nn.Module, means: Means, listener: Listener) -> _Workshop:
    description = describe(original)
    images = gather_images(means.calibrate, means.verify, description, means.count, means.seed)
    if images.note:
        listener.tell(f"note: {images.note}")
    listener.advance("running the original", 0, 1)
    reference = Reference(original.to(find_device(means.device)), images.measuring)
    reference.require_answers()
    return _Workshop(original, images, means, reference, listener)


def _check_names(model: str, path: Path) -> None:
    """Refuse what is no network, or a file that would not be taken for a converted one."""
    file = find_model_file(Path(model))
    if not is_known(model) and file.is_file():
        options = "--back" if is_converted(file) else "resnet50 --weights"
        raise UsageError(
            f"{model} is a file; a network is converted by its name, with weights from a file",
            kind="usage.unknown_model",
            fix=f"momconv convert {options} {shlex.quote(model)}",
        )
    if not is_own(model):
        check_name(model)
    model_file.check_suffix(path)


def _report(
    scheme: Scheme,
    workshop: _Workshop,
    choice: Choice,
    certificate: Certificate,
    calibration: CalibrationReport | None,
    path: Path,
) -> Conversion:
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


def _describe_calibration(
    adaptation: Adaptation, images: AdaptationImages
) -> CalibrationReport | None:
    if images.adapting is None:
        return None
    unreadable = tuple(error.message for error in images.adapting.unreadable)
    readable = len(images.adapting.paths) - len(unreadable)
    return CalibrationReport(readable, adaptation.layers, images.more, unreadable)


def _command(scheme: Scheme, means: Means, path: Path) -> str:
    """Return what converts the network like this, but for γ and the length of the work."""
    words = ["momconv", "convert", scheme.model, "--weights", scheme.weights]
    words += write_options(scheme.arguments)
    words += ["--resolution", str(scheme.resolution)] if scheme.resolution else []
    words += scheme.preparation.write_options()
    words += ["--stages", scheme.stages] if scheme.stages != "auto" else []
    words += ["--velocity", scheme.velocity] if scheme.velocity != "zero" else []
    words += [] if scheme.gain else ["--no-gain"]
    words += ["--calibrate", str(means.calibrate)] if means.calibrate else []
    words += ["--verify", str(means.verify)] if means.verify else []
    return shlex.join([*words, "-o", str(path), "--overwrite"])


def _warn_of_cuts(adaptation: Adaptation, listener: Listener) -> None:
    if adaptation.interrupted:
        name = adaptation.steps[-1].name
        listener.tell(
            f"warning: interrupted before it was fully {name}; the best so far was written"
        )


def _warn_of_images(images: AdaptationImages, listener: Listener) -> None:
    if images.adapting is None:
        return
    if bad := images.adapting.unreadable:
        listed = itemise([error.message for error in bad], _SHOWN)
        what = f"{plural(len(bad), 'image')} left out for being unreadable"
        listener.tell(f"warning: {what}\n{listed}")
    for line in warn_of_values(images.adapting.outside, images.adapting.guessed):
        listener.tell(line)
    readable = len(images.adapting.paths) - len(bad)
    if readable < _FEW:
        listener.tell(f"warning: only {readable} images to calibrate on; {_FEW} or more are better")


def _warn_of_result(done: Conversion, listener: Listener) -> None:
    if done.gamma and not any(stage.momentum for stage in done.stages):
        listener.tell(
            "warning: no run of blocks is long enough for momentum to save memory; --stages all"
            " takes any"
        )
    if done.calibration is None and done.gamma and done.source != "none":
        listener.tell(
            "warning: BatchNorm's statistics are still those of the plain network, which costs"
            " accuracy; --calibrate FOLDER re-estimates them on your images"
        )
    if done.remedies:
        drift = done.certificate.drift
        commands = "\n".join(f"  {command}" for command in done.remedies)
        listener.tell(
            f"warning: only {drift.agreement:.1%} of the images keep their top-1; what brings the"
            f" network closer to its original\n{commands}"
        )
