"""Tiny members of the families, calibrated as a user's network is, with gains and norms refined."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.mnasnet import MNASNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

import momconv
from momconv.zoo.networks import find_head

SIDE, CLASSES = 32, 3
TWO_STAGES = BlockParams([1, 3], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
SWIN = partial(SwinTransformer, [4, 4], 16, [3, 2], [2, 2], [4, 4], num_classes=CLASSES)
MBCONV = MBConvConfig(4, 3, 2, 16, 24, 3)
SHRINKING = InvertedResidualConfig(16, 3, 32, 24, True, "HS", 2, 1, 1)
KEEPING = InvertedResidualConfig(24, 3, 48, 24, True, "HS", 1, 1, 1)

TINY: dict[str, Callable[[], nn.Module]] = {
    "resnext": lambda: ResNet(Bottleneck, [3, 1, 1, 1], CLASSES, groups=4, width_per_group=8),
    "regnet_y": lambda: RegNet(TWO_STAGES, CLASSES, stem_width=8),
    "convnext": lambda: ConvNeXt(
        [CNBlockConfig(16, 32, 3), CNBlockConfig(32, None, 3)], 0.0, 1.0, CLASSES
    ),
    "vit": lambda: VisionTransformer(SIDE, 8, 4, 2, 32, 64, num_classes=CLASSES),
    "swin": SWIN,
    "swin_v2": partial(SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "efficientnet": lambda: EfficientNet(
        [MBConvConfig(1, 3, 1, 16, 16, 3), MBCONV], 0.0, 0.2, CLASSES, last_channel=64
    ),
    "efficientnet_v2": lambda: EfficientNet(
        [FusedMBConvConfig(1, 3, 1, 16, 16, 3), MBCONV], 0.0, 0.2, CLASSES, last_channel=64
    ),
    "mobilenet_v2": lambda: MobileNetV2(CLASSES, 0.5, [[1, 16, 1, 1], [6, 24, 3, 2]]),
    "mobilenet_v3": lambda: MobileNetV3([SHRINKING, KEEPING, KEEPING], 64, CLASSES),
    "mnasnet": lambda: MNASNet(0.35, CLASSES),
    "maxvit": lambda: MaxVit((SIDE, SIDE), 8, 2, [8, 16], [1, 4], 4, 0.0, num_classes=CLASSES),
}


def make(family: str, images: Tensor) -> nn.Module:
    """A network whose outputs differ from image to image, as if it were trained."""
    torch.manual_seed(0)
    plain = TINY[family]()
    momconv.calibrate(plain, [images])
    head = plain.get_submodule(find_head(plain)).get_parameter("weight")
    nn.init.normal_(head)
    with torch.no_grad():
        head.mul_(3 / plain.eval()(images).std())
    return plain


@pytest.mark.parametrize("family", TINY)
def test_calibration_brings_a_swapped_network_closer_and_keeps_it_exact(family: str) -> None:
    images = torch.randn(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    images = torch.cat([images, images[:6]])  # those held out: random weights do not generalise
    plain = make(family, images)
    model = momconv.convert(plain, stages="all", gain=False, inputs=[images[:2]])
    imitation = momconv.calibrate(model, [images] * 7, plain).imitation
    assert imitation is not None
    assert imitation.after < imitation.before

    def left_of_a_step(strategy: str) -> list[Tensor]:
        network = copy.deepcopy(model).train()
        momconv.set_strategy(network, strategy)  # type: ignore[arg-type]
        torch.manual_seed(1)
        network(images[:4]).square().sum().backward()
        return [p.grad for p in network.parameters() if p.grad is not None] + [*network.buffers()]

    assert all(map(torch.equal, left_of_a_step("auto"), left_of_a_step("store")))
