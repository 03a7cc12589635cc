"""How a run went so far, in its folder."""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields

from momconv.files.atomic import write_text
from momconv.training.progress import EpochRow, Progress
from momconv.training.run_folder import RunFolder


def write_history(folder: RunFolder, progress: Progress) -> None:
    """Write ``metrics`` and ``events``, whole: after a resume they hold nothing twice."""
    rows = [asdict(row) for row in progress.history]
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(EpochRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder.metrics, table.getvalue())
    events = [{"event": "epoch"} | _finite(row) for row in rows]
    events += [{"event": "out_of_memory"} | asdict(halving) for halving in progress.halvings]
    events += [{"event": "not_finite"} | asdict(back) for back in progress.rollbacks]
    events += [{"event": "unreadable_image"} | asdict(one) for one in progress.omissions]
    events.sort(key=lambda event: (event["epoch"], event["event"] == "epoch"))
    write_text(folder.events, "".join(json.dumps(event) + "\n" for event in events))


def _finite(row: Mapping[str, float | None]) -> dict[str, float | None]:
    """The row without numbers that JSON does not have."""
    return {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
