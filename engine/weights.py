"""The weights of a run: saved for testing, read without executing anything, and made a model again."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from data.loaders import Pixels
from engine import files
from engine.console import warn
from engine.errors import Refused
from engine.evaluate import default_head
from engine.record import read_record
from models import LongTailClassifier, build_model


def save_weights(path: Path, model: nn.Module, class_means: np.ndarray | None, epoch: int) -> None:
    """Weights for testing: everything but the generator, and the class means where they predict."""
    tensors = {
        name: value.contiguous() for name, value in model.state_dict().items() if name.split(".")[0] != "generator"
    }
    if class_means is not None:
        tensors["class_means"] = torch.from_numpy(class_means)
    content = safetensors.torch.save(tensors, metadata={"epoch": str(epoch)})
    files.write_atomically(path, lambda file: file.write(content))


class Weights(NamedTuple):
    tensors: dict[str, Tensor]
    epoch: int  # they are from
    hash: str  # SHA-256 of the file


def read_weights(folder: Path, weights: str) -> Weights:
    """``best`` or ``last``, from one look at the file, which a training may replace at any time."""
    path = folder / f"{weights}.safetensors"
    if not path.exists():
        raise Refused(
            f"{path} does not exist; has the run finished an epoch, and had it val/ images to choose the best?"
        )
    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        epoch = int(header["__metadata__"]["epoch"])  # which safetensors gives of a path only, not of bytes
        return Weights(safetensors.torch.load(content), epoch, hashlib.sha256(content).hexdigest())
    except Exception as error:  # SafetensorError is not public
        raise Refused(
            f"{path} cannot be read ({error!r:.200}); put a copy in its place, or train anew with --overwrite"
        ) from None


def load_run(folder: Path | str, weights: str | None = None) -> tuple[LongTailClassifier, Pixels, list[str]]:
    """The model of a run in evaluation mode, what turns an RGB PIL image into its input, and the class names.

    ``weights`` is "best" or "last"; by default the best, or the last where nothing was selected.
    """
    folder = Path(folder)
    record = read_record(folder)
    tensors = read_weights(folder, weights or default_weights(folder)).tensors
    if default_head(record["flags"]) == "ncm":
        warn(f"no loss trained the classifier of {folder}: only features are of use, and imagenet_lt_test.py --images")
    return trained_model(folder, record, tensors), pixels_of(record), record["classes"]


def trained_model(folder: Path, record: dict, tensors: dict[str, Tensor]) -> LongTailClassifier:
    """The model of the run that ``record`` is of, in evaluation mode, with these weights from its ``folder``."""
    model = build_model(
        argparse.Namespace(**record["flags"] | {"pretrained": False}), record["class_counts"], with_generator=False
    )
    try:
        model.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "class_means"})
    except RuntimeError as error:
        raise Refused(
            f"the weights in {folder} do not fit its args.json: {str(error).splitlines()[1].strip()}"
        ) from None
    return model.eval()


def default_weights(folder: Path) -> str:
    return "best" if (folder / "best.safetensors").exists() else "last"


def pixels_of(record: dict) -> Pixels:
    return Pixels(record["img_size"], tuple(record["mean"]), tuple(record["std"]))
