"""torchvision's residual networks, cut before their last stage, where the generator works."""

from collections import OrderedDict

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from engine.errors import Refused


class Part(nn.Sequential):
    """Layers one after the other. Compiled once, they serve every number of rows: the generator's is another in every
    step, and a last batch is short."""

    def __call__(self, rows: Tensor) -> Tensor:
        if self._compiled_call_impl is not None:
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return super().__call__(rows)


def widened(layer: nn.Conv2d, inputs: tuple[Tensor]) -> Tensor | None:
    """Maps of one pixel with a zero on either side: what a padded convolution of stride 2 makes of them stays the same.

    Images of 16 px come to that. In bfloat16 oneDNN 3.13 (torch 2.15) leaves the gradient of weights that see nothing
    but padding as the memory was: numbers at random, or NaN.
    """
    (maps,) = inputs
    return F.pad(maps, (0, 1, 0, 1)) if maps.shape[2:] == (1, 1) else None


class Backbone(nn.Module):
    """Two parts: ``lower`` takes images to maps [B, C, H, W], ``upper`` takes maps to pooled features [B, D].

    ``map_channels`` is C, ``num_features`` is D. No tensor of one may be named like one of the other: ``--weights``
    knows both without their part, as torchvision names them.
    """

    def __init__(self, lower: Part, upper: Part, map_channels: int, num_features: int):
        super().__init__()
        if shared := lower.state_dict().keys() & upper.state_dict().keys():
            raise ValueError(f"lower and upper both have a tensor named {min(shared)}: weights could not be told apart")
        self.lower, self.upper = lower, upper
        self.map_channels, self.num_features = map_channels, num_features
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) and layer.padding != (0, 0):
                layer.register_forward_pre_hook(widened)

    def compile(self, **options) -> None:
        """`torch.compile` of the two parts, in place: parameters keep their names, and a copy is not compiled."""
        torch._functorch.config.donated_buffer = False  # SupCon's keys go back through the upper part twice
        for part in (self.lower, self.upper):
            part.compile(**options)


def torchvision_resnet(arch: str, stem: str = "imagenet", pretrained: bool = False) -> Backbone:
    """torchvision's ``arch``, one of its ``resnet*`` or ``resnext*``; ``pretrained`` downloads its default weights.

    The ``small`` stem keeps the resolution of small images: a 3x3 convolution with stride 1 and no pooling.
    """
    try:
        resnet = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None)
    except (OSError, RuntimeError) as error:  # the latter: a part of the file has arrived
        raise Refused(
            f"--pretrained: cannot download weights of {arch} ({error}); give a local file: --weights"
        ) from None
    if stem == "small":
        resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
        resnet.maxpool = nn.Identity()
    layers = OrderedDict(resnet.named_children())  # torchvision's names, so that its weights load as they are
    num_features = layers.pop("fc").in_features
    upper = OrderedDict((name, layers.pop(name)) for name in ("layer4", "avgpool"))
    upper["flatten"] = nn.Flatten()
    return Backbone(Part(layers), Part(upper), num_features // 2, num_features)
