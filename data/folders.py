"""Class folders on disk: which images there are, of which class, and whether they can be trained on."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from data.image_lists import find_list, read_lists
from data.wordnet import MINI_IMAGENET_NAMES
from engine.console import first_of
from engine.errors import Refused
from engine.files import read_json

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
# formats of images that are not read, which is said: other files may be anything
NOT_READ = {".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".ppm", ".pgm", ".dcm", ".dng", ".cr2", ".nef", ".arw"}
SPLITS = ("train", "val", "test")
LIKE_VAL = ("valid", "validation", "dev")  # what others call val


class Split(NamedTuple):
    """Image files of one split in (class, name) order and their class indices."""

    paths: list[Path]
    targets: list[int]


@dataclass(frozen=True)
class ImageFolders:
    """A data set laid out as ``root/{train,val,test}/<class>/<image>``, or listed in ``train.txt`` and its like.

    Classes are the sorted folders of train, or the labels of the lists in their order.
    """

    root: Path
    classes: list[str]
    splits: dict[str, Split]  # train, and val and test where they exist
    about: dict = field(default_factory=dict)  # dataset.json: "source", "readable_names" {class: name}, "hflip"
    synthetic: Split | None = None  # images to train on besides the real ones
    count_synthetic: bool = False  # in `class_counts`

    @property
    def class_counts(self) -> list[int]:
        """Training images by class, in class-index order."""
        counts = self._counts(self.splits["train"])
        if self.count_synthetic:
            counts = [real + made for real, made in zip(counts, self.synthetic_counts, strict=True)]
        return counts

    @property
    def synthetic_counts(self) -> list[int]:
        return self._counts(self.synthetic or Split([], []))

    def _counts(self, split: Split) -> list[int]:
        counts = Counter(split.targets)
        return [counts[index] for index in range(len(self.classes))]

    @property
    def readable_names(self) -> list[str]:
        names = known_names(self.about)
        return [names.get(name, name) for name in self.classes]

    @property
    def flips(self) -> bool:
        """Whether a mirrored image keeps its class; true unless ``dataset.json`` says otherwise."""
        return self.about.get("hflip", True)

    def by_class(self, split: Split) -> dict[str, list[Path]]:
        """Class -> its images in ``split``, for every class."""
        images = {name: [] for name in self.classes}
        for path, target in zip(*split, strict=True):
            images[self.classes[target]].append(path)
        return images

    def names(self) -> dict[str, Path]:
        """``split/class/name`` of every image, see `image_names`."""
        return image_names(self.root, {name: self.by_class(split) for name, split in self.splits.items()})

    def untested(self, split: str) -> list[str]:
        """Classes without an image in ``split``: class means are taken over the others."""
        present = set(self.splits[split].targets)
        return [name for index, name in enumerate(self.classes) if index not in present]


def read_image_folders(root: Path, list_dir: Path | None = None) -> ImageFolders:
    """The data set below ``root``; `Refused` when it has no train split, an empty class or a class train lacks.

    Image lists in ``list_dir``, or a ``train.txt`` in ``root``, are used instead of folders.
    """
    if not root.is_dir():
        raise Refused(
            f"data folder {root} does not exist; prepare one with `python scripts/prepare_data.py digits`, "
            f"or give yours with --data_dir (it holds train/<class>/<image>)"
        )
    if (lists := lists_in_use(root, list_dir)) is not None:
        return read_listed_images(root, lists)
    train = root / "train"
    if not train.is_dir():
        raise Refused(f"{root} has no train/ folder; a data set is laid out as {root}/train/<class>/<image>")
    found = images_by_class(root)
    classes = list(found["train"])
    if len(classes) < 2:
        raise Refused(f"{train} holds {len(classes)} class folder(s); a classifier needs at least two")
    refuse_unknown_classes(found, root)
    if empty := [train / name for name, images in found["train"].items() if not images]:
        raise without_images(empty)
    splits = {name: split_of(images, classes) for name, images in found.items() if any(images.values())}
    return ImageFolders(root, classes, splits, read_about(root))


def lists_in_use(root: Path, list_dir: Path | None) -> Path | None:
    """Where the image lists lie that are used instead of the class folders in ``root``; None where those are."""
    return root if list_dir is None and (root / "train.txt").is_file() else list_dir


def refuse_unknown_classes(splits: dict[str, dict], root: Path) -> None:
    """``splits`` are those below ``root``: split -> class -> images."""
    for split, classes in splits.items():
        if unknown := classes.keys() - splits["train"].keys():
            shown = told_apart(unknown, splits["train"])
            raise Refused(
                f"{root / split} holds classes that train/ lacks: {shown}; move them away, or add such images to train/"
            )


def told_apart(names: Iterable[str], classes: Iterable[str]) -> str:
    """Sorted ``names`` that are none of ``classes``, and what to do with those that only look like one: disks and
    archives of a Mac write accents apart from their letters."""
    look = {normalize("NFC", name) for name in classes}
    hint = " (rename it: a class has this name in another Unicode form)"
    return first_of([name + (hint if normalize("NFC", name) in look else "") for name in sorted(names)])


def without_images(folders: list[Path]) -> Refused:
    """What to say of class folders that hold no image themselves."""
    for folder in folders:
        for inner in folder.rglob("*/"):
            if image_files(inner) and not any(part.startswith(".") for part in inner.relative_to(folder).parts):
                return Refused(f"no images in {folder} itself but in {inner}, which is not read; move them up")
    return Refused(f"no images in {first_of([str(folder) for folder in folders])}; add some or remove the folder")


def read_known_classes(root: Path, list_dir: Path | None, split: str, classes: list[str]) -> ImageFolders:
    """What there is below ``root`` in ``classes``, which a run knows; `Refused` without images in ``split``."""
    if (lists := lists_in_use(root, list_dir)) is not None:
        folders = read_image_folders(root, list_dir)
        if folders.classes != classes or split not in folders.splits:
            raise Refused(f"the lists in {lists} have no {split} images in the classes of the run")
        return folders
    if not (root / split).is_dir():
        raise Refused(f"{root / split} does not exist; give the data set with --data_dir, or another --split")
    found = images_by_class(root)
    if unknown := found[split].keys() - classes:
        raise Refused(
            f"{root / split} holds classes that the run does not know: {told_apart(unknown, classes)}; move them away, "
            f"or give other images with --data_dir"
        )
    splits = {name: split_of(images, classes) for name, images in found.items()}
    if not splits[split].paths:
        raise Refused(f"{root / split} holds no images of the run's classes")
    return ImageFolders(root, classes, splits)


def read_listed_images(root: Path, list_dir: Path) -> ImageFolders:
    found = {split: find_list(list_dir, split) for split in SPLITS}
    if found["train"] is None:
        raise Refused(f"{list_dir} holds no train.txt with lines `path label`; see --list_dir")
    classes, rows = read_lists(root, {split: path for split, path in found.items() if path is not None})
    if len(classes) < 2:
        raise Refused(f"{found['train']} holds one label; a classifier needs at least two")
    splits = {split: Split([path for path, _ in rows], [label for _, label in rows]) for split, rows in rows.items()}
    return ImageFolders(root, classes, splits, read_about(root))


def class_folders(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def images_by_class(root: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> class -> images, as they lie in ``root/split/class/``; other files and folders are ignored."""
    return {
        split: {name: image_files(root / split / name) for name in class_folders(root / split)}
        for split in SPLITS
        if (root / split).is_dir()
    }


def split_of(images: dict[str, list[Path]], classes: list[str]) -> Split:
    rows = [(path, index) for index, name in enumerate(classes) for path in images.get(name, [])]
    return Split([path for path, _ in rows], [index for _, index in rows])


def image_files(directory: Path) -> list[Path]:
    """Image files directly in ``directory``, sorted by name. Dot files are ignored, and what is no file: a pipe would
    be waited for. A link that leads nowhere is an image that cannot be read."""
    with os.scandir(directory) as entries:
        return sorted(
            directory / entry.name
            for entry in entries
            if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".")
            if entry.is_file() or not Path(entry).exists()
        )


def check_names(names: Iterable[str], where: str) -> list[str]:
    """A warning about images ``where`` that are not read, by the ``names`` of the files there."""
    suffixes = Counter(Path(name).suffix.lower() for name in names if not name.startswith("."))
    others = ", ".join(f"{number} {suffix}" for suffix, number in suffixes.most_common() if suffix in NOT_READ)
    return [f"{others} {where} are not read; convert them, to .jpg or .png say"] if others else []


def read_about(root: Path) -> dict:
    """``dataset.json``: what the folders cannot say. Empty when there is none."""
    about = read_json(root / "dataset.json", default={})
    names = about.get("readable_names", {})
    readable = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not readable or not isinstance(about.get("hflip", True), bool):
        raise Refused(f"{root / 'dataset.json'}: needs readable_names {{class: name}}, hflip true or false; mend it")
    return about


def known_names(about: dict) -> dict[str, str]:
    """Readable names by class: those in ``dataset.json``, and WordNet's of mini-ImageNet."""
    return {**MINI_IMAGENET_NAMES, **about.get("readable_names", {})}


def image_names(root: Path, splits: dict[str, dict[str, list[Path]]]) -> dict[str, Path]:
    """``split/class/name`` of every image of split -> class -> images. Lists may hold a name twice in a class: then the
    second is called by its path below ``root``, and a file's repetitions by their number, too."""
    names, times = {}, Counter()
    for folder, path in ((f"{s}/{c}", path) for s, classes in splits.items() for c in classes for path in classes[c]):
        name = f"{folder}/{path.name}"
        if name in names:
            name = f"{folder}/{os.path.relpath(path, root)}"
        times[name] += 1
        names[name if name not in names else f"{name} ({times[name]})"] = path
    return names
