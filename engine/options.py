"""All flags of the two entry scripts, and those that belong to the run rather than to a package."""

import argparse
from pathlib import Path

from data.build import add_data_flags
from data.folders import SPLITS
from data.loaders import CACHE_LIMIT
from engine import metrics
from engine.errors import Refused
from engine.evaluate import PREDICT_WITH
from engine.flags import Parser, add_device, add_root_model, add_switch, given_path, number_in, plain_name
from engine.optim import add_optimizer_flags
from engine.precision import AMP, CHANNELS_LAST
from losses import CLASSIFICATION_LOSSES, add_loss_flags, uses_class_balanced_weights
from models import add_model_flags
from rsg import add_rsg_flags

ORIGINAL_RUN = "ImageNet_LT_CIFAR10_resnext50_32x4d_normout_rsg_ldam_supcon"


def train_parser(description: str = "") -> Parser:
    parser = Parser(description)
    add_data_flags(parser)
    add_model_flags(parser)
    add_rsg_flags(parser)
    add_loss_flags(parser)
    add_optimizer_flags(parser)
    add_run_flags(parser)
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add_root_model(group)
    group.add_argument(
        "--root_log", type=given_path, default=Path("log"), metavar="DIR", help="where TensorBoard events lie"
    )
    group.add_argument(
        "--run_name",
        type=plain_name,
        metavar="NAME",
        help="of the run folder; default: made from data, arch and losses",
    )
    group.add_argument("--seed", type=number_in(0, 2**31, kind=int), help="default: drawn, printed and recorded")
    group.add_argument("--start_epoch", "--start-epoch", type=number_in(0, kind=int), default=0, help="of a fresh run")
    add_switch(group, "--resume", False, "go on with the run in the folder, or start if there is none")
    add_switch(group, "--overwrite", False, "replace the run in the folder, its tests, predictions and exports too")
    group.add_argument(
        "--save_every_steps",
        type=number_in(1, kind=int),
        metavar="N",
        help="updates between two saves; default: once an epoch",
    )
    group.add_argument("--max_steps", type=number_in(1, kind=int), metavar="N", help="end after N updates: a smoke run")
    add_switch(group, "--sync_bn", False, "batch normalisation over all processes; GPUs only")
    add_device(group)
    group.add_argument("--amp", choices=AMP, default="auto", help="precision of the backbone; auto: bf16 where fast")
    group.add_argument(
        "--channels_last", choices=CHANNELS_LAST, default="auto", help="order of maps in memory; auto: on with half"
    )
    add_switch(group, "--compile", False, "compile the backbone: slow to start, then faster")
    group.add_argument("-p", "--print_freq", "--print-freq", type=number_in(1, kind=int), default=10, help="in steps")


def check_run_flags(args: argparse.Namespace) -> None:
    """`Refused` for wishes that exclude each other."""
    if args.resume and args.overwrite:
        raise Refused("--resume goes on with the run in the folder, --overwrite replaces it; give one")


def check_idle_flags(args: argparse.Namespace, defaults: argparse.Namespace) -> list[str]:
    """Warnings about flags that are not at their ``defaults`` and change nothing."""
    has_cbl = uses_class_balanced_weights(args)
    counts_with = {  # beginning of a flag's name: (whether the flag counts, with what)
        **{f"{name}_": (getattr(args, f"add_{name}_loss"), f"--add_{name}_loss") for name in CLASSIFICATION_LOSSES},
        "logit_adjust_tau": (args.add_logit_adjusted_loss, "--add_logit_adjusted_loss"),
        "cbl_beta": (has_cbl, "a loss with class-balanced weights, as --ldam_weight_type cbl"),
        "supcon_": (args.add_supcon_loss, "--add_supcon_loss"),
        "supcon_generated": (args.add_supcon_loss and args.add_rsg, "--add_supcon_loss and --add_rsg"),
        "arc_": (args.add_arc_margin_loss, "--add_arc_margin_loss"),
        "am_": (args.add_add_margin_loss, "--add_add_margin_loss"),
        "sphere_": (args.add_sphere_loss, "--add_sphere_loss"),
        "rsg_": (args.add_rsg, "--add_rsg"),
        "epoch_thresh": (args.add_rsg, "--add_rsg"),
        "lr_decay": (args.lr_schedule == "exponential", "--lr_schedule exponential"),
        "lr_milestones": (args.lr_schedule == "step", "--lr_schedule step"),
        "lr_factor": (args.lr_schedule == "step", "--lr_schedule step"),
        "momentum": (args.optimizer == "sgd", "--optimizer sgd"),
        "backbone_lr": (not args.freeze_backbone, "a backbone that trains, without --freeze_backbone"),
        "precise_bn": (not args.freeze_backbone, "a backbone that trains, without --freeze_backbone"),
    }
    warnings = []
    for flag, default in vars(defaults).items():
        beginnings = [beginning for beginning in counts_with if flag.startswith(beginning)]
        counts, use = counts_with[max(beginnings, key=len)] if beginnings else (True, "")
        if not counts and getattr(args, flag) != default:
            warnings.append(f"--{flag} changes nothing: it is for {use}")
    return warnings


def evaluation_parser(description: str = "") -> Parser:
    parser = Parser(description)
    add_question_flags(parser)
    add_answer_flags(parser)
    add_loading_flags(parser)
    group = parser.add_argument_group("computation")
    add_device(group)
    group.add_argument("--amp", choices=AMP, default="off", help="precision of the backbone")
    return parser


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Which run is asked about which images, and through what."""
    group = parser.add_argument_group("run and images")
    group.add_argument("--model_dir", default=ORIGINAL_RUN, metavar="RUN", help="a run's folder, or its name")
    add_root_model(group)
    group.add_argument("--data_dir", type=given_path, metavar="DIR", help="default: the run's own")
    group.add_argument("--list_dir", type=given_path, metavar="DIR", help="image lists in place of folders")
    group.add_argument("--split", choices=SPLITS, default="test", help="which images")
    group.add_argument("--weights", choices=("best", "last"), help="default: best, or last where none was selected")
    group.add_argument(
        "--predict_with",
        choices=PREDICT_WITH,
        help="head, mean of heads, or nearest class mean; default: the trained one",
    )
    group = group.add_mutually_exclusive_group()  # both correct for the class prior
    group.add_argument(
        "--test_prior",
        metavar="PRIOR",
        help="predict for classes as frequent as this: uniform, train, or a file of `class value` lines or JSON",
    )
    group.add_argument(
        "--logit_adjust",
        type=number_in(0),
        metavar="TAU",
        help="predict with z - TAU log(training prior), for balanced accuracy; --post_hoc finds TAU",
    )


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """What is made of the model's logits."""
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--images", type=given_path, metavar="DIR", help="predict these images, which have no labels, and test nothing"
    )
    group.add_argument(
        "--shot_thresholds",
        type=number_in(0, kind=int),
        nargs=2,
        default=[metrics.MANY, metrics.FEW],
        metavar=("MANY", "FEW"),
        help="training images: more than MANY is many, fewer than FEW is few",
    )
    add_switch(
        group, "--post_hoc", False, "compare corrections fitted on val/: logit adjustment, tau-norm, temperature"
    )
    add_switch(group, "--plot_features", False, "draw the features in two dimensions, which takes a minute")


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument("-b", "--batch_size", type=number_in(1, kind=int), default=64, help="images")
    group.add_argument("-j", "--workers", type=number_in(0, kind=int), default=4, help="processes, at most one a core")
    group.add_argument("--cache_limit", type=number_in(0), default=CACHE_LIMIT, metavar="BYTES", help="decoded images")


def check_evaluation_flags(args: argparse.Namespace) -> None:
    """`Refused` for wishes that exclude each other."""
    many, few = args.shot_thresholds
    if many < few - 1:
        raise Refused(f"--shot_thresholds {many} {few}: a class could be both many and few; MANY is the larger one")
    if args.images and (args.post_hoc or args.plot_features):
        raise Refused(
            "--images have no labels: --post_hoc and --plot_features need some; leave them out (--logit_adjust TAU "
            "predicts as --post_hoc has found)"
        )
    if args.images and (args.split != "test" or args.shot_thresholds != [metrics.MANY, metrics.FEW]):
        raise Refused("--images are of no split and have no labels; leave out --split and --shot_thresholds")
    if args.post_hoc and args.split == "val":
        raise Refused("--post_hoc is fitted on val/; judge it on another --split")
    if args.post_hoc and (args.test_prior or args.logit_adjust is not None):
        raise Refused("--post_hoc, --test_prior and --logit_adjust correct for the class prior; give one")
