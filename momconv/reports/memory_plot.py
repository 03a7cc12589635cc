"""Memory over the batch, and on the way through the network, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from momconv.errors import UsageError
from momconv.planner.profile import EXAMPLE, MemoryProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IMAGES = range(1, 65)
FORMATS = (".png", ".svg", ".pdf")


def require_picture_name(path: Path) -> None:
    """Do nothing if a picture can be written to ``path``.

    Raises:
        UsageError: Its ending is none of a picture's.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"--plot {path}: not one of {', '.join(FORMATS)}",
            kind="usage.bad_value",
            fix=f"--plot {path.with_suffix('.png')}",
        )


def draw_memory(profile: MemoryProfile, budgets: Mapping[str, int], path: Path) -> None:
    """Draw the peak of each variant over the images of a step, and the course of one step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    over_batch, over_depth = figure.subplots(1, 2)
    _draw_batches(over_batch, profile, budgets)
    _draw_course(over_depth, profile)
    figure.savefig(path)


def _draw_batches(axes: "Axes", profile: MemoryProfile, budgets: Mapping[str, int]) -> None:
    for p in profile.profiles:
        axes.plot(_IMAGES, [p.peak.at(n) / 2**30 for n in _IMAGES], label=p.variant)
    top = max(p.peak.at(_IMAGES[-1]) for p in profile.profiles)
    for name, budget in budgets.items():
        if budget <= top:
            axes.axhline(budget / 2**30, color="grey", linewidth=0.8, linestyle="--")
            axes.annotate(name, (_IMAGES[-1], budget / 2**30), ha="right", va="bottom")
    axes.set(xlabel="images of a training step", ylabel="GiB at the peak", ylim=(0, None))
    axes.legend()


def _draw_course(axes: "Axes", profile: MemoryProfile) -> None:
    """Draw what is alive over the depth, forwards and then backwards, and the peak."""
    for p in profile.profiles:
        places, alive = zip(*p.course, strict=True)
        (line,) = axes.plot(places, [bytes_ / 2**30 for bytes_ in alive], linewidth=1)
        peak = alive.index(max(alive))
        axes.plot(places[peak], alive[peak] / 2**30, "o", color=line.get_color())
    names = [*profile.stages, *reversed(profile.stages)]
    for border in range(1, len(names)):
        axes.axvline(border, color="lightgrey", linewidth=0.8, zorder=0)
    axes.set_xticks([n + 0.5 for n in range(len(names))], names, rotation=60)
    axes.set(
        xlabel="forward pass, then backward pass",
        ylabel=f"GiB alive in a step of {EXAMPLE} images",
        ylim=(0, None),
    )
