"""Images a second on several GPUs, on paper: nothing of this is measured.

The work of a step (operations, flops, bytes) is what the planner counts for the plain network in
bf16 on 64 images of 224² a GPU, and its time that of the GPU which the planner assumes:
200 TFLOP/s, 1.5 TB/s, 10 µs an operation. What processes exchange goes around rings at the usable
bandwidths below, within machines first, while between machines each has one link.
"""

from dataclasses import dataclass

import typer
from rich.console import Console

from momconv.planner.cost import estimate_speed
from momconv.planner.prediction import Predictor, Training
from momconv.zoo.networks import outline

NETWORKS = {"ResNet-152": "resnet152", "ViT-L/16": "vit_l_16", "ConvNeXt-L": "convnext_large"}
IMAGES = 64  # of a GPU
RESOLUTION = 224
COUNTED = 4  # images, of which the work is scaled
BACKWARD = 2 / 3  # of the time of a step
NVLINK, PCIE = 200e9, 12e9  # usable bytes a second around the GPUs of a machine


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines with so many GPUs each; bytes a second within one, and of the link of each."""

    name: str
    machines: int = 1
    gpus: int = 1
    within: float = NVLINK
    between: float = NVLINK

    def seconds(self, size: float) -> float:
        """How long it takes until ``size`` bytes of each GPU have gone around all rings once.

        >>> Cluster("", machines=2, gpus=4, within=3.0, between=1.0).seconds(4)
        3.0
        """
        inside, outside = ((n - 1) / n for n in (self.gpus, self.machines))
        return size * (inside / self.within + outside / self.between)


CLUSTERS = [
    Cluster("1 GPU"),
    Cluster("8 GPUs, NVLink", gpus=8),
    Cluster("8 GPUs, PCIe", gpus=8, within=PCIE),
    Cluster("4 × 8 GPUs, NVLink, 25 Gbit/s", machines=4, gpus=8, between=25e9 / 8),
    Cluster("4 × 8 GPUs, NVLink, 100 Gbit/s", machines=4, gpus=8, between=100e9 / 8),
]


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds that a step computes on one GPU, and the bytes of the weights, or of gradients."""

    compute: float
    weights: float

    def speeds(self, cluster: Cluster) -> tuple[float, float, float]:
        """Images a second: replicated, with the sum after backward, or during it; sharded."""
        once = cluster.seconds(self.weights)
        seconds = (
            self.compute + 2 * once,
            self.compute + max(0.0, 2 * once - BACKWARD * self.compute),
            max(self.compute, 3 * once),
        )
        images = IMAGES * cluster.machines * cluster.gpus
        after, during, sharded = (images / each for each in seconds)
        return after, during, sharded


def count(name: str) -> Step:
    """What a step of the network ``name`` takes."""
    model = outline(name).train()
    training = Training(RESOLUTION, "bf16")
    work = Predictor(model, training).predict(COUNTED).work.scale(IMAGES / COUNTED)
    return Step(estimate_speed("cuda", "bf16").seconds(work), training.static_bytes(model).weights)


def main() -> None:
    """Print the table of docs/clusters.md."""
    out = Console(soft_wrap=True, highlight=False)
    out.print("| | | replicated, summed after backward | during it | sharded |")
    out.print("|---|---|---|---|---|")
    for title, name in NETWORKS.items():
        step = count(name)
        for cluster in CLUSTERS:
            cells = " | ".join(f"{speed:,.0f}" for speed in step.speeds(cluster))
            out.print(f"| {title} | {cluster.name} | {cells} |")


if __name__ == "__main__":
    typer.run(main)
