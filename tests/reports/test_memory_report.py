import io
import json

import pytest
from rich.console import Console

from momconv.planner.micro_batch import Line, StaticBytes
from momconv.planner.profile import VARIANTS, MemoryProfile, Profile
from momconv.reports.memory import judge, show_memory, to_json

MIB = 2**20
BUDGETS = {"100MiB": 100 * MIB, "1GiB": 1024 * MIB}


def measured(plain: float, store: float, checkpoint: float, momentum: float) -> MemoryProfile:
    """A profile in which an image takes so many MiB."""
    needs = dict(zip(VARIANTS, (plain, store, checkpoint, momentum, momentum), strict=True))
    return MemoryProfile(
        StaticBytes(weights=10 * MIB, gradients=10 * MIB, optimizer=20 * MIB),
        tuple(
            Profile(variant, Line(0, int(need * MIB)), "layer3", {"stem": 0, "layer3": 3 * MIB})
            for variant, need in needs.items()
        ),
    )


def shown(profile: MemoryProfile, *, width: int = 80, encoding: str = "utf-8") -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=buffer, width=width, force_terminal=False)
    for part in show_memory(profile, BUDGETS):
        console.print(part)
    buffer.seek(0)
    return buffer.read()


def test_every_variant_has_its_need_its_peak_and_its_batches() -> None:
    lines = shown(measured(12, 15, 6, 4)).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if "layer3" in line}
    assert [rows[v][1] for v in VARIANTS] == ["12.00", "15.00", "6.00", "4.00", "4.00"]
    assert rows["plain"][-3:] == ["layer3", "5", "82"]  # (100 - 40) / 12 and (1024 - 40) / 12
    assert rows["momentum"][-3:] == ["layer3", "15", "246"]


def test_bars_are_in_proportion() -> None:
    lines = [line for line in shown(measured(12, 12, 6, 3)).splitlines() if "━" in line]
    bars = {line.split()[0]: line.count("━") for line in lines}
    assert bars["plain"] == 2 * bars["checkpoint"] == 4 * bars["momentum"] > 0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_it_fits_80_columns_in_any_encoding(encoding: str) -> None:
    text = shown(measured(1200.5, 1500, 600, 400), encoding=encoding)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("needs", "verdict"),
    [
        (
            (12, 15, 6, 4),
            "momentum needs least: 4.0 MiB an image, 3.0 times less than the plain network and 1.5 "
            "times less than checkpointing each block.",
        ),
        (
            (12, 15, 6, 6),
            "checkpoint needs least: 6.0 MiB an image, 2.0 times less than the plain network. "
            "Momentum does not pay here: with it, it is 6.0 MiB an image; with checkpointing "
            "alone, 6.0 MiB an image.",
        ),
        (
            (5, 15, 6, 7),
            "plain needs least: 5.0 MiB an image. Momentum does not pay here: with it, it is "
            "7.0 MiB an image; with checkpointing alone, 6.0 MiB an image.",
        ),
    ],
    ids=["momentum", "checkpoint", "plain"],
)
def test_the_verdict_is_honest(needs: tuple[float, float, float, float], verdict: str) -> None:
    assert judge(measured(*needs)) == verdict


def test_the_document_has_every_number() -> None:
    document = json.loads(json.dumps(to_json(measured(12, 15, 6, 4), BUDGETS)))
    assert document["static_bytes"] == {
        "weights": 10 * MIB,
        "gradients": 10 * MIB,
        "optimizer": 20 * MIB,
    }
    assert list(document["variants"]) == list(VARIANTS)
    assert document["variants"]["momentum"] == {
        "bytes_per_image": 4 * MIB,
        "fixed_bytes": 0,
        "peak_stage": "layer3",
        "held_bytes_per_image": {"stem": 0, "layer3": 3 * MIB},
        "largest_batch": {"100MiB": 15, "1GiB": 246},
    }
