"""Where a loader's pixels come from: memory where the decoded images fit, else worker processes that decode them."""

import atexit
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import transforms
from data.augment import Policy
from data.images import MAX_PIXELS, faults, read_image
from engine.console import first_of
from engine.errors import Failed, Refused
from engine.transfer import to_device


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
            yield self.views[to_device(torch.tensor(indices), self.views.device)]


class WorkerPool:
    """Worker processes that read batches of ``dataset`` in the order asked for, and live through all epochs."""

    def __init__(self, dataset: Dataset, workers: int, device: torch.device):
        self.batches = _GivenBatches()
        self.loader = DataLoader(
            dataset,
            batch_size=None,  # what is sampled is a whole batch
            sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_main_process,
        )
        if workers:
            atexit.register(_end_workers)

    def read(self, batches: Iterable[list]) -> Iterator[Tensor]:
        self.batches.batches = batches
        try:
            for images in self.loader:
                if isinstance(images, str):
                    raise Failed(images)
                yield images
        except (ConnectionError, EOFError) as error:  # as it was killed while it handed images over
            time.sleep(5)  # the loader's own word of it is raised here, and would else come out anywhere later
            raise Failed(f"a data worker died: {error!r}. If memory ran out, try fewer --workers") from None


class FixedViews(Dataset):
    """`transforms.fixed_view` of every image; a key is an index."""

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.size = paths, size

    def __getitem__(self, indices: list[int]) -> Tensor | str:
        return read_batch(indices, lambda i: transforms.fixed_view(read_image(self.paths[i]), self.size))


class RandomCrops(Dataset):
    """Random resized crops; a key is an index and the draws for it. ``decoded`` images spare the files.

    Without them a JPEG is decoded at the smallest of its scales that the crop allows: a few grey levels of difference.
    A ``policy`` is applied to the crops.
    """

    def __init__(self, paths: list[Path], size: int, decoded: "DecodedImages | None", policy: Policy | None = None):
        self.paths, self.size, self.decoded, self.policy = paths, size, decoded, policy

    def __getitem__(self, keys: list[tuple[int, list[float]]]) -> Tensor | str:
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
    """A sampler that yields the batches it was given last."""

    def __init__(self):
        self.batches: Iterable[list] = ()

    def __iter__(self) -> Iterator[list]:
        return iter(self.batches)


def _leave_signals_to_the_main_process(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill workers that an exception keeps alive: Python would send SIGTERM, which they ignore, and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


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
    """``store`` with each position and path; `Refused` with all broken files. Each goes where it will stay: a list of
    them would take as much memory again."""
    if broken := [fault for fault in faults(paths, store, workers, "decoding") if fault]:
        raise Refused(f"{first_of(broken, separator='; ')}; scripts/audit_data.py lists them all")


def decoded_bytes(paths: list[Path], sample: int = 64) -> float:
    """Estimate of what the images take in memory, from evenly spaced ones."""
    sizes = [size for size in map(image_size, paths[:: max(1, len(paths) // sample)]) if size]
    return len(paths) * sum(3 * width * height for width, height in sizes) / max(1, len(sizes))


def own_size(paths: list[Path], largest: int = 96) -> tuple[int | None, Path | None]:
    """The side in px when all readable images are squares of one size up to ``largest``; the first image that is not of
    the size of those before it, when these are."""
    side = None
    for path in paths:
        if (size := image_size(path)) is None:
            continue
        if not size[0] == size[1] == (side or size[0]) <= largest:
            return None, path if side else None
        side = size[0]
    return side, None


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height in px from the file's header; None where there is none: decoding will tell why."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # decoders raise what they like
        return None
