"""Source images that already lie in one folder per class, with or without splits."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.folders import LIKE_VAL, SPLITS, class_folders, image_files, without_images
from engine.errors import Refused

LIKE_SPLITS = {*SPLITS, *LIKE_VAL, "training", "testing"}
Classes = dict[str, dict[str, Path | np.ndarray]]  # class -> name of the file -> image file or uint8 pixels


class Source(NamedTuple):
    """What there is to draw from."""

    splits: dict[str, Classes]  # train, and val and test where the source has its own
    about: dict  # for dataset.json; "source" says what it is
    profile: dict  # how it is drawn where no flag says otherwise


def read_class_folders(root: Path) -> dict[str, Classes]:
    """``root/{train,val,test}/<class>/`` or, all as train, ``root/<class>/``."""
    names = class_folders(root)
    odd = [name for name in names if name not in SPLITS and name.lower() in LIKE_SPLITS]
    if odd and ("train" in names or len(odd) == len(names)):
        raise Refused(
            f"{root / odd[0]} has a name that is not used here; the splits are train/, val/ and test/: rename it"
        )
    if names and set(names) < set(SPLITS) and "train" not in names:
        raise Refused(f"{root} has {names[0]}/ but no train/ folder; add one, or name classes otherwise")
    if "train" not in names:
        return {"train": read_classes(root)}
    beside = [name for name in names if name not in SPLITS and image_files(root / name)]
    if beside and not {"val", "test"} & set(names):
        raise Refused(
            f"{root / beside[0]} holds images beside train/: move it away if train/ is a split, or rename train/ if it "
            f"is a class"
        )
    return {split: read_classes(root / split) for split in SPLITS if (root / split).is_dir()}


def read_classes(folder: Path) -> Classes:
    classes = {name: {path.name: path for path in image_files(folder / name)} for name in class_folders(folder)}
    if not classes:
        raise Refused(f"{folder} holds no class folders; images lie in {folder}/<class>/<image>")
    empty = [name for name, images in classes.items() if not images]
    if empty:
        raise without_images([folder / name for name in empty])
    return classes


def left_out(root: Path, splits: dict[str, Classes]) -> list[str]:
    """Files below ``root`` that are in no class: no image by their name, or not directly in a class folder."""
    used = {path for classes in splits.values() for images in classes.values() for path in images.values()}
    found = (path for path in root.rglob("*") if path not in used and not path.is_dir())
    names = sorted(str(path.relative_to(root)) for path in found)
    return [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
