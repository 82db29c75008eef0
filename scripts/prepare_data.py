__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Write a long-tailed data set as class folders: data/<name>/{train,val,test}/<class>/<image>.

    python scripts/prepare_data.py digits                      # 417 training images, 124 down to 6 a class; 2 seconds
    python scripts/prepare_data.py cifar10 --source cifar-10-python.tar.gz --imb_factor 100
    python scripts/prepare_data.py folder --source photos      # about 70 % train, 10 % val, 20 % test of every class

The same command draws the same images anywhere; the split hash that it prints shows it. Run again, it changes nothing;
killed, it leaves nothing that looks whole.
"""

import re
from pathlib import Path

from data.archives import unpacked
from data.long_tail import IMBALANCES, Profile, draw, resolved_class_order
from data.preparation import publish, refuse_foreign_output, scratch_folder
from data.source_folders import Source
from data.sources import CIFAR_KINDS, SOURCES, download_cifar
from engine.console import say
from engine.errors import Refused, one_line_errors
from engine.flags import Parser, add_switch, given_path, number_in

DRAW_FLAGS = ("imb_type", "imb_factor", "val_per_class", "test_per_class", "val_fraction", "test_fraction")


def parse_args(argv: list[str] | None = None):
    parser = Parser("Write a long-tailed data set as class folders with a frozen, hashed split.")
    group = parser.add_argument_group("source")
    add = group.add_argument
    add("kind", choices=SOURCES, metavar="SOURCE", help=", ".join(SOURCES))
    add("--source", type=given_path, metavar="PATH", help="folder to read, or tar or zip archive of it")
    add_switch(group, "--download", default=False, help="fetch the official CIFAR archive into data/downloads")
    add(
        "--ilsvrc",
        type=given_path,
        metavar="DIR",
        help="ILSVRC-2012 training folders that mini-ImageNet's lists point to",
    )
    group = parser.add_argument_group("draw (where none is given, the source's own default)")
    add = group.add_argument
    add("--imb_type", choices=IMBALANCES, help="shape of class sizes; default: exp if balanced, else none")
    add("--imb_factor", type=number_in(1), metavar="R", help="largest / smallest class; default: digits 20, others 100")
    add("--class_order", default="index", metavar="index|random|FILE", help="largest class first; FILE: one a line")
    add("--val_per_class", type=number_in(0, kind=int), metavar="N", help="images a class in val; default: digits 20")
    add("--test_per_class", type=number_in(0, kind=int), metavar="N", help="images a class in test; default: digits 30")
    add("--val_fraction", type=number_in(0, 1), metavar="F", help="share of every class in val; default: folder 0.1")
    add("--test_fraction", type=number_in(0, 1), metavar="F", help="share of every class in test; default: folder 0.2")
    add("--data_seed", type=int, default=0, metavar="S", help="seed of the draw")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=given_path, metavar="DIR", help="folder; default: data/<name of the data set>")
    add_switch(group, "--link", default=False, help="hard links in place of copies of image files")
    add_switch(group, "--overwrite", default=False, help="replace a folder that holds something else")
    return parser.parse_args(argv)


@one_line_errors
def main(args) -> None:
    path = source_path(args)
    output = args.output or Path("data") / (SOURCES[args.kind].folder or name_of(path))
    refuse_foreign_output(output, [path, args.ilsvrc])
    with scratch_folder(output) as scratch:
        source = SOURCES[args.kind].read(unpacked(path, scratch / "unpacked"), args.ilsvrc)
        if not source.splits["train"] or not all(source.splits["train"].values()):
            raise Refused(f"{path} names no class, or one without an image; get the original source")
        for split in ("val", "test"):
            if split in source.splits and getattr(args, f"{split}_fraction") is not None:
                raise Refused(
                    f"--{split}_fraction changes nothing: {path} has its own {split}/, which is kept; leave it out, or "
                    f"shorten it with --{split}_per_class"
                )
        profile = drawing_profile(args, source)
        say(publish(source, draw(source.splits, profile), profile, scratch, output, args.link, args.overwrite))


def name_of(source: Path) -> str:
    """Of the data set: that of the folder, or of the archive without its suffixes."""
    name = source.resolve().name
    if source.is_file():
        name = re.sub(r"(\.tar)?\.\w+$", "", name)
    if not name or name.startswith("."):
        raise Refused(f"--source {source} has no name for a folder below data/; give one with --output")
    return name


def source_path(args) -> Path | None:
    """What is to be read; `Refused` when the flags do not fit the kind of source."""
    if args.ilsvrc and args.kind != "mini-imagenet":
        raise Refused(f"--ilsvrc is for mini-imagenet, not for {args.kind}; leave it out")
    if args.kind == "digits":
        if args.source or args.download:
            raise Refused("digits ship with scikit-learn: leave out --source and --download")
        return None
    if args.download:
        if args.source or args.kind not in CIFAR_KINDS:
            raise Refused("--download goes with cifar10 or cifar100 and without --source")
        return download_cifar(args.kind, Path("data/downloads"))
    if args.source is None:
        also = " or --download" if args.kind in CIFAR_KINDS else ""
        raise Refused(f"{args.kind} needs --source PATH{also}")
    if not args.source.exists():
        raise Refused(f"--source {args.source} does not exist")
    return args.source


def drawing_profile(args, source: Source) -> Profile:
    given = {flag: getattr(args, flag) for flag in DRAW_FLAGS if getattr(args, flag) is not None}
    for split in ("val", "test"):
        if f"{split}_fraction" in given and f"{split}_per_class" in given:
            raise Refused(f"--{split}_fraction and --{split}_per_class say the size of one split twice; give one")
        if f"{split}_fraction" in given:
            given[f"{split}_per_class"] = None  # a source's default
    order = resolved_class_order(args.class_order, sorted(source.splits["train"]), args.data_seed)
    profile = Profile(**{**source.profile, **given}, class_order=order, data_seed=args.data_seed)
    carved = {
        split: getattr(profile, f"{split}_fraction")
        for split in ("val", "test")
        if split not in source.splits and getattr(profile, f"{split}_per_class") is None
    }
    if sum(carved.values()) >= 1:
        shares = " and ".join(f"--{split}_fraction {share:g}" for split, share in carved.items())
        raise Refused(f"{shares}: nothing is left to train on; the sum is to be below 1")
    if profile.imb_type == "none" and (args.imb_factor or args.class_order != "index"):
        flag = "--imb_factor" if args.imb_factor else "--class_order"
        raise Refused(f"{flag} changes nothing: the classes keep their sizes; give --imb_type exp or step, too")
    return profile


if __name__ == "__main__":
    main(parse_args())
