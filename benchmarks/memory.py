"""Peak activation and transient bytes of one training step, per image, for every method.

Weights, gradients, optimiser state and the input images are left out; everything else that
PyTorch's allocator handed out is in (momconv.planner.measurement). In bf16 (autocast, channels last
as in fine-tuning) a CPU without instructions for it takes many minutes for a step, so there
the peak is what ``momconv.peak_memory`` predicts, which is compared with measured ones, bf16
included, in benchmarks/prediction.py; with avx512_bf16 it is measured. Not all of a step halves in
bf16: weights have a bf16 copy, and gradients in bf16 and fp32 of the size of a weight, whatever
the batch is (6 of the 15.2 MiB for each of 4 images in ViT-L); x and v keep their 32 bits; and
autocast computes normalisations and ConvNeXt's layer scale in fp32. With 4 images the peak is what
oneDNN takes for one gradient of a weight, on tiles (AMX) or in blocks: that of ViT-L's patches,
and of ConvNeXt-L's last 7×7 kernels. Even without that, momentum blocks cannot go below about 11.2
and 24.5 MiB for each of 4 images as long as autograd trains them: while the gradient of the largest
linear layer goes from bf16 (8 and 18 MiB) to fp32 (16 and 36), there are x, v and r of its stage
and of those before (7 and 39), the two gradients of x (6 and 2), and the layer's input and its
output's gradient (8 and 3).

memcnn and revtorch do not train the same network but one of couplings with half of the work, see
benchmarks/couplings.py. torch.compile takes minutes to compile, so it is tried on two networks only
(budgets of 0.2 and 0 for cifar_resnet110 were given up after half an hour); its budget is the share
of activations held, see benchmarks/compilation.py.
"Best checkpointing" is the better of the two rows that say checkpoint.
"""

from collections.abc import Sequence

import torch
import typer
from rich.console import Console

from benchmarks.cases import Case, Chosen, Networks, choose, prepare
from benchmarks.isolation import attempt
from benchmarks.methods import METHODS, select
from benchmarks.tables import Log, Out, Row, choose_device, number, ratio, show
from momconv import peak_memory
from momconv.planner.measurement import measure_step

MIB = 2**20
TITLE = "memory"
VALUE = "MiB per image"
KEY = ("network", "resolution", "batch", "precision", "method")

CASES = [
    Case("cifar_resnet20", 32, 32),
    Case("cifar_resnet110", 32, 32),
    Case("cifar_resnet1202", 32, 8),
    Case("resnet50", 224, 24),
    Case("resnet152", 224, 24),
    Case("resnet152", 500, 4),
    Case("vit_l_16", 224, 4),
    Case("convnext_large", 224, 4),
    Case("resnet152", 224, 24, "bf16"),
    Case("resnet152", 500, 4, "bf16"),
    Case("vit_l_16", 224, 4, "bf16"),
    Case("vit_l_16", 224, 32, "bf16"),
    Case("convnext_large", 224, 4, "bf16"),
    Case("convnext_large", 224, 32, "bf16"),
]


def measure(case: Case, key: str, device: torch.device) -> float:
    """MiB per image under the method of that key."""
    model = prepare(case, key, device)
    if case.precision == "bf16" and device.type == "cpu" and not has_bf16():
        return peak_memory(model, case.batch, case.resolution, "bf16").step / case.batch / MIB

    def peak() -> int:
        precision = case.precision
        step = measure_step(model, case.batch, case.resolution, precision=precision, device=device)
        return step

    if METHODS[key].warms_up:
        peak()
    return peak() / case.batch / MIB


def has_bf16() -> bool:
    """Whether the CPU has instructions for it."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def describe(case: Case) -> Row:
    """The columns that say what was trained."""
    return {
        "network": case.network,
        "resolution": str(case.resolution),
        "batch": str(case.batch),
        "precision": case.precision,
    }


def present(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratios to storing all and to the best checkpointing of the same case."""
    return [
        {
            "network": f"{row['network']} {row['resolution']}² ×{row['batch']} {row['precision']}",
            "method": row["method"],
            VALUE: row[VALUE],
            "of store all": ratio(row, _find(row, rows, "store all"), VALUE),
            "of best checkpointing": ratio(row, _find(row, rows, "checkpoint"), VALUE),
        }
        for row in rows
    ]


def _find(row: Row, rows: Sequence[Row], method: str) -> Row | None:
    """The smallest number of a method whose name begins so, in the case of ``row``."""
    found = [
        (value, index)
        for index, other in enumerate(rows)
        if all(other[column] == row[column] for column in KEY[:-1])
        and other["method"].startswith(method)
        and (value := number(other, VALUE)) is not None
    ]
    return rows[min(found)[1]] if found else None


def main(networks: Networks, method: Chosen, out: Out = None) -> None:
    """Measure the peak memory of a training step."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    cases = choose(CASES, networks)
    for case in cases:
        for key in select(case.network, method):
            Console(stderr=True).print(f"{case.label}: {key}")
            value = attempt(measure, case, key, device)
            cell = value if isinstance(value, str) else f"{value:.2f}"
            log.merge([describe(case) | {"method": METHODS[key].label, VALUE: cell}], KEY)
    labels = [describe(case) for case in cases]
    rows = [row for row in log.read() if {c: row[c] for c in KEY[:-1]} in labels]
    show(TITLE, present(rows))


if __name__ == "__main__":
    typer.run(main)
