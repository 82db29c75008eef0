"""The optimiser, its parameter groups, and the learning rate of each epoch."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from engine.errors import Refused
from engine.flags import add_switch, epoch_or_share, number_in, resolved_epoch
from models.classifier import LongTailClassifier

SCHEDULES = ("exponential", "step", "cosine", "constant")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimiser")
    positive, fraction = number_in(0, open_low=True), number_in(0, 1)
    below_1 = number_in(0, 1, open_high=True)
    group.add_argument("--epochs", type=number_in(1, kind=int), default=20, help="passes over the training images")
    group.add_argument(
        "-b", "--batch_size", "--batch-size", type=number_in(2, kind=int), default=32, help="images, over all processes"
    )
    group.add_argument(
        "--lr", "--learning-rate", type=positive, default=1e-3, help="learning rate; from scratch 1e-3 barely trains"
    )
    group.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="SGD with momentum, or AdamW")
    group.add_argument(
        "--backbone_lr", type=positive, metavar="LR", help="of the backbone, for pretrained weights; default: --lr"
    )
    group.add_argument("--momentum", type=below_1, default=0.9, help="SGD")
    add_switch(group, "--nesterov", False, "Nesterov momentum in SGD")
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
        "--warmup_epochs",
        type=epoch_or_share(0),
        default=0,
        metavar="E",
        help="of linear rise, which does not shift the schedule; 0.1: share of all",
    )
    group.add_argument(
        "--ema_decay", type=below_1, metavar="D", help="judge and save the exponential mean of the weights, decay D"
    )
    add_switch(
        group, "--precise_bn", False, "judge and save with batch statistics of unmixed images, without generated rows"
    )
    group.add_argument("--clip_grad_norm", type=positive, metavar="N", help="largest gradient norm, generator left out")
    group.add_argument(
        "--accumulate_steps",
        type=number_in(1, kind=int),
        default=1,
        metavar="N",
        help="batches of one update; SupCon and means by class or image weights stay those of a batch",
    )


def check_optimizer_flags(args: argparse.Namespace) -> list[str]:
    """Warnings about a warm-up without end and steps that coincide; `Refused` when no epoch is left, or for settings of
    an optimiser that is not in use."""
    if args.nesterov and (args.optimizer != "sgd" or not args.momentum):
        raise Refused("--nesterov is a kind of SGD's momentum; it needs --optimizer sgd and a --momentum above 0")
    if args.start_epoch >= args.epochs:
        raise Refused(
            f"--start_epoch {args.start_epoch}: epochs count from 0, the last of {args.epochs} is {args.epochs - 1}"
        )
    warnings = []
    if (warmup := resolved_epoch(args, "warmup_epochs")) > args.epochs:
        warnings.append(f"--lr is never reached: its warm-up takes {warmup} epochs, and there are {args.epochs}")
    steps = milestones(args)
    if args.lr_schedule == "step" and len(set(steps)) < len(steps):
        warnings.append(f"--lr_milestones of {args.epochs} epochs fall on epochs {steps}: some steps are taken at once")
    return warnings


def milestones(args: argparse.Namespace) -> list[int]:
    """The epochs from which on the step schedule is a factor lower."""
    return [round(fraction * args.epochs) for fraction in args.lr_milestones]


def check_average(args: argparse.Namespace, num_batches: int) -> list[str]:
    """A warning when the averaged weights still hold much of the first ones at the end."""
    if args.ema_decay is None or args.max_steps is not None:
        return []
    updates = (args.epochs - args.start_epoch) * math.ceil(num_batches / args.accumulate_steps)
    first = args.ema_decay ** (updates - 1)  # the average begins with the weights after the first update
    if updates == 1 or first < 0.01:
        return []
    return [
        f"after {updates} updates --ema_decay {args.ema_decay:g} leaves {first:.0%} of the first weights in what is "
        f"judged and saved; {0.01 ** (1 / (updates - 1)):.4g} leaves 1 %"
    ]


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """The learning rate in force in ``epoch``, counted from 0."""
    warmup = resolved_epoch(args, "warmup_epochs")
    if epoch < warmup:
        return args.lr * (epoch + 1) / warmup
    factor = 1.0
    if args.lr_schedule == "exponential":
        factor = args.lr_decay**epoch
    elif args.lr_schedule == "step":
        factor = args.lr_factor ** sum(epoch >= first for first in milestones(args))
    elif args.lr_schedule == "cosine":
        factor = (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return args.lr * factor


def rates_in_force(args: argparse.Namespace, epoch: int) -> dict[str, float]:
    """The learning rates of ``epoch`` as log.jsonl names them."""
    rates = {"lr": learning_rate(args, epoch)}
    return rates | ({"backbone_lr": rates["lr"] * args.backbone_lr / args.lr} if args.backbone_lr else {})


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
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm)


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
    """``--rsg_center_lr``, or half the learning rate from which on the generator's centres may diverge.

    The centre loss sums over the maps' positions, so that the curvature of a centre is up to ``2 * cesc_weight *
    positions`` (all rows of a batch in one class), and SGD with momentum m diverges at ``2 (1 + m) / curvature``: at
    16x16 positions below the usual 0.1. Nesterov's momentum diverges ``1 + 2 m`` times earlier; AdamW's steps do not
    grow with the gradient.
    """
    if args.rsg_center_lr:
        return args.rsg_center_lr
    if not args.rsg_cesc_weight or args.optimizer == "adamw":
        return math.inf
    limit = (1 + args.momentum) / (2 * args.rsg_cesc_weight * map_positions(model, img_size))
    return limit / (1 + 2 * args.momentum) if args.nesterov else limit


def build_optimizer(args: argparse.Namespace, model: LongTailClassifier, img_size: int) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, on all parameters. A group's learning rate is ``lr_factor`` times that of the epoch,
    and at most its ``lr_limit``."""
    backbone, centers, others = [], [], []
    for name, parameter in model.named_parameters():
        if name == "generator.centers":
            centers.append(parameter)
        else:
            pretrained = name.startswith("backbone.") and ".neck." not in name
            (backbone if args.backbone_lr and pretrained else others).append(parameter)
    groups = [{"params": others, "lr_limit": math.inf, "lr_factor": 1.0}]
    if backbone:
        groups.append({"params": backbone, "lr_limit": math.inf, "lr_factor": args.backbone_lr / args.lr})
    if centers:
        groups.append({"params": centers, "lr_limit": center_lr_limit(args, model, img_size), "lr_factor": 1.0})
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.wd, fused=True)
    optimizer = torch.optim.SGD(
        groups, args.lr, args.momentum, weight_decay=args.wd, nesterov=args.nesterov, fused=True
    )
    if args.momentum:
        # fused SGD makes this buffer in its first step and leaves it unfilled when that step is masked
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = min(lr * group["lr_factor"], group["lr_limit"])


def build_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """The exponential moving average of the model over its updates, running statistics included."""
    return None if decay is None else MovingAverage(model, decay)


class MovingAverage(AveragedModel):
    """`AveragedModel` with an update that does not wait for the device, to which its own one copies their number."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        own, given = [*self.module.parameters(), *self.module.buffers()], [*model.parameters(), *model.buffers()]
        means, taken = [], []
        for pair in zip(own, given, strict=True):
            # a mean of counts would be cut to a whole number
            (means if self.n_averaged and pair[0].is_floating_point() else taken).append(pair)
        if means:
            torch._foreach_lerp_(*map(list, zip(*means, strict=True)), 1 - self.decay)
        if taken:
            torch._foreach_copy_(*map(list, zip(*taken, strict=True)))
        self.n_averaged += 1
