"""Two networks in plain torch.nn: ResNet-50, and a small detector on a pyramid of features.

They stand for what batch norm is used in; nothing here knows of bnext.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut (He et al., 2015; stride in the 3×3)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            conv_bn(inputs, width),
            nn.ReLU(inplace=True),
            conv_bn(width, width, 3, stride),
            nn.ReLU(inplace=True),
            conv_bn(width, outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet_stages(blocks: Sequence[int]) -> nn.ModuleList:
    """The stem and the four stages; stage i has 256·2^i channels at a stride of 4·2^i."""
    stem = nn.Sequential(conv_bn(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    stages, inputs = nn.ModuleList(), 64
    for number, count in enumerate(blocks):
        width = 64 * 2**number
        layers: list[nn.Module] = [] if number else [stem]
        for index in range(count):
            layers.append(Bottleneck(inputs, width, 2 if number and not index else 1))
            inputs = 4 * width
        stages.append(nn.Sequential(*layers))
    return stages


class ResNet50(nn.Module):
    """53 batch norms, 25.6 million parameters with 1000 classes."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stages = resnet_stages((3, 4, 6, 3))
        self.head = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))

    def loss(self, x: Tensor) -> Tensor:
        """Cross entropy for targets made from the image's number."""
        logits = self(x)
        target = logits.new_zeros(len(x)).long()
        return F.cross_entropy(logits, target)


class Detector(nn.Module):
    """One stage, one look: a backbone, a top-down pyramid and a shared head of scores and boxes.

    Few images with large planes, as in detection, so that batch norm has few values per channel
    where it is deep and large planes where it is shallow.
    """

    def __init__(self, width: int = 64, anchors: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn(3, width // 4, 3, 2),
            nn.SiLU(),
            conv_bn(width // 4, width // 2, 3, 2),
            nn.SiLU(),
        )
        sizes = (width, 2 * width, 4 * width)
        before = (width // 2, *sizes[:-1])
        self.levels = nn.ModuleList(
            nn.Sequential(conv_bn(a, b, 3, 2), nn.SiLU(), conv_bn(b, b, 3), nn.SiLU())
            for a, b in zip(before, sizes, strict=True)
        )
        self.lateral = nn.ModuleList(conv_bn(size, width) for size in sizes)
        self.head = nn.Sequential(
            conv_bn(width, width, 3), nn.SiLU(), nn.Conv2d(width, anchors * 5, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        above: Tensor | None = None
        results = []
        for lateral, features in zip(reversed(self.lateral), reversed(maps), strict=True):
            merged = lateral(features)
            if above is not None:
                merged = merged + F.interpolate(above, size=merged.shape[2:], mode="nearest")
            above = merged
            results.append(self.head(merged))
        return results

    def loss(self, x: Tensor) -> Tensor:
        """Something to differentiate: all scores towards 0, all boxes towards 1."""
        total = x.new_zeros(())
        for found in self(x):
            scores, boxes = found.unflatten(1, (-1, 5)).split((1, 4), dim=2)
            total = (
                total
                + F.softplus(scores).mean()
                + F.smooth_l1_loss(boxes, boxes.new_ones(()).expand_as(boxes))
            )
        return total


NETWORKS: dict[str, type[nn.Module]] = {"resnet50": ResNet50, "detector": Detector}
