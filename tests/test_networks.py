"""Small networks of the kinds that use batch norm, converted, beside the same ones in torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnext


def conv_norm(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    """A convolution without bias and the batch norm that follows it."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """ResNet: batch norm before a sum, in place relu after it, and in the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(inputs, width, 1),
            nn.ReLU(inplace=True),
            conv_norm(width, width, 3, stride),
            nn.ReLU(inplace=True),
            conv_norm(width, 2 * width, 1),
        )
        self.shortcut = conv_norm(inputs, 2 * width, 1, stride)
        nn.init.zeros_(self.body[-1][1].weight)  # as ResNets begin: the gradient has to start it

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.body(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """MobileNet: depthwise convolution, clipped activations, a gate from pooled 1x1 planes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(conv_norm(width, 3 * width, 1), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(
            conv_norm(3 * width, 3 * width, groups=3 * width), nn.ReLU6()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv_norm(3 * width, 3 * width, 1), nn.Hardsigmoid()
        )
        self.project = conv_norm(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.gate(y))


class Dense(nn.Module):
    """DenseNet: norm before convolution, on concatenations that grow and are read again."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width + i * growth) for i in range(3))
        self.convs = nn.ModuleList(
            nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return x


class UNet(nn.Module):
    """One level down and up again, odd sizes, a layer of norm used at two places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = conv_norm(width, width)
        self.middle = conv_norm(width, width)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.norm = nn.BatchNorm2d(width, momentum=None)
        self.out = conv_norm(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        left = self.norm(F.leaky_relu(self.down(x), 0.1))
        middle = F.silu(self.middle(F.max_pool2d(left, 2)))
        right = self.norm(F.interpolate(self.up(middle), left.shape[2:]))
        return self.out(torch.cat([left, right], 1))


class Shuffle(nn.Module):
    """ShuffleNet: norm on slices and permutations of channels, without affine or statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = conv_norm(width // 2, width // 2, groups=width // 2)
        self.plain = nn.BatchNorm2d(width // 2, affine=False)
        self.batch = nn.BatchNorm2d(width, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.stack([self.plain(left), self.branch(right)], 2).flatten(1, 2)
        return self.batch(x.transpose(2, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: nn.Sequential(Bottleneck(8, 4, 1), Bottleneck(8, 6, 2)),
    "mobilenet": lambda: nn.Sequential(InvertedResidual(8), InvertedResidual(8)),
    "densenet": lambda: Dense(8, 4),
    "unet": lambda: UNet(8),
    "shufflenet": lambda: nn.Sequential(Shuffle(8), nn.ReLU(), Shuffle(8)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()]
    return nn.Sequential(*stem, NETWORKS[name]()).double()


def train(step: nn.Module, model: nn.Module, layout: torch.memory_format, device: str) -> list:
    """Losses of three steps of training, then parameters, statistics and an eval output."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    results: list[Tensor] = []
    for _ in range(3):
        x = torch.randn(4, 3, 13, 11, generator=generator, dtype=torch.float64).to(device)
        optimizer.zero_grad()
        y = step(x.contiguous(memory_format=layout))
        loss = (y - 0.5).square().mean() + y.diff(dim=3).abs().mean()
        loss.backward()
        optimizer.step()
        results.append(loss.detach())
    results += [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    model.eval()
    with torch.no_grad():
        results.append(step(x.contiguous(memory_format=layout)))
    return results


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Float64 throughout: three steps leave a few million roundings, each around 1e-16."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=number: f"result {n}: {m}"
        )


LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_training(name: str, layout: torch.memory_format, device: str) -> None:
    theirs = build(name).to(device).to(memory_format=layout)
    ours = bnext.convert(copy.deepcopy(theirs))
    same(train(ours, ours, layout, device), train(theirs, theirs, torch.contiguous_format, device))


@pytest.mark.parametrize("name", ["resnet", "unet", "shufflenet"])
def test_compiled_training(name: str, device: str) -> None:
    """In one graph each for training and eval, the weights of eager training."""
    torch._dynamo.reset()
    theirs = build(name).to(device)
    ours = bnext.convert(copy.deepcopy(theirs))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    layout = torch.contiguous_format
    same(train(compiled, ours, layout, device), train(theirs, theirs, layout, device))
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_exported(name: str, training: bool, device: str) -> None:
    """Exported, a network computes and updates what it did."""
    model = bnext.convert(build(name)).to(device).train(training)
    x = torch.randn(4, 3, 13, 11, dtype=torch.float64).to(device)
    program = torch.export.export(copy.deepcopy(model), (x,)).module()
    same([program(x)], [model(x)])
    same([program.get_buffer(name) for name, _ in model.named_buffers()], list(model.buffers()))
