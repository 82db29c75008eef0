"""What a model says of a split, and which of its heads is asked."""

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.loaders import Batch
from engine import distributed, metrics
from engine.console import progress
from engine.transfer import to_device
from losses import predicts_by_class_means
from models.heads import MARGIN_HEADS

PREDICT_WITH = ("main", *MARGIN_HEADS, "mean", "ncm")


class Predictions(NamedTuple):
    """Rows in the order of the split; float64, margin-free."""

    features: np.ndarray | None  # [N, D], where they were asked for
    logits: dict[str, np.ndarray]  # head -> [N, C]
    targets: np.ndarray  # [N]


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[Batch], amp_dtype: torch.dtype | None, text: str, with_features: bool = True
) -> Predictions:
    """Run the model in evaluation mode over ``batches``; every process gets the rows of all. ``text`` names the bar."""
    model.eval()
    features, logits, targets, indices = [], [], [], []
    for batch in progress(batches, text, "batch"):
        with torch.autocast(batch.images.device.type, amp_dtype, enabled=amp_dtype is not None):
            output = model(batch.images)
        if with_features:
            features.append(output.features.float())
        logits.append(output.logits)
        targets.append(batch.targets)
        indices.append(to_device(batch.indices, batch.targets.device))
    _, order = np.unique(distributed.gather_rows(torch.cat(indices)).cpu().numpy(), return_index=True)

    def gathered(rows: list[Tensor]) -> np.ndarray:
        array = distributed.gather_rows(torch.cat(rows)).cpu().numpy()[order]
        return array.astype(np.float64) if array.dtype == np.float32 else array

    heads = {head: gathered([each[head] for each in logits]) for head in logits[0]}
    if not all(np.isfinite(rows).all() for rows in heads.values()):
        raise distributed.failed(f"the model's outputs are not finite ({text}): it has diverged; try a lower --lr")
    return Predictions(gathered(features) if with_features else None, heads, gathered(targets))


def validation_row(logits: np.ndarray, targets: np.ndarray, class_counts: list[int]) -> dict[str, float]:
    """The val_* keys of log.jsonl. The loss is plain cross-entropy without margins, whatever training minimises."""
    summary = metrics.summary(logits, targets, class_counts, metrics.shot_groups(class_counts))
    names = {"nll": "loss", "top1": "accuracy"} | dict.fromkeys(("balanced_accuracy", "many", "medium", "few"))
    return {f"val_{new or old}": summary[old] for old, new in names.items() if old in summary}


def default_head(flags: dict) -> str:
    """The head that training has trained; the nearest class mean when it trained none."""
    return "ncm" if predicts_by_class_means(argparse.Namespace(**flags)) else "main"


def head_in_words(predict_with: str) -> str:
    words = {"main": "the main head", "mean": "the mean of all heads", "ncm": "the nearest class mean"}
    return words.get(predict_with, f"the {predict_with} head")


def chosen_logits(
    predictions: Predictions, predict_with: str, class_means: np.ndarray | None, scale: float
) -> np.ndarray:
    """Logits [N, C] of a head, of the ``mean`` of all heads' softmax, or of the nearest class mean (``ncm``)."""
    if predict_with == "ncm":
        return metrics.class_mean_logits(predictions.features, class_means, scale)
    if predict_with == "mean":
        return metrics.mean_of_heads(list(predictions.logits.values()))
    return predictions.logits[predict_with]


def class_means(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Mean of the normalised features of each class [C, D], from predictions on un-augmented training images."""
    features = metrics.unit_rows(predictions.features)
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, predictions.targets, features)
    return sums / np.bincount(predictions.targets, minlength=num_classes)[:, None]
