"""The optimiser, its parameter groups, and the learning rate of each epoch."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import nn

from engine.errors import Refused
from engine.flags import number_in
from models.classifier import LongTailClassifier

SCHEDULES = ("exponential", "step", "cosine", "constant")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimiser")
    positive, fraction = number_in(0, open_low=True), number_in(0, 1)
    group.add_argument("--epochs", type=number_in(1, kind=int), default=20, help="passes over the training images")
    group.add_argument(
        "-b", "--batch_size", "--batch-size", type=number_in(2, kind=int), default=32, help="images, over all processes"
    )
    group.add_argument(
        "--lr", "--learning-rate", type=positive, default=1e-3, help="learning rate; from scratch 1e-3 barely trains"
    )
    group.add_argument("--momentum", type=number_in(0, 1), default=0.9, help="SGD")
    group.add_argument(
        "--wd", "--weight_decay", "--weight-decay", type=number_in(0), default=5e-4, help="weight decay, all parameters"
    )
    group.add_argument("--lr_schedule", choices=SCHEDULES, default="exponential", help="of the learning rate, by epoch")
    group.add_argument("--lr_decay", type=positive, default=0.9, metavar="F", help="exponential: factor an epoch")
    group.add_argument(
        "--lr_milestones", type=fraction, nargs="+", default=[0.8, 0.9], metavar="F", help="step: fractions of epochs"
    )
    group.add_argument("--lr_factor", type=positive, default=0.01, metavar="F", help="step: factor at a milestone")
    group.add_argument(
        "--warmup_epochs", type=number_in(0, kind=int), default=0, metavar="E", help="epochs of linear warm-up"
    )
    group.add_argument("--clip_grad_norm", type=positive, metavar="N", help="largest gradient norm, generator left out")
    group.add_argument(
        "--accumulate_steps", type=number_in(1, kind=int), default=1, metavar="N", help="batches of one update"
    )


def check_optimizer_flags(args: argparse.Namespace) -> None:
    """`Refused` when no epoch is left."""
    if args.start_epoch >= args.epochs:
        raise Refused(
            f"--start_epoch {args.start_epoch}: epochs count from 0, the last of {args.epochs} is {args.epochs - 1}"
        )


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """The learning rate in force in ``epoch``, counted from 0."""
    if epoch < args.warmup_epochs:
        return args.lr * (epoch + 1) / args.warmup_epochs
    factor = 1.0
    if args.lr_schedule == "exponential":
        factor = args.lr_decay**epoch
    elif args.lr_schedule == "step":
        factor = args.lr_factor ** sum(epoch >= round(fraction * args.epochs) for fraction in args.lr_milestones)
    elif args.lr_schedule == "cosine":
        factor = (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return args.lr * factor


def steps_in_epoch(args: argparse.Namespace, epoch: int, num_batches: int) -> int:
    """Batches to train on in ``epoch``: fewer than ``num_batches`` where ``--max_steps`` ends the run, then 0."""
    if epoch >= args.epochs:
        return 0
    if args.max_steps is None:
        return num_batches
    updates_before = (epoch - args.start_epoch) * math.ceil(num_batches / args.accumulate_steps)
    return min(num_batches, max(0, args.max_steps - updates_before) * args.accumulate_steps)


def build_clip(model: nn.Module, max_norm: float | None) -> Callable[[], None]:
    """Clips the norm of all gradients but the generator's, whose own loss is thousands of times larger."""
    if max_norm is None:
        return lambda: None
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("generator.")]
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False)


def map_positions(model: LongTailClassifier, img_size: int) -> int:
    """Positions H x W of the maps between the two parts of the backbone."""
    training = model.training
    with torch.no_grad():
        maps = model.eval().backbone.lower(
            torch.zeros(1, 3, img_size, img_size, device=next(model.parameters()).device)
        )
    model.train(training)
    return maps.shape[2] * maps.shape[3]


def center_lr_limit(args: argparse.Namespace, model: LongTailClassifier, img_size: int) -> float:
    """The largest learning rate at which the generator's centres are stable, by a factor of two.

    The centre loss sums over the maps' positions, so that the curvature of a centre is up to ``2 * cesc_weight *
    positions`` (all rows of a batch in one class), and SGD with momentum m diverges at ``2 (1 + m) / curvature``: at
    16x16 positions below the usual 0.1.
    """
    if model.generator is None or not args.rsg_cesc_weight:
        return math.inf
    return (1 + args.momentum) / (2 * args.rsg_cesc_weight * map_positions(model, img_size))


def build_optimizer(args: argparse.Namespace, model: LongTailClassifier, img_size: int) -> torch.optim.Optimizer:
    """SGD with momentum on all parameters; a group's ``lr_limit`` bounds its learning rate."""
    centers, others = [], []
    for name, parameter in model.named_parameters():
        (centers if name == "generator.centers" else others).append(parameter)
    groups = [{"params": others, "lr_limit": math.inf}]
    groups += [{"params": centers, "lr_limit": center_lr_limit(args, model, img_size)}] if centers else []
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.wd, fused=True)
    if args.momentum:
        # fused SGD makes this buffer in its first step and leaves it unfilled when that step is masked
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = min(lr, group["lr_limit"])
