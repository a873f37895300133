"""The nets whose layers are measured, built as torchvision builds them, without torchvision.

Each takes (N, 3, H, W) images and returns (N, 1000) scores. Numbers and shapes of parameters and of
batch norms are torchvision's. For training torchvision itself is used where it can be imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .options import first_line


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, of which type checkers do not know that it is a tensor."""
    y: Tensor = module(x)
    return y


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


class _Residual(nn.Module):
    """A residual block (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        c_out = 4 * width if bottleneck else width
        self.relu = nn.ReLU(inplace=True)
        if bottleneck:
            self.conv1, self.bn1 = _conv(c_in, width, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = _conv(width, c_out, 1), nn.BatchNorm2d(c_out)
        else:
            self.conv1, self.bn1 = _conv(c_in, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            out = self.bn3(self.conv3(self.relu(out)))
        out += x if self.downsample is None else self.downsample(x)
        return _call(self.relu, out)


class ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, layers = 64, []
        for stage, count in enumerate(blocks):
            for i in range(count):
                width, stride = 64 << stage, 2 if stage and not i else 1
                layers.append(_Residual(channels, width, stride, bottleneck))
                channels = 4 * width if bottleneck else width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return _call(self.fc, self.layers(x).mean((2, 3)))


class _Inverted(nn.Module):
    """An inverted residual block (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, c_in: int, c_out: int, stride: int, widen: int) -> None:
        super().__init__()
        width = c_in * widen
        layers = [] if widen == 1 else [*_conv_norm_relu6(c_in, width, 1)]
        layers += _conv_norm_relu6(width, width, 3, stride, width)
        self.layers = nn.Sequential(*layers, _conv(width, c_out, 1), nn.BatchNorm2d(c_out))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out = _call(self.layers, x)
        return x + out if self.shortcut else out


def _conv_norm_relu6(
    c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> Iterator[nn.Module]:
    yield _conv(c_in, c_out, kernel, stride, groups)
    yield nn.BatchNorm2d(c_out)
    yield nn.ReLU6(inplace=True)


class MobileNetV2(nn.Module):
    STAGES = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip  # how much wider, channels, blocks, stride

    def __init__(self) -> None:
        super().__init__()
        layers, channels = [*_conv_norm_relu6(3, 32, 3, 2)], 32
        for widen, c_out, count, stride in self.STAGES:
            for i in range(count):
                layers.append(_Inverted(channels, c_out, 1 if i else stride, widen))
                channels = c_out
        layers += _conv_norm_relu6(channels, 1280, 1)
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return _call(self.classifier, self.layers(x).mean((2, 3)))


class _Dense(nn.Module):
    """A dense layer (Huang et al. 2016, arXiv:1608.06993) with a growth rate of 32 channels."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), _conv(c_in, 128, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(128), _conv(128, 32, 3)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(out)))], 1)


class DenseNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        channels = 64
        for stage, count in enumerate(blocks):
            for _ in range(count):
                layers.append(_Dense(channels))
                channels += 32
            layers.append(nn.BatchNorm2d(channels))
            if stage < len(blocks) - 1:
                layers += [nn.ReLU(inplace=True), _conv(channels, channels // 2, 1)]
                layers.append(nn.AvgPool2d(2))
                channels //= 2
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return _call(self.classifier, F.relu(self.layers(x)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: ResNet((3, 4, 6, 3), bottleneck=True),
    "mobilenet_v2": MobileNetV2,
    "densenet121": lambda: DenseNet((6, 12, 24, 16)),
}


def build(name: str) -> tuple[nn.Module, str]:
    """The net of that name, and where it is from: torchvision if it can be imported, else this
    file."""
    try:
        models = importlib.import_module("torchvision.models")
        version = importlib.import_module("torchvision").__version__
    except (ImportError, RuntimeError):  # RuntimeError: compiled for another torch
        return NETS[name](), "bench.nets"
    return getattr(models, name)(), f"torchvision {version}"


def batch_norm_inputs(
    name: str, batch: int, size: int = 224, *, training: bool = True
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and input shape of each batch norm of a net, in order of execution.

    The net runs on the meta device, so only shapes are computed.

    Raises:
        ValueError: the net cannot take such a batch: its images are too small, or in training a
            batch norm gets one value per channel.
    """
    with torch.device("meta"):
        net = NETS[name]().train(training)
    seen: list[tuple[str, tuple[int, ...]]] = []
    for path, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, args, path=path: seen.append((path, tuple(args[0].shape)))
            )
    try:
        net(torch.empty(batch, 3, size, size, device="meta"))
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        what = f"{batch} image{'s' * (batch > 1)} of {size}x{size}"
        use = "be trained on" if training else "take"
        raise ValueError(f"{name} cannot {use} {what}: {first_line(error)}") from None
    return seen
