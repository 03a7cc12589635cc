"""Top-1 on photographs of ants and bees after each epoch, from networks with ImageNet weights.

EfficientNet-Lite0 and -Lite1 (the extra ``photographs``) are fine-tuned on the 244 photographs of
PyTorch's tutorial at 224² or 240², for three epochs in batches of 32, with `momconv finetune`'s
defaults otherwise; 153 photographs are held out. A seed decides the head, the order and the
augmentation. First, with no limit of memory:

* plain: the network itself, which is to be reached;
* plain, sgd-8bit: the same with an optimiser whose state has a byte a value;
* default stages: momentum only where `convert` puts it unless it is told otherwise;
* all stages: momentum wherever there are two blocks in a row. Both are calibrated before.

Then with the memory of a limit that all keep to, as in figure 8 of Sander et al. 2021:

* limit, plain, stored: as other loops do it, which leaves few images for a micro-batch, each with
  batch statistics of its own;
* limit, plain, frozen statistics: the same, with BatchNorm as the published weights have it;
* limit, plain: the way that momconv plans for the plain network;
* limit, all stages: the same for the momentum network.

In the table, mean ± standard deviation over the seeds in percent, and the median of the seconds of
an epoch of training, without conversion.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import photographs, transfer
from benchmarks.cases import check_names
from benchmarks.conversion import SHARED
from benchmarks.photographs import CROP, MEAN, SIDES, STD
from benchmarks.tables import Log, Out, Row, show
from momconv import finetune
from momconv.recipe import load_recipe

TITLE = "hymenoptera"
KEY = ("network", "method", "epoch", "seed")
VALUE, SECONDS = transfer.VALUE, "seconds"
SEEDS, EPOCHS = 3, 3
LIMIT = "train.memory=600MiB"
PLAIN, ALL = "momentum.use=never", "momentum.stages=all"
STORED = "momentum.strategy=store"

METHODS = {
    "plain": [PLAIN],
    "plain, sgd-8bit": [PLAIN, "train.optimizer=sgd-8bit"],
    "default stages": ["momentum.use=always"],
    "all stages": [ALL],
    "limit, plain, stored": [PLAIN, LIMIT, STORED],
    "limit, plain, frozen statistics": [PLAIN, LIMIT, STORED, "train.freeze_bn=true"],
    "limit, plain": [PLAIN, LIMIT],
    "limit, all stages": [ALL, LIMIT],
}


def make_recipe(network: str, method: str, seed: int, data: Path) -> list[str]:
    """What sets the recipe of one run."""
    side = SIDES[network]
    return [
        f"model.name={photographs.__file__}:load_network",
        f"model.arguments=[name={network}]",
        f"data.path={data}",
        f"data.resolution={side}",
        f"data.crop={CROP}",
        f"data.mean={','.join(map(str, MEAN))}",
        f"data.std={','.join(map(str, STD))}",
        "data.interpolation=bicubic",
        "data.workers=0",
        "train.device=cpu",
        f"train.epochs={EPOCHS}",
        f"train.seed={seed}",
        *METHODS[method],
    ]


def run(network: str, method: str, seed: int, data: Path) -> Iterator[Row]:
    """A row for each epoch of one run."""
    key = {"network": network, "method": method, "seed": str(seed)}
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(load_recipe(None, make_recipe(network, method, seed, data)), folder)
        for row in transfer.read_epochs(result.folder):
            yield key | {
                "epoch": row["epoch"],
                VALUE: f"{100 * float(row['val_top1']):.2f}",
                SECONDS: f"{float(row['seconds']):.0f}",
            }


def present(rows: Sequence[Row]) -> list[Row]:
    """A row for each network and method, with the scores after each epoch."""
    table = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        for scores in transfer.present(own):
            seconds = [float(r[SECONDS]) for r in own if r["method"] == scores["method"]]
            middle = f"{statistics.median(seconds):.0f}"
            table.append({"network": network, **scores, SECONDS: middle})
    return table


def main(
    methods: Annotated[list[str] | None, typer.Argument(show_default="all")] = None,
    *,
    data: Annotated[Path, typer.Option(help="The images.")] = SHARED / "data/hymenoptera",
    network: Annotated[list[str] | None, typer.Option(help="Only this one.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this one.")] = None,
    out: Out = None,
) -> None:
    """Fine-tune networks by methods; other results stay as they are."""
    check_names(methods or [], METHODS)
    if not data.exists():
        raise typer.BadParameter(f"{data} does not exist; name it with --data")
    log = Log.of(TITLE, torch.device("cpu"), out)
    for name in network or SIDES:
        for number in seed or range(SEEDS):
            for method in methods or METHODS:
                rows = list(run(name, method, number, data))
                log.merge(rows, KEY)
                Console(stderr=True).print(name, method, number, *(row[VALUE] for row in rows))
    show(TITLE, present(log.read()))


if __name__ == "__main__":
    typer.run(main)
