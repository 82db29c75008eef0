"""Augmentation as pure functions of images and of uniform draws, and the fixed view for evaluation.

Each image has one row of `DRAWS` numbers in [0, 1) that says all that is random about it, so that a batch does not
depend on who computes it: one process or many, in one run or resumed.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SMALL = 64  # px: up to here images are cropped with padding, above by random resized crops
# one uniform number each: crop position, crop area and aspect ratio, mirroring, colour jitter
DRAWS = ("top", "left", "area", "ratio", "flip", "brightness", "contrast", "saturation")
TOP, LEFT, AREA, RATIO, FLIP, BRIGHTNESS, CONTRAST, SATURATION = range(len(DRAWS))
# and, where `--augment` asks for it: a policy's operations, whether or which, and their signs; cutout's centre
POLICY_DRAWS = ("operation", "first", "second", "first_sign", "second_sign", "hole_top", "hole_left")
OPERATION, FIRST, SECOND, FIRST_SIGN, SECOND_SIGN, HOLE_TOP, HOLE_LEFT = range(
    len(DRAWS), len(DRAWS) + len(POLICY_DRAWS)
)
JITTER = 0.4  # factors in [0.6, 1.4], as in the original suite

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fixed_view(image: Image.Image, size: int) -> Image.Image:
    """What evaluation sees: the centre square of the image, its short side resized.

    Above 64 px the short side becomes 256/224 of ``size``, else ``size``; a small square of that size stays as it is.
    """
    image = middle(image)
    short = short_side(size)
    width, height = image.size
    if min(width, height) != short:
        factor = short / min(width, height)
        width, height = max(size, round(width * factor)), max(size, round(height * factor))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def middle(image: Image.Image, longest: int = 8) -> Image.Image:
    """The middle of an image whose long side is more than ``longest`` times its short one, which is all of it that
    `fixed_view` can see: a line of a pixel would be enlarged beyond all memory."""
    width, height = (min(side, longest * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image


def short_side(size: int) -> int:
    """Of the image of whose middle `fixed_view` is the centre square, in px."""
    return round(size * 256 / 224) if size > SMALL else size


def random_resized_crop(image: Image.Image, size: int, draws: list[float]) -> Image.Image:
    """A crop of 8 to 100 % of the area and aspect ratio 3/4 to 4/3, no longer than a side, resized to ``size``."""
    area, ratio = crop_shape(draws)
    width = min(math.sqrt(area * ratio * image.width * image.height), image.width)
    height = min(math.sqrt(area / ratio * image.width * image.height), image.height)
    left, top = draws[LEFT] * (image.width - width), draws[TOP] * (image.height - height)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def crop_shape(draws: list[float]) -> tuple[float, float]:
    """Share of the image's area, uniform in [0.08, 1), and width / height, log-uniform in [3/4, 4/3)."""
    return 0.08 + 0.92 * draws[AREA], (4 / 3) ** (2 * draws[RATIO] - 1)


def smallest_useful_side(size: int, draws: list[float]) -> int:
    """How many pixels a side must keep for `random_resized_crop` never to enlarge what the file has in full."""
    area, ratio = crop_shape(draws)
    return math.ceil(size / math.sqrt(area * min(ratio, 1 / ratio)))


def padded_crop(images: Tensor, draws: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] shifted by up to an eighth of S each way, black where nothing is left."""
    size = images.shape[-1]
    margin = size // 8
    top, left = (draws[:, TOP : LEFT + 1] * (2 * margin + 1)).long().unbind(1)  # [B] in 0..2 margin
    crops = F.pad(images, [margin] * 4).unfold(2, size, 1).unfold(3, size, 1)  # all of them, without a copy
    return crops[torch.arange(len(images), device=images.device), :, top, left]


def mirrored(images: Tensor, draws: Tensor) -> Tensor:
    """Half of the images flipped left to right."""
    rows = torch.arange(len(images), device=images.device) + len(images) * (draws[:, FLIP] < 0.5)
    return torch.cat([images, images.flip(3)]).index_select(0, rows)  # whole images are copied: faster than where()


def colour_jitter_(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation of float images in [0, 1], in place, in this order, each by its own
    factor."""
    factors = 1 + JITTER * (2 * draws[:, BRIGHTNESS : SATURATION + 1, None, None, None] - 1)  # [B, 3, 1, 1, 1]
    brightness, contrast, saturation = factors.unbind(1)
    images.mul_(brightness).clamp_(0, 1)
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    grey = _grey(images)
    return images.mul_(saturation).add_(grey * (1 - saturation)).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def cutout(images: Tensor, draws: Tensor) -> Tensor:
    """A black square of half the side around a point anywhere in the image, cut off at the border (DeVries and Taylor,
    "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, where it is 16 of 32 px)."""
    size = images.shape[-1]
    centers = (draws[:, HOLE_TOP : HOLE_LEFT + 1, None] * size).long()  # [B, 2, 1]
    distance = torch.arange(size, device=images.device) - centers
    inside = (distance >= -(size // 4)) & (distance < size // 4)  # [B, 2, S]
    return images.masked_fill(inside[:, 0, None, :, None] & inside[:, 1, None, None, :], 0)


class Mixing(NamedTuple):
    """How the images of a batch are mixed, each with the one after it, and the last with the first."""

    share: float  # of the image itself; the other has the rest
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right of what the other covers; None: they blend


def mixed(images: Tensor, mixing: Mixing) -> Tensor:
    """mixup (Zhang et al., 2018) or, with a box, CutMix (Yun et al., 2019) of a batch."""
    others = images.roll(-1, dims=0)
    if mixing.box is None:
        return torch.lerp(others, images, mixing.share)
    top, bottom, left, right = mixing.box
    images = images.clone()
    images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images


def cutmix_box(share: float, size: int, center: tuple[float, float]) -> Mixing:
    """A box of about ``1 - share`` of the area around ``center`` (in [0, 1)), cut off at the border: the share becomes
    that of the pixels that are left."""
    half = int(size * math.sqrt(1 - share)) // 2
    spans = [(max(0, int(at * size) - half), min(size, int(at * size) + half)) for at in center]
    (top, bottom), (left, right) = spans
    return Mixing(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def normalized_(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Float images in [0, 1] minus mean, over standard deviation, by channel, in place."""
    means, deviations = (_by_channel(values, images.device, images.dtype) for values in (mean, std))
    return images.sub_(means).div_(deviations)


@functools.cache  # a copy to a device would make each batch wait for it
def _by_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]
