"""Test a trained run on images it has not seen; writes tables and figures into the run's folder.

python imagenet_lt_test.py --model_dir quickstart
"""

import argparse
from pathlib import Path

import numpy as np

from data.folders import ImageFolders
from data.split_hash import split_hash, tested_hash
from engine import distributed, metrics, post_hoc, report
from engine.console import say, warn
from engine.errors import Refused, one_line_errors
from engine.files import read_json
from engine.flags import command_line
from engine.options import check_evaluation_flags, evaluation_parser
from engine.predictor import Predictor
from engine.record import check_finished, synthetic_use
from engine.run import find_run
from engine.unlabelled import predict_images
from rsg.generator import head_classes


@one_line_errors
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = evaluation_parser(__doc__).parse_args(argv)
    check_evaluation_flags(args)
    return args


@one_line_errors
def main(args: argparse.Namespace) -> dict:
    """Test, print the table, write the files, and return the content of metrics.json; or predict ``--images``."""
    device = distributed.start(args.device)
    predictor = Predictor(args, find_run(args.model_dir, args.root_model), device)
    warn(*check_finished(predictor.run, predictor.record))
    result = predict_images(predictor, args.images) if args.images else evaluate(args, predictor)
    distributed.stop()
    return result


def evaluate(args: argparse.Namespace, predictor: Predictor) -> dict:
    run, record, counts = predictor.run, predictor.record, predictor.record["class_counts"]
    folders = predictor.folders(args.split)
    if args.post_hoc and not ("val" in folders.splits and folders.splits["val"].paths):
        raise Refused(f"--post_hoc is fitted on val/, and {folders.root} has no val images; leave it out or add some")
    loader = predictor.loader(folders.splits[args.split])
    shot_groups = metrics.shot_groups(counts, *args.shot_thresholds)
    head = head_classes(counts, record["flags"]["head_tail_ratio"]).numpy()
    groups = shot_groups | {"head": head, "tail": ~head}

    last = predictor if predictor.weights == "last" else Predictor(args, run, predictor.device, "last")
    logits, targets, features = answers = predictor(loader, "testing")
    summary = metrics.summary(logits, targets, counts, groups) | {"epoch": predictor.epoch}
    result = {"split": args.split, "weights": predictor.weights, "predict_with": predictor.head, **summary}
    result["ece_groups"] = metrics.calibration_by_group(logits, targets, groups)
    images = np.bincount(targets, minlength=len(counts))
    tested = images > 0
    if args.logit_adjust is not None:
        result["logit_adjust"] = args.logit_adjust
    if predictor.test_prior is not None:
        result |= {"test_prior": args.test_prior, "test_prior_shares": predictor.answers_by()["test_prior"]}
        result["top1_under_prior"] = metrics.accuracy_under_prior(logits, targets, predictor.test_prior)
        result["prior_tested"] = float(predictor.test_prior[tested].sum())
    result["intervals"] = metrics.bootstrap_intervals(logits, targets, groups)
    result["fewest_images"] = int(images[tested].min())
    result["counts"] = {name: int((members & tested).sum()) for name, members in groups.items() if name in result}
    result["split_hash"], result["weights_hash"] = split_hash(folders), predictor.weights_hash
    result["tested_hash"] = tested_hash(folders, args.split)
    result |= synthetic_use(record) | {"shot_thresholds": args.shot_thresholds}
    is_own = result["split_hash"] == record["split_hash"]
    if args.split == "val" and is_own and (predictor.weights == "best" or record.get("val_balanced_accuracy_by_tau")):
        result["chosen_on_these_images"] = True
    result["last"] = summary
    if last.weights_hash != predictor.weights_hash:
        of_last = last(loader, "testing").logits
        result["last"] = metrics.summary(of_last, targets, counts, groups) | {"epoch": last.epoch}
    if args.data_dir is None and args.list_dir is None and not is_own:
        warn(f"{folders.root} no longer holds the images that the run was trained with")

    folder = run / f"{args.split}{predictor.suffix()}"
    folder = folder.with_name(folder.name + own_suffix(args, folder, folders, result, record))
    if distributed.is_main():
        command = command_line("imagenet_lt_test.py", vars(args), vars(parse_args([])))
        shown = features if args.plot_features else None
        report.write_report(folder, result, logits, folders, record, shot_groups, command, shown)
    say(report.table(result))
    if args.post_hoc:
        say(post_hoc.write_comparison(folder, result, predictor, folders.splits["val"], answers, groups))
    say(f"tables and figures in {folder}")
    return result


def own_suffix(args: argparse.Namespace, folder: Path, folders: ImageFolders, result: dict, record: dict) -> str:
    """What tells the files of a test on other images or groups from those of the run's own in ``folder``, which
    comparisons read."""
    suffix = ""
    if result["split_hash"] != record["split_hash"]:
        earlier = read_json(folder / "metrics.json", default={}).get("split_hash", result["split_hash"])
        if args.data_dir or args.list_dir or earlier != result["split_hash"]:
            suffix = f"_{folders.root.resolve().name}-{result['split_hash'][:8]}"
    if args.shot_thresholds != [metrics.MANY, metrics.FEW]:
        suffix += "_shots_{}_{}".format(*args.shot_thresholds)
    return suffix


if __name__ == "__main__":
    main(parse_args())
