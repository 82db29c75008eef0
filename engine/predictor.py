"""A trained run that answers: image files in, logits of one of its heads out."""

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.build import build_evaluation_loader
from data.folders import ImageFolders, Split, read_known_classes
from data.loaders import EvaluationLoader
from engine import distributed
from engine.console import warn
from engine.errors import Refused
from engine.evaluate import chosen_logits, class_means, default_head, predict
from engine.precision import autocast_dtype
from engine.priors import logit_adjusted, model_prior, read_prior, reweighted, training_prior
from engine.record import read_record, real_class_counts
from engine.weights import default_weights, pixels_of, read_weights, trained_model
from models.heads import margin_heads_on


class Answers(NamedTuple):
    """Rows in the order of the split; float64."""

    logits: np.ndarray  # [N, C], margin-free
    targets: np.ndarray  # [N]
    features: np.ndarray | None = None  # [N, D], for --plot_features


class Predictor:
    """The ``weights`` of a run (default: those that ``--weights`` asks for), asked as the test script's flags say.

    `Refused` when the run has no such head, or when the nearest class mean lacks training images.
    """

    def __init__(self, args: argparse.Namespace, run: Path, device: torch.device, weights: str | None = None):
        self.args, self.run, self.device = args, run, device
        self.amp_dtype = autocast_dtype(args.amp, device)
        self.record = read_record(run)
        flags, classes = self.record["flags"], self.record["classes"]
        self.weights = weights or args.weights or default_weights(run)
        self.head = args.predict_with or default_head(flags)
        heads = ["main", *margin_heads_on(argparse.Namespace(**flags))]
        if self.head not in (*heads, "mean", "ncm"):
            raise Refused(
                f"--predict_with {self.head}: the run has no such head; it has {', '.join(heads)}, mean and ncm"
            )
        tensors, self.epoch, self.weights_hash = read_weights(run, self.weights)
        self.test_prior = None
        self.shift = None  # what corrects for a prior: [C], added to the logits
        no_logits = np.zeros(len(classes))
        if args.logit_adjust is not None:
            self.shift = logit_adjusted(no_logits, training_prior(self.record), args.logit_adjust)
        if args.test_prior is not None:
            if "tau" in self.record:
                raise Refused("--test_prior: the logits of a rescaled classifier stand for no prior that is known")
            self.test_prior = read_prior(args.test_prior, classes, real_class_counts(self.record))
            self.shift = reweighted(no_logits, model_prior(self.record, self.head, self.epoch), self.test_prior)
        self.model = trained_model(run, self.record, tensors).to(device)
        self.class_means = None
        if self.head == "ncm":
            self.class_means = tensors["class_means"].numpy() if "class_means" in tensors else self._class_means()

    def __call__(self, loader: EvaluationLoader, text: str) -> Answers:
        """Logits of the loader's images, corrected for ``--test_prior`` or by ``--logit_adjust`` if one is given.
        ``text`` names the bar."""
        with_features = self.head == "ncm" or self.args.plot_features
        predictions = predict(self.model, loader, self.amp_dtype, text, with_features)
        logits = chosen_logits(predictions, self.head, self.class_means, self.record["flags"]["norm_scale"])
        if self.shift is not None:
            logits = logits + self.shift
        return Answers(logits, predictions.targets, predictions.features)

    def loader(self, split: Split) -> EvaluationLoader:
        pixels = pixels_of(self.record)
        return distributed.together(lambda: build_evaluation_loader(self.args, split, pixels, self.device))

    def folders(self, split: str) -> ImageFolders:
        """The data set, by default the run's own; `Refused` without images in ``split``."""
        args, (root, list_dir) = self.args, self._own_data()
        if args.data_dir is not None:
            root = args.data_dir
            if list_dir and args.list_dir is None and not (root / split).is_dir():
                raise Refused(
                    f"{root / split} does not exist, and the run knows its images by lists; give --list_dir, too"
                )
            list_dir = None
        return read_known_classes(root, args.list_dir or list_dir, split, self.record["classes"])

    def answers_by(self) -> dict:
        """What its answers depend on beside images and weights, in words and numbers that last."""
        shares = None
        if self.test_prior is not None:
            shares = dict(zip(self.record["classes"], self.test_prior.tolist(), strict=True))
        return {"predict_with": self.head, "logit_adjust": self.args.logit_adjust, "test_prior": shares}

    def suffix(self) -> str:
        """What tells the files of this test from those of the default one."""
        suffix = "" if self.weights == default_weights(self.run) else f"_{self.weights}"
        suffix += "" if self.head == default_head(self.record["flags"]) else f"_{self.head}"
        suffix += "" if self.amp_dtype is None else f"_{str(self.amp_dtype).removeprefix('torch.')}"
        if self.args.logit_adjust is not None:
            suffix += f"_adjusted_{self.args.logit_adjust:g}"
        if self.test_prior is None:
            return suffix
        path = Path(self.args.test_prior)
        content = f"-{hashlib.sha256(self.test_prior.tobytes()).hexdigest()[:8]}" if path.is_file() else ""
        return f"{suffix}_prior_{path.stem}{content}"

    def _own_data(self) -> tuple[Path, Path | None]:
        """The data folder that the run was trained on, and its folder of lists."""
        flags = self.record["flags"]
        return Path(flags["data_dir"]), Path(flags["list_dir"]) if flags["list_dir"] else None

    def _class_means(self) -> np.ndarray:
        args, (root, list_dir) = self.args, self._own_data()
        if args.data_dir is not None and not root.is_dir():  # else it may name other images
            warn(f"{root} is gone: the class means are those of the training images in {args.data_dir}")
            root, list_dir = args.data_dir, args.list_dir
        try:
            folders = read_known_classes(root, list_dir, "train", self.record["classes"])
        except Refused as error:
            raise Refused(f"--predict_with ncm needs training images: {error}") from None
        if missing := folders.untested("train"):
            raise Refused(f"--predict_with ncm needs training images of every class; {missing[0]} has none")
        loader = self.loader(folders.splits["train"])
        predictions = predict(self.model, loader, self.amp_dtype, "class means")
        return class_means(predictions, len(self.record["classes"]))
