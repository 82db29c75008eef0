"""The hash that names exactly the images of a split, and when a recorded one may be believed."""

import hashlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data.folders import SPLITS, ImageFolders, image_names
from engine.console import progress
from engine.files import read_json

STAMP = ".stamp"  # in a prepared folder, see `stamp`
Files = dict[str, Path | np.ndarray]  # "split/class/name" -> image file, or uint8 pixels [H, W] or [H, W, 3]


def split_hash(folders: ImageFolders) -> str:
    """SHA-256 that names exactly these images in these splits.

    Over the sorted lines ``split/class/name sha256(content)``. A ``split.json`` that lists the very same files, none
    of them changed after itself, in a folder that was not copied, carries the hash already; otherwise every file is
    read.
    """
    names, path = folders.names(), folders.root / "split.json"
    recorded = read_json(path, default={})
    is_listed = recorded.get("files") == sorted(names) and isinstance(recorded.get("hash"), str)
    if is_listed and is_as_stamped(folders.root, names.values()):
        return recorded["hash"]
    return hash_of_files(names)


def tested_hash(folders: ImageFolders, split: str) -> str:
    """SHA-256 that names exactly these images of ``split``, whatever the other splits hold."""
    names = folders.names()
    return hash_of_files({name: path for name, path in names.items() if name.startswith(f"{split}/")})


def hash_of_files(files: Files) -> str:
    """SHA-256 of the sorted lines ``name sha256(content)``."""
    return hash_of_lines(
        f"{name} {hashlib.sha256(file_content(image)).hexdigest()}"
        for name, image in progress(files.items(), "hashing", "image")
    )


def file_content(image: Path | np.ndarray) -> bytes:
    """A file as it is; pixels as PNG."""
    if isinstance(image, Path):
        return image.read_bytes()
    png = BytesIO()
    # Stored, not compressed: the bytes, and with them the split hash, do not depend on the version of zlib.
    Image.fromarray(image).save(png, "PNG", compress_level=0)
    return png.getvalue()


def stamp(root: Path) -> None:
    """Note that ``split.json``, just written or touched, is of the images in ``root``."""
    (root / STAMP).write_text(_changes(root))


def is_as_stamped(root: Path, images: Iterable[Path]) -> bool:
    """Whether ``root`` is the folder that was stamped, not a copy of it, and none of its ``images`` changed since."""
    if not (root / STAMP).is_file() or (root / STAMP).read_bytes() != _changes(root).encode():
        return False
    written = (root / "split.json").stat().st_ctime  # unlike mtime never that of a file which was copied or moved here
    return all(image.stat().st_ctime <= written + 1 for image in images)


def _changes(root: Path) -> str:
    """When ``split.json`` and the splits' folders last changed, in ns: renaming ``root`` keeps these times, no copy can
    have them, and a class or a split from elsewhere moves them."""
    names = ["split.json", *(split for split in SPLITS if (root / split).is_dir())]
    return " ".join(str((root / name).stat().st_ctime_ns) for name in names)


def synthetic_hash(folders: ImageFolders) -> str:
    """SHA-256 that names exactly these synthetic images: `split_hash` of a split ``synthetic``."""
    return hash_of_files(image_names(folders.root, {"synthetic": folders.by_class(folders.synthetic)}))


def hash_of_lines(lines: Iterable[str]) -> str:
    """SHA-256 of the lines, sorted, a newline after each."""
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode(errors="surrogateescape")).hexdigest()
