"""Source images that already lie in one folder per class, with or without splits."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.folders import SPLITS, class_folders, image_files
from engine.errors import Refused

Classes = dict[str, dict[str, Path | np.ndarray]]  # class -> name of the file -> image file or uint8 pixels


class Source(NamedTuple):
    """What there is to draw from."""

    splits: dict[str, Classes]  # train, and val and test where the source has its own
    about: dict = {}  # for dataset.json
    profile: dict = {}  # how it is drawn where no flag says otherwise


def read_class_folders(root: Path) -> dict[str, Classes]:
    """``root/{train,val,test}/<class>/`` or, all as train, ``root/<class>/``."""
    if not (root / "train").is_dir():
        return {"train": read_classes(root)}
    odd = next((name for name in ("valid", "validation", "training", "testing") if (root / name).is_dir()), None)
    if odd:
        raise Refused(
            f"{root / odd} has a name that is not used here; the splits are train/, val/ and test/: rename it"
        )
    return {split: read_classes(root / split) for split in SPLITS if (root / split).is_dir()}


def read_classes(folder: Path) -> Classes:
    classes = {name: {path.name: path for path in image_files(folder / name)} for name in class_folders(folder)}
    if not classes:
        raise Refused(f"{folder} holds no class folders; images lie in {folder}/<class>/<image>")
    empty = [name for name, images in classes.items() if not images]
    if empty:
        raise Refused(f"no images in {', '.join(str(folder / name) for name in empty)}; add some or remove the folder")
    return classes


def refuse_unknown_classes(splits: dict[str, Classes], root: Path) -> None:
    for split, classes in splits.items():
        unknown = sorted(set(classes) - set(splits["train"]))
        if unknown:
            raise Refused(f"{root / split} holds classes that train/ lacks: {', '.join(unknown)}; remove or move them")
