"""Small nets in the style of ResNet, MobileNetV2 and DenseNet: what conversion meets in practice.

Every one takes ``(N, 3, H, W)`` images (H and W at least 8) and gives ``(N, classes)`` scores. The
norm layer is a parameter, so that the same net can be built natively or with another class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def conv_norm_act(
    norm: Norm,
    c_in: int,
    c_out: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm(c_out), act())


class BasicBlock(nn.Module):
    """ResNet's two-convolution block; the shortcut is projected where the shape changes."""

    def __init__(self, norm: Norm, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = norm(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = norm(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


class SmallResNet(nn.Module):
    """Three stages of one block; 9 batch norms."""

    def __init__(self, norm: Norm = nn.BatchNorm2d, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_norm_act(norm, 3, width)
        self.layer1 = nn.Sequential(BasicBlock(norm, width, width))
        self.layer2 = nn.Sequential(BasicBlock(norm, width, 2 * width, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(norm, 2 * width, 2 * width))
        self.head_norm = norm(2 * width)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.head_norm(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project without an activation."""

    def __init__(self, norm: Norm, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        self.use_shortcut = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            conv_norm_act(norm, c_in, hidden, kernel=1, act=nn.ReLU6),
            conv_norm_act(norm, hidden, hidden, stride=stride, groups=hidden, act=nn.ReLU6),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            norm(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class SmallMobileNet(nn.Module):
    """Three inverted residuals; 11 batch norms, odd channel counts among them."""

    def __init__(self, norm: Norm = nn.BatchNorm2d, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm_act(norm, 3, 6, act=nn.ReLU6),
            InvertedResidual(norm, 6, 9, 2, 3),
            InvertedResidual(norm, 9, 9, 1, 3),
            InvertedResidual(norm, 9, 12, 2, 2),
            conv_norm_act(norm, 12, 24, kernel=1, act=nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(24, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    """DenseNet's pre-activation layer: its output is appended to its input's channels."""

    def __init__(self, norm: Norm, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, 2 * growth, 1, bias=False)
        self.norm2 = norm(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(out)))], 1)


class SmallDenseNet(nn.Module):
    """A block of three dense layers, a transition, a 1-D norm in the head; 9 batch norms."""

    def __init__(
        self,
        norm: Norm = nn.BatchNorm2d,
        classes: int = 10,
        head_norm: Norm = nn.BatchNorm1d,
    ) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.block = nn.Sequential(*[DenseLayer(norm, 8 + 4 * i, 4) for i in range(3)])
        self.transition = nn.Sequential(
            norm(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)
        )
        self.last_norm = norm(10)
        self.head_norm = head_norm(10)
        self.fc = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last_norm(self.transition(self.block(self.conv0(x))))
        return self.fc(self.head_norm(torch.relu(x).mean((2, 3))))


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": SmallResNet,
    "mobilenet": SmallMobileNet,
    "densenet": SmallDenseNet,
}
