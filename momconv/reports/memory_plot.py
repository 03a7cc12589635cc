"""Memory over the batch, as a picture."""

from collections.abc import Mapping
from pathlib import Path

from momconv.errors import UsageError
from momconv.planner.profile import MemoryProfile

_IMAGES = range(1, 65)
FORMATS = (".png", ".svg", ".pdf")


def require_matplotlib(path: Path) -> None:
    """Do nothing if a picture can be written to ``path``.

    Raises:
        UsageError: matplotlib is not installed, or does not know the format.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which is not installed",
            kind="usage.missing_extra",
            fix="pip install matplotlib",
        ) from error
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"--plot {path}: not one of {', '.join(FORMATS)}",
            kind="usage.bad_value",
            fix=f"--plot {path.with_suffix('.png')}",
        )


def draw_memory(profile: MemoryProfile, budgets: Mapping[str, int], path: Path) -> None:
    """Draw the peak of each variant over the images of a step, and the budgets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for p in profile.profiles:
        axes.plot(_IMAGES, [p.peak.at(n) / 2**30 for n in _IMAGES], label=p.variant)
    top = max(p.peak.at(_IMAGES[-1]) for p in profile.profiles)
    for name, budget in budgets.items():
        if budget <= top:
            axes.axhline(budget / 2**30, color="grey", linewidth=0.8, linestyle="--")
            axes.annotate(name, (_IMAGES[-1], budget / 2**30), ha="right", va="bottom")
    axes.set(xlabel="images of a training step", ylabel="GiB at the peak", ylim=(0, None))
    axes.legend()
    figure.savefig(path)
