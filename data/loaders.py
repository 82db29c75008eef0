"""Batches on the device: from memory where the decoded images fit, else decoded by worker processes."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import transforms
from data.augment import POLICIES, Policy
from data.folders import Split
from data.images import MAX_PIXELS, read_image
from data.samplers import batch_bounds, epoch_draws, epoch_mixings, epoch_order, policy_draws
from engine import distributed
from engine.errors import Failed, Refused

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
    each process mixes its own rows, after all else. ``synthetic`` images come after those of ``split`` and count
    ``synthetic_weight`` in the losses; the samplers then draw a class by its ``class_counts``.
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
        order = epoch_order(self.targets, sampler, self.seed, epoch, self.class_counts)
        draws = epoch_draws(self.views * len(order), self.seed, epoch)
        if self.augment:
            draws = torch.cat([draws, policy_draws(len(draws), self.seed, epoch)], dim=1)
        draws = draws.view(self.views, len(order), -1)
        rank, step = distributed.rank(), distributed.world_size()
        own = [slice(start + rank, stop, step) for start, stop in self.bounds[first_batch:]]
        indices = [order[rows].repeat(self.views) for rows in own]
        draws = [draws[:, rows].flatten(0, 1) for rows in own]
        if self.small:
            keys = (batch.tolist() for batch in indices)
        else:
            keys = (list(zip(i.tolist(), d.tolist(), strict=True)) for i, d in zip(indices, draws, strict=True))
        shown = (
            (self.in_parts(self.cropped, images.to(self.device, non_blocking=True), numbers), numbers)
            for images, numbers in zip(
                self.source.read(keys), (rows.to(self.device, non_blocking=True) for rows in draws), strict=True
            )
        )
        if self.policy is not None and self.small:
            shown = self.with_policy(shown)
        batches = (
            Batch(self.in_parts(self.coloured, images, numbers), self.rows_of(self.targets, batch), batch)._replace(
                weights=self.rows_of(self.weights, batch), real=self.rows_of(self.real, batch)
            )
            for (images, numbers), batch in zip(shown, indices, strict=True)
        )
        return batches if self.mixup is None and self.cutmix is None else self.with_mixing(batches, epoch, first_batch)

    def rows_of(self, values: Tensor | None, batch: Tensor) -> Tensor | None:
        return None if values is None else values[batch].to(self.device, non_blocking=True)

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
            views = batch.images.unflatten(0, (self.views, -1))
            images = torch.cat([transforms.mixed(view, mixing) for view in views])
            others = {
                f"mixed_{name}": rows.view(self.views, -1).roll(-1, dims=1).flatten()
                for name in ("targets", "weights", "real")
                if (rows := getattr(batch, name)) is not None
            }
            yield batch._replace(images=images, share=mixing.share, **others)


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
            images = self.pixels.normalized_(images.to(self.device, non_blocking=True) / 255)
            indices = torch.tensor([self.own[i] for i in batch], dtype=torch.long)
            yield Batch(images, self.targets[indices].to(self.device), indices)


class CachedViews:
    """The fixed view of every image, decoded once: uint8 [N, 3, S, S] on the device."""

    def __init__(self, paths: list[Path], size: int, workers: int, device: torch.device):
        views = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

        def store(index: int, path: Path) -> None:
            views.numpy()[index] = np.asarray(transforms.fixed_view(read_image(path), size)).transpose(2, 0, 1)

        decode_all(paths, store, workers)
        self.views = views.to(device)

    def read(self, batches: Iterable[list[int]]) -> Iterator[Tensor]:
        for indices in batches:
            yield self.views[torch.tensor(indices).to(self.views.device, non_blocking=True)]


class WorkerPool:
    """Worker processes that read batches of ``dataset`` in the order asked for, and live through all epochs."""

    def __init__(self, dataset: Dataset, workers: int, device: torch.device):
        self.batches = _GivenBatches()
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def read(self, batches: Iterable[list]) -> Iterator[Tensor]:
        self.batches.batches = batches
        for images in self.loader:
            if isinstance(images, str):
                raise Failed(images)
            yield images


class FixedViews(Dataset):
    """`transforms.fixed_view` of every image; a key is an index."""

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.size = paths, size

    def __getitems__(self, indices: list[int]) -> Tensor | str:
        return read_batch(indices, lambda i: transforms.fixed_view(read_image(self.paths[i]), self.size))


class RandomCrops(Dataset):
    """Random resized crops; a key is an index and the draws for it. ``decoded`` images spare the files.

    Without them a JPEG is decoded at the smallest of its scales that the crop allows: a few grey levels of difference.
    A ``policy`` is applied to the crops.
    """

    def __init__(self, paths: list[Path], size: int, decoded: "DecodedImages | None", policy: Policy | None = None):
        self.paths, self.size, self.decoded, self.policy = paths, size, decoded, policy

    def __getitems__(self, keys: list[tuple[int, list[float]]]) -> Tensor | str:
        return read_batch(keys, self.crop)

    def crop(self, key: tuple[int, list[float]]) -> Image.Image:
        index, draws = key
        if self.decoded is not None:
            image = self.decoded[index]
        else:
            image = read_image(self.paths[index], transforms.smallest_useful_side(self.size, draws))
        image = transforms.random_resized_crop(image, self.size, draws)
        return image if self.policy is None else self.policy.on_image(image, draws)


class DecodedImages:
    """All images in one block of memory, which worker processes share."""

    def __init__(self, paths: list[Path], workers: int):
        sizes = torch.tensor([image_size(path) or (0, 0) for path in paths])
        sizes[sizes.prod(dim=1) > MAX_PIXELS] = 0  # is refused when it is read
        self.ends = (3 * sizes.prod(dim=1)).cumsum(0)
        self.shapes = torch.empty(len(paths), 2, dtype=torch.int64)  # height, width as seen: a turned image's differ
        self.block = torch.empty(int(self.ends[-1]), dtype=torch.uint8).share_memory_()

        def store(index: int, path: Path) -> None:
            image = read_image(path)
            if image.width * image.height != int(sizes[index].prod()):
                raise Refused(f"{path} is not of the size that its header says; save it again")
            self.shapes[index] = torch.tensor((image.height, image.width))
            self.pixels(index).numpy()[:] = np.asarray(image)

        decode_all(paths, store, workers)

    def pixels(self, index: int) -> Tensor:
        (height, width), end = self.shapes[index].tolist(), int(self.ends[index])
        return self.block[end - 3 * height * width : end].view(height, width, 3)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels(index).numpy())


class _GivenBatches:
    """A batch sampler that yields the batches it was given last."""

    def __init__(self):
        self.batches: Iterable[list] = ()

    def __iter__(self) -> Iterator[list]:
        return iter(self.batches)


def _leave_signals_to_the_main_process(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill workers that an exception keeps alive: Python would send SIGTERM, which they ignore, and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _unchanged(batch: Tensor | str) -> Tensor | str:
    return batch


def fixed_views(paths: list[Path], size: int, workers: int, device: torch.device, cache_limit: float):
    """The fixed views of ``paths``, from memory where they fit."""
    if len(paths) * 3 * size**2 <= cache_limit:
        return CachedViews(paths, size, workers, device)
    return WorkerPool(FixedViews(paths, size), workers, device)


def read_batch(keys: list, read: Callable) -> Tensor | str:
    """uint8 [B, 3, S, S], or what is wrong with a file: an exception would bring a worker's traceback along."""
    try:
        return torch.from_numpy(np.stack([np.asarray(read(key)) for key in keys])).permute(0, 3, 1, 2).contiguous()
    except Refused as error:
        return str(error)


def decode_all(paths: list[Path], store: Callable[[int, Path], None], workers: int) -> None:
    """``store`` with each position and path, in threads (decoders leave Python's lock); `Refused` with all broken
    files. Each goes where it will stay: a list of them would take as much memory again."""

    def attempt(index: int, path: Path) -> str:
        try:
            store(index, path)
        except Refused as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(attempt, range(len(paths)), paths)
        faults = list(tqdm(results, "decoding", len(paths), unit="image", disable=None, leave=False))
    if broken := [fault for fault in faults if fault]:
        more = f"; and {len(broken) - 20} more, which scripts/audit_data.py lists" if len(broken) > 20 else ""
        raise Refused("; ".join(broken[:20]) + more)


def decoded_bytes(paths: list[Path], sample: int = 64) -> float:
    """Estimate of what the images take in memory, from evenly spaced ones."""
    sizes = [size for size in map(image_size, paths[:: max(1, len(paths) // sample)]) if size]
    return len(paths) * sum(3 * width * height for width, height in sizes) / max(1, len(sizes))


def own_size(paths: list[Path], largest: int = 96) -> int | None:
    """The side in px when all readable images are squares of one size up to ``largest``, else None."""
    side = None
    for width, height in filter(None, map(image_size, paths)):
        side = side or width
        if not width == height == side <= largest:
            return None
    return side


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height in px from the file's header; None where there is none: decoding will tell why."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # decoders raise what they like
        return None
