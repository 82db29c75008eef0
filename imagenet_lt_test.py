"""Test a trained run on images it has not seen; writes tables and figures into the run's folder.

python imagenet_lt_test.py --model_dir quickstart
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from data.build import build_evaluation_loader
from data.folders import SPLITS, ImageFolders, read_known_classes, split_hash
from data.loaders import CACHE_LIMIT
from engine import distributed, metrics, report
from engine.console import say, warn
from engine.errors import Refused, one_line_errors
from engine.evaluate import PREDICT_WITH, chosen_logits, class_means, default_head, predict
from engine.flags import Parser, command_line, number_in
from engine.numerics import AMP, autocast_dtype
from engine.record import read_record
from engine.run import default_weights, find_run, load_run, pixels_of, read_weights
from models.heads import margin_heads_on
from rsg import head_classes

ORIGINAL_RUN = "ImageNet_LT_CIFAR10_resnext50_32x4d_normout_rsg_ldam_supcon"


@one_line_errors
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_dir", default=ORIGINAL_RUN, metavar="RUN", help="a run's folder, or its name")
    parser.add_argument(
        "--root_model", type=Path, default=Path("checkpoint"), metavar="DIR", help="where names are found"
    )
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help="default: the run's own")
    parser.add_argument("--list_dir", type=Path, metavar="DIR", help="image lists in place of folders")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which images")
    parser.add_argument("--weights", choices=("best", "last"), help="default: best, or last where none was selected")
    parser.add_argument(
        "--predict_with",
        choices=PREDICT_WITH,
        help="head, mean of heads, or nearest class mean; default: the trained one",
    )
    parser.add_argument(
        "--shot_thresholds",
        type=number_in(0, kind=int),
        nargs=2,
        default=[metrics.MANY, metrics.FEW],
        metavar=("MANY", "FEW"),
        help="training images: more than MANY is many, fewer than FEW is few",
    )
    parser.add_argument("-b", "--batch_size", type=number_in(1, kind=int), default=64, help="images")
    parser.add_argument("-j", "--workers", type=number_in(0, kind=int), default=4, help="processes, at most one a core")
    parser.add_argument("--cache_limit", type=number_in(0), default=CACHE_LIMIT, metavar="BYTES", help="decoded images")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    parser.add_argument("--amp", choices=AMP, default="off", help="precision of the backbone")
    args = parser.parse_args(argv)
    many, few = args.shot_thresholds
    if many < few - 1:
        raise Refused(f"--shot_thresholds {many} {few}: a class could be both many and few; MANY is the larger one")
    return args


@one_line_errors
def main(args: argparse.Namespace) -> dict:
    """Test, print the table, write the files, and return the content of metrics.json."""
    device = distributed.start(args.device)
    run = find_run(args.model_dir, args.root_model)
    record = read_record(run)
    own = record["flags"]
    root = args.data_dir or Path(own["data_dir"])
    list_dir = args.list_dir or (Path(own["list_dir"]) if own["list_dir"] and args.data_dir is None else None)
    folders = read_known_classes(root, list_dir, args.split, record["classes"])
    weights = args.weights or default_weights(run)
    predict_with = args.predict_with or default_head(own)
    check_head(predict_with, record, folders)
    pixels, amp_dtype = pixels_of(record), autocast_dtype(args.amp, device)
    loader = build_evaluation_loader(args, folders.splits[args.split], pixels, device)
    shot_groups = metrics.shot_groups(record["class_counts"], *args.shot_thresholds)
    head = head_classes(record["class_counts"], own["head_tail_ratio"]).numpy()
    groups = shot_groups | {"head": head, "tail": ~head}

    def tested(name: str) -> tuple[np.ndarray, dict]:
        """Logits under the weights ``name``, and their metrics."""
        tensors, epoch = read_weights(run, name)
        model = load_run(run, name)[0].to(device)
        predictions = predict(model, loader, amp_dtype, "testing")
        if predict_with == "ncm" and "class_means" not in tensors:
            training = build_evaluation_loader(args, folders.splits["train"], pixels, device)
            means = class_means(predict(model, training, amp_dtype, "class means"), len(record["classes"]))
        else:
            means = tensors["class_means"].numpy() if predict_with == "ncm" else None
        logits = chosen_logits(predictions, predict_with, means, own["norm_scale"])
        return logits, metrics.summary(logits, loader.targets.numpy(), record["class_counts"], groups) | {
            "epoch": epoch
        }

    logits, summary = tested(weights)
    result = {"split": args.split, "weights": weights, "predict_with": predict_with, **summary}
    result["intervals"] = metrics.bootstrap_intervals(logits, loader.targets.numpy(), groups)
    tested_classes = np.bincount(loader.targets.numpy(), minlength=len(record["classes"])) > 0
    result["counts"] = {
        name: int((members & tested_classes).sum()) for name, members in groups.items() if name in result
    }
    result["split_hash"] = split_hash(folders)
    result["weights_hash"] = hashlib.sha256((run / f"{weights}.safetensors").read_bytes()).hexdigest()
    result["last"] = summary if weights == "last" else tested("last")[1]
    if args.data_dir is None and result["split_hash"] != record["split_hash"]:
        warn(f"{root} no longer holds the images that the run was trained with")

    suffix = "" if weights == default_weights(run) else f"_{weights}"
    suffix += "" if predict_with == default_head(own) else f"_{predict_with}"
    folder = run / f"{args.split}{suffix}"
    if distributed.is_main():
        command = command_line("imagenet_lt_test.py", vars(args), vars(parse_args([])))
        report.write_report(folder, result, logits, folders, record, shot_groups, command)
    say(report.table(result))
    say(f"tables and figures in {folder}")
    distributed.stop()
    return result


def check_head(predict_with: str, record: dict, folders: ImageFolders) -> None:
    heads = ["main", *margin_heads_on(argparse.Namespace(**record["flags"]))]
    if predict_with not in (*heads, "mean", "ncm"):
        raise Refused(
            f"--predict_with {predict_with}: the run has no such head; it has {', '.join(heads)}, mean and ncm"
        )
    if predict_with == "ncm" and ("train" not in folders.splits or folders.untested("train")):
        raise Refused(f"--predict_with ncm needs training images of every class in {folders.root / 'train'}")


if __name__ == "__main__":
    main(parse_args())
