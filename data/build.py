"""From flags to loaders."""

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from data.augment import AUGMENTATIONS, POLICIES
from data.folders import LIKE_VAL, ImageFolders, Split, check_names, class_folders, lists_in_use, read_image_folders
from data.loaders import CACHE_LIMIT, EvaluationLoader, Pixels, TrainingLoader
from data.pixel_sources import own_size
from data.samplers import SAMPLERS
from data.synthesis import read_kept_images
from engine import distributed
from engine.console import first_of, say, warn
from engine.errors import Refused
from engine.flags import add_switch, epoch_or_share, given_path, number_in, resolved_epoch
from engine.hardware import num_cores


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_dir",
        type=given_path,
        default=Path("data/mini-ImageNet"),
        metavar="DIR",
        help="holds train/, val/, test/",
    )
    group.add_argument(
        "--list_dir",
        type=given_path,
        metavar="DIR",
        help="holds train.txt, val.txt, test.txt of `path label` lines to use",
    )
    group.add_argument(
        "--cls_num", type=number_in(2, kind=int), metavar="C", help="expected number of classes; default: the folder's"
    )
    group.add_argument(
        "--img_size",
        type=number_in(8, 2**16 - 1, kind=int),
        metavar="S",
        help="px; default: the images' own, if all are squares of one size up to 96, else 224",
    )
    group.add_argument("--normalize", choices=("imagenet", "dataset"), default="imagenet", help="whose mean and std")
    add_switch(group, "--hflip", None, "mirror images; default: the data set's word")
    group.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        nargs="*",
        default=[],
        metavar="WORD",
        help=f"beside crop and flip: {', '.join(POLICIES)} (one of them), cutout; default: none",
    )
    for name, what in (("mixup", "blend images"), ("cutmix", "paste boxes of others")):
        group.add_argument(
            f"--{name}", type=number_in(0), metavar="A", help=f"{what}, share from Beta(A, A); None, 0: off"
        )
    group.add_argument("--sampler", choices=SAMPLERS, help="of training images; default: uniform, balanced with DRS")
    group.add_argument(
        "--drs_epoch",
        type=epoch_or_share(0),
        metavar="E",
        help="uniform before epoch E, --sampler from it on (DRS); 0.8: from that share of the epochs on",
    )
    group.add_argument(
        "--synthetic_weight",
        type=number_in(0),
        default=0.0,
        metavar="W",
        help="of synthetic images in the losses, a real one is 1; 0 leaves them out",
    )
    group.add_argument(
        "--synthetic_dir",
        type=given_path,
        metavar="DIR",
        help="of scripts/synthesize_tail.py; default: synthetic/ in the data",
    )
    add_switch(group, "--count_synthetic", False, "in class weights, margins, groups, generator and samplers")
    group.add_argument("-j", "--workers", type=number_in(0, kind=int), default=4, help="processes, at most one a core")
    group.add_argument(
        "--cache_limit", type=number_in(0), default=CACHE_LIMIT, metavar="BYTES", help="of decoded images in memory"
    )


def check_data_flags(args: argparse.Namespace) -> list[str]:
    """Warnings about flags that change nothing; `Refused` for augmentations that cannot go together."""
    if len(policies := [name for name in args.augment if name in POLICIES]) > 1:
        raise Refused(
            f"--augment {' '.join(policies)}: each is a whole policy; give one of them, and cutout if you like"
        )
    mixes = [f"--{name}" for name in ("mixup", "cutmix") if getattr(args, name)]
    needy = [f"--add_{name} False" for name, on in (("supcon_loss", args.add_supcon_loss), ("rsg", args.add_rsg)) if on]
    if mixes and needy:
        raise Refused(
            f"{' and '.join(mixes)}: a mixed image is of no one class, as SupCon and RSG need it; add {' '.join(needy)}"
        )
    warnings = []
    if args.drs_epoch is not None and args.sampler == "uniform":
        warnings.append("--drs_epoch changes nothing: --sampler uniform is in force before it, too")
    if args.drs_epoch is not None and resolved_epoch(args, "drs_epoch") >= args.epochs:
        warnings.append(f"DRS never begins: --drs_epoch {args.drs_epoch}, but the last epoch is {args.epochs - 1}")
    idle = [name for name in ("count_synthetic", "synthetic_dir") if getattr(args, name) and not args.synthetic_weight]
    warnings += [f"--{name} changes nothing: --synthetic_weight is 0" for name in idle]
    return warnings


def sampler_of(args: argparse.Namespace, epoch: int) -> str:
    """The sampler in force in ``epoch``."""
    if args.drs_epoch is None:
        return args.sampler or "uniform"
    return (args.sampler or "balanced") if epoch >= resolved_epoch(args, "drs_epoch") else "uniform"


def read_data(args: argparse.Namespace) -> ImageFolders:
    """The data set that the flags name, with its synthetic images when they have a weight."""
    folders = read_image_folders(args.data_dir, args.list_dir)
    if not args.synthetic_weight:
        return folders
    synthetic = read_kept_images(args.synthetic_dir or args.data_dir / "synthetic", folders.classes)
    return dataclasses.replace(folders, synthetic=synthetic, count_synthetic=args.count_synthetic)


def check_data(args: argparse.Namespace, folders: ImageFolders) -> None:
    """`Refused` for a wrong ``--cls_num``; warnings about what is not read, cannot be judged, or has no long tail."""
    if args.cls_num is not None and args.cls_num != len(folders.classes):
        raise Refused(f"--cls_num is {args.cls_num}, but {folders.root / 'train'} holds {len(folders.classes)} classes")
    if args.add_rsg and len(set(folders.class_counts)) == 1:
        warn(f"every class has {folders.class_counts[0]} training images: RSG takes the first ones for head classes")
    lists = lists_in_use(folders.root, args.list_dir)
    if lists is None:
        inner = [
            folders.root / split / name for split in folders.splits for name in class_folders(folders.root / split)
        ]
        names = (entry.name for folder in inner for entry in os.scandir(folder))
        warn(*check_names(names, f"in the class folders of {folders.root}"))
    elif args.list_dir is None:
        say(f"images     those that {lists / 'train.txt'} and its like list, whatever else lies there")
    for split in ("val", "test"):
        if split in folders.splits and (names := folders.untested(split)):
            warn(f"no image in {folders.root / split} for {first_of(names)}: class means are over the other classes")
    if "val" not in folders.splits:
        other = next((name for name in LIKE_VAL if (folders.root / name).is_dir()), None)
        hint = f"; {folders.root / other} is not used, its name would have to be val" if other and not lists else ""
        where = f"{lists} has no list of val images" if lists else f"{folders.root} has no val/ images"
        warn(f"{where}: nothing is selected, the last epoch is the model{hint}")


def mirrors(args: argparse.Namespace, folders: ImageFolders) -> bool:
    """Whether images are mirrored at random: as told, else as the data set says."""
    return folders.flips if args.hflip is None else args.hflip


def build_pixels(args: argparse.Namespace, folders: ImageFolders) -> Pixels:
    """Image size and normalisation."""
    side, odd = (args.img_size, None) if args.img_size else own_size(folders.splits["train"].paths)
    if odd:
        warn(f"{odd} is of another size than the small squares before it: all become 224 px; --img_size sets another")
    pixels = Pixels(side or 224)
    if args.normalize == "imagenet":
        return pixels
    own = distributed.together(lambda: channel_sums(args, folders.splits["train"], pixels))
    number, total, squares = sum(distributed.from_all(own))
    mean = total / number
    std = (squares / number - mean.square()).sqrt().clamp_min(1e-3)
    return pixels._replace(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def channel_sums(args: argparse.Namespace, split: Split, pixels: Pixels) -> torch.Tensor:
    """Over this process's images, by channel: their number, and the sums of their means and of their mean squares
    ([3, 3], float64)."""
    raw = pixels._replace(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for batch in build_evaluation_loader(args, split, raw, torch.device("cpu")):
        images = batch.images.double()
        means = images.mean(dim=(2, 3)).sum(dim=0), images.square().mean(dim=(2, 3)).sum(dim=0)
        sums += torch.stack([torch.full((3,), float(len(images)), dtype=torch.float64), *means])
    return sums


def build_training_loader(
    args: argparse.Namespace, folders: ImageFolders, pixels: Pixels, seed: int, device: torch.device
) -> TrainingLoader:
    processes, images = distributed.world_size(), len(folders.splits["train"].paths)
    if args.batch_size % processes or args.batch_size < 2 * processes or images < 2 * processes:
        raise Refused(
            f"--batch_size {args.batch_size} and {images} training images for {processes} processes: the batch must "
            f"divide by their number and leave each at least two images"
        )
    return TrainingLoader(
        folders.splits["train"],
        pixels,
        args.batch_size,
        seed,
        device,
        flips=mirrors(args, folders),
        views=args.supcon_views if args.add_supcon_loss else 1,
        workers=workers_in_use(args),
        cache_limit=args.cache_limit,
        augment=tuple(args.augment),
        mixup=args.mixup,
        cutmix=args.cutmix,
        synthetic=folders.synthetic,
        synthetic_weight=args.synthetic_weight,
        class_counts=folders.class_counts,
    )


def build_evaluation_loader(
    args: argparse.Namespace, split: Split, pixels: Pixels, device: torch.device
) -> EvaluationLoader:
    batch_size = max(1, args.batch_size // distributed.world_size())
    return EvaluationLoader(split, pixels, batch_size, device, workers_in_use(args), args.cache_limit)


def workers_in_use(args: argparse.Namespace) -> int:
    """``--workers``, but never more than this process's share of the cores."""
    return min(args.workers, max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
