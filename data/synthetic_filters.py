"""Which synthetic images are kept, and why the others are not."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.audit import Inspected, inspect_all
from data.duplicates import near_duplicates
from data.folders import ImageFolders
from data.images import read_image

Objections = Callable[[list[Path], list[int]], list[str | None]]  # what a trained run says, see engine/agreement.py
BLACK = 16  # grey levels of 255 that no pixel of a black image reaches; a safety checker paints 0
FLAT = 4.0  # grey levels; the standard deviation of every channel of a flat image is below


class Look(NamedTuple):
    """What the filters see of an image by itself."""

    inspected: Inspected
    fault: str | None  # black or flat
    objection: str | None = None  # of a trained run


class Filters:
    """Judges the rows of a manifest in their order, so that a verdict does not depend on what was drawn later.

    An image is kept unless it is gone, changed or unreadable, blanked by a safety checker, black, flat, a copy or
    near-duplicate of an image of train, val or test or of one kept before it, not agreed with, or more than its class
    wants.
    """

    def __init__(self, folders: ImageFolders, folder: Path, objections: Objections | None, workers: int):
        self.classes, self.folder, self.objections, self.workers = folders.classes, folder, objections, workers
        self.real = folders.names()
        self.inspected_real: list[Inspected] | None = None
        self.looks: dict[str, Look] = {}  # by file; each is looked at once

    def judge(self, rows: list[dict], wanted: dict[str, int]) -> None:
        """Set ``kept`` and ``why`` of ``rows``; at most ``wanted`` of a class are kept."""
        if not rows:
            return
        if self.inspected_real is None:
            self.inspected_real = inspect_all(list(self.real.values()), self.workers)
        self.look([row for row in rows if row["file"] not in self.looks])
        looks = [self.looks[row["file"]] for row in rows]
        names = [row["file"] for row in rows] + list(self.real)
        twins = earlier_twins([look.inspected for look in looks], self.inspected_real)
        kept, number_kept = set(), Counter()
        for index, (row, (inspected, fault, objection)) in enumerate(zip(rows, looks, strict=True)):
            if inspected.error:
                why = "gone or unreadable"
            elif inspected.digest != row["sha256"]:
                why = "changed since it was drawn"
            elif row["flagged"]:
                why = "blanked by the model's safety checker"
            elif fault:
                why = fault
            elif twin := next((text + names[j] for j, text in twins[index] if j >= len(rows) or j in kept), None):
                why = twin
            elif objection:
                why = objection
            else:
                why = None if number_kept[row["class"]] < wanted[row["class"]] else "its class has all that it needs"
            row["kept"], row["why"] = why is None, why
            if why is None:
                kept.add(index)
                number_kept[row["class"]] += 1

    def look(self, rows: list[dict]) -> None:
        paths = [self.folder / row["file"] for row in rows]
        inspected = inspect_all(paths, self.workers)
        readable = [index for index, image in enumerate(inspected) if not image.error]
        objections = {}
        if self.objections is not None and readable:
            targets = [self.classes.index(rows[index]["class"]) for index in readable]
            said = self.objections([paths[index] for index in readable], targets)
            objections = dict(zip(readable, said, strict=True))
        for index, row in enumerate(rows):
            fault = black_or_flat(paths[index]) if index in readable else None
            self.looks[row["file"]] = Look(inspected[index], fault, objections.get(index))


def black_or_flat(path: Path) -> str | None:
    pixels = np.asarray(read_image(path), dtype=np.float32)
    if pixels.max() < BLACK:
        return "black"
    return "flat" if pixels.std(axis=(0, 1)).max() < FLAT else None


def earlier_twins(images: list[Inspected], real: list[Inspected]) -> list[list[tuple[int, str]]]:
    """For each of ``images`` the positions, in ``images + real``, of the real ones and of those before it that look the
    same, each with "copy: " or "near-duplicate: "."""
    everything = images + real
    readable = [index for index, image in enumerate(everything) if not image.error]
    first = sum(index < len(images) for index in readable)
    thumbnails = np.stack([everything[index].thumbnail for index in readable])
    pairs = [(readable[i], readable[j]) for i, j in near_duplicates(thumbnails, first)]
    twins = [[] for _ in images]
    for i, j in pairs:
        text = "copy: " if everything[i].digest == everything[j].digest else "near-duplicate: "
        later, other = (j, i) if j < len(images) else (i, j)
        twins[later].append((other, text))
    return [sorted(each, key=lambda twin: -twin[0]) for each in twins]  # what leaks from another split comes first
