"""Reading images, whole epochs and evaluation, on images that are made up in a temporary folder."""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data.build import build_evaluation_loader, build_pixels, build_training_loader
from data.folders import read_image_folders
from data.loaders import Batch, TrainingLoader
from data.long_tail import imbalanced_counts
from engine.evaluate import predict, validation_row
from models import build_model
from scripts.benchmarks.measuring import Bench, Row, interleaved, quotients
from scripts.benchmarks.steps import NO_RSG, BareSteps, TrainingSteps, bare_network, flags, operations

INPUTS = {  # images, their size in the file, the side that is fed, suffix, flags, times ImageFolder's speed to reach
    "32 px PNG, cached": (4000, (32, 32), 32, ".png", "", 10.0),
    "84 px JPEG, cached": (2000, (84, 84), 84, ".jpg", "", 2.0),
    "224 px from 500x375 JPEG": (400, (500, 375), 224, ".jpg", "--cache_limit 0", None),
}


def make_images(folder: Path, counts: list[int], size: tuple[int, int], suffix: str) -> None:
    """Class folders of images that compress about as photographs do."""
    random = np.random.default_rng(0)
    for index, count in enumerate(counts):
        place = folder / f"class{index:03d}"
        place.mkdir(parents=True)
        for number in range(count):
            coarse = random.integers(0, 256, (max(2, size[1] // 16), max(2, size[0] // 16), 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
            pixels = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number:05d}{suffix}", quality=90)


def input_rows(bench: Bench) -> Iterable[Row]:
    """Augmented training batches on the device, as a multiple of what ImageFolder and a DataLoader deliver with the
    same augmentation and as many workers, from the second epoch on."""
    workers = min(4, bench.cores)
    for name, (number, size, side, suffix, words, at_least) in INPUTS.items():
        number = 40 if bench.quick else number
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder) / "train", [number // 10] * 10, size, suffix)
            args = flags(f"--data_dir {folder} -j {workers} -b 128 --img_size {side} {words}")
            begun = time.perf_counter()
            ours = build_loader(args, bench.device)
            ready = time.perf_counter() - begun
            theirs = image_folder_loader(args, bench.device)
            candidates = {
                "ours": lambda loader=ours: exhaust(loader.epoch(0)),
                "theirs": lambda loader=theirs: exhaust(
                    images.to(bench.device, non_blocking=True) for images, _ in loader
                ),
            }
            seconds = interleaved(candidates, bench)
            figures = {
                f"images/s{suffix}": number / median(seconds[side])
                for suffix, side in (("", "ours"), (" theirs", "theirs"))
            }
            figures |= {"s to decode all once": ready} if not words else {}
            ratios = quotients(seconds["theirs"], seconds["ours"])
            title = f"{name}, {workers} workers: speed / ImageFolder"
            yield Row("input", title, ratios, figures, at_least=at_least)
            del ours, theirs, candidates  # their workers read from the folder


def build_loader(args: argparse.Namespace, device: torch.device) -> TrainingLoader:
    folders = read_image_folders(args.data_dir, None)
    return build_training_loader(args, folders, build_pixels(args, folders), 0, device)


def image_folder_loader(args: argparse.Namespace, device: torch.device) -> DataLoader:
    """torchvision's usual way, with the augmentation that the train script has for this size."""
    side = args.img_size
    crop = (
        [transforms.RandomCrop(side, padding=side // 8), transforms.RandomHorizontalFlip()]
        if side <= 64
        else [
            transforms.RandomResizedCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4),
        ]
    )
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    dataset = ImageFolder(args.data_dir / "train", transforms.Compose([*crop, transforms.ToTensor(), normalize]))
    return DataLoader(
        dataset,
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )


def exhaust(batches: Iterable) -> None:
    for _ in batches:
        pass


def epoch_rows(bench: Bench) -> Iterable[Row]:
    """A whole epoch on images like CIFAR-10-LT (imbalance 100, 12,406 images), reading and augmenting included, as a
    multiple of the bare network's forward and backward over as many images that lie in memory."""
    counts = imbalanced_counts("exp", 50 if bench.quick else 5000, 10, 100)
    precision = f"--amp {bench.amp} --channels_last {bench.channels_last} --compile {bench.compile}"
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "train", counts, (32, 32), ".png")
        base = f"--data_dir {folder} --arch resnet32 --img_size 32 -b 128 -j {min(4, bench.cores)} {precision}"
        args = flags(f"{base} {NO_RSG}")
        loader = build_loader(args, bench.device)
        batches = list(loader.epoch(0))
        bare = BareSteps(args, len(counts), bench.device)
        ours = TrainingSteps(args, counts, bench.device, generating=False)
        seconds = interleaved(
            {
                "ours": lambda: ours(loader.epoch(0), len(loader)),
                "bare": lambda: bare(batches, len(batches)),
            },
            bench._replace(repeats=max(1, bench.repeats // 2)),
        )
        epoch, bare_epoch = median(seconds["ours"]), median(seconds["bare"])
        figures = {"s an epoch": epoch, "bare s": bare_epoch, "% of the time not bare": 100 * (1 - bare_epoch / epoch)}
        name = f"resnet32, {sum(counts)} images, LDAM + SupCon: epoch / bare"
        yield Row("epoch", name, quotients(seconds["ours"], seconds["bare"]), figures, at_most=1.10)

        num_steps = min(len(batches), 10)
        with_rsg = TrainingSteps(flags(base), counts, bench.device, generating=False)
        rounds = {
            "ours": lambda: with_rsg(itertools.islice(loader.epoch(0), num_steps), num_steps),
            "bare": lambda: bare(batches, num_steps),
        }
        seconds = interleaved(rounds, bench)
        figures = {"s": median(seconds["ours"]), "bare s": median(seconds["bare"])}
        if not bench.compile:
            share = 1 - operations(bare, batches[:1]) / operations(with_rsg, batches[:1])
            figures["extra layers, % of operations"] = 100 * share
        name = f"resnet32, first {num_steps} steps, LDAM + SupCon + RSG: time / bare"
        yield Row("epoch", name, quotients(seconds["ours"], seconds["bare"]), figures)


def evaluation_rows(bench: Bench) -> Iterable[Row]:
    """Validation with its metrics, as a share of the speed of the bare network over as many images in memory."""
    number = 40 if bench.quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            make_images(Path(folder) / split, [number // 10] * 10, (32, 32), ".png")
        args = flags(f"--data_dir {folder} --arch resnet32 --img_size 32 -b 128 -j {min(4, bench.cores)} {NO_RSG}")
        folders = read_image_folders(args.data_dir, None)
        loader = build_evaluation_loader(args, folders.splits["val"], build_pixels(args, folders), bench.device)
        batches = list(loader)
        model = build_model(args, folders.class_counts, with_generator=False).to(bench.device)
        bare = bare_network(args, 10).to(bench.device).eval()

        def validate() -> None:
            predictions = predict(model, loader, None, "validation")
            validation_row(predictions.logits["main"], predictions.targets, folders.class_counts)

        seconds = interleaved({"ours": validate, "bare": forward_over(bare, batches)}, bench)
        figures = {
            f"images/s{suffix}": number / median(seconds[side]) for suffix, side in (("", "ours"), (" bare", "bare"))
        }
        name = f"resnet32, {number} images of 32 px, with metrics: speed / bare"
        yield Row("evaluation", name, quotients(seconds["bare"], seconds["ours"]), figures)


def forward_over(model: nn.Module, batches: list[Batch]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return torch.cat([model(batch.images) for batch in batches]).cpu()

    return call
