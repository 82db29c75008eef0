"""AutoAugment, RandAugment and TrivialAugment with torchvision's tables and operations, as functions of draws.

torchvision draws from the global generator, image by image. Here an image's row of draws says which operations it gets,
and each operation is done once for all images that have drawn it with the same magnitude: on small images one costs
about the same for one as for fifty.
"""

from collections import defaultdict

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from data.transforms import FIRST, FIRST_SIGN, OPERATION, SECOND, SECOND_SIGN, SMALL

POLICIES = ("autoaugment", "randaugment", "trivialaugment")
AUGMENTATIONS = (*POLICIES, "cutout")
NOTHING = ("Identity", 0.0)


class Policy:
    """One of `POLICIES` for images of ``size`` px, with torchvision's default settings.

    Cubuk et al., "AutoAugment", 2019: one of 25 pairs of operations, up to 64 px those found on CIFAR-10, else those
    found on ImageNet. Cubuk et al., "RandAugment", 2020: two operations of 14, magnitude 9 of 30. Mueller and Hutter,
    "TrivialAugment", 2021: one operation of 14 with any of 31 magnitudes.
    """

    def __init__(self, name: str, size: int):
        self.name = name
        found_on = v2.AutoAugmentPolicy.CIFAR10 if size <= SMALL else v2.AutoAugmentPolicy.IMAGENET
        build = {
            "autoaugment": lambda: v2.AutoAugment(found_on),
            "randaugment": v2.RandAugment,
            "trivialaugment": v2.TrivialAugmentWide,
        }
        self.theirs = build[name]()
        bins = 10 if name == "autoaugment" else self.theirs.num_magnitude_bins
        space = self.theirs._AUGMENTATION_SPACE
        tables = {operation: (values(bins, size, size), signed) for operation, (values, signed) in space.items()}
        self.magnitudes = {name: (None if t is None else t.tolist(), signed) for name, (t, signed) in tables.items()}
        self.operations = list(space)

    def plan(self, draws: list[float]) -> list[tuple[str, float]]:
        """The operations, with their magnitudes, that an image with ``draws`` gets; equally many for all images."""
        if self.name == "autoaugment":
            pair = self.theirs._policies[int(draws[OPERATION] * len(self.theirs._policies))]
            return [
                self._step(operation, level, draws[sign]) if draws[applied] < probability else NOTHING
                for (operation, probability, level), applied, sign in zip(
                    pair, (FIRST, SECOND), (FIRST_SIGN, SECOND_SIGN), strict=True
                )
            ]
        if self.name == "randaugment":
            return [
                self._step(self._drawn(draws[chosen]), self.theirs.magnitude, draws[sign])
                for chosen, sign in ((FIRST, FIRST_SIGN), (SECOND, SECOND_SIGN))
            ]
        level = int(draws[FIRST] * self.theirs.num_magnitude_bins)
        return [self._step(self._drawn(draws[OPERATION]), level, draws[FIRST_SIGN])]

    def _drawn(self, draw: float) -> str:
        return self.operations[int(draw * len(self.operations))]

    def _step(self, operation: str, level: int | None, sign: float) -> tuple[str, float]:
        values, signed = self.magnitudes[operation]
        if values is None:
            return operation, 0.0
        return operation, -values[level] if signed and sign < 0.5 else values[level]

    def transformed(self, image: Tensor | Image.Image, operation: str, magnitude: float) -> Tensor | Image.Image:
        theirs = self.theirs
        return theirs._apply_image_or_video_transform(
            image, operation, magnitude, interpolation=theirs.interpolation, fill=theirs._fill
        )

    def on_image(self, image: Image.Image, draws: list[float]) -> Image.Image:
        for operation, magnitude in self.plan(draws):
            image = self.transformed(image, operation, magnitude)
        return image

    def on_batch(self, images: Tensor, draws: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to the same; what becomes of an image does not depend on the others."""
        images = images.clone()
        for step in zip(*(self.plan(row) for row in draws.tolist()), strict=True):
            rows = defaultdict(list)
            for row, drawn in enumerate(step):
                rows[drawn].append(row)
            rows.pop(NOTHING, None)
            for (operation, magnitude), same in rows.items():
                index = torch.tensor(same, device=images.device)
                images[index] = self.transformed(images[index], operation, magnitude)
        return images
