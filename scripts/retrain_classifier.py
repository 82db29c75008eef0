__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Give a trained run another classifier on the same backbone; leaves a new run folder that names its parent.

    python scripts/retrain_classifier.py --model_dir RUN                  # cRT: trains a new classifier, RUN_crt
    python scripts/retrain_classifier.py --model_dir RUN --method tau     # rescales the one it has, RUN_tau
    python imagenet_lt_test.py --model_dir RUN_crt

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", 2020. crt: the main head starts
afresh and trains with cross-entropy on class-balanced batches; the backbone stays as it is, batch statistics included.
tau: each class's weights are divided by the tau-th power of their norm, and the bias is dropped; tau is chosen on val/.
Flags of imagenet_lt_train.py may follow: --run_name other, and for crt's training --epochs 30 --lr 0.05 and the like.
"""

import argparse

import torch

import imagenet_lt_train
from data.build import build_evaluation_loader
from data.folders import read_image_folders
from data.split_hash import split_hash
from engine import distributed, files
from engine.console import say, warn
from engine.errors import Refused, one_line_errors
from engine.evaluate import default_head, predict
from engine.flags import Parser, add_root_model, flag_words, number_in
from engine.options import train_parser
from engine.post_hoc import best_tau, scores_by_tau, tau_normalising
from engine.predictor import Answers
from engine.record import check_finished, code_commit, plain_flags, read_record
from engine.run import RunFolder, find_run
from engine.weights import default_weights, pixels_of, read_weights, save_weights, trained_model

CRT = "--add_cross_entropy_loss --add_ldam_loss False --add_supcon_loss False --add_rsg False --sampler balanced "
CRT += "--freeze_backbone --epochs 10 --lr 0.1 --lr_schedule cosine"
OF_THE_PARENT = (
    *("data_dir", "list_dir", "synthetic_weight", "synthetic_dir", "count_synthetic"),
    *("arch", "stem", "neck", "norm_out", "norm_scale", "normalize", "hflip", "batch_size", "head_tail_ratio"),
)
FOR_TAU = {
    *("run_name", "root_log", "overwrite", "data_dir", "list_dir", "batch_size", "workers", "cache_limit", "device"),
}
OWN = ("run_name", "root_model", "root_log", "data_dir", "list_dir")  # of a rescaled run; the rest is its parent's


@one_line_errors
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this script, and in ``training`` those of the new run's training."""
    parser = Parser("Give a trained run another classifier; flags of imagenet_lt_train.py may follow.")
    parser.add_argument("--model_dir", required=True, metavar="RUN", help="a run's folder, or its name")
    add_root_model(parser)
    parser.add_argument("--method", choices=("crt", "tau"), default="crt", help="train anew, or rescale")
    parser.add_argument("--parent_weights", choices=("best", "last"), help="default: best, or last without one")
    parser.add_argument(
        "--tau", type=number_in(0), metavar="T", help="tau: 0 to 2 by 0.05, the best on val/, by default"
    )
    args, rest = parser.parse_known_args(argv)
    args.parent = find_run(args.model_dir, args.root_model)
    args.parent_weights = args.parent_weights or default_weights(args.parent)
    args.training = imagenet_lt_train.parse_args(training_flags(args) + rest)
    if args.method == "crt" and args.tau is not None:
        raise Refused("--tau is for --method tau; crt trains a new classifier")
    told = vars(train_parser().parse_args(training_flags(args)))
    changed = [flag for flag, value in vars(args.training).items() if value != told[flag] and flag not in FOR_TAU]
    if args.method == "tau" and changed:
        raise Refused(f"--{changed[0]} is for --method crt; tau only rescales")
    return args


def training_flags(args: argparse.Namespace) -> list[str]:
    record = read_record(args.parent)
    flags = {name: record["flags"][name] for name in OF_THE_PARENT}
    flags |= {"img_size": record["img_size"], "weights": args.parent / f"{args.parent_weights}.safetensors"}
    flags |= {"root_model": args.root_model, "run_name": f"{args.parent.name}_{args.method}", "seed": record["seed"]}
    return flag_words(flags, {}) + CRT.split()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    warn(*check_finished(args.parent, read_record(args.parent)))
    if args.method == "crt":
        imagenet_lt_train.main(args.training)
    else:
        rescale(args)


def rescale(args: argparse.Namespace) -> None:
    """The tau-normalised run: the parent's weights with the main head's rescaled."""
    record, device = read_record(args.parent), distributed.start(args.training.device)
    if default_head(record["flags"]) == "ncm":
        raise Refused(f"{args.parent} predicts with its nearest class mean: no loss trained a head; try --method crt")
    if record["flags"]["norm_out"]:
        raise Refused(f"{args.parent} has a NormedLinear head, whose weights have no norm to rescale; try --method crt")
    run = distributed.together(lambda: RunFolder(args.training))
    weights = read_weights(args.parent, args.parent_weights)
    model = trained_model(args.parent, record, weights.tensors).to(device)
    head, scores = model.heads["main"], {}
    if args.tau is None:
        folders = read_image_folders(args.training.data_dir, args.training.list_dir)
        if split_hash(folders) != record["split_hash"]:
            raise Refused(f"{folders.root} does not hold the images of {args.parent}; tau is chosen on its own val/")
        if "val" not in folders.splits:
            raise Refused(f"{folders.root} has no val/ images of the run's classes to choose tau on; give --tau")
        val, pixels = folders.splits["val"], pixels_of(record)
        loader = distributed.together(lambda: build_evaluation_loader(args.training, val, pixels, device))
        predictions = predict(model, loader, None, "validation")
        scores = scores_by_tau(tau_normalising(head), Answers(predictions.logits["main"], predictions.targets))
        for tau, score in scores.items():
            say(f"tau {tau:.2f}  val balanced {score:6.1%}")
    tau = args.tau if args.tau is not None else best_tau(scores)
    with torch.no_grad():
        head.weight.div_(torch.linalg.vector_norm(head.weight, dim=1, keepdim=True) ** tau)
        head.bias.zero_()
    own = {name: plain_flags(args.training)[name] for name in OWN}
    record.pop("resumed", None)
    record |= {"flags": record["flags"] | own, "parent": str(args.parent), "commit": code_commit()}
    record |= {"parent_weights": args.parent_weights}
    record |= {"tau": tau, "val_balanced_accuracy_by_tau": scores}
    if distributed.is_main():
        with files.locked(run.path):
            run.check_unchanged()
            run.begin(record, 0, fresh=True)
            save_weights(run.path / "last.safetensors", model, None, weights.epoch)
            run.writer.close()
    say(f"tau {tau:g}; test it with: {run.test_command()}")
    distributed.stop()


if __name__ == "__main__":
    main(parse_args())
