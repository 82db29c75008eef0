"""Losses: ``(logits, targets)`` or ``(features, targets)`` to a scalar. No parameters, only buffers.

A new classification loss is one file, one line in `CLASSIFICATION_LOSSES` and its own flags in `add_loss_flags`. Like
`FocalLoss` it takes ``row_weights`` for synthetic images, and `mean_over_processes` makes its mean that of all
processes. It is built anew in every epoch and keeps nothing of it.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor

from engine.errors import Refused
from engine.flags import add_switch, epoch_or_share, number_in, resolved_epoch
from losses.class_weights import class_balanced_weights, inverse_frequency_weights
from losses.cross_entropy import CrossEntropyLoss
from losses.focal import FocalLoss
from losses.ldam import LDAMLoss
from losses.logit_adjusted import LogitAdjustedLoss
from losses.objective import HeadTerm, Objective
from losses.supcon import SupConLoss
from models.heads import margin_heads_on

CLASSIFICATION_LOSSES = {  # name: (printed name, built from flags, class counts and class weights)
    "cross_entropy": ("CE", lambda args, class_counts, weight: CrossEntropyLoss(weight, args.label_smoothing)),
    "ldam": (
        "LDAM",
        lambda args, class_counts, weight: LDAMLoss(class_counts, args.ldam_max_margin, weight, args.label_smoothing),
    ),
    "focal": ("focal", lambda args, class_counts, weight: FocalLoss(args.focal_gamma, weight)),
    "logit_adjusted": (
        "logit-adjusted CE",
        lambda args, class_counts, weight: LogitAdjustedLoss(
            class_counts, args.logit_adjust_tau, weight, args.label_smoothing
        ),
    ),
}
CLASS_WEIGHTS = {  # name: (printed name, built from flags and class counts)
    "none": (None, lambda args, class_counts: None),
    "cbl": ("CB", lambda args, class_counts: class_balanced_weights(class_counts, args.cbl_beta)),
    "icf": ("ICF", lambda args, class_counts: inverse_frequency_weights(class_counts)),
}


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("losses")
    factor, below_1 = number_in(0), number_in(0, 1, open_high=True)
    for name, (title, _) in CLASSIFICATION_LOSSES.items():
        is_ldam = name == "ldam"
        add_switch(group, f"--add_{name}_loss", is_ldam, f"{title} on every head")
        group.add_argument(
            f"--{name}_loss_weight", type=factor, default=0.1 if is_ldam else 1.0, metavar="W", help="factor"
        )
        group.add_argument(
            f"--{name}_weight_type", choices=CLASS_WEIGHTS, default="icf" if is_ldam else "none", help="class weights"
        )
    group.add_argument("--cbl_beta", type=below_1, default=0.999, metavar="B", help="cbl weights: 0 makes them all 1")
    group.add_argument("--ldam_max_margin", type=factor, default=0.3, metavar="M", help="LDAM: rarest class, a cosine")
    group.add_argument("--focal_gamma", type=factor, default=2.0, metavar="G", help="focal: 0 is cross-entropy")
    group.add_argument(
        "--logit_adjust_tau", type=factor, default=1.0, metavar="T", help="logit-adjusted CE: 1 is balanced softmax"
    )
    group.add_argument(
        "--label_smoothing", type=below_1, default=0.0, metavar="E", help="share of all classes; not in focal"
    )
    add_switch(group, "--add_supcon_loss", True, "SupCon on the pooled features")
    group.add_argument("--supcon_loss_weight", type=factor, default=0.9, metavar="W", help="factor")
    group.add_argument(
        "--supcon_temperature", type=number_in(0, open_low=True), default=0.07, metavar="T", help="SupCon"
    )
    group.add_argument("--supcon_views", type=int, choices=(1, 2), default=1, help="augmented views of every image")
    group.add_argument(
        "--supcon_projection_dim",
        type=number_in(0, kind=int),
        default=0,
        metavar="D",
        help="SupCon sees a two-layer projection of this size instead of the features; 0: none",
    )
    group.add_argument(
        "--supcon_generated",
        choices=("all", "keys", "none"),
        default="all",
        help="generated rows in SupCon: anchors and keys; keys, without gradient for the generator; left out",
    )
    add_switch(
        group,
        "--supcon_balance",
        False,
        "SupCon with classes averaged and classifier weights as prototypes (BCL); with a projection: through their own",
    )
    group.add_argument(
        "--drw_epoch",
        type=epoch_or_share(0),
        metavar="E",
        help="class weights are 1 before epoch E (DRW); 0.8: before that share of the epochs",
    )


def check_loss_flags(args: argparse.Namespace, sampler: str) -> list[str]:
    """Warnings about doubtful combinations, also with the last epoch's ``sampler``; `Refused` when no loss is on."""
    on = losses_on(args)
    no_classifier = predicts_by_class_means(args)
    if no_classifier and not (args.add_supcon_loss and args.supcon_loss_weight):
        raise Refused("no loss is on with a weight above 0; add one, for example --add_cross_entropy_loss")
    if args.supcon_balance and not args.add_supcon_loss:
        raise Refused("--supcon_balance is about SupCon, which is off; leave it out or give --add_supcon_loss")
    if args.supcon_balance and no_classifier:
        raise Refused(
            "--supcon_balance takes the classifier's weights as prototypes, but no loss trains a classifier; add one, "
            "for example --add_logit_adjusted_loss"
        )
    if args.freeze_backbone and no_classifier:
        raise Refused("--freeze_backbone leaves nothing to train: no loss trains a classifier; add one")
    warnings = []
    if no_classifier:
        warnings.append(
            "SupCon alone trains no classifier: validation and test predict with the nearest class mean (ncm)"
        )
    if "ldam" in on and not args.norm_out:
        warnings.append("LDAM on a Linear head: a margin on unbounded logits does next to nothing; use --norm_out True")
    weighted = [name for name in on if _weight_type(args, name) != "none"]
    warnings += _corrected_twice(args, weighted, sampler)
    if (
        args.freeze_backbone
        and args.add_supcon_loss
        and not any((args.supcon_projection_dim, args.supcon_balance, args.add_rsg))
    ):
        warnings.append("SupCon trains nothing: it sees the features, which --freeze_backbone keeps as they are")
    if args.drw_epoch is not None and not weighted:
        warnings.append("--drw_epoch changes nothing: no loss that is on has class weights; see --ldam_weight_type")
    elif args.drw_epoch is not None and resolved_epoch(args, "drw_epoch") >= args.epochs:
        warnings.append(
            f"class weights never begin: --drw_epoch {args.drw_epoch}, but the last epoch is {args.epochs - 1}"
        )
    if args.label_smoothing and not (set(on) - {"focal"} or (not on and margin_heads_on(args))):
        warnings.append(
            "--label_smoothing changes nothing: only cross-entropy, LDAM and the logit-adjusted loss know it"
        )
    return warnings


def _corrected_twice(args: argparse.Namespace, weighted: list[str], sampler: str) -> list[str]:
    """Warnings about losses, those ``weighted`` by class among them, and a sampler that make up for the same thing."""
    adjusted = "logit_adjusted" in losses_on(args) and args.logit_adjust_tau > 0
    ways = [f"--{name}_weight_type {getattr(args, f'{name}_weight_type')}" for name in weighted]
    ways += ["--add_logit_adjusted_loss"] * adjusted
    pairs = [(f"the {sampler} sampler", ", ".join(ways))] if ways and sampler != "uniform" else []
    if adjusted and "logit_adjusted" in weighted:
        flag = f"--logit_adjusted_weight_type {args.logit_adjusted_weight_type}"
        pairs.append(("the logit-adjusted loss", flag))
    return [f"corrected twice: {one} and {other} both make up for rare classes" for one, other in pairs]


def check_class_weights(args: argparse.Namespace, class_counts: Sequence[int]) -> list[str]:
    """A warning when class-balanced weights that are in use are all but equal, though the classes are not."""
    if not uses_class_balanced_weights(args) or args.cbl_beta == 0:
        return []
    weights, most, fewest = class_balanced_weights(class_counts, args.cbl_beta), max(class_counts), min(class_counts)
    if most < 2 * fewest or weights.max() > 1.1 * weights.min():
        return []
    return [
        f"class-balanced weights of --cbl_beta {args.cbl_beta:g} are all but equal ({weights.min():.3f} to "
        f"{weights.max():.3f}) for classes of {fewest} to {most} images; 1 - 1/N with the N images of the "
        f"largest class is {1 - 1 / most:.6g}"
    ]


def uses_class_balanced_weights(args: argparse.Namespace) -> bool:
    return any(getattr(args, f"{name}_weight_type") == "cbl" for name in losses_on(args))


def _weight_type(args: argparse.Namespace, name: str) -> str:
    """Of the loss ``name``; class-balanced weights with beta 0 are none."""
    weight_type = getattr(args, f"{name}_weight_type")
    return "none" if weight_type == "cbl" and args.cbl_beta == 0 else weight_type


def predicts_by_class_means(args: argparse.Namespace) -> bool:
    """Whether no loss trains a classifier, so that the nearest class mean must predict."""
    return not margin_heads_on(args) and not losses_on(args)


def losses_on(args: argparse.Namespace) -> list[str]:
    """Names of the classification losses that are on; a factor of 0 switches a loss off, too."""
    names = [name for name in CLASSIFICATION_LOSSES if getattr(args, f"add_{name}_loss")]
    return [name for name in names if getattr(args, f"{name}_loss_weight")]


def build_objective(args: argparse.Namespace, class_counts: Sequence[int], epoch: int | None = None) -> Objective:
    """The objective in force in ``epoch`` (None: when all has begun): before ``--drw_epoch`` class weights are 1."""
    deferred = epoch is not None and args.drw_epoch is not None and epoch < resolved_epoch(args, "drw_epoch")
    heads = ["main", *margin_heads_on(args)]
    terms = [
        (name, getattr(args, f"{name}_loss_weight"), "none" if deferred else _weight_type(args, name))
        for name in losses_on(args)
    ]
    if not terms and len(heads) > 1:  # margin heads as their papers define them
        terms = [("cross_entropy", 1.0, "none")]
    return Objective(
        [_head_term(args, *term, head, class_counts) for head in heads for term in terms],
        SupConLoss(args.supcon_temperature) if args.add_supcon_loss else None,
        supcon_factor=args.supcon_loss_weight,
        supcon_generated=args.supcon_generated if args.add_rsg else "all",
        supcon_sees="projections" if args.supcon_projection_dim else "features",
        supcon_title="balanced SupCon" if args.supcon_balance else "SupCon",
        cesc_factor=args.rsg_cesc_weight if args.add_rsg else 0.0,
        mv_factor=args.rsg_mv_weight if args.add_rsg else 0.0,
    )


def _head_term(
    args: argparse.Namespace, name: str, factor: float, weight_type: str, head: str, class_counts: Sequence[int]
) -> HeadTerm:
    title, build_loss = CLASSIFICATION_LOSSES[name]
    weights_title, build_weights = CLASS_WEIGHTS[weight_type]
    weight: Tensor | None = build_weights(args, class_counts)
    on = ("normed" if args.norm_out else "linear") if head == "main" else head
    text = f"{title}({on}{f'; {weights_title} weights' if weights_title else ''})"
    return HeadTerm(f"{name}_{head}", text, factor, head, build_loss(args, class_counts, weight))
