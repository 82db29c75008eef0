"""Images without labels: which there are below a folder, and the table of what they are taken for."""

import os
from pathlib import Path

import numpy as np
from scipy.special import softmax

from data.build import workers_in_use
from data.folders import Split, check_names, image_files
from data.images import faults, read_image
from engine import distributed
from engine.console import first_of, say, warn
from engine.errors import Refused
from engine.files import read_json, write_json
from engine.predictor import Predictor
from engine.report import write_csv

BEST = 3  # classes of an image


def predict_images(predictor: Predictor, directory: Path) -> dict:
    """Write ``RUN/predict/<folder name>.csv`` about the images in ``directory``, and beside it a JSON file that says
    which folder that is; their number and the table's path.

    `Refused` when the table there is of another folder. An image that cannot be read has a row without a class, and the
    end is `Failed` with the names of such images.
    """
    paths = images_below(directory)
    name = directory.name if directory.name not in ("", "..") else directory.resolve().name
    table = predictor.run / "predict" / f"{name}{predictor.suffix()}.csv"
    about = {"images": os.path.realpath(directory), "weights": predictor.weights, "epoch": predictor.epoch}
    about |= {"weights_hash": predictor.weights_hash, **predictor.answers_by()}
    other = read_json(table.with_suffix(".json"), default={}).get("images")
    if table.exists() and other not in (None, about["images"]):
        raise Refused(f"{table} holds the predictions for {other}; move it away, or rename one of the folders")
    size, wrong = predictor.record["img_size"], [""] * len(paths)
    share = slice(distributed.rank(), None, distributed.world_size())
    found = faults(
        paths[share], lambda _, path: read_image(path, at_least=size), workers_in_use(predictor.args), "checking"
    )
    for rank, part in enumerate(distributed.from_all(found)):
        wrong[rank :: distributed.world_size()] = part
    readable = [path for path, fault in zip(paths, wrong, strict=True) if not fault]
    rows = iter(())
    if readable:
        loader = predictor.loader(Split(readable, [0] * len(readable)))
        rows = iter(softmax(predictor(loader, "predicting").logits, axis=1))
    if distributed.is_main():
        table.parent.mkdir(exist_ok=True)
        files = [os.path.relpath(path, directory) for path in paths]
        write_json(table.with_suffix(".json"), about)
        write_unlabelled(table, files, [None if fault else next(rows) for fault in wrong], predictor.record["classes"])
    say(f"{len(readable)} of {len(paths)} images predicted, in {table}")
    if broken := [fault for fault in wrong if fault]:
        raise distributed.failed(f"{first_of(broken, separator='; ')}; they have no class in {table}")
    return {"n": len(readable), "table": str(table)}


def images_below(directory: Path) -> list[Path]:
    """Image files in ``directory`` and its folders, in the order of their paths; dot files and folders are ignored,
    links are followed, each folder once. `Refused` when there is none."""
    if not directory.is_dir():
        raise Refused(f"--images {directory} is no folder")
    paths, names, seen = [], [], set()
    for folder, inner, files in os.walk(directory, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above would never end
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        paths += image_files(Path(folder))
        names += files
    warn(*check_names(names, f"in {directory}"))
    if not paths:
        raise Refused(f"--images {directory} holds no image; .jpg, .png and the like are read, in inner folders too")
    return sorted(paths)


def write_unlabelled(path: Path, files: list[str], probabilities: list[np.ndarray | None], classes: list[str]) -> None:
    """Each file's most probable class, its probability, and the next two; empty where there are no probabilities."""
    best = min(BEST, len(classes))
    header = ["file", "class", "probability"]
    header += [f"{column}_{place}" for place in range(2, best + 1) for column in ("class", "probability")]
    rows = []
    for file, row in zip(files, probabilities, strict=True):
        order = [] if row is None else np.argsort(-row, kind="stable")[:best]
        cells = [cell for index in order for cell in (classes[index], f"{row[index]:.6f}")]
        rows.append([file, *(cells or [""] * (len(header) - 1))])
    write_csv(path, header, rows)
