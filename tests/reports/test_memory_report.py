import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from momconv.errors import UsageError
from momconv.planner.cost import Speed, Work
from momconv.planner.micro_batch import Curve, Line, StaticBytes
from momconv.planner.prediction import Alive, PeakMemory
from momconv.planner.profile import MemoryProfile, Profile, Variant
from momconv.reports.memory import judge, show_memory, to_csv, to_json
from momconv.reports.memory_plot import draw_memory, require_picture_name

MIB = 2**20
VARIANTS: tuple[Variant, ...] = ("plain", "checkpoint", "segment", "momentum", "auto")
BUDGETS = {"100MiB": 100 * MIB, "1GiB": 1024 * MIB}


def need(variant: Variant, mebibytes: float) -> Profile:
    """A variant of which an image takes so much, on top of 40 MiB."""
    image = int(mebibytes * MIB)
    alive = (Alive(operation="convolution", stage="layer3", count=7, bytes=16 * image),)
    peak = PeakMemory(
        weights=10 * MIB,
        gradients=10 * MIB,
        optimizer=20 * MIB,
        ema=0,
        batch=0,
        activations={"stem": 0, "layer3": 16 * image},
        side_information=0,
        transients=16 * image,
        allowance=0,
        stage="layer3",
        operation="convolution",
        alive=alive,
    )
    course = ((0.0, 0), (1.5, 2 * image), (2.5, 32 * image), (3.5, 0))
    work = Work(1, flops=32 * (1 if variant == "plain" else 2))
    return Profile(variant, Curve((Line(40 * MIB, image),)), peak, work, course)


def profiled(plain: float, checkpoint: float, segment: float, momentum: float) -> MemoryProfile:
    """A profile in which an image takes so many MiB."""
    needs = dict(zip(VARIANTS, (plain, checkpoint, segment, momentum, momentum), strict=True))
    static = StaticBytes(weights=10 * MIB, gradients=10 * MIB, optimizer=20 * MIB)
    speed = Speed(per_operation=5, per_flop=1, per_byte=0)
    profiles = tuple(need(*item) for item in needs.items())
    return MemoryProfile(static, 0.5, ("stem", "layer3"), speed, profiles)


def shown(profile: MemoryProfile, *, width: int = 80, encoding: str = "utf-8") -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=buffer, width=width, force_terminal=False)
    for part in show_memory(profile, BUDGETS):
        console.print(part)
    buffer.seek(0)
    return buffer.read()


def test_every_variant_has_its_need_its_batches_and_what_is_alive() -> None:
    lines = shown(profiled(12, 15, 6, 4)).splitlines()
    rows = {line.split()[0]: line.split() for line in lines[2:7]}
    assert [rows[v][1] for v in VARIANTS] == ["12.00", "15.00", "6.00", "4.00", "4.00"]
    assert rows["plain"][-2:] == ["5", "82"]  # (100 - 40) / 12 and (1024 - 40) / 12
    assert rows["momentum"][-2:] == ["15", "246"]
    (alive,) = [line.split() for line in lines if "convolution" in line and "momentum" in line]
    assert "rounding: not measured; x is kept to 2^-24 of the largest activation, or finer" in lines
    assert alive == ["momentum", "layer3", "0.062", "7", "convolution", "layer3"]


def test_the_images_a_second_are_those_of_the_largest_batch() -> None:
    profile = profiled(12, 15, 6, 100)
    rows = [line.split() for line in shown(profile).splitlines()]
    assert ["plain", "1.00", "0.5", "0.943"] in rows  # 5 / (5 + 5) and 82 / (5 + 82)
    assert ["momentum", "1.86", "-", "0.391"] in rows  # (5 + 64) / (5 + 32) and 9 / (5 + 18)
    momentum = to_json(profile, BUDGETS)["variants"]["momentum"]
    assert list(momentum["predicted_images_per_second"].values()) == [None, 9 / 23]


def test_bars_are_in_proportion_and_show_the_parts() -> None:
    lines = shown(profiled(12, 6, 6, 3)).splitlines()[2:7]
    bars = {line.split()[0]: line.split()[2] for line in lines}
    assert bars["plain"] == "b" * 12 + "e" * 12
    assert bars["checkpoint"] == "b" * 6 + "e" * 6
    assert bars["momentum"] == "b" * 3 + "e" * 3
    legend = "a stem, b layer3, c images, d side information, e recomputed and gradients"
    assert legend in shown(profiled(12, 6, 6, 3))


def test_measured_peaks_stand_beside_the_predicted_ones_and_decide() -> None:
    profile = profiled(12, 15, 6, 4)
    checked = replace(
        profile,
        profiles=tuple(replace(p, measured=Line(0, 10 * MIB)) for p in profile.profiles),
    )
    row = next(line.split() for line in shown(checked).splitlines() if line.startswith("plain"))
    assert row[1:3] == ["12.00", "10.00"]
    assert row[-2:] == ["10", "102"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_it_fits_80_columns_in_any_encoding(encoding: str) -> None:
    text = shown(profiled(1200.5, 1500, 600, 400), encoding=encoding)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("needs", "verdict"),
    [
        (
            (12, 8, 6, 4),
            "momentum needs least: 4.0 MiB an image, 3.0 times less than the plain network and 1.5 "
            "times less than checkpointing (segment).",
        ),
        (
            (12, 5, 6, 4.75),
            "momentum needs least: 4.8 MiB an image, 2.5 times less than the plain network and 1.1 "
            "times less than checkpointing (checkpoint). Momentum hardly helps here: checkpointing "
            "alone (checkpoint) needs 5.0 MiB an image, and keeps the plain network.",
        ),
        (
            (12, 6, 7, 6),
            "checkpoint needs least: 6.0 MiB an image, 2.0 times less than the plain network. "
            "Momentum does not pay here: with it, it is 6.0 MiB an image; with checkpointing "
            "alone, 6.0 MiB an image.",
        ),
        (
            (5, 6, 8, 7),
            "plain needs least: 5.0 MiB an image. Momentum does not pay here: with it, it is "
            "7.0 MiB an image; with checkpointing alone, 6.0 MiB an image.",
        ),
    ],
    ids=["momentum", "hardly", "checkpoint", "plain"],
)
def test_the_verdict_is_honest(needs: tuple[float, float, float, float], verdict: str) -> None:
    assert judge(profiled(*needs)) == verdict


def test_the_document_has_every_number() -> None:
    document = json.loads(json.dumps(to_json(profiled(12, 15, 6, 4), BUDGETS)))
    assert document["static_bytes"] == {
        "weights": 10 * MIB,
        "gradients": 10 * MIB,
        "optimizer": 20 * MIB,
    }
    assert list(document["variants"]) == list(VARIANTS)
    momentum = document["variants"]["momentum"]
    assert momentum["bytes_per_image"] == 4 * MIB
    assert momentum["largest_batch"] == {"100MiB": 15, "1GiB": 246}
    assert momentum["peak_of_32"]["total"] == 168 * MIB
    assert momentum["peak_of_32"]["activations"] == {"stem": 0, "layer3": 64 * MIB}


def test_the_csv_has_a_line_for_each_variant() -> None:
    header, plain, *_ = to_csv(profiled(12, 15, 6, 4), BUDGETS).splitlines()
    assert header.endswith(
        "measured_bytes_per_image,largest_batch_in_100MiB,largest_batch_in_1GiB,"
        "images_per_second_in_100MiB,images_per_second_in_1GiB"
    )
    assert plain.startswith(f"plain,{12 * MIB},{(40 + 32 * 12) * MIB},,5,82,0.5,0.94")


def test_the_picture_is_written_or_its_name_refused(tmp_path: Path) -> None:
    for suffix in ("png", "svg"):
        require_picture_name(tmp_path / f"memory.{suffix}")
        draw_memory(profiled(12, 15, 6, 4), BUDGETS, tmp_path / f"memory.{suffix}")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "memory.svg").read_text()
    with pytest.raises(UsageError, match="not one of"):
        require_picture_name(tmp_path / "memory.txt")
