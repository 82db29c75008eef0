"""Synthetic images of a data set: how many each class gets, what decides each of them, and the manifest of them all."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.folders import ImageFolders, Split, known_names
from data.long_tail import sha256_of
from engine.console import first_of, warn
from engine.errors import Refused
from engine.files import append_json, locked, read_json, read_json_lines, write_json_lines

MANIFEST = "manifest.jsonl"
RESULTS = {"file", "batch_size", "precision", "sha256", "flagged", "kept", "why"}  # what a row holds besides `facts`


@dataclass(frozen=True)
class Recipe:
    """What decides how an image comes out, but for its class and its number."""

    model: str
    mode: str  # text2img or img2img
    prompt: str  # the class's name stands for {}
    negative_prompt: str = ""
    seed: int = 0
    strength: float | None = None  # img2img: share of the steps that are drawn over the starting image
    steps: int = 50
    guidance: float = 7.5
    scheduler: str | None = None  # None: the model's own
    size: int | None = None  # px of the drawn square; None: the model's own
    saved_size: int | None = None  # px of the file; None: as drawn


class Job(NamedTuple):
    """An image to draw: the ``index``-th of its class."""

    class_name: str
    index: int
    prompt: str
    seed: int
    start: Path | None  # the training image that img2img starts from


def wanted_images(class_counts: list[int], target: str | int) -> list[int]:
    """How many synthetic images bring each class to ``target`` images: a number, ``median`` (rounded down) or ``max``
    of the class counts."""
    total = {"median": int(np.median(class_counts)), "max": max(class_counts)}.get(target, target)
    return [max(0, total - count) for count in class_counts]


def prompt_names(folders: ImageFolders, names_file: Path | None) -> tuple[list[str], list[str]]:
    """Each class's name for prompts, and the classes that have none but their folder's.

    ``names_file`` is a JSON object {class: name}; then dataset.json, WordNet's names of mini-ImageNet, and the folder's
    name with spaces for underscores.
    """
    known = known_names(folders.about)
    if names_file is not None:
        if not names_file.is_file():
            raise Refused(f"--class_names {names_file} does not exist; it is a JSON object {{class: name}}")
        known |= read_json(names_file)
    names = [known.get(name, name.replace("_", " ")) for name in folders.classes]
    if odd := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise Refused(f"{names_file or folders.root / 'dataset.json'}: {odd[0]!r} is no name of a class; mend it")
    return names, [name for name in folders.classes if name not in known]


class Plan:
    """What is to be drawn for ``folders``: a function of its arguments and, through `next_jobs`, of the manifest."""

    def __init__(
        self, folders: ImageFolders, names: list[str], wanted: list[int], max_candidates: float, recipe: Recipe
    ):
        self.classes, self.root, self.recipe = folders.classes, folders.root, recipe
        self.names = dict(zip(folders.classes, names, strict=True))
        self.wanted = dict(zip(folders.classes, wanted, strict=True))
        self.limits = {name: math.ceil(max_candidates * number) for name, number in self.wanted.items()}
        self.starts = starting_images(folders, recipe.seed) if recipe.mode == "img2img" else None
        counts = folders.class_counts
        self.rarest_first = sorted(folders.classes, key=lambda name: counts[folders.classes.index(name)])

    def next_jobs(self, rows: list[dict]) -> list[Job]:
        """Images of the next round, or of an interrupted one: as many as the judged ``rows`` lack, rarest class first.

        Only judged rows have a say, so a round that was interrupted comes out as it began.
        """
        kept = Counter(row["class"] for row in rows if row["kept"])
        judged = Counter()
        for row in rows:
            if row["kept"] is not None:
                judged[row["class"]] = max(judged[row["class"]], row["index"] + 1)
        return [
            self.job(name, index)
            for name in self.rarest_first
            for first in [judged[name]]
            for index in range(first, min(first + self.wanted[name] - kept[name], self.limits[name]))
        ]

    def job(self, class_name: str, index: int) -> Job:
        prompt = self.recipe.prompt.replace("{}", self.names[class_name])
        seed = int(sha256_of(f"{self.recipe.seed}/{class_name}/{index}")[:16], 16) >> 1
        start = self.starts[class_name][index % len(self.starts[class_name])] if self.starts else None
        return Job(class_name, index, prompt, seed, start)

    def facts(self, job: Job) -> dict:
        """All that decides the image, as the manifest says it."""
        start = job.start and str(
            job.start.relative_to(self.root) if job.start.is_relative_to(self.root) else job.start
        )
        own = {"class": job.class_name, "index": job.index, "prompt": job.prompt, "seed": job.seed, "start": start}
        return own | {key: value for key, value in asdict(self.recipe).items() if key not in own}

    def refuse_other_recipe(self, rows: list[dict], folder: Path) -> None:
        """`Refused` when ``rows`` were not made as this plan would make them."""
        for row in rows:
            if row["class"] not in self.names:
                raise Refused(
                    f"{folder} holds images of class {row['class']}, which {self.root} lacks; use --output DIR"
                )
            for key, value in self.facts(self.job(row["class"], row["index"])).items():
                if row[key] != value:
                    raise Refused(
                        f"{folder / row['file']} was made with {key} {row[key]!r}, now it would be {value!r}; "
                        f"give what it was, or write elsewhere with --output DIR"
                    )


def starting_images(folders: ImageFolders, seed: int) -> dict[str, list[Path]]:
    """The training images of every class in an order drawn by ``seed``."""

    def drawn(path: Path) -> tuple[str, Path]:
        return sha256_of(f"{seed}/{path.parent.name}/{path.name}"), path

    return {name: sorted(paths, key=drawn) for name, paths in folders.by_class(folders.splits["train"]).items()}


class Manifest:
    """``manifest.jsonl`` of a folder of synthetic images, a row each: how it was made, and whether it is kept or why
    not (None until it is judged). Rows are added at the end; judging writes the file anew."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / MANIFEST
        self.rows = read_rows(self.path)

    def missing(self, jobs: list[Job]) -> list[Job]:
        """Those without a row."""
        present = {(row["class"], row["index"]) for row in self.rows}
        return [job for job in jobs if (job.class_name, job.index) not in present]

    def add(self, row: dict) -> None:
        append_json(self.path, row)
        self.rows.append(row)

    def save(self) -> None:
        write_json_lines(self.path, self.rows)


@contextlib.contextmanager
def locked_manifest(folder: Path) -> Iterator[Manifest]:
    """The manifest of ``folder``, which is this process's until the end.

    A line that a killed process has half written goes. `Failed` when another process holds the folder, `Refused` when
    it holds somebody else's files.
    """
    if not (folder / MANIFEST).exists() and folder.is_dir() and {path.name for path in folder.iterdir()} - {".lock"}:
        raise Refused(f"{folder} holds files, but no {MANIFEST}; write elsewhere with --output DIR")
    with locked(folder):
        manifest = Manifest(folder)
        manifest.save()
        yield manifest


def read_rows(path: Path) -> list[dict]:
    """The rows of a manifest."""
    keys = {"class", "index", *Recipe.__dataclass_fields__, *RESULTS}
    return read_json_lines(path, keys, "row of a manifest")


def read_kept_images(folder: Path, classes: list[str]) -> Split:
    """The synthetic images in ``folder`` that passed its filters, in (class, name) order."""
    if not (folder / MANIFEST).is_file():
        raise Refused(
            f"{folder} holds no synthetic images; make some with `python scripts/synthesize_tail.py`, give "
            f"their folder with --synthetic_dir, or leave out --synthetic_weight"
        )
    rows = read_rows(folder / MANIFEST)
    if unknown := sorted({row["class"] for row in rows} - set(classes)):
        raise Refused(f"{folder} holds images of classes that train/ lacks: {first_of(unknown)}; see --synthetic_dir")
    if waiting := sum(row["kept"] is None for row in rows):
        warn(f"{waiting} images in {folder} have not been judged and are left out: run synthesize_tail.py to its end")
    images = sorted((classes.index(row["class"]), row["file"]) for row in rows if row["kept"])
    if not images:
        raise Refused(f"{folder} has no image that passed its filters; {folder / MANIFEST} says why")
    paths = [folder / name for _, name in images]
    if gone := [path for path in paths if not path.is_file()]:
        raise Refused(f"{gone[0]} is gone; run synthesize_tail.py again, which takes it off the list")
    return Split(paths, [target for target, _ in images])
