"""The memory of a training step under each strategy, side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from momconv.planner.profile import MemoryProfile, Profile, Variant
from momconv.units import format_bytes

_BAR = 12  # characters
# What backward gets its activations from.
_EXPLANATIONS: dict[Variant, str] = {
    "plain": "the network before its conversion, all activations stored",
    "store": "converted, all stored: the steps of momentum are stored too",
    "checkpoint": "converted, each block recomputed from its stored input",
    "momentum": "converted, inputs reconstructed backwards, each block recomputed",
    "auto": "momentum in long runs of blocks, checkpointing elsewhere; the default",
}


def show_memory(profile: MemoryProfile, budgets: Mapping[str, int]) -> Iterator[RenderableType]:
    """The peak of each variant, what its stages hold, and what follows from it.

    ``budgets`` are bytes by what the user called them.
    """
    yield Text("peak of a training step, and the largest batch in a budget")
    yield _tabulate_peaks(profile, budgets)
    static = profile.static
    yield Text(
        f"\nall of them, on top: weights {format_bytes(static.weights)}, gradients "
        f"{format_bytes(static.gradients)}, optimiser {format_bytes(static.optimizer)}"
    )
    for variant, explanation in _EXPLANATIONS.items():
        yield Text(f"{variant:<11}{explanation}")
    yield Text("\nMiB that each stage holds for an image between forward and backward pass")
    yield _tabulate_stages(profile)
    yield Text(f"\n{judge(profile)}", style="bold")


def judge(profile: MemoryProfile) -> str:
    """In words: what needs least, and whether momentum is worth it."""
    needs = {p.variant: p.peak.bytes_per_image for p in profile.profiles}
    amounts = {variant: f"{format_bytes(need)} an image" for variant, need in needs.items()}
    least = min(needs, key=lambda variant: needs[variant])
    verdict = f"{least} needs least: {amounts[least]}"
    if least != "plain":
        verdict += f", {_ratio(needs['plain'], needs[least])} the plain network"
    if least in ("momentum", "auto"):
        verdict += f" and {_ratio(needs['checkpoint'], needs[least])} checkpointing each block"
    if needs["momentum"] < needs["checkpoint"]:
        return f"{verdict}."
    return (
        f"{verdict}. Momentum does not pay here: with it, it is {amounts['momentum']}; with "
        f"checkpointing alone, {amounts['checkpoint']}."
    )


def to_json(profile: MemoryProfile, budgets: Mapping[str, int]) -> dict[str, Any]:
    """The profile as values that JSON knows."""
    static = profile.static
    return {
        "static_bytes": {
            "weights": static.weights,
            "gradients": static.gradients,
            "optimizer": static.optimizer,
        },
        "variants": {p.variant: _variant_to_json(profile, p, budgets) for p in profile.profiles},
        "verdict": judge(profile),
    }


def _variant_to_json(
    profile: MemoryProfile, variant: Profile, budgets: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "bytes_per_image": variant.peak.bytes_per_image,
        "fixed_bytes": variant.peak.fixed_bytes,
        "peak_stage": variant.peak_stage,
        "held_bytes_per_image": variant.held_bytes,
        "largest_batch": {
            name: profile.largest_batch(variant, budget) for name, budget in budgets.items()
        },
    }


def _tabulate_peaks(profile: MemoryProfile, budgets: Mapping[str, int]) -> Table:
    table = Table("strategy", box=None, pad_edge=False)
    table.add_column("MiB an image", justify="right")
    table.add_column("")
    table.add_column("peak in")
    for name in budgets:
        table.add_column(Text(name), justify="right")
    largest = max(p.peak.bytes_per_image for p in profile.profiles)
    for p in profile.profiles:
        need = p.peak.bytes_per_image
        table.add_row(
            p.variant,
            _mebibytes(need),
            ProgressBar(total=largest, completed=need, width=_BAR),
            Text(p.peak_stage),
            *(str(profile.largest_batch(p, budget)) for budget in budgets.values()),
        )
    return table


def _tabulate_stages(profile: MemoryProfile) -> Table:
    """What each stage holds when the forward pass has ended."""
    table = Table("stage", box=None, pad_edge=False)
    for p in profile.profiles:
        table.add_column(p.variant, justify="right")
    for stage in profile.profiles[0].held_bytes:
        held = (_mebibytes(p.held_bytes[stage]) for p in profile.profiles)
        table.add_row(Text(stage), *held)
    return table


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f}"


def _ratio(more: int, less: int) -> str:
    return f"{more / less:.1f} times less than"
