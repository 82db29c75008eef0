"""report.html: a test on one page that needs nothing else, with the images behind the figures."""

import base64
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from data.images import read_image
from engine.curves import accuracy_curve, loss_curves
from engine.errors import Refused
from engine.evaluate import head_in_words
from engine.files import write_atomically
from engine.flags import command_line
from engine.metrics import calibration_bins, per_class
from engine.record import default_flags, real_class_counts

TEMPLATE = Path(__file__).with_name("page.html.jinja")
FIGURES = {  # key of metrics.json: its name for people, in the order of the page
    "balanced_accuracy": "balanced accuracy",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "many": "accuracy, many",
    "medium": "accuracy, medium",
    "few": "accuracy, few",
    "head": "accuracy, head",
    "tail": "accuracy, tail",
    "worst_class": "worst class",
    "macro_f1": "macro F1",
    "g_mean": "geometric mean of recalls",
    "ece": "expected calibration error",
    "nll": "negative log-likelihood, nats",
    "brier": "Brier score, 0 to 2",
}
NO_PERCENTAGE = ("nll", "brier")
ELSEWHERE = ("flags", "classes", "class_counts", "readable_names", "synthetic_counts", "objective", "launch")
MATRIX_CLASSES = 100  # more are not drawn: the cells would be smaller than a pixel on a phone
LABELLED_CLASSES = 30  # with names below the bars
PAIRS, PAIR_IMAGES, MISTAKES = 12, 4, 21
THUMBNAIL = 128  # pixels of the longer side, at most


class JudgedImages(NamedTuple):
    """A test, image by image."""

    paths: list[Path]
    files: list[str]  # their names for people
    targets: np.ndarray  # [N]
    predicted: np.ndarray  # [N]
    confidence: np.ndarray  # [N]
    confusion: np.ndarray  # [C, C], true class by predicted one


def write_page(
    path: Path,
    result: dict,
    predictions: JudgedImages,
    record: dict,
    groups: dict[str, np.ndarray],
    log: list[dict],
    command: str,
    feature_map: Path | None = None,
) -> None:
    """One HTML page that requests nothing: figures of ``result`` (metrics.json), charts, images, how to do it again.

    ``groups`` are many, medium and few, ``log`` the rows of log.jsonl, ``command`` is that of the test, ``feature_map``
    a PNG. An image that is gone is named in place of its picture.
    """
    name = path.absolute().parent.parent.name
    rows = class_rows(predictions, record, groups)
    order = [row["index"] for row in rows]
    largest = max(row["train"] for row in rows)
    defaults = default_flags()
    page = template(TEMPLATE).render(
        run=name,
        result=result,
        record=record,
        figures={key: name for key, name in FIGURES.items() if key in result},
        groups=group_spans(rows, result),
        rows=rows,
        num_synthetic=sum(row["synthetic"] for row in rows),
        labelled=len(rows) <= LABELLED_CLASSES,
        count_ticks=[(count_height(count, largest), f"{count:,}") for count in 10 ** np.arange(7) if count <= largest],
        cells=list(matrix_cells(predictions.confusion[order][:, order])) if len(rows) <= MATRIX_CLASSES else [],
        pairs=pairs(predictions, record["readable_names"]),
        mistakes=mistakes(predictions, record["readable_names"]),
        num_wrong=int((predictions.targets != predictions.predicted).sum()),
        bins=reliability(predictions),
        feature_map=data_uri("png", feature_map.read_bytes()) if feature_map else None,
        curves=[*loss_curves(log), *filter(None, [accuracy_curve(log)])],
        about=about(result, record),
        flags={flag: (plain_text(value), value != defaults.get(flag)) for flag, value in record["flags"].items()},
        commands=[training_command(record, defaults, name), command],
    )
    write_atomically(path, lambda file: file.write(page.encode(errors="backslashreplace")))  # file names are bytes


@functools.cache
def template(path: Path) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"
    environment.filters["figure"] = figure
    environment.filters["in_words"] = head_in_words
    environment.filters["short"] = lambda name, length: name if len(name) <= length else f"{name[: length - 1]}…"
    return environment.from_string(path.read_text())


def figure(value: float, key: str) -> str:
    """A value of metrics.json for people."""
    return f"{value:.3f}" if key in NO_PERCENTAGE else f"{100 * value:.2f}\N{NO-BREAK SPACE}%"


def class_rows(predictions: JudgedImages, record: dict, groups: dict[str, np.ndarray]) -> list[dict]:
    """What is known of each class, from most to fewest training images. Figures are None without test images."""
    counts, names, real = record["class_counts"], record["readable_names"], real_class_counts(record)
    synthetic = record.get("synthetic_counts", [0] * len(counts))
    confusion = predictions.confusion
    wrong = confusion - np.diag(confusion.diagonal())
    scores = [[None if math.isnan(value) else float(value) for value in values] for values in per_class(confusion)]
    rows = []
    for index in np.argsort(-np.asarray(counts), kind="stable").tolist():
        rows.append(
            {
                "index": index,
                "name": names[index],
                "folder": record["classes"][index],
                "group": next(group for group, members in groups.items() if members[index]),
                "train": real[index] + synthetic[index],
                "synthetic": synthetic[index],
                "test": int(confusion[index].sum()),
                "recall": scores[0][index],
                "precision": scores[1][index] if confusion[index].any() else None,
                "f1": scores[2][index],
                "taken_for": names[wrong[index].argmax()] if wrong[index].any() else None,
                "times": int(wrong[index].max()),
            }
        )
    largest = max(row["train"] for row in rows)
    for row in rows:
        row["height"] = count_height(row["train"], largest)
        row["real_height"] = count_height(row["train"] - row["synthetic"], largest)
    return rows


def count_height(count: int, largest: int) -> float:
    """Per cent of the chart's height, on a logarithmic axis from 0.7 images to the largest class."""
    return 100 * math.log(max(count, 0.7) / 0.7) / math.log(largest / 0.7)


def group_spans(rows: list[dict], result: dict) -> list[dict]:
    """The groups that were tested, with their places on the axis of classes."""
    spans = []
    for name in ("many", "medium", "few"):
        places = [place for place, row in enumerate(rows) if row["group"] == name]
        if name in result:
            spans.append({"name": name, "from": places[0], "to": places[-1] + 1, "mean": result[name]})
    return spans


def matrix_cells(confusion: np.ndarray) -> Iterator[tuple[int, int, int, float]]:
    """Row, column, images and share of the row's images of every cell that holds some."""
    for row, column in np.argwhere(confusion).tolist():
        number = int(confusion[row, column])
        yield row, column, number, number / int(confusion[row].sum())


def pairs(predictions: JudgedImages, names: list[str]) -> list[dict]:
    """The confusions of one class with another that befell most images, with the surest of these images."""
    targets, predicted, confusion = predictions.targets, predictions.predicted, predictions.confusion
    wrong = confusion - np.diag(confusion.diagonal())
    cells = np.argwhere(wrong)
    number = wrong[tuple(cells.T)]
    share = number / confusion.sum(axis=1)[cells[:, 0]]
    order = np.lexsort((-share, -number))[:PAIRS]  # most images first, then the larger share
    found = []
    for place in order:
        true, guess = cells[place]
        rows = surest(predictions, (targets == true) & (predicted == guess), PAIR_IMAGES)
        found.append(
            {
                "true": names[true],
                "predicted": names[guess],
                "number": int(number[place]),
                "of": int(confusion[true].sum()),
                "share": float(share[place]),
                "images": [shown(predictions, row, names) for row in rows],
            }
        )
    return found


def mistakes(predictions: JudgedImages, names: list[str]) -> list[dict]:
    """The wrong predictions of highest confidence."""
    rows = surest(predictions, predictions.targets != predictions.predicted, MISTAKES)
    return [shown(predictions, row, names) for row in rows]


def surest(predictions: JudgedImages, chosen: np.ndarray, limit: int) -> list[int]:
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(-predictions.confidence[rows], kind="stable")][:limit].tolist()


def shown(predictions: JudgedImages, row: int, names: list[str]) -> dict:
    return {
        "picture": thumbnail(predictions.paths[row]),
        "file": predictions.files[row],
        "true": names[predictions.targets[row]],
        "predicted": names[predictions.predicted[row]],
        "confidence": float(predictions.confidence[row]),
    }


def thumbnail(path: Path) -> str | None:
    """The image as a JPEG in a data URI; None when it cannot be read any more."""
    try:
        image = read_image(path, at_least=THUMBNAIL)
    except Refused:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return data_uri("jpeg", content.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def reliability(predictions: JudgedImages) -> list[dict]:
    """The bins of confidence that hold images."""
    bins = calibration_bins(predictions.confidence, predictions.targets == predictions.predicted)
    return [
        {"bin": index, "rows": int(rows), "confidence": float(confidence), "accuracy": float(accuracy)}
        for index, (rows, confidence, accuracy) in enumerate(zip(*bins, strict=True))
        if rows
    ]


def about(result: dict, record: dict) -> dict[str, str]:
    """What exactly was tested, and everything else that the record says: seed, device, versions, commit."""
    return {
        "split hash of the test": result["split_hash"],
        f"SHA-256 of {result['weights']}.safetensors": result["weights_hash"],
        **{key.replace("_", " "): plain_text(value) for key, value in record.items() if key not in ELSEWHERE},
    }


def plain_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(plain_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain_text(each)}" for name, each in value.items())
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def training_command(record: dict, defaults: dict, name: str) -> str:
    """What makes the run ``name`` again from the start, with the seed that was drawn."""
    if "tau" in record:
        own = {flag: record[flag] for flag in ("parent_weights", "tau")} | {"run_name": record["flags"]["run_name"]}
        words = {"model_dir": record["parent"], "root_model": record["flags"]["root_model"], "method": "tau"} | own
        return command_line("scripts/retrain_classifier.py", words, {"root_model": "checkpoint"})
    flags = record["flags"] | {"seed": record["seed"], "resume": False, "overwrite": False}
    if record["flags"]["seed"] is None:
        flags["run_name"] = name  # the seed would become part of it
    command, processes = command_line("imagenet_lt_train.py", flags, defaults), record.get("processes", 1)
    return command if processes == 1 else command.replace("python", f"torchrun --nproc_per_node {processes}", 1)
