"""What a model file says about its network, and the networks that momconv converts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import RenderableType
from rich.text import Text
from torch import nn

from momconv.data.values import describe_ranges
from momconv.errors import ModelFileError
from momconv.files.model_file import read_metadata, read_skeleton
from momconv.names import encode_name
from momconv.reports.conversion import (
    describe_drift,
    describe_rounding,
    show_facts,
    tabulate_stages,
)
from momconv.surgery.certificate import Certificate
from momconv.surgery.conversion import Stage, summarise
from momconv.units import format_bytes
from momconv.words import list_some, plural, printable
from momconv.zoo.checkpoints import find_spoilt, read_state
from momconv.zoo.description import Description, Preprocessing, describe

_SHOWN = 10  # classes; --json has them all
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class FileInspection:
    """What is known about the network in a file.

    Attributes:
        path: The file.
        bytes: Its size.
        written_by: The momconv that wrote it.
        torch: The PyTorch that it ran on.
        created: When, as ISO 8601.
        description: What the network is.
        parameters: How many numbers it learns.
        stages: Its stages.
        certificate: What the conversion was worth; None where none is stored.
        measured_on: The images of the certificate.
        training: What fine-tuning recorded; None where there was none.
        not_finite: The names of tensors with values that are infinite or not a number.
    """

    path: Path
    bytes: int
    written_by: str
    torch: str
    created: str
    description: Description
    parameters: int
    stages: tuple[Stage, ...]
    certificate: Certificate | None
    measured_on: str
    training: Mapping[str, Any] | None
    not_finite: tuple[str, ...]

    def show(self) -> Iterator[RenderableType]:
        """Yield a table of the stages, and what else is known."""
        yield tabulate_stages(self.stages, self.parameters, self.certificate)
        yield Text()
        yield from show_facts(_facts(self))

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        certificate = self.certificate and self.certificate.to_json()
        document = {**asdict(self), "path": encode_name(self.path), "certificate": certificate}
        if seen := self.description.seen:
            document["description"]["seen"] = {"images": seen.count, "complete": seen.complete}
        return document


def inspect_file(path: Path, own: nn.Module | None) -> FileInspection:
    """Return what the model file ``path`` says about itself, which is checked but not tried.

    Args:
        path: The file.
        own: For a file of a network of your own: as for ``momconv.load``.

    Raises:
        ModelFileError: The file is missing, damaged, not converted, or of a newer momconv.
        UsageError: The file holds a network of your own, and it is not given.
    """
    metadata, network = read_metadata(path), read_skeleton(path, own)
    certificate = metadata.get("certificate")
    return FileInspection(
        path=path,
        bytes=path.stat().st_size,
        written_by=metadata["version"],
        torch=metadata["torch"],
        created=metadata["created"],
        description=describe(network),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        stages=tuple(summarise(network)),
        certificate=_check(path, "certificate", Certificate, certificate) if certificate else None,
        measured_on=str(metadata.get("measured_on", "")),
        training=_check(path, "training", dict[str, Any] | None, metadata.get("training")),
        not_finite=tuple(find_spoilt(read_state(path))),
    )


def describe_input(p: Preprocessing) -> str:
    """Return how an image becomes the input, in the order in which it is done."""
    values = f"{ranges}, " if (ranges := describe_ranges(p.ranges)) else ""
    return f"{values}{p.describe()}"


def _check(path: Path, name: str, kind: Any, value: object) -> Any:
    """Return the ``value`` that someone wrote under ``name``, as a ``kind``."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ModelFileError(
            f"{path} contradicts itself, so it was damaged or edited\n"
            f"momconv.{where}: {first['msg']}",
            kind="model_file.inconsistent",
        ) from error


def _facts(inspection: FileInspection) -> Iterator[tuple[str, str]]:
    description, certificate = inspection.description, inspection.certificate
    yield "network", f"{description.architecture}, {plural(description.num_classes, 'class')}"
    if description.arguments:
        yield "arguments", printable(", ".join(description.arguments))
    yield "classes", _list_classes(description)
    guess = " (assumed, as nobody said so)" if description.assumed else ""
    yield "input", f"{describe_input(description.preprocessing)}{guess}"
    sha256 = f" (sha256 {description.source_sha256})" if description.source_sha256 else ""
    yield "weights", printable(f"from {description.source}{sha256}")
    if seen := description.seen:
        yield "has seen", f"{plural(seen.count, 'image')}, which momconv eval knows"
    if certificate:
        origin = printable(inspection.measured_on)
        yield "agreement", describe_drift(certificate.drift, origin)
    if any(stage.momentum for stage in inspection.stages):
        yield from _describe_precision(certificate)
    if certificate and certificate.accuracy:
        before, after = certificate.accuracy.original, certificate.accuracy.converted
        yield "converted", f"top-1 {before:.1%} before, {after:.1%} after"
    if inspection.training:
        yield "training", printable(_describe(inspection.training))
    if inspection.not_finite:
        listed = list_some([*map(printable, inspection.not_finite)], _SHOWN)
        yield "not finite", f"{', '.join(listed)}: nothing can be computed with these"
    versions = f"momconv {inspection.written_by}, torch {inspection.torch}"
    written = f"{inspection.created} by {versions} ({format_bytes(inspection.bytes)})"
    yield "written", printable(written)


def _describe_precision(certificate: Certificate | None) -> Iterator[tuple[str, str]]:
    is_exact = certificate.gradients_exact if certificate else None
    told = {True: "bit for bit those of ordinary backpropagation", False: "not exact"}
    yield "gradients", "not compared" if is_exact is None else told[is_exact]
    yield "rounding", describe_rounding(certificate.rounding if certificate else None)


def _list_classes(description: Description) -> str:
    if description.classes is None:
        return "not named"
    shown = ", ".join(map(printable, description.classes[:_SHOWN]))
    more = description.num_classes - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _describe(record: Mapping[str, Any]) -> str:
    """Return what a run recorded, flat.

    >>> _describe({"epochs": 2, "metrics": {"val_top1": 0.51234}})
    'epochs 2, val_top1 0.5123'
    """
    parts = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            parts.append(_describe(value))
        elif value is not None:
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(part for part in parts if part)
