"""The sources of `prepare_data.py`: each reads a folder and says what there is to draw from."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.folders import IMAGE_SUFFIXES, read_about, refuse_unknown_classes
from data.mini_imagenet import read_mini_imagenet
from data.pickles import load_arrays
from data.preparation import WRITTEN
from data.source_folders import Source, left_out, read_class_folders
from engine.console import first_of, warn
from engine.errors import Failed, Refused


def read_digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels and 17 grey levels, every pixel repeated 4 x 4 times."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    classes = {str(label): {} for label in range(10)}
    for index, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        classes[str(label)][f"{index:04d}.png"] = image
    about = {"source": "scikit-learn's handwritten digits", "hflip": False}
    profile = {"imb_type": "exp", "imb_factor": 20, "val_per_class": 20, "test_per_class": 30}
    return Source({"train": classes}, about, profile)


def read_folder(root: Path) -> Source:
    splits = read_class_folders(root)
    refuse_unknown_classes(splits, root)
    if lost := [name for name in left_out(root, splits) if name not in WRITTEN]:
        warn(
            f"{len(lost)} files of {root} are left out: {first_of(lost, 3)}; an image lies directly in its class's "
            f"folder and ends in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    about = read_about(root) | {"source": "class folders"}
    return Source(splits, about, {"imb_type": "none", "val_fraction": 0.1, "test_fraction": 0.2})


def read_cifar(root: Path, num_classes: int) -> Source:
    """The official batches for Python, or class folders of the same images."""
    meta, train, test, label = OFFICIAL_CIFAR[num_classes]
    if (root / meta).is_file():
        names = cifar_class_names(root / meta, f"{label}_names".encode(), num_classes)
        keys = f"{label}s".encode()
        splits = {"train": read_cifar_batches([root / name for name in train], keys, names)}
        splits["test"] = read_cifar_batches([root / test], keys, names)
    else:
        splits = read_class_folders(root)
        refuse_unknown_classes(splits, root)
        names = sorted(splits["train"])
        if len(names) != num_classes:
            raise Refused(f"{root} holds {len(names)} classes, CIFAR-{num_classes} has {num_classes}; see --source")
    readable = {name: name.replace("_", " ") for name in names if "_" in name}
    about = {"source": f"CIFAR-{num_classes}", "readable_names": readable, "hflip": True}
    return Source(splits, about, {"imb_type": "exp", "imb_factor": 100})


def cifar_class_names(path: Path, key: bytes, num_classes: int) -> list[str]:
    meta = load_arrays(path)
    names = meta.get(key) if isinstance(meta, dict) else None
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, bytes) for name in names):
        raise Refused(f"{path} does not list {num_classes} names under {key.decode()}; get the original file")
    return [name.decode() for name in names]


def read_cifar_batches(paths: list[Path], key: bytes, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    classes = {name: {} for name in names}
    for path in paths:
        pixels, labels, files = read_cifar_batch(path, key, len(names))
        for image, label, file in zip(pixels, labels, files, strict=True):
            images = classes[names[label]]
            stem = Path(file.decode()).stem
            images[f"{stem}.png" if f"{stem}.png" not in images else f"{stem}_{len(images)}.png"] = image
    return classes


def read_cifar_batch(path: Path, key: bytes, num_classes: int) -> tuple[np.ndarray, list[int], list[bytes]]:
    """Pixels [N, 32, 32, 3], labels and file names of one batch file: a dictionary with byte keys."""
    if not path.is_file():
        raise Refused(f"{path} is missing; unpack the whole archive, or give the archive itself with --source")
    batch = load_arrays(path)
    pixels, labels, files = (batch.get(k) if isinstance(batch, dict) else None for k in (b"data", key, b"filenames"))
    if (
        not (isinstance(pixels, np.ndarray) and isinstance(labels, list) and isinstance(files, list))
        or pixels.dtype != np.uint8
        or pixels.shape != (len(labels), 3 * 32 * 32)
        or len(files) != len(pixels)
        or not all(isinstance(label, int) and 0 <= label < num_classes for label in labels)
    ):
        raise Refused(f"{path} does not hold data, {key.decode()} and filenames of one length; get the original file")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, files


def download_cifar(kind: str, folder: Path) -> Path:
    """The archive of ``cifar10`` or ``cifar100`` in ``folder``; one that is there with the right checksum is kept."""
    from torchvision.datasets import CIFAR10, CIFAR100  # takes seconds to import
    from torchvision.datasets.utils import download_url

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    try:
        download_url(dataset.url, folder, dataset.filename, dataset.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise Failed(f"cannot download {dataset.url} ({error}); get it another way and give it with --source") from None
    return folder / dataset.filename


class Kind(NamedTuple):
    read: Callable[[Path, Path | None], Source]  # the source's folder, the ILSVRC folders
    folder: str | None  # below data/; None: named like the source


OFFICIAL_CIFAR = {  # by the number of classes: files of the archive for Python, and what their labels are called
    10: ("batches.meta", [f"data_batch_{k}" for k in range(1, 6)], "test_batch", "label"),
    100: ("meta", ["train"], "test", "fine_label"),
}
CIFAR_KINDS = ("cifar10", "cifar100")
SOURCES = {
    "digits": Kind(lambda root, ilsvrc: read_digits(), "digits"),
    "cifar10": Kind(lambda root, ilsvrc: read_cifar(root, 10), "CIFAR10"),
    "cifar100": Kind(lambda root, ilsvrc: read_cifar(root, 100), "CIFAR100"),
    "mini-imagenet": Kind(read_mini_imagenet, "mini-ImageNet"),
    "folder": Kind(lambda root, ilsvrc: read_folder(root), None),
}
