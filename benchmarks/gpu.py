"""What only a GPU can show, in the order of its value and within eight minutes.

    python -m benchmarks.gpu [--out FOLDER]

Each check (benchmarks/gpu_checks.py) has a process of its own and a limit of time, so that none
stops another. What it finds is printed at once as a line of JSON; a table comes last. FOLDER gets
the results, and gpus.json, whose place is momconv/planner/: what the planner allows for on this GPU
besides tensors. "goal" says whether a figure is as it should be, where something was promised.

Without a GPU the same code runs on the CPU at a small size, to check itself; that says nothing
about GPUs, and is kept only in a FOLDER that is named. No GPU has been measured yet where there is
no table below.
"""

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

_CONTEXT = get_context("forkserver")  # which imports torch once, and never touches the GPU
_CONTEXT.set_forkserver_preload(["benchmarks.gpu_checks"])
if __name__ == "__main__":
    forkserver.ensure_running()  # while it imports, so does this process

import torch
import typer

from benchmarks.gpu_checks import CHECKS, TABLE, Check, Figure, Place, explain
from benchmarks.tables import MISSING, RESULTS, Log, Out, Row, choose_device, show
from momconv.planner import allowance

TITLE = "gpu"
KEY = ("check", "case", "figure")
SECONDS = 480.0  # for everything


def run(checks: Sequence[Check], place: Place, seconds: float = SECONDS) -> Iterator[Row]:
    """A row for each figure of each check, as soon as it is there."""
    ends = time.monotonic() + seconds
    for check in checks:
        limit = min(check.seconds, ends - time.monotonic())
        began = time.monotonic()
        for figure in _watch(check, place, limit):
            yield _to_row(check.name, figure)
        took = time.monotonic() - began
        yield _to_row(check.name, Figure("all of it", "seconds", took))


def _watch(check: Check, place: Place, seconds: float) -> Iterator[Figure]:
    """What the check finds in a process of its own, and why it ended early if it did."""
    if seconds <= 0:
        yield Figure("all of it", "ended", goal=False, note="no time was left")
        return
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(check, place, sender))
    process.start()
    assert process.pid
    sender.close()
    ends = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, ends - time.monotonic())):
            figure = receiver.recv()
            if figure is None:
                return
            yield figure
        yield Figure("all of it", "ended", goal=False, note=f"stopped after {seconds:.0f} s")
    except EOFError:
        process.join(10)
        note = f"the process died with exit code {process.exitcode}"
        yield Figure("all of it", "ended", goal=False, note=note)
    finally:
        process.kill()  # which may not be a group yet
        with suppress(ProcessLookupError):  # all that it has started ends, too
            os.killpg(process.pid, signal.SIGKILL)
        process.join(10)


def _work(check: Check, place: Place, sender: Connection) -> None:
    """Send what is found, and None at the end."""
    os.setsid()  # a group of its own
    try:
        for figure in check.look(place):
            sender.send(figure)
    except Exception as error:
        traceback.print_exc()
        sender.send(Figure("all of it", "ended", goal=False, note=explain(error)))
    sender.send(None)


def _to_row(check: str, figure: Figure) -> Row:
    value = MISSING if figure.value is None else f"{figure.value:.6g}"
    goal = MISSING if figure.goal is None else "reached" if figure.goal else "missed"
    cells = {"check": check, "case": figure.case, "figure": figure.name, "value": value}
    return {**cells, "goal": goal, "note": figure.note}


def present(rows: Sequence[Row]) -> list[Row]:
    """The numbers and what is not as it should be, without how long each check took."""
    return [
        row
        for row in rows
        if (row["value"] != MISSING or row["goal"] == "missed") and row["figure"] != "seconds"
    ]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """A row for each check."""
    names = list(dict.fromkeys(row["check"] for row in rows))
    return [_summarise(name, [row for row in rows if row["check"] == name]) for name in names]


def _summarise(name: str, rows: Sequence[Row]) -> Row:
    missed = [row for row in rows if row["goal"] == "missed"]
    first = (
        f"{missed[0]['case']}: {missed[0]['figure']} {missed[0]['value']}" if missed else MISSING
    )
    seconds = next((row["value"] for row in rows if row["figure"] == "seconds"), MISSING)
    return {
        "check": name,
        "figures": str(len(rows) - 1),
        "goals reached": str(sum(row["goal"] == "reached" for row in rows)),
        "goals missed": str(len(missed)),
        "the first of them": f"{first} {missed[0]['note']}".strip() if missed else first,
        "seconds": seconds,
    }


def write_table(rows: Sequence[Row], place: Place, folder: Path) -> None:
    """Write gpus.json, with the allowance that was measured on this GPU if one was."""
    cells = [row["note"] for row in rows if row["figure"] == TABLE]
    if not cells or place.device.type != "cuda":
        return
    known: dict[str, Any] = {name: asdict(row) for name, row in allowance.read_table().items()}
    known[torch.cuda.get_device_name(place.device)] = json.loads(cells[-1])  # of the most cases
    path = folder / allowance.TABLE.name
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


Only = Annotated[list[str] | None, typer.Option("--check", help="Only this one (again for more).")]


def main(out: Out = None, check: Only = None) -> None:
    """Run the checks."""
    device = choose_device()
    place = Place(device, is_small=device.type != "cuda")
    checks = [each for each in CHECKS if not check or each.name in check]
    if not checks:
        raise typer.BadParameter(f"no such check; there are {', '.join(c.name for c in CHECKS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or (Path(scratch) if place.is_small else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for row in run(checks, place):
            print(json.dumps(row, ensure_ascii=False), flush=True)  # noqa: T201 (the result)
            rows.append(row)
            with (folder / "gpu.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        # Now: asked for earlier, the GPU's name would make a context beside those of the checks.
        Log.of(TITLE, device, folder).merge(rows, KEY)
        write_table(rows, place, folder)
    show(TITLE, summarise(rows))


if __name__ == "__main__":
    typer.run(main)
