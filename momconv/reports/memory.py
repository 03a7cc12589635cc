"""The memory of a training step under each strategy, side by side."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from string import ascii_lowercase
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from momconv.planner.prediction import PeakMemory
from momconv.planner.profile import EXAMPLE, MemoryProfile, Profile, Variant
from momconv.reports.conversion import describe_rounding
from momconv.units import format_bytes
from momconv.vocabulary import STRATEGIES

_BAR = 24  # characters
_SHOWN = 3  # kinds of tensors alive at a peak
_LONGEST = 12  # characters of a stage
_PLAIN = "the network before its conversion, all activations stored"
_COLOURS = ("cyan", "blue", "green", "yellow", "magenta", "red")


_HARDLY = 0.9  # of what checkpointing needs, from which on it is no gain to speak of


def show_memory(
    profile: MemoryProfile, budgets: Mapping[str, int], batch_sizes: Sequence[int] = ()
) -> Iterator[RenderableType]:
    """Yield the peak of each variant, what is alive at it, and what follows from that.

    ``budgets`` are bytes by what the user called them.
    """
    letters = _assign_letters(profile)
    yield Text("MiB an image at the peak of a training step, and the largest batch in a budget")
    yield _tabulate_peaks(profile, budgets, letters)
    yield Text(", ".join(f"{letter} {part}" for part, letter in letters.items()))
    if batch_sizes:
        yield Text("\nthe peak of a training step with so many images, everything included")
        yield _tabulate_batches(profile, batch_sizes)
    yield Text(f"\nimages/s with the largest batch, {_explain_speed(profile)}")
    yield _tabulate_rates(profile, budgets)
    static = profile.static
    yield Text(
        f"\nin the budgets for all: weights {format_bytes(static.weights)}, gradients "
        f"{format_bytes(static.gradients)}, optimiser {format_bytes(static.optimizer)}"
    )
    yield Text(f"all that is alive at the peak of {EXAMPLE} images, predicted")
    yield _tabulate_whole(profile)
    for variant in (one.variant for one in profile.profiles):
        explanation = _PLAIN if variant == "plain" else STRATEGIES[variant].explanation
        yield Text(f"{variant:<11}{explanation}")
    yield Text(f"\nalive at the peak of {EXAMPLE} images, predicted, the largest first")
    yield _tabulate_alive(profile)
    yield Text(f"\n{_explain_side_information(profile)}")
    yield Text(f"rounding: {describe_rounding(profile.rounding)}")
    yield Text(f"\n{judge(profile)}", style="bold")


def _explain_speed(profile: MemoryProfile) -> str:
    """Return where the predicted times come from."""
    if profile.speed.is_measured:
        return "predicted from two small steps; time: relative to plain"
    return "about, for a typical device of this kind; time: relative to plain"


def _tabulate_batches(profile: MemoryProfile, batch_sizes: Sequence[int]) -> Table:
    table = Table("strategy", box=None, pad_edge=False)
    for size in batch_sizes:
        table.add_column(str(size), justify="right")
    for p in profile.profiles:
        table.add_row(p.variant, *(format_bytes(p.peak.at(size)) for size in batch_sizes))
    return table


def _tabulate_whole(profile: MemoryProfile) -> Table:
    """Return what depends on the images beside what does not."""
    table = Table("strategy", box=None, pad_edge=False)
    for name in ("weights", "gradients", "optimiser", "images", "step", "in all"):
        table.add_column(name, justify="right")
    for p in profile.profiles:
        peak = p.example
        parts = peak.weights, peak.gradients, peak.optimizer, peak.batch, peak.step, peak.total
        table.add_row(p.variant, *map(format_bytes, parts))
    return table


def _tabulate_rates(profile: MemoryProfile, budgets: Mapping[str, int]) -> Table:
    table = Table("strategy", box=None, pad_edge=False)
    for name in ("time", *budgets):
        table.add_column(Text(name), justify="right")
    for p in profile.profiles:
        rates = _predict_rates(p, profile, budgets).values()
        cells = ("-" if rate is None else f"{rate:.3g}" for rate in rates)
        table.add_row(p.variant, f"{profile.relative_seconds(p.variant):.2f}", *cells)
    return table


def _predict_rates(
    p: Profile, profile: MemoryProfile, budgets: Mapping[str, int]
) -> dict[str, float | None]:
    """Return the images a second in each budget; None where not even one fits."""
    return {
        name: p.predict_rate(p.peak.largest_batch(size), profile.speed)
        for name, size in budgets.items()
    }


def _explain_side_information(profile: MemoryProfile) -> str:
    bits = math.log2(1 / profile.gamma)
    alive = format_bytes(profile["momentum"].example.side_information / EXAMPLE)
    return (
        f"side information of momentum: log2(1/gamma) = {bits:.2f} bits for each value and "
        f"block at gamma {profile.gamma:g}; {alive} an image alive at its peak"
    )


def _inverts(variant: Variant) -> bool:
    return variant != "plain" and STRATEGIES[variant].depends_on_gamma


def judge(profile: MemoryProfile) -> str:
    """Say what needs least, and whether momentum is worth it."""
    needs = {p.variant: p.peak.bytes_per_image for p in profile.profiles}
    amounts = {variant: f"{format_bytes(need)} an image" for variant, need in needs.items()}
    least = min(needs, key=lambda variant: needs[variant])
    checkpointing = [name for name in needs if name != "plain" and not _inverts(name)]
    recomputed = min(checkpointing, key=lambda variant: needs[variant])
    verdict = f"{least} needs least: {amounts[least]}"
    if least != "plain":
        verdict += f", {_ratio(needs['plain'], needs[least])} the plain network"
    if _inverts(least):
        verdict += f" and {_ratio(needs[recomputed], needs[least])} checkpointing ({recomputed})"
    with_momentum = min(needs["momentum"], needs["auto"])
    if with_momentum < _HARDLY * needs[recomputed]:
        return f"{verdict}."
    if with_momentum < needs[recomputed]:
        return (
            f"{verdict}. Momentum hardly helps here: checkpointing alone ({recomputed}) needs "
            f"{amounts[recomputed]}, and keeps the plain network."
        )
    return (
        f"{verdict}. Momentum does not pay here: with it, it is {amounts['momentum']}; with "
        f"checkpointing alone, {amounts[recomputed]}."
    )


def to_json(
    profile: MemoryProfile, budgets: Mapping[str, int], batch_sizes: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the profile as values that JSON knows."""
    static = profile.static
    return {
        "static_bytes": {
            "weights": static.weights,
            "gradients": static.gradients,
            "optimizer": static.optimizer,
        },
        "gamma": profile.gamma,
        "speed_is_measured": profile.speed.is_measured,
        "rounding": profile.rounding,
        "variants": {
            p.variant: _variant_to_json(p, profile, budgets)
            | {"peak_bytes": {str(size): p.peak.at(size) for size in batch_sizes}}
            for p in profile.profiles
        },
        "verdict": judge(profile),
    }


def to_csv(
    profile: MemoryProfile, budgets: Mapping[str, int], batch_sizes: Sequence[int] = ()
) -> str:
    """Return a line for each variant."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(
        ["strategy", "bytes_per_image", f"peak_bytes_of_{EXAMPLE}", "measured_bytes_per_image"]
        + [f"largest_batch_in_{name}" for name in budgets]
        + [f"images_per_second_in_{name}" for name in budgets]
        + [f"peak_bytes_with_{size}_images" for size in batch_sizes]
    )
    for p in profile.profiles:
        batches = [p.peak.largest_batch(budget) for budget in budgets.values()]
        measured = p.measured.bytes_per_image if p.measured else None
        rates = _predict_rates(p, profile, budgets).values()
        writer.writerow(
            [p.variant, p.predicted.bytes_per_image, p.example.total, measured, *batches, *rates]
            + [p.peak.at(size) for size in batch_sizes]
        )
    return table.getvalue()


def _variant_to_json(
    p: Profile, profile: MemoryProfile, budgets: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "bytes_per_image": p.predicted.bytes_per_image,
        "relative_seconds": profile.relative_seconds(p.variant),
        "predicted_images_per_second": _predict_rates(p, profile, budgets),
        "measured_images_per_second": p.images_per_second,
        "measured_bytes_per_image": p.measured.bytes_per_image if p.measured else None,
        f"peak_of_{EXAMPLE}": asdict(p.example) | {"total": p.example.total},
        "largest_batch": {name: p.peak.largest_batch(size) for name, size in budgets.items()},
    }


def _tabulate_peaks(
    profile: MemoryProfile, budgets: Mapping[str, int], letters: Mapping[str, str]
) -> Table:
    table = Table("strategy", box=None, pad_edge=False)
    table.add_column("MiB", justify="right")
    measured = any(p.measured for p in profile.profiles)
    if measured:
        table.add_column("measured", justify="right")
        table.add_column("images/s", justify="right")
    table.add_column("")
    for name in budgets:
        table.add_column(Text(name), justify="right")
    largest = max(sum(_parts(p.example).values()) for p in profile.profiles)
    for p in profile.profiles:
        table.add_row(
            p.variant,
            _mebibytes(p.predicted.bytes_per_image),
            *([_mebibytes(p.measured.bytes_per_image)] if p.measured else []),
            *([f"{p.images_per_second:.1f}"] if p.images_per_second else []),
            _draw_bar(p.example, largest, letters),
            *(str(p.peak.largest_batch(budget)) for budget in budgets.values()),
        )
    return table


def _tabulate_alive(profile: MemoryProfile) -> Table:
    """Return where each peak is, and the largest kinds of tensors at it."""
    table = Table(
        "strategy", "peak in", "GiB", "tensors", "made by", "in", box=None, pad_edge=False
    )
    for p in profile.profiles:
        for row, alive in enumerate(p.example.alive[:_SHOWN]):
            table.add_row(
                p.variant if row == 0 else "",
                Text(_shorten(p.example.stage) if row == 0 else ""),
                f"{alive.bytes / 2**30:.3f}",
                str(alive.count),
                Text(alive.operation),
                Text(_shorten(alive.stage)),
            )
    return table


def _shorten(stage: str) -> str:
    """Return a long name without what it has in common with those of the other stages.

    >>> _shorten("features.3"), _shorten("trunk_output.block3")
    ('features.3', '…block3')
    """
    return stage if len(stage) <= _LONGEST else f"…{stage.rpartition('.')[2]}"


def _parts(peak: PeakMemory) -> dict[str, int]:
    """Return what grows with the images, by the name in the legend."""
    return {
        **peak.activations,
        "images": peak.batch,
        "side information": peak.side_information,
        "gathered": peak.gathered,
        "recomputed and gradients": peak.transients,
    }


def _assign_letters(profile: MemoryProfile) -> dict[str, str]:
    peaks = [one.example for one in profile.profiles]
    names = dict.fromkeys(name for peak in peaks for name in peak.activations)
    rest = ["images", "side information", "gathered", "recomputed and gradients"]
    if not any(peak.gathered for peak in peaks):
        rest.remove("gathered")
    return dict(zip([*names, *rest], ascii_lowercase * (len(names) // 26 + 1), strict=False))


def _draw_bar(peak: PeakMemory, largest: int, letters: Mapping[str, str]) -> Text:
    bar, end, drawn = Text(), 0, 0
    for number, (name, letter) in enumerate(letters.items()):
        end += _parts(peak).get(name, 0)
        width = round(_BAR * end / largest) - drawn
        bar.append(letter * width, _COLOURS[number % len(_COLOURS)])
        drawn += width
    return bar


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f}"


def _ratio(more: int, less: int) -> str:
    return f"{more / less:.1f} times less than"
