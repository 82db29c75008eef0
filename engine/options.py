"""All flags of the train script, and those that belong to the run rather than to a package."""

import argparse
from pathlib import Path

from data.build import add_data_flags
from engine.errors import Refused
from engine.flags import Parser, add_switch, number_in
from engine.numerics import AMP, CHANNELS_LAST
from engine.optim import add_optimizer_flags
from losses import add_loss_flags
from models import add_model_flags
from rsg import add_rsg_flags


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
    group.add_argument(
        "--root_model", type=Path, default=Path("checkpoint"), metavar="DIR", help="where run folders lie"
    )
    group.add_argument("--root_log", type=Path, default=Path("log"), metavar="DIR", help="where TensorBoard events lie")
    group.add_argument("--run_name", metavar="NAME", help="of the run folder; default: made from data, arch and losses")
    group.add_argument("--seed", type=number_in(0, 2**31, kind=int), help="default: drawn, printed and recorded")
    group.add_argument("--start_epoch", "--start-epoch", type=number_in(0, kind=int), default=0, help="of a fresh run")
    add_switch(group, "--resume", False, "go on with the run in the folder, or start if there is none")
    add_switch(group, "--overwrite", False, "replace the run in the folder")
    group.add_argument("--save_every_steps", type=number_in(1, kind=int), metavar="N", help="default: once an epoch")
    group.add_argument("--max_steps", type=number_in(1, kind=int), metavar="N", help="end after N steps: a smoke run")
    add_switch(group, "--sync_bn", False, "batch normalisation over all processes; GPUs only")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    group.add_argument("--amp", choices=AMP, default="auto", help="precision of the backbone; auto: bf16 where native")
    group.add_argument(
        "--channels_last", choices=CHANNELS_LAST, default="auto", help="order of maps in memory; auto: on with half"
    )
    add_switch(group, "--compile", False, "compile the backbone: slow to start, then faster")
    group.add_argument("-p", "--print_freq", "--print-freq", type=number_in(1, kind=int), default=10, help="in steps")


def check_run_flags(args: argparse.Namespace) -> None:
    """`Refused` for wishes that exclude each other."""
    if args.resume and args.overwrite:
        raise Refused("--resume goes on with the run in the folder, --overwrite replaces it; give one")
