"""The Rare-class Sample Generator: part of the model in training only."""

import argparse
from collections.abc import Sequence

from engine.flags import add_switch, epoch_or_share, number_in, resolved_epoch
from rsg.generator import RareSampleGenerator


def add_rsg_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rsg")
    add_switch(group, "--add_rsg", True, "Rare-class Sample Generator in training")
    group.add_argument(
        "--head_tail_ratio", type=number_in(0, 1), default=0.2, metavar="R", help="share of classes that are head"
    )
    group.add_argument(
        "--epoch_thresh",
        type=epoch_or_share(-1),
        metavar="E",
        help="rows are generated in epochs > E, counted from 0, or with a point after that share of the epochs; "
        "default: floor(0.8 epochs) - 1, the last fifth",
    )
    group.add_argument("--rsg_centers", type=number_in(1, kind=int), default=15, metavar="K", help="centres per class")
    group.add_argument(
        "--rsg_contrast_dim",
        type=number_in(1, kind=int),
        default=256,
        metavar="D",
        help="contrastive module's channels",
    )
    group.add_argument(
        "--rsg_strength", type=number_in(0, open_low=True), default=1.0, metavar="S", help="factor on generated rows"
    )
    group.add_argument(
        "--rsg_center_lr",
        type=number_in(0, open_low=True),
        metavar="LR",
        help="most that the centres learn at, whatever --lr; default: a rate at which they cannot diverge",
    )
    group.add_argument("--rsg_cesc_weight", type=number_in(0), default=0.1, metavar="W", help="factor of CESC")
    group.add_argument("--rsg_mv_weight", type=number_in(0), default=0.01, metavar="W", help="factor of the MV loss")


def generates(args: argparse.Namespace, epoch: int) -> bool:
    """Whether rows are generated in ``epoch``."""
    if args.epoch_thresh is None:
        return epoch > 4 * args.epochs // 5 - 1
    if isinstance(args.epoch_thresh, float):
        return epoch >= resolved_epoch(args, "epoch_thresh")
    return epoch > args.epoch_thresh


def check_rsg_flags(args: argparse.Namespace) -> list[str]:
    """Warnings about a generator that never starts."""
    if args.add_rsg and not generates(args, args.epochs - 1):
        return [f"RSG never generates: --epoch_thresh {args.epoch_thresh}, but the last epoch is {args.epochs - 1}"]
    return []


def unmoved_centers(row: dict[str, float]) -> list[str]:
    """A warning when rows are generated from centres that are still where they began: at 0, |F - mu| / |F| is 1."""
    if row["generated_rows"] and row["rsg_center_distance"] > 0.99:
        distance = f"mean |F - mu| / |F| is {row['rsg_center_distance']:.3f}"
        return [f"RSG's centres have hardly moved: {distance}; try a higher --lr or --rsg_cesc_weight"]
    return []


def build_generator(args: argparse.Namespace, channels: int, class_counts: Sequence[int]) -> RareSampleGenerator:
    generator = RareSampleGenerator(
        channels, class_counts, args.head_tail_ratio, args.rsg_centers, args.rsg_contrast_dim, args.rsg_strength
    )
    generator.pair_shift = 1 if args.add_supcon_loss and args.supcon_views == 2 else 0
    return generator
