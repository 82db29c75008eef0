"""Image lists as ImageNet-LT, Places-LT and iNaturalist 2018 publish them: text files of lines ``path label``."""

from collections import defaultdict
from pathlib import Path, PurePosixPath

from engine.errors import Refused

Rows = list[tuple[Path, int]]


def find_list(folder: Path, split: str) -> Path | None:
    """``<split>.txt`` in ``folder``, or the one file there whose name ends in ``_<split>.txt``."""
    if (folder / f"{split}.txt").is_file():
        return folder / f"{split}.txt"
    named = sorted(folder.glob(f"*_{split}.txt"))
    if len(named) > 1:
        raise Refused(f"{folder} holds {named[0].name} and {named[1].name}; name the one to use {split}.txt")
    return named[0] if named else None


def read_lists(root: Path, lists: dict[str, Path]) -> tuple[list[str], dict[str, Rows]]:
    """Class names in the order of their labels, and the rows of each list in (label, path) order.

    Paths are relative to ``root``; labels count from 0, and each of them has training images.
    """
    rows = {split: read_rows(root, path) for split, path in lists.items()}
    labels = {label for _, label in rows["train"]}
    for split, path in lists.items():
        missing = sorted({label for _, label in rows[split]} - labels)
        if missing:
            raise Refused(f"{path} holds label {missing[0]}, which {lists['train']} lacks; remove it or add images")
    gap = next((label for label in range(len(labels)) if label not in labels), None)
    if gap is not None:
        raise Refused(f"{lists['train']} has no image of label {gap}; labels count from 0 without a gap")
    return class_names(root, rows["train"]), rows


def read_rows(root: Path, path: Path) -> Rows:
    rows = []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        words = line.rsplit(maxsplit=1)
        if words:
            if len(words) < 2 or not words[1].isdecimal():
                raise Refused(f"{path}, line {number}, is not `path label` with a number as label: {line.strip()}")
            rows.append((root / words[0].strip(), int(words[1])))
    if not rows:
        raise Refused(f"{path} lists no images")
    refuse_missing(rows, path)
    return sorted(rows, key=lambda row: (row[1], row[0]))


def refuse_missing(rows: Rows, list_path: Path) -> None:
    """`Refused` with the first file that is not there; one listing a folder is faster than a look at every file."""
    present = {}
    for path, _ in rows:
        if path.parent not in present:
            present[path.parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in present[path.parent]:
            raise Refused(f"{list_path} lists {path}, which does not exist; paths are relative to the data folder")


def class_names(root: Path, rows: Rows) -> list[str]:
    """The folder of a label's training images, as short as it stays unique; the label where there are several."""
    folders = defaultdict(set)
    for path, label in rows:
        folders[label].add(PurePosixPath(path.relative_to(root) if path.is_relative_to(root) else path).parent)
    width = len(str(len(folders) - 1))
    labels = [f"{label:0{width}d}" for label in range(len(folders))]
    if any(len(folder) > 1 for folder in folders.values()):
        return labels
    folder_of = [folders[label].copy().pop() for label in range(len(folders))]
    for names in ([folder.name for folder in folder_of], ["-".join(folder.parts[-2:]) for folder in folder_of]):
        if len(set(names)) == len(names) and "" not in names:
            return names
    return labels
