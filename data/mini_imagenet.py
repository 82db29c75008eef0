"""Mini-ImageNet in the layouts it is passed around in: folders, few-shot lists over ILSVRC folders, pickled caches.

Ravi and Larochelle's few-shot split (2017) keeps 64, 16 and 20 classes for train, val and test. Long-tailed
classification needs all 100 in each, so those are merged and split again inside every class.
"""

import csv
import re
from pathlib import Path

import numpy as np

from data.folders import SPLITS, image_files, refuse_unknown_classes
from data.pickles import load_arrays
from data.source_folders import Classes, Source, read_class_folders
from data.wordnet import MINI_IMAGENET_NAMES
from engine.errors import Refused

RESPLIT = {"imb_type": "exp", "imb_factor": 100, "val_per_class": 50, "test_per_class": 50}


def read_mini_imagenet(root: Path, ilsvrc: Path | None) -> Source:
    """The layout that lies in ``root``; ``ilsvrc`` holds the ILSVRC-2012 training folders that few-shot lists mean."""
    profile = RESPLIT
    if (root / "train.csv").is_file():
        splits = {"train": read_few_shot_lists(root, ilsvrc or root / "images")}
    elif caches := sorted(root.glob("mini-imagenet-cache-*.pkl")):
        splits = {"train": read_caches(caches)}
    else:
        splits = read_class_folders(root)
        merged = {name: images for classes in splits.values() for name, images in classes.items()}
        if len(merged) == sum(map(len, splits.values())):  # no class is in two splits: the few-shot ones, or one split
            splits = {"train": merged}
        else:
            profile = {"imb_type": "none"}
            refuse_unknown_classes(splits, root)
    readable = {name: MINI_IMAGENET_NAMES[name] for name in splits["train"] if name in MINI_IMAGENET_NAMES}
    return Source(splits, {"source": "mini-ImageNet", "readable_names": readable, "hflip": True}, profile)


def read_few_shot_lists(root: Path, images: Path) -> Classes:
    """``train.csv``, ``val.csv``, ``test.csv`` with the columns filename and label, all merged."""
    if not images.is_dir():
        raise Refused(
            f"{images} is no folder; give the ILSVRC-2012 training folders of the images in {root} with --ilsvrc"
        )
    rows = [row for split in SPLITS for row in read_list(root / f"{split}.csv")]
    classes = {label: {} for _, label in rows}
    ranked = {label: by_number(images / label) for label in classes}
    for filename, label in rows:
        classes[label][filename] = listed_image(images, filename, label, ranked[label])
    return classes


def read_list(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise Refused(f"{path} is missing; the few-shot lists are train.csv, val.csv and test.csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} cannot be read as a list: {error}; get the original list") from None
    wrong = next(
        (k for k, row in enumerate(rows) if len(row) != 2 or any(Path(word).name != word for word in row)), None
    )
    if wrong is not None or not rows:
        raise Refused(f"{path}, line {(wrong or 0) + 1}, is not `filename,label`; get the original list")
    return [(filename, label) for filename, label in rows if (filename, label) != ("filename", "label")]


def by_number(folder: Path) -> list[Path]:
    """ILSVRC images ``<wnid>_<number>.JPEG`` by their number; empty where there is no such folder."""
    if not folder.is_dir():
        return []
    numbered = [(re.fullmatch(r".*_(\d+)", path.stem), path) for path in image_files(folder)]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def listed_image(images: Path, filename: str, label: str, ranked: list[Path]) -> Path:
    """The file that a row means: itself, or, ``n0153282900000005.jpg``, the fifth of its ILSVRC class by number."""
    for path in (images / filename, images / label / filename):
        if path.is_file():
            return path
    number = Path(filename).stem.removeprefix(label)
    if not number.isdecimal() or not 1 <= int(number) <= len(ranked):
        raise Refused(
            f"{images} lacks {filename} of class {label}: {len(ranked)} images in {images / label}; see --ilsvrc"
        )
    return ranked[int(number) - 1]


def read_caches(paths: list[Path]) -> Classes:
    """``mini-imagenet-cache-*.pkl``: 84 px pixels and the rows of each class; images are named by their rank in it."""
    classes = {}
    for path in paths:
        cache = load_arrays(path)
        cache = {text(key): value for key, value in cache.items()} if isinstance(cache, dict) else {}
        pixels, rows_by_class = cache.get("image_data"), cache.get("class_dict")
        if (
            not (isinstance(rows_by_class, dict) and isinstance(pixels, np.ndarray))
            or pixels.dtype != np.uint8
            or pixels.shape[1:] != (84, 84, 3)
        ):
            raise Refused(f"{path} does not hold image_data and class_dict; get the original file")
        try:
            for label, rows in rows_by_class.items():
                classes[text(label)] = {f"{rank:04d}.png": pixels[row] for rank, row in enumerate(rows)}
        except (IndexError, TypeError, ValueError):
            raise Refused(f"{path}: class_dict names what image_data lacks; get the original file") from None
    return classes


def text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key
