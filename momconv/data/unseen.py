"""Scores are those of images that a network has not seen: the others are left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from momconv.data.examination import examine_all
from momconv.data.source import ImageSet, Source, to_image_set
from momconv.words import plural
from momconv.zoo.description import describe
from momconv.zoo.seen import SeenImages


@dataclass(frozen=True, slots=True)
class Exposure:
    """How far images to evaluate on are those that the networks were trained on.

    Attributes:
        left_out: How many were trained on and do not count.
        counted: How many were trained on and count nevertheless.
        recorded: Whether it is known which images the networks were fine-tuned on.
        complete: Whether it is known of their original weights, too.
    """

    left_out: int
    counted: int
    recorded: bool
    complete: bool

    def describe(self, scored: int) -> str:
        """Return what is to be known of a score on so many images."""
        if self.counted:
            return (
                f"{self.counted} of {plural(scored, 'image')} were trained on, so this does not "
                "say how it does on new ones"
            )
        if not self.recorded:
            return (
                "which images it was trained on is not recorded in the file, so some of these may "
                "be among them"
            )
        text = "none of them was trained on"
        if self.left_out:
            text += f"; {plural(self.left_out, 'image')} left out, which were"
        if not self.complete:
            text += " (what its original weights had seen is not recorded)"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return {
            "left_out": self.left_out,
            "counted": self.counted,
            "recorded": self.recorded,
            "complete": self.complete,
        }


def keep_unseen(
    images: ImageSet | Source, *models: nn.Module, keep_all: bool = False
) -> tuple[ImageSet, Exposure]:
    """Return those of ``images`` that none of ``models`` was trained on, known by their content.

    All are kept if all were trained on, or with ``keep_all``. To be called before the images are
    evaluated on; files that were looked at before are not read again. Those of a source get the
    classes of the first model.

    Raises:
        UsageError: A model has no description.
        DataError: A source has a class that the model does not have.
    """
    descriptions = [describe(model) for model in models]
    found = to_image_set(images, descriptions[0].classes if descriptions else None)
    return leave_out_seen(found, [about.seen for about in descriptions], keep_all=keep_all)


def leave_out_seen(
    images: ImageSet, records: Sequence[SeenImages | None], *, keep_all: bool
) -> tuple[ImageSet, Exposure]:
    """Return what ``keep_unseen`` does, for what networks are known to have seen."""
    recorded, complete = None not in records, all(seen and seen.complete for seen in records)
    known = [seen for seen in records if seen is not None and seen.digests]
    if not known:
        return images, Exposure(0, 0, recorded, complete)
    found = examine_all(images.source, images.paths)
    sha256s = [finding.sha256 for finding in found.values()]
    every = set[str]().union(*(seen.find(sha256s) for seen in known))
    unseen = [index for index, sha256 in enumerate(sha256s) if sha256 not in every]
    count = len(sha256s) - len(unseen)
    if keep_all or not unseen:
        return images, Exposure(0, count, recorded, complete)
    return images.select(unseen), Exposure(count, 0, recorded, complete)
