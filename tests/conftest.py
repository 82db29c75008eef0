import os

os.environ["MPLBACKEND"] = "Agg"  # also for the scripts that tests start
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side; on a busy core threads wait long for each other

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import ARCHITECTURES
from models.resnet_cifar import resnet_cifar

ARCHITECTURES["resnet8"] = lambda args: resnet_cifar(8, 16)  # where the depth does not matter; scripts lack it
TINY_CLASSES = {"common": ((200, 0, 0), 8), "medium": ((0, 200, 0), 5), "rare": ((0, 0, 200), 3)}  # colour, training


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_tiny_dataset() -> Callable[[Path], None]:
    """Writes three long-tailed classes of 16x16 PNGs, each of one noisy colour: 8, 5 and 3 to train, 3 to val, 3 to
    test."""

    def make(root: Path) -> None:
        random = np.random.default_rng(0)
        for name, (colour, num_train) in TINY_CLASSES.items():
            for split, number in (("train", num_train), ("val", 3), ("test", 3)):
                folder = root / split / name
                folder.mkdir(parents=True)
                for index in range(number):
                    pixels = np.array(colour) + random.integers(0, 55, (16, 16, 3))
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}_{index}.png")

    return make


@pytest.fixture
def tiny_dataset(tmp_path, make_tiny_dataset) -> Path:
    make_tiny_dataset(tmp_path / "tiny")
    return tmp_path / "tiny"
