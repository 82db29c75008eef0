"""What a trained run says of images whose classes are known."""

from pathlib import Path

import numpy as np
import torch

from data.folders import Split
from engine.errors import Refused
from engine.options import evaluation_parser
from engine.predictor import Predictor
from engine.record import read_record


class Agreement:
    """What a trained run says of an image: the classes it finds likelier than the image's own must be fewer than
    ``first``."""

    def __init__(self, run: Path, first: int, classes: list[str], device: torch.device, workers: int):
        if read_record(run)["classes"] != classes:
            raise Refused(f"--filter_model {run} was trained on other classes than those of --data_dir")
        args = evaluation_parser().parse_args(["--workers", str(workers)])
        self.predictor, self.classes, self.first = Predictor(args, run, device), classes, first

    def __call__(self, paths: list[Path], targets: list[int]) -> list[str | None]:
        """For every image None, or what the run takes it for."""
        logits = self.predictor(self.predictor.loader(Split(paths, targets)), "agreement").logits
        likelier = (logits > logits[np.arange(len(targets)), targets, None]).sum(axis=1)
        return [
            None
            if number < self.first
            else f"wrong class: {self.predictor.run.name} takes it for {self.classes[guess]}"
            for number, guess in zip(likelier, logits.argmax(axis=1), strict=True)
        ]
