import argparse

import numpy as np
import torch
from torch import nn

from data.build import build_evaluation_loader
from data.folders import ImageFolders
from data.loaders import EvaluationLoader, Pixels
from engine.evaluate import chosen_logits, class_means, predict, validation_row
from engine.metrics import negative_log_likelihood
from losses import predicts_by_class_means


class Selection:
    """Judges the model after an epoch, on val/ only. ``training`` is given where the nearest class mean predicts."""

    def __init__(
        self,
        validation: EvaluationLoader | None,
        training: EvaluationLoader | None,
        class_counts: list[int],
        scale: float,
        amp_dtype: torch.dtype | None,
    ):
        self.validation, self.training = validation, training
        self.class_counts, self.scale, self.amp_dtype = class_counts, scale, amp_dtype

    def judge(self, model: nn.Module) -> tuple[dict[str, float], np.ndarray | None]:
        """The val_* keys of log.jsonl (none without val/), and the class means (None where a head predicts). The margin
        heads have a ``val_loss_<head>``, without margin."""
        means = None
        if self.training is not None:
            means = class_means(predict(model, self.training, self.amp_dtype, "class means"), len(self.class_counts))
        if self.validation is None:
            return {}, means
        predictions = predict(model, self.validation, self.amp_dtype, "validation", means is not None)
        logits = chosen_logits(predictions, "main" if means is None else "ncm", means, self.scale)
        row = validation_row(logits, predictions.targets, self.class_counts)
        for head, logits in predictions.logits.items():
            if head != "main":
                row[f"val_loss_{head}"] = float(negative_log_likelihood(logits, predictions.targets).mean())
        return row, means


def build_selection(
    args: argparse.Namespace,
    folders: ImageFolders,
    pixels: Pixels,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> Selection:
    def loader(split: str) -> EvaluationLoader:
        return build_evaluation_loader(args, folders.splits[split], pixels, device)

    validation = loader("val") if "val" in folders.splits else None
    training = loader("train") if predicts_by_class_means(args) else None
    return Selection(validation, training, folders.class_counts, args.norm_scale, amp_dtype)
