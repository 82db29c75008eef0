"""The batches of an epoch, on the device: augmented for training, as they are for evaluation."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import transforms
from data.augment import POLICIES, Policy
from data.folders import Split
from data.pixel_sources import DecodedImages, RandomCrops, WorkerPool, decoded_bytes, fixed_views
from data.samplers import batch_bounds, epoch_draws, epoch_mixings, epoch_order, policy_draws
from engine import distributed
from engine.transfer import to_device

CACHE_LIMIT = 2e9  # bytes of decoded images kept in memory
POLICY_IMAGES = 2048  # to which a policy is applied at once
IN_CACHE = 2**22  # bytes of images that a CPU handles at a time: all that is done to a pixel is done in its cache


class Batch(NamedTuple):
    images: Tensor  # float [V * B, 3, S, S], normalised, view by view
    targets: Tensor  # [V * B]
    indices: Tensor  # [V * B] positions in the split, on the CPU
    mixed_targets: Tensor | None = None  # [V * B] of the images mixed into these
    share: float = 1.0  # of an image in its mixture
    # where synthetic images are in use, and None elsewhere: what an image counts in the losses, and whether it is real
    weights: Tensor | None = None  # [V * B]
    real: Tensor | None = None  # bool [V * B]
    mixed_weights: Tensor | None = None  # [V * B], and whether they are real: of the images mixed into these
    mixed_real: Tensor | None = None


class Pixels(NamedTuple):
    """How pixels reach the model: side in px, channel means and standard deviations of images in [0, 1]."""

    size: int
    mean: tuple[float, ...] = transforms.IMAGENET_MEAN
    std: tuple[float, ...] = transforms.IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """What evaluation feeds the model for an RGB image: float [3, S, S], normalised."""
        view = np.array(transforms.fixed_view(image, self.size))
        return self.normalized_(torch.from_numpy(view).permute(2, 0, 1) / 255)

    def normalized_(self, images: Tensor) -> Tensor:
        return transforms.normalized_(images, self.mean, self.std)


class TrainingLoader:
    """Augmented batches. What an epoch holds depends on its number and the seed alone, not on workers or devices.

    Up to 64 px images are cropped with padding in one operation on the device; larger ones are random resized crops
    made by worker processes, and the device jitters their colours. With two views every image comes twice.
    ``augment`` names `AUGMENTATIONS`: one policy, cutout, or both. ``mixup`` and ``cutmix`` are the A of Beta(A, A);
    each process mixes its own rows, of a single view, after all else. ``synthetic`` images come after those of
    ``split`` and count ``synthetic_weight`` in the losses; the samplers then draw a class by its ``class_counts``.
    """

    def __init__(
        self,
        split: Split,
        pixels: Pixels,
        batch_size: int,
        seed: int,
        device: torch.device,
        flips: bool = True,
        views: int = 1,
        workers: int = 0,
        cache_limit: float = CACHE_LIMIT,
        augment: tuple[str, ...] = (),
        mixup: float | None = None,
        cutmix: float | None = None,
        synthetic: Split | None = None,
        synthetic_weight: float = 1.0,
        class_counts: list[int] | None = None,
    ):
        self.weights = self.real = self.class_counts = None
        if synthetic is not None:
            self.real = torch.arange(len(split.paths) + len(synthetic.paths)) < len(split.paths)
            self.weights = torch.where(self.real, 1.0, synthetic_weight)
            self.class_counts = torch.tensor(class_counts, dtype=torch.double)
            split = Split(split.paths + synthetic.paths, split.targets + synthetic.targets)
        self.paths, self.targets = split.paths, torch.tensor(split.targets)
        self.augment, self.mixup, self.cutmix = augment, mixup, cutmix
        self.policy = next((Policy(name, pixels.size) for name in augment if name in POLICIES), None)
        self.bounds = batch_bounds(len(split.paths), batch_size, smallest=2 * distributed.world_size())
        self.sizes = [stop - start for start, stop in self.bounds]  # images of each batch, of all processes
        self.pixels, self.seed, self.device, self.flips, self.views = pixels, seed, device, flips, views
        self.small = pixels.size <= transforms.SMALL
        if self.small:
            self.source = fixed_views(split.paths, pixels.size, workers, device, cache_limit)
        else:
            decoded = DecodedImages(split.paths, workers) if decoded_bytes(split.paths) <= cache_limit else None
            self.source = WorkerPool(RandomCrops(split.paths, pixels.size, decoded, self.policy), workers, device)

    def __len__(self) -> int:
        return len(self.bounds)

    def epoch(self, epoch: int, sampler: str = "uniform", first_batch: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``first_batch`` on: this process's share of each."""
        batches = self.unmixed(epoch, sampler, slice(first_batch, None))
        return self.with_mixing(batches, epoch, first_batch) if self.mixup or self.cutmix else batches

    def unmixed(self, epoch: int, sampler: str, part: slice) -> Iterator[Batch]:
        """A ``part`` of the batches of ``epoch``, before their images are mixed."""
        order = epoch_order(self.targets, sampler, self.seed, epoch, self.class_counts)
        draws = epoch_draws(self.views * len(order), self.seed, epoch)
        if self.augment:
            draws = torch.cat([draws, policy_draws(len(draws), self.seed, epoch)], dim=1)
        draws = draws.view(self.views, len(order), -1)
        rank, step = distributed.rank(), distributed.world_size()
        own = [slice(start + rank, stop, step) for start, stop in self.bounds[part]]
        indices = [order[rows].repeat(self.views) for rows in own]
        draws = [draws[:, rows].flatten(0, 1) for rows in own]
        shown = self.cropped_batches(indices, draws)
        if self.policy is not None and self.small:
            shown = self.with_policy(shown)
        return self.coloured_batches(shown, indices)

    def cropped_batches(self, indices: list[Tensor], draws: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images of each batch, cropped and mirrored, with the draws for them, on the device."""
        if self.small:
            keys = (batch.tolist() for batch in indices)
        else:
            keys = (list(zip(i.tolist(), d.tolist(), strict=True)) for i, d in zip(indices, draws, strict=True))
        for images, numbers in zip(self.source.read(keys), draws, strict=True):
            numbers = to_device(numbers, self.device)
            yield self.in_parts(self.cropped, to_device(images, self.device), numbers), numbers

    def coloured_batches(self, shown: Iterator[tuple[Tensor, Tensor]], indices: list[Tensor]) -> Iterator[Batch]:
        for (images, numbers), batch in zip(shown, indices, strict=True):
            yield Batch(
                self.in_parts(self.coloured, images, numbers),
                self.rows_of(self.targets, batch),
                batch,
                weights=self.rows_of(self.weights, batch),
                real=self.rows_of(self.real, batch),
            )

    def rows_of(self, values: Tensor | None, batch: Tensor) -> Tensor | None:
        return None if values is None else to_device(values[batch], self.device)

    def in_parts(self, function: Callable[[Tensor, Tensor], Tensor], images: Tensor, draws: Tensor) -> Tensor:
        """``function`` of as many images at a time as the cache of a CPU holds."""
        number = len(images) if images.device.type != "cpu" else max(1, IN_CACHE // (12 * self.pixels.size**2))
        parts = zip(images.split(number), draws.split(number), strict=True)
        return torch.cat([function(*part) for part in parts])

    def cropped(self, images: Tensor, draws: Tensor) -> Tensor:
        """uint8 images cropped, which has been done for larger ones, and mirrored."""
        if self.small:
            images = transforms.padded_crop(images, draws)
        return transforms.mirrored(images, draws) if self.flips else images

    def with_policy(self, shown: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images after `Policy`, in the same batches."""
        while some := list(islice(shown, max(1, POLICY_IMAGES * len(self) // len(self.paths)))):
            images, draws = (torch.cat(tensors) for tensors in zip(*some, strict=True))
            images = self.policy.on_batch(images, draws)
            yield from zip(images.split([len(each) for each, _ in some]), (numbers for _, numbers in some), strict=True)

    def coloured(self, images: Tensor, draws: Tensor) -> Tensor:
        """uint8 images to what the model is fed."""
        images = images / 255
        if not self.small:
            images = transforms.colour_jitter_(images, draws)
        if "cutout" in self.augment:
            images = transforms.cutout(images, draws)
        return self.pixels.normalized_(images)

    def with_mixing(self, batches: Iterator[Batch], epoch: int, first_batch: int) -> Iterator[Batch]:
        mixings = epoch_mixings(len(self), self.seed, epoch, self.mixup, self.cutmix, self.pixels.size)
        for batch, mixing in zip(batches, mixings[first_batch:], strict=True):
            others = {
                f"mixed_{name}": rows.roll(-1)
                for name in ("targets", "weights", "real")
                if (rows := getattr(batch, name)) is not None
            }
            yield batch._replace(images=transforms.mixed(batch.images, mixing), share=mixing.share, **others)


class EvaluationLoader:
    """The batches of a split in the view of `transforms.fixed_view`, without augmentation: this process's share."""

    def __init__(
        self,
        split: Split,
        pixels: Pixels,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        cache_limit: float = CACHE_LIMIT,
    ):
        images = list(range(len(split.paths)))
        # with fewer images than processes some look at the first image too; `predict` counts each once
        self.own = images[distributed.rank() :: distributed.world_size()] or images[:1]
        self.targets = torch.tensor(split.targets, dtype=torch.long)
        self.bounds = batch_bounds(len(self.own), batch_size, smallest=1)
        self.pixels, self.device = pixels, device
        self.source = fixed_views([split.paths[i] for i in self.own], pixels.size, workers, device, cache_limit)

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[Batch]:
        keys = [list(range(start, stop)) for start, stop in self.bounds]
        for images, batch in zip(self.source.read(keys), keys, strict=True):
            images = self.pixels.normalized_(to_device(images, self.device) / 255)
            indices = torch.tensor([self.own[i] for i in batch], dtype=torch.long)
            yield Batch(images, to_device(self.targets[indices], self.device), indices)
