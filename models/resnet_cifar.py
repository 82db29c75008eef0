import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone, Part


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A): every other pixel, new channels zero."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.new_channels = stride, out_channels - in_channels

    def forward(self, maps: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        if self.stride > 1 or self.new_channels:
            half = self.new_channels // 2
            maps = F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(out + maps)


def resnet_cifar(depth: int = 32, width: int = 16) -> Backbone:
    """The residual network for 32 px images (He et al., 2016, section 4.2): three stages of ``width``, ``2 width`` and
    ``4 width`` channels, cut before the last. Depth 32 and width 16 have 0.46 M parameters, width 64 has 7.4 M."""
    blocks = (depth - 2) // 6
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    stages = (
        _stage(width, width, blocks, 1),
        _stage(width, 2 * width, blocks, 2),
        _stage(2 * width, 4 * width, blocks, 2),
    )
    layers = Part(*stem, *(block for stage in stages for block in stage), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    cut = len(stem) + 2 * blocks
    lower, upper = layers[:cut], layers[cut:]  # slices keep the numbers: no layer of one is named like one of the other
    return Backbone(lower, upper, 2 * width, 4 * width)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> list[BasicBlock]:
    return [BasicBlock(in_channels, out_channels, stride)] + [
        BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)
    ]
